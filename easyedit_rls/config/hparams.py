"""Settings of RLSEdit, in EasyEdit's YAML key names and order, checked field by field."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from easyedit_rls._base.settings import check_fields, refuse_unless, setting
from easyedit_rls.config.auto import settings_of
from easyedit_rls.config.fields import (
    are_layers,
    are_statements,
    are_texts,
    has_slot,
    is_folder,
    of_objective,
)
from easyedit_rls.config.files import find_settings
from easyedit_rls.config.reading import no_mapping, read_yaml, typed, yaml_of
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.solvers.rule import Rule, find_rule

_PER_LAYER: dict[str, Any] = {"test": has_slot, "allowed": "a module name with one {} for the layer number"}


@dataclass(kw_only=True)
class RLSEditHyperParams:
    """Settings of one editor. Fields without a default must be given.

    Raises:
        HyperParamsError: a value is out of its range; the message names the field, the value and the range.
    """

    # The method, and the model
    alg_name: str = setting("Always RLSEdit.", "RLSEdit", choices=["RLSEdit"], allowed="RLSEdit")
    model_name: str = setting("Hub name or folder of the model that these settings are for.")
    device: Any = setting(
        "EasyEdit's device: cpu, or a CUDA index. The editor itself goes where the model is.", "cpu"
    )
    layers: list[int] = of_objective(
        "Decoder layers to edit, 0-based, ascending; values are optimized at the last one.",
        test=are_layers,
        allowed="a list of at least one layer number",
    )
    seed: int = of_objective(
        "Seed of everything sampled: templates and self-generated text.",
        0,
        least=0,
        below=2**63,
        allowed="0 to 2^63 - 1",
    )
    batch_tokens: int = setting("Tokens in one forward pass, at most: bounds memory.", 8192, least=1)

    # Values: how they are optimized
    clamp_norm_factor: float = setting(
        "Radius of the ball that keeps the value's change δ, as a multiple of ‖h‖.", above=0
    )
    v_num_grad_steps: int = setting(
        "Evaluations of the value's loss, at most, from 2 on: "
        "there is one Adam step less, so 1 would leave the model as it is.",
        least=2,
    )
    v_lr: float = setting(
        "Learning rate of Adam on δ; with value_at: output in units of the root mean square of each output.",
        above=0,
    )
    v_loss_layer: int = setting(
        "Layer whose output goes through final norm and head for the loss; normally the last."
    )
    v_weight_decay: float = setting("Weight of ‖δ‖/‖h‖² in the value's loss.", least=0)
    kl_factor: float = setting("Weight of the KL divergence at the subject in '{subject} is a'.", least=0)

    # The model's modules
    rewrite_module_tmp: str = of_objective(
        "Name of the edited module, the MLP's output projection, with {} for the layer.", **_PER_LAYER
    )
    layer_module_tmp: str = setting("Name of a decoder layer, with {} for the layer.", **_PER_LAYER)
    ln_f_module: str = setting("Name of the final norm.")
    lm_head_module: str = setting(
        "Name of the output head; for a tied head either its own name or the embedding's."
    )

    # Anchors: second moments of ordinary keys
    mom2_adjustment: bool = of_objective(
        "Whether the anchor term uses second moments; False leaves λ alone.", True
    )
    mom2_update_weight: float = of_objective(
        "n_0: how many tokens of ordinary text the anchor term stands for.", least=0
    )
    mom2_dataset: str = of_objective(
        "Text behind the moments: 'shipped' (comes with the package), "
        "'self' (sampled from the model), a .txt file, or a Hugging Face dataset "
        "('wikipedia', 'wikitext', 'wikitext2', 'owner/name', 'owner/name:config').",
        "shipped",
    )
    mom2_n_samples: int = of_objective(
        "How many texts to use, at most (see mom2_tolerance); a .txt file gives a text a paragraph.",
        400,
        least=1,
    )
    mom2_tolerance: float = of_objective(
        "Relative error of the moments at which no more text is read, "
        "estimated from two halves of it; 0 reads all mom2_n_samples texts.",
        0.15,
        least=0,
    )
    mom2_dtype: str = of_objective(
        "Type the moments are summed in: float32 or float64.", "float32", choices=["float32", "float64"]
    )
    stats_dir: str = of_objective(
        "Folder with EasyEdit's cached second moments (.npz), looked at first.", "./data/stats"
    )

    # The prior that λ, μ and n_0 make
    lambda_reg: float = of_objective(
        "λ: pull toward the unedited weight. λ² is also the ridge of Norm-Constrained editing.", 0.0, least=0
    )
    mu_reg: float = of_objective("μ: pull toward the anchor mapping.", 1.0, least=0)
    nullspace_weight: float = of_objective(
        "How many tokens of ordinary text each direction stands for that ordinary keys are made of, "
        "besides n_0; 0 is the paper's prior, and AlphaEdit's projection the limit of ever larger weights.",
        0.0,
        least=0,
    )
    nullspace_threshold: float = of_objective(
        "Eigenvalue of E[kkᵀ] from which a direction counts as one of these (AlphaEdit's key).", 2e-2, least=0
    )

    # The update
    solver: str = of_objective(
        "Update rule: given keys and targets, what the new weight is. `rls` is the paper's; filters of its "
        "step stand behind a hyphen, as in memit_seq-rect. `easyedit-rls compare --help` lists all.",
        "rls",
    )
    solver_settings: dict[str, Any] = of_objective(
        "Settings of that rule by name; those of a filter in a block of its name.", factory=dict
    )
    targets: str = setting(
        "'residual': V = K W + (z − h)/(layers left), right. "
        "'published': V = (z − h), divided after the old output is subtracted, as the authors' code does; "
        "only to reproduce their figures. "
        "'first_layer': V = K W + (z_l − h_l), z optimized at the first edited layer "
        "and z_l what each makes of it (MEMIT-FE).",
        "residual",
        choices=["residual", "published", "first_layer"],
    )
    keys: str = of_objective(
        "What becomes of a fact's keys in its context templates: "
        "'mean' makes one row of them, as MEMIT does; with 'each' every one is a row of its own, "
        "so that all of them are written, in as many times the rows (update, memory and ledger).",
        "mean",
        choices=["mean", "each"],
    )
    max_deviation: Any = setting(
        "A batch that moves a layer by more than this share of its norm, ‖W_t − W_{t−1}‖/‖W_0‖, "
        "and whose facts the model for the most part still does not say, is refused and taken back. "
        "Sound batches move a layer by 0.02 to 0.2. 'off' lets every batch pass.",
        0.5,
        above=0,
        word="off",
        allowed="a number above 0, or 'off'",
    )

    # Values: where they are put, and when a fact is done
    values: str = setting(
        "How values are found: 'adam' (optimized, as in MEMIT), or 'gradient' (one forward and backward "
        "pass a fact, as in UltraEdit: several times faster still, and weaker).",
        "adam",
        choices=["adam", "gradient"],
    )
    gradient_step: float = setting(
        "For values: gradient, the length of the step, as a multiple of ‖h‖.", 0.7, above=0
    )
    value_at: str | None = setting(
        "Where a value is put: 'hidden', at the last edited layer's hidden state, as in MEMIT; "
        "'output', at what each edited MLP writes, all of them together. "
        "None takes 'output' where a norm stands behind an edited MLP, and 'hidden' elsewhere.",
        None,
        choices=[None, "hidden", "output"],
    )
    v_momentum: float = setting(
        "β₁ of Adam on δ. ROME, MEMIT and AlphaEdit have 0.9; "
        "with about 0.5 a fact is done in fewer steps, with a shorter δ.",
        0.9,
        least=0,
        below=1,
    )
    early_stopping: str = setting(
        "When a fact's optimization ends: 'argmax' (Most-Probable Early Stopping, arXiv 2502.01636: "
        "the target is the most probable text in every template), "
        "'loss' (total loss below 0.05, as in ROME), 'off'.",
        "argmax",
        choices=["argmax", "loss", "off"],
    )
    early_stopping_margin: float = setting(
        "For 'argmax': by how many nats each target token must lead the runner-up.", 0.0, least=0
    )
    overshoot: float = setting(
        "By how much a value's change δ is lengthened once it is found, still within clamp_norm_factor. "
        "Above 1, rewordings follow more often and other facts change more; "
        "cheaper than a larger margin, which takes steps.",
        1.0,
        above=0,
    )
    settled_nll: float = setting(
        "A text whose target has a lower mean NLL than this, nats, keeps its last gradient "
        "and runs at every settled_every-th step only; 0 runs every text at every step.",
        0.0,
        least=0,
    )
    settled_every: int = setting("See settled_nll.", 3, least=1)
    v_dtype: str | None = setting(
        "Type of the model's copy that values are optimized on: bfloat16 takes half of a float32 model's "
        "memory more, and less time on processors that multiply bfloat16 (AMX, tensor cores); None takes "
        "the model as it is. All else stays in the model's own type.",
        None,
        choices=[None, "float32", "bfloat16", "float16"],
    )

    # Texts around a prompt
    context_templates: list[str] | None = of_objective(
        "Texts put before each prompt, as they are or as in MEMIT with {} at their end, where the prompt "
        "goes: 'Hello. {}'. None samples short ones from the model, [] uses the bare prompt only.",
        None,
        test=lambda value: value is None or are_texts(value),
        allowed="a list of texts, or null",
    )
    n_templates: int = of_objective(
        "How many texts to sample for that; the time an edit takes grows with them.", 5, least=1
    )
    statements: list[str] = setting(
        "Short texts that the target shall follow too, "
        "with {} for the subject, whatever the prompt's wording: '{}:' makes 'SUBJECT: TARGET'. "
        "With them, rewordings follow more often. They are left out of the key and of early stopping.",
        factory=list,
        test=are_statements,
        allowed="a list of texts with one {} for the subject, and something behind it, such as '{}:'",
    )
    statement_share: float = setting(
        "Weight of the statements' mean NLL in the value's loss; "
        "the prompts in their templates have the rest.",
        0.33,
        least=0,
        below=1,
    )
    chat_template: bool = setting("Whether all prompts are user's turns in the model's chat template.", False)

    # The memory
    memory: str = setting(
        "Where edits go: 'weights', into the edited weights; 'gated', beside them, and only tokens that the "
        "edits know something of see them (docs/memory.md): other text stays as it was, to the bit.",
        "weights",
        choices=["weights", "gated"],
    )
    gate_prior: float = setting(
        "The prior's part in the gate, as a share of what it does for the weights.", 0.03, above=0, most=1
    )
    gate_fill: float = setting(
        "How full a shard of the memory may become before a new one begins (solver: rls); 1 keeps to one.",
        0.2,
        above=0,
        most=1,
    )
    gate_share: float = setting("Share of ordinary tokens that may see gated edits.", 1e-3, above=0, below=1)
    gate_share_most: float = setting(
        "The same where an edit's own prompt would not see it otherwise.", 1e-3, above=0, below=1
    )

    # Edits that stand, and where they are kept
    on_conflict: str = setting(
        "When the same prompt is edited again: 'supersede' takes the older edit out first, 'keep' fits "
        "both, 'error' refuses.",
        "supersede",
        choices=["supersede", "keep", "error"],
    )
    rehearsal: int = setting(
        "Before each batch, so many edits that stand are looked at, each in its turn; "
        "those whose target is no longer the most probable text after their prompt are taken out "
        "and edited again with the batch. 0 looks at none.",
        0,
        least=0,
    )
    state_dir: str | None = setting(
        "Folder of the ledger, which keeps every edit on disk; None keeps them in memory.",
        None,
        test=is_folder,
        allowed="a folder, or null for none",
    )
    checkpoint_every: int = setting(
        "Batches after which the ledger stores the whole state again.", 20, least=1
    )

    # EasyEdit's keys, which it reads itself or nobody does
    layer_selection: str = setting("EasyEdit's key; only 'all'.", "all", choices=["all"])
    fact_token: str = setting("Where a fact sits.", "subject_last", choices=["subject_last"])
    mlp_module_tmp: str = setting("Name of a layer's MLP (EasyEdit's key; not used).")
    attn_module_tmp: str = setting("Name of a layer's attention (EasyEdit's key; not used).")
    max_length: int = setting("Longest prompt that EasyEdit's evaluation tokenizes.", 40, least=1)
    batch_size: int = setting("Edits that EasyEdit hands over at once.", 1, least=1)
    model_parallel: bool = setting("EasyEdit's key.", False)

    def __post_init__(self) -> None:
        check_fields(self)
        is_ascending = list(self.layers) == sorted(set(self.layers))
        refuse_unless(is_ascending, self, "layers", "strictly ascending layer numbers")
        refuse_unless(self.layers[0] >= 0, self, "layers", "numbers from 0")
        is_above = self.v_loss_layer >= (last := self.layers[-1])
        refuse_unless(is_above, self, "v_loss_layer", f"the last edited layer ({last}) or above")
        refuse_unless(self.lambda_reg > 0 or self.mu_reg > 0, self, "lambda_reg", "above 0 where mu_reg is 0")
        can_rehearse = self.rule.can_retract or self.rehearsal == 0
        refuse_unless(can_rehearse, self, "rehearsal", f"0 where solver is {self.solver}")
        has_covariance = self.rule.has_covariance or self.memory == "weights"
        refuse_unless(has_covariance, self, "memory", f"'weights' where solver is {self.solver}")
        has_prior = self.lambda_reg > 0 or self.mom2_adjustment
        refuse_unless(has_prior, self, "lambda_reg", "above 0 where mom2_adjustment is false")
        if self.context_templates is not None:
            fronts = [text.removesuffix("{}") for text in self.context_templates]
            are_fine = all("{}" not in text for text in fronts)
            refuse_unless(are_fine, self, "context_templates", "{} at the end of a text, or nowhere")
            self.context_templates = [text for text in fronts if text]  # the bare "{}" counts anyway

    @classmethod
    def from_hparams(cls, path_or_name: str | Path) -> "RLSEditHyperParams":
        """Read settings from a YAML file, or the shipped ones by name.

        Args:
            path_or_name: a YAML file, with or without its '.yaml', or a shipped name such as 'smollm2-135m'
                (see `shipped`).

        Raises:
            HyperParamsError: not found, not YAML, not a mapping, an unknown or missing key, a wrong type or
                value. The message gives the absolute path.
        """
        path = find_settings(path_or_name)
        loaded = cls._load(path)
        if not isinstance(loaded, dict):
            raise no_mapping(path)
        return cls.from_dict(loaded, source=str(path))

    @classmethod
    def _load(cls, path: Path) -> Any:
        """What a settings file holds; EasyEdit's way of reading takes this one's place there."""
        return read_yaml(path)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], source: str = "the settings") -> "RLSEditHyperParams":
        """Build from a mapping; checks keys and types as `from_hparams` does.

        Args:
            settings: key -> value.
            source: where they come from, for messages.
        """
        values = typed(cls, settings, source)
        try:
            return cls(**values)
        except HyperParamsError as exc:
            raise HyperParamsError(f"In {source}: {exc}") from exc

    @classmethod
    def for_model(cls, model: PreTrainedModel, **changes: Any) -> "RLSEditHyperParams":
        """Settings for a model that has no file: modules and layers read off it, everything else as tuned for
        SmolLM2-135M; ``memory="gated"`` brings the values' settings that were tuned for that.

        See `auto.settings_of` for what is read off.

        Args:
            model: the model.
            changes: settings that shall differ.

        Raises:
            LayoutError: the layout can't be told, or the layers can't be edited; says what was found.
            HyperParamsError: a change is no setting, or out of range.
        """
        own = settings_of(model, changes.get("layers"))
        tuned = cls.from_hparams(f"smollm2-135m{'-gated' * (changes.get('memory') == 'gated')}").to_dict()
        return cls.from_dict({**tuned, **own, **changes}, source=f"the settings for {own['model_name']}")

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain Python values."""
        return asdict(self)

    def to_yaml(self) -> str:
        """A settings file, a line a setting, with what it means."""
        return yaml_of(self)

    def objective(self) -> dict[str, Any]:
        """The settings that define the least-squares problem: what is edited, both regularizers, the update
        rule with all of its settings, and where a fact sits.
        """
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata.get("objective")}
        return found | {"solver_settings": self.rule.describe()}

    @property
    def rule(self) -> Rule:
        """The update rule that `solver` and `solver_settings` ask for."""
        return find_rule(self.solver, self.solver_settings)
