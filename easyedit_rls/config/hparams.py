"""Settings of RLSEdit, in EasyEdit's YAML key names and order, checked field by field."""

import difflib
import io
import math
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedModel

from easyedit_rls._base.files import read_text
from easyedit_rls.config.auto import settings_of
from easyedit_rls.config.files import find_settings, shipped
from easyedit_rls.errors import HyperParamsError

_SHIELD = "\ue000{"  # stands for "${" where OmegaConf reads, which would take it for something to look up


def _setting(help_text: str, default: Any = MISSING, factory: Any = MISSING) -> Any:
    return field(default=default, default_factory=factory, metadata={"help": help_text})


@dataclass
class RLSEditHyperParams:
    """Settings of one editor. Fields without a default must be given; the first block has EasyEdit's names.

    Raises:
        HyperParamsError: a value is out of its range; the message names the field, the value and the range.
    """

    model_name: str = _setting("Hub name or folder of the model that these settings are for.")
    layers: list[int] = _setting(
        "Decoder layers to edit, 0-based, ascending; values are optimized at the last one."
    )
    clamp_norm_factor: float = _setting(
        "Radius of the ball that keeps the value's change δ, as a multiple of ‖h‖."
    )
    v_num_grad_steps: int = _setting(
        "Evaluations of the value's loss, at most, from 2 on: "
        "there is one Adam step less, so 1 would leave the model as it is."
    )
    v_lr: float = _setting(
        "Learning rate of Adam on δ; with value_at: output in units of the root mean square of each output."
    )
    v_loss_layer: int = _setting(
        "Layer whose output goes through final norm and head for the loss; normally the last."
    )
    v_weight_decay: float = _setting("Weight of ‖δ‖/‖h‖² in the value's loss.")
    kl_factor: float = _setting("Weight of the KL divergence at the subject in '{subject} is a'.")
    mom2_update_weight: float = _setting("n_0: how many tokens of ordinary text the anchor term stands for.")
    rewrite_module_tmp: str = _setting(
        "Name of the edited module, the MLP's output projection, with {} for the layer."
    )
    layer_module_tmp: str = _setting("Name of a decoder layer, with {} for the layer.")
    mlp_module_tmp: str = _setting("Name of a layer's MLP (EasyEdit's key; not used).")
    attn_module_tmp: str = _setting("Name of a layer's attention (EasyEdit's key; not used).")
    ln_f_module: str = _setting("Name of the final norm.")
    lm_head_module: str = _setting(
        "Name of the output head; for a tied head either its own name or the embedding's."
    )

    alg_name: str = _setting("Always RLSEdit.", "RLSEdit")
    device: Any = _setting(
        "EasyEdit's device: cpu, or a CUDA index. The editor itself goes where the model is.", "cpu"
    )
    stats_dir: str = _setting(
        "Folder with EasyEdit's cached second moments (.npz), looked at first.", "./data/stats"
    )
    layer_selection: str = _setting("EasyEdit's key; only 'all'.", "all")
    fact_token: str = _setting("Where a fact sits; only 'subject_last'.", "subject_last")
    mom2_adjustment: bool = _setting(
        "Whether the anchor term uses second moments; False leaves λ alone.", True
    )
    mom2_dataset: str = _setting(
        "Text behind the moments: 'shipped' (comes with the package), "
        "'self' (sampled from the model), a .txt file, or a Hugging Face dataset "
        "('wikipedia', 'wikitext', 'wikitext2', 'owner/name', 'owner/name:config').",
        "shipped",
    )
    mom2_n_samples: int = _setting(
        "How many texts to use, at most (see mom2_tolerance); a .txt file gives a text a paragraph.", 400
    )
    mom2_tolerance: float = _setting(
        "Relative error of the moments at which no more text is read, "
        "estimated from two halves of it; 0 reads all mom2_n_samples texts.",
        0.15,
    )
    mom2_dtype: str = _setting("Type the moments are summed in: float32 or float64.", "float32")
    max_length: int = _setting("Longest prompt that EasyEdit's evaluation tokenizes.", 40)
    batch_size: int = _setting("Edits that EasyEdit hands over at once.", 1)
    model_parallel: bool = _setting("EasyEdit's key.", False)

    lambda_reg: float = _setting(
        "λ: pull toward the unedited weight. λ² is also the ridge of Norm-Constrained editing.", 0.0
    )
    mu_reg: float = _setting("μ: pull toward the anchor mapping.", 1.0)
    nullspace_weight: float = _setting(
        "How many tokens of ordinary text each direction stands for that ordinary keys are made of, "
        "besides n_0; 0 is the paper's prior, and AlphaEdit's projection the limit of ever larger weights.",
        0.0,
    )
    nullspace_threshold: float = _setting(
        "Eigenvalue of E[kkᵀ] from which a direction counts as one of these (AlphaEdit's key).", 2e-2
    )
    solver: str = _setting(
        "Update rule: given keys and targets, what the new weight is. `rls` is the paper's; filters of its "
        "step stand behind a hyphen, as in memit_seq-rect. `easyedit-rls compare --help` lists all.",
        "rls",
    )
    solver_settings: dict[str, Any] = _setting(
        "Settings of that rule by name; those of a filter in a block of its name.", factory=dict
    )
    targets: str = _setting(
        "'residual': V = K W + (z − h)/(layers left), right. "
        "'published': V = (z − h), divided after the old output is subtracted, as the authors' code does; "
        "only to reproduce their figures. "
        "'first_layer': V = K W + (z_l − h_l), z optimized at the first edited layer "
        "and z_l what each makes of it (MEMIT-FE).",
        "residual",
    )
    keys: str = _setting(
        "What becomes of a fact's keys in its context templates: "
        "'mean' makes one row of them, as MEMIT does; with 'each' every one is a row of its own, "
        "so that all of them are written, in as many times the rows (update, memory and ledger).",
        "mean",
    )
    v_momentum: float = _setting(
        "β₁ of Adam on δ. ROME, MEMIT and AlphaEdit have 0.9; "
        "with about 0.5 a fact is done in fewer steps, with a shorter δ.",
        0.9,
    )
    early_stopping: str = _setting(
        "When a fact's optimization ends: 'argmax' (Most-Probable Early Stopping, arXiv 2502.01636: "
        "the target is the most probable text in every template), "
        "'loss' (total loss below 0.05, as in ROME), 'off'.",
        "argmax",
    )
    early_stopping_margin: float = _setting(
        "For 'argmax': by how many nats each target token must lead the runner-up.", 0.0
    )
    settled_nll: float = _setting(
        "A text whose target has a lower mean NLL than this, nats, keeps its last gradient "
        "and runs at every settled_every-th step only; 0 runs every text at every step.",
        0.0,
    )
    settled_every: int = _setting("See settled_nll.", 3)
    overshoot: float = _setting(
        "By how much a value's change δ is lengthened once it is found, still within clamp_norm_factor. "
        "Above 1, rewordings follow more often and other facts change more; "
        "cheaper than a larger margin, which takes steps.",
        1.0,
    )
    values: str = _setting(
        "How values are found: 'adam' (optimized, as in MEMIT), or 'gradient' "
        "(one forward and backward pass a fact, as in UltraEdit: "
        "several times faster still, and weaker).",
        "adam",
    )
    value_at: str | None = _setting(
        "Where a value is put: 'hidden', at the last edited layer's hidden state, as in MEMIT; "
        "'output', at what each edited MLP writes, all of them together. "
        "None takes 'output' where a norm stands behind an edited MLP, and 'hidden' elsewhere.",
        None,
    )
    v_dtype: str | None = _setting(
        "Type of the model's copy that values are optimized on: "
        "bfloat16 takes half of a float32 model's memory more, "
        "and less time on processors that multiply bfloat16 (AMX, tensor cores); "
        "None takes the model as it is. All else stays in the model's own type.",
        None,
    )
    gradient_step: float = _setting(
        "For values: gradient, the length of the step, as a multiple of ‖h‖.", 0.7
    )
    forgetting_factor: Any = _setting(
        "γ in (0, 1]: by how much each batch fades the edits before it; "
        "'adaptive' fades more after surprising batches (Fortescue et al. 1981). "
        "Anything but 1 costs O(d_k³) a batch.",
        1.0,
    )
    forgetting_memory: float = _setting(
        "For 'adaptive': how many edits' worth of information to remember.", 1000.0
    )
    max_deviation: Any = _setting(
        "A batch that moves a layer by more than this share of its norm, ‖W_t − W_{t−1}‖/‖W_0‖, "
        "and whose facts the model for the most part still does not say, is refused and taken back. "
        "Sound batches move a layer by 0.02 to 0.2. 'off' lets every batch pass.",
        0.5,
    )
    on_conflict: str = _setting(
        "When the same prompt is edited again: "
        "'supersede' takes the older edit out first, 'keep' fits both, 'error' refuses.",
        "supersede",
    )
    chat_template: bool = _setting(
        "Whether prompts, paraphrases and neighbors are user's turns in the model's chat template.", False
    )
    rehearsal: int = _setting(
        "Before each batch, so many edits that stand are looked at, each in its turn; "
        "those whose target is no longer the most probable text after their prompt are taken out "
        "and edited again with the batch. 0 looks at none.",
        0,
    )
    state_dir: str | None = _setting(
        "Folder of the ledger, which keeps every edit on disk; None keeps them in memory.", None
    )
    checkpoint_every: int = _setting("Batches after which the ledger stores the whole state again.", 20)
    context_templates: list[str] | None = _setting(
        "Texts put before each prompt, as they are or as in MEMIT with {} at their end, "
        "where the prompt goes: 'Hello. {}'. "
        "None samples short ones from the model, [] uses the bare prompt only.",
        None,
    )
    n_templates: int = _setting(
        "How many texts to sample for that; the time an edit takes grows with them.", 5
    )
    statements: list[str] = _setting(
        "Short texts that the target shall follow too, "
        "with {} for the subject, whatever the prompt's wording: '{}:' makes 'SUBJECT: TARGET'. "
        "With them, rewordings follow more often. They are left out of the key and of early stopping.",
        factory=list,
    )
    statement_share: float = _setting(
        "Weight of the statements' mean NLL in the value's loss; "
        "the prompts in their templates have the rest.",
        0.33,
    )
    seed: int = _setting("Seed of everything sampled: templates and self-generated text.", 0)
    batch_tokens: int = _setting("Tokens in one forward pass, at most: bounds memory.", 8192)

    def __post_init__(self) -> None:
        self._check("alg_name", self.alg_name == "RLSEdit", "RLSEdit")
        is_list = isinstance(self.layers, (list, tuple)) and all(type(layer) is int for layer in self.layers)
        self._check("layers", is_list and bool(self.layers), "a list of at least one layer number")
        self._check(
            "layers", list(self.layers) == sorted(set(self.layers)), "strictly ascending layer numbers"
        )
        self._check("layers", all(layer >= 0 for layer in self.layers), "numbers from 0")
        self._check(
            "v_loss_layer",
            self.v_loss_layer >= self.layers[-1],
            f"the last edited layer ({self.layers[-1]}) or above",
        )
        for name in ("clamp_norm_factor", "v_lr", "gradient_step", "overshoot"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("v_momentum", "statement_share"):
            self._check(name, 0 <= getattr(self, name) < 1, "0 or above, and below 1")
        self._check_texts()
        is_fine = all(text.count("{}") == 1 and not text.endswith("{}") for text in self.statements)
        self._check(
            "statements", is_fine, "texts with one {} for the subject, and something behind it, such as '{}:'"
        )
        self._check("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        for setting in fields(self):
            value = getattr(self, setting.name)
            self._check(setting.name, not isinstance(value, float) or math.isfinite(value), "a finite number")
        self._check("v_num_grad_steps", self.v_num_grad_steps >= 2, "2 or above")
        self._check("state_dir", _is_folder(self.state_dir), "a folder, or null for none")
        for name in _NOT_NEGATIVE:
            self._check(name, getattr(self, name) >= 0, "0 or above")
        for name in _COUNTS:
            self._check(name, getattr(self, name) >= 1, "1 or above")
        self._check("lambda_reg", self.lambda_reg > 0 or self.mu_reg > 0, "above 0 where mu_reg is 0")
        self._check(
            "lambda_reg",
            self.lambda_reg > 0 or self.mom2_adjustment,
            "above 0 where mom2_adjustment is false",
        )
        gamma = self.forgetting_factor
        is_number = isinstance(gamma, (int, float)) and not isinstance(gamma, bool)
        self._check(
            "forgetting_factor",
            0 < gamma <= 1 if is_number else gamma == "adaptive",
            "above 0 and up to 1, or 'adaptive'",
        )
        self._check("forgetting_memory", self.forgetting_memory >= 1, "1 or above")
        limit = self.max_deviation
        is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        self._check("max_deviation", limit > 0 if is_number else limit == "off", "a number above 0, or 'off'")
        for name, allowed in _CHOICES.items():
            self._check(name, getattr(self, name) in allowed, " or ".join(repr(a) for a in allowed))
        for name in ("rewrite_module_tmp", "layer_module_tmp"):
            self._check(
                name, getattr(self, name).count("{}") == 1, "a module name with one {} for the layer number"
            )

    def _check_texts(self) -> None:
        """Lists of texts are that, and templates put their text before the prompt."""
        self._check("statements", _is_texts(self.statements), "a list of texts")
        if self.context_templates is not None:
            self._check("context_templates", _is_texts(self.context_templates), "a list of texts, or null")
            fronts = [text.removesuffix("{}") for text in self.context_templates]
            self._check(
                "context_templates",
                all("{}" not in text for text in fronts),
                "{} at the end of a text, or nowhere",
            )
            self.context_templates = [
                text for text in fronts if text
            ]  # MEMIT's bare "{}" is the prompt alone, which counts anyway

    def _check(self, name: str, is_fine: bool, allowed: str) -> None:
        if not is_fine:
            raise HyperParamsError(f"Setting {name} is {getattr(self, name)!r}; allowed: {allowed}.")

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
        try:
            loaded = cls._load(path)
        except (yaml.YAMLError, RecursionError) as exc:
            raise HyperParamsError(
                f"{path} is not YAML: {' '.join(str(exc).split())}. Mend the file."
            ) from exc
        except OSError as exc:  # OmegaConf's own, where the file holds no mapping and no list
            raise HyperParamsError(
                f"{path} holds no mapping of settings. Write one 'key: value' a line."
            ) from exc
        if not isinstance(loaded, dict):
            raise HyperParamsError(f"{path} holds no mapping of settings. Write one 'key: value' a line.")
        return cls.from_dict(loaded, source=str(path))

    @classmethod
    def _load(cls, path: Path) -> Any:
        """What a settings file holds, as plain values: ``${`` in it is text, and nothing of the environment
        comes in.
        """
        loaded = OmegaConf.load(io.StringIO(read_text(path, HyperParamsError).replace("${", _SHIELD)))
        return (
            _replaced(OmegaConf.to_container(loaded), _SHIELD, "${")
            if OmegaConf.is_config(loaded)
            else loaded
        )

    @classmethod
    def from_dict(cls, settings: dict[str, Any], source: str = "the settings") -> "RLSEditHyperParams":
        """Build from a mapping; checks keys and types as `from_hparams` does.

        Args:
            settings: key -> value.
            source: where they come from, for messages.
        """
        known = [f.name for f in fields(cls)]
        unknown = [key for key in settings if key not in known]
        if unknown:
            raise HyperParamsError(
                f"Unknown setting in {source}: "
                f"{', '.join(_did_you_mean(str(key), known) for key in unknown)}."
            )
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        missing = sorted(required - settings.keys())
        if missing:
            raise HyperParamsError(
                f"Missing in {source}: {', '.join(missing)}. Start from a shipped file, e.g. {shipped()[0]}."
            )
        off = {
            name: "off" for name in ("early_stopping", "max_deviation") if settings.get(name) is False
        }  # YAML's bare off
        settings = {**settings, **off}
        try:
            merged = OmegaConf.merge(OmegaConf.structured(cls), _replaced(settings, "${", _SHIELD))
            typed = _replaced(OmegaConf.to_container(merged), _SHIELD, "${")
        except OmegaConfBaseException as exc:
            raise HyperParamsError(
                f"In {source}, {exc.full_key or 'a setting'}: {str(exc).splitlines()[0]}."
            ) from exc
        try:
            return cls(**typed)
        except HyperParamsError as exc:
            raise HyperParamsError(f"In {source}: {exc}") from exc

    @classmethod
    def for_model(cls, model: PreTrainedModel, **changes: Any) -> "RLSEditHyperParams":
        """Settings for a model that has no file: modules and layers read off it, everything else as tuned for
        SmolLM2-135M.

        See `auto.settings_of` for what is read off.

        Args:
            model: the model.
            changes: settings that shall differ.

        Raises:
            LayoutError: the layout can't be told, or the layers can't be edited; says what was found.
            HyperParamsError: a change is no setting, or out of range.
        """
        own = settings_of(model, changes.get("layers"))
        tuned = cls.from_hparams("smollm2-135m").to_dict()
        return cls.from_dict({**tuned, **own, **changes}, source=f"the settings for {own['model_name']}")

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain Python values."""
        return asdict(self)

    def to_yaml(self) -> str:
        """A settings file, a line a setting, with what it means."""
        lines = []
        for setting in fields(self):
            value = (
                yaml.safe_dump(getattr(self, setting.name), default_flow_style=True, width=10**6)
                .removesuffix("\n")
                .removesuffix("\n...")
            )
            lines += textwrap.wrap(setting.metadata["help"], 118, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"{setting.name}: {value}")
        return "\n".join(lines) + "\n"

    def objective(self) -> dict[str, Any]:
        """The settings that define the least-squares problem: what is edited, both regularizers, and where a
        fact sits.
        """
        return {name: getattr(self, name) for name in _OBJECTIVE}


_OBJECTIVE = (
    "layers",
    "rewrite_module_tmp",
    "lambda_reg",
    "mu_reg",
    "mom2_adjustment",
    "mom2_update_weight",
    "nullspace_weight",
    "nullspace_threshold",
    "mom2_dataset",
    "mom2_n_samples",
    "mom2_tolerance",
    "mom2_dtype",
    "stats_dir",
    "context_templates",
    "n_templates",
    "keys",
    "seed",
    "solver",
    "solver_settings",
    "forgetting_factor",
    "forgetting_memory",
)

_NOT_NEGATIVE = (
    "v_weight_decay",
    "kl_factor",
    "mom2_update_weight",
    "nullspace_weight",
    "nullspace_threshold",
    "mom2_tolerance",
    "lambda_reg",
    "mu_reg",
    "early_stopping_margin",
    "settled_nll",
    "rehearsal",
)

_COUNTS = (
    "mom2_n_samples",
    "n_templates",
    "batch_size",
    "batch_tokens",
    "max_length",
    "checkpoint_every",
    "settled_every",
)

_CHOICES = {
    "layer_selection": ("all",),
    "fact_token": ("subject_last",),
    "mom2_dtype": ("float32", "float64"),
    "v_dtype": (None, "float32", "bfloat16", "float16"),
    "targets": ("residual", "published", "first_layer"),
    "value_at": (None, "hidden", "output"),
    "keys": ("mean", "each"),
    "values": ("adam", "gradient"),
    "early_stopping": ("argmax", "loss", "off"),
    "on_conflict": ("supersede", "keep", "error"),
}


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def _is_folder(value: Any) -> bool:
    """Whether it names a folder, or is None; "None" is what Python's word for it becomes in YAML, whose own
    is null.
    """
    return value is None or (isinstance(value, str) and value.strip().lower() not in ("", "none", "null"))


def _did_you_mean(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"'{key}' (did you mean '{close[0]}'?)" if close else f"'{key}'"


def _replaced(values: Any, old: str, new: str) -> Any:
    """Plain values with a text replaced in all their texts."""
    if isinstance(values, str):
        return values.replace(old, new)
    if isinstance(values, Mapping):
        return {key: _replaced(value, old, new) for key, value in values.items()}
    return [_replaced(value, old, new) for value in values] if isinstance(values, (list, tuple)) else values
