"""`RLSEditor`: the whole algorithm, from requests to written weights."""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors import AnchorPairs, anchor_pairs, moments
from easyedit_rls.errors import AnchorError, NumericalError, RLSEditWarning, StateMismatchError
from easyedit_rls.hparams import RLSEditHyperParams
from easyedit_rls.keys import Fact, collect_keys, locate_facts, value_states
from easyedit_rls.model.capture import undisturbed
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.sampling import sample_templates
from easyedit_rls.progress import progress_bar
from easyedit_rls.recursion import RecursiveLeastSquares
from easyedit_rls.requests import EditRequest, parse_requests
from easyedit_rls.state import EditorState
from easyedit_rls.values import Values, optimise_values

logger = logging.getLogger(__name__)

_DRIFT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class FactReport:
    """How one fact fared.

    Attributes:
        prompt: the prompt.
        target: what the model shall say.
        case_id: the caller's own number, if any.
        steps: Adam steps its value took.
        loss: the value's loss at the end, nats.
        nll: the target's negative log-likelihood with the value put in by hand, nats a token.
        value_change: ‖z − h‖/‖h‖ before the weights were written.
        miss: ‖z − h‖ after they were written, as a fraction of the same before; 0 is a perfect write.
    """

    prompt: str
    target: str
    case_id: int | str | None
    steps: int
    loss: float
    nll: float
    value_change: float
    miss: float


@dataclass(frozen=True)
class LayerReport:
    """State of one edited layer after the batch.

    Attributes:
        layer: its number.
        step: ‖W_t − W_{t−1}‖/‖W_0‖.
        deviation: ‖W_t − W_0‖/‖W_0‖.
        drift: relative error of the covariance (see `RecursiveLeastSquares.drift`).
    """

    layer: int
    step: float
    deviation: float
    drift: float


@dataclass(frozen=True)
class EditReport:
    """What one call of `RLSEditor.edit` did.

    Attributes:
        batch: number of the batch, from 1.
        n_edits: edits in the state after it.
        facts: a report each request, in order.
        layers: a report each edited layer.
        seconds: time in 'prepare' (templates, anchors; first batch only), 'values', and 'weights' (keys and updates).
    """

    batch: int
    n_edits: int
    facts: list[FactReport]
    layers: list[LayerReport]
    seconds: dict[str, float]

    @property
    def seconds_per_edit(self) -> float:
        """Seconds an edit, without the one-time preparation."""
        return (self.seconds["values"] + self.seconds["weights"]) / len(self.facts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "seconds_per_edit": self.seconds_per_edit}


class RLSEditor:
    """Edits facts into a causal language model, batch after batch, by recursive least squares (RLSEdit, arXiv 2601.15686).

    Weights are written in place. The editor keeps a state (a covariance and a float32 master weight for each edited layer) and
    checks before each batch that the model's weights are those it left.

    Args:
        model: a Hugging Face causal language model in float32, bfloat16 or float16.
        tok: its fast tokenizer; its settings are not touched.
        hparams: settings.
        anchors: explicit anchors instead of second moments: `AnchorPairs`, or prompts whose outcome should stay.
        state: the state of an earlier editor of this model under the same objective; a fresh one if None.
        show_progress: None shows progress bars on a terminal only.

    Attributes:
        state: what is remembered of the edits so far.

    Raises:
        LayoutError: the settings name a layer or module that the model lacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tok: PreTrainedTokenizerBase,
        hparams: RLSEditHyperParams,
        *,
        anchors: AnchorPairs | Sequence[str] | None = None,
        state: EditorState | None = None,
        show_progress: bool | None = None,
    ) -> None:
        self.model = model
        self.tok = tok
        self.hparams = hparams
        self.layout = find_layout(model, hparams)
        self._anchors = anchors
        self._show_progress = show_progress
        self.state = EditorState() if state is None else state

    def edit(self, requests: Sequence[Mapping[str, Any] | EditRequest] | Mapping[str, Any] | EditRequest) -> EditReport:
        """Edit one batch of facts into the model: all of it, or nothing.

        Args:
            requests: one request or a list: EasyEdit's dicts, CounterFact records, or `EditRequest`.

        Returns:
            What happened to each fact and each layer.

        Raises:
            RequestError: a request is incomplete or contradicts itself.
            StateMismatchError: somebody else changed the edited weights.
            NumericalError: NaN in the weights, or a prior that is not positive definite.
            AnchorError: the second moments can't be had.
        """
        parsed = parse_requests(requests)
        self.state.follow(self.layout.edited)
        with undisturbed(self.model):
            locate_facts(self.tok, parsed, [])  # bad requests fail here, before the long work
            start = time.perf_counter()
            self._prepare()
            prepared = time.perf_counter()
            facts = locate_facts(self.tok, parsed, self.state.templates)
            values = self._optimise(facts)
            optimised = time.perf_counter()
            steps = self._write(facts, values)
            written = time.perf_counter()
            self.state.n_batches += 1
            seconds = {"prepare": prepared - start, "values": optimised - prepared, "weights": written - optimised}
            return self._report(facts, values, steps, seconds)

    def rollback(self) -> None:
        """Take the last batch back: weights and state are bit for bit those before it.

        Raises:
            StateMismatchError: there is no batch to take back, or somebody else changed the weights since.
        """
        self.state.follow(self.layout.edited)
        if self.state.found is None:
            raise StateMismatchError("No batch can be rolled back: only the last one can, and only once.")
        self._restore(self.state.found)
        self.state.roll_back()

    def reset(self) -> None:
        """Forget all edits and start anew from the weights as they are now; they count as unedited from here on."""
        self.state.clear()

    def adopt_weights(self) -> None:
        """Go on with the covariance of all edits so far, but from the weights as they are now."""
        for layer, solution in self.state.layers.items():
            solution.adopt(self.layout.edited[layer].read())
        self.state.found = None

    @property
    def n_edits(self) -> int:
        """Edits in the state."""
        return self.state.n_edits

    def _prepare(self) -> None:
        """Before the first batch: context templates, and the prior of each layer."""
        if self.state.layers:
            return
        hp = self.hparams
        weights = {layer: weight.read() for layer, weight in self.layout.edited.items()}
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NumericalError(f"Weight {name} holds NaN or infinite entries. Load the model again from sound weights.")
        templates = sample_templates(self.model, self.tok, hp.seed) if hp.context_templates is None else list(hp.context_templates)
        solutions = {}
        for layer, (gram, cross) in self._anchor_terms(weights).items():
            solutions[layer] = RecursiveLeastSquares(
                weights[layer], gram, lambda_reg=hp.lambda_reg, mu_reg=hp.mu_reg, anchor_cross=cross, name=f"layer {layer}"
            )
        self.state.layers, self.state.unedited, self.state.templates = solutions, weights, templates
        logger.info("Prepared layers %s of %s", hp.layers, hp.model_name)

    def _anchor_terms(self, weights: Mapping[int, Tensor]) -> dict[int, tuple[Tensor | None, Tensor | None]]:
        """``K_0ᵀK_0`` of each layer, and ``K_0ᵀV_0`` where the anchors say something else than W_0."""
        hp, pairs = self.hparams, self._anchors
        if pairs is None:
            if not hp.mom2_adjustment or hp.mu_reg == 0:
                return {layer: (None, None) for layer in weights}
            found = moments(self.model, self.tok, hp, show_progress=self._show_progress)
            return {layer: (found[layer].mean.to(W.device) * hp.mom2_update_weight, None) for layer, W in weights.items()}
        if not isinstance(pairs, AnchorPairs):
            pairs = anchor_pairs(self.model, self.tok, hp, pairs)
        return {layer: _pair_terms(pairs, layer, W) for layer, W in weights.items()}

    def _optimise(self, facts: Sequence[Fact]) -> Values:
        with progress_bar(len(facts), f"batch {self.state.n_batches + 1}: values", "fact", self._show_progress) as bar:
            return optimise_values(self.model, self.layout, facts, self.hparams, bar)

    def _write(self, facts: Sequence[Fact], values: Values) -> dict[int, float]:
        """Write the values into all layers, lowest first; returns the size of each layer's step."""
        hp, tokens = self.hparams, self.hparams.batch_tokens
        found = {layer: weight.snapshot() for layer, weight in self.layout.edited.items()}
        counts = {layer: solution.n_edits for layer, solution in self.state.layers.items()}
        importance = torch.tensor([fact.request.importance for fact in facts])
        steps = {}
        self.state.found = None  # from the first update on, the batch before this one is final
        try:
            for i, (layer, weight) in enumerate(self.layout.edited.items()):
                solution, layers_left = self.state.layers[layer], len(hp.layers) - i
                W = solution.weight
                K = collect_keys(self.model, self.layout, facts, layer, tokens).to(W)
                missing = values.z - value_states(self.model, self.layout, facts, tokens)
                solution.update(K, _targets(K, W, missing.to(W), layers_left, hp.targets), importance)
                weight.write(solution.weight)
                steps[layer] = float((solution.weight - W).norm() / self.state.unedited[layer].norm())
            self.state.found = found
        except BaseException:
            self._restore(found)
            for layer, solution in self.state.layers.items():
                if solution.n_edits != counts[layer]:
                    solution.rollback()
            raise
        return steps

    def _report(self, facts: Sequence[Fact], values: Values, steps: Mapping[int, float], seconds: dict[str, float]) -> EditReport:
        wanted = (values.z - values.h).norm(dim=1)
        missed = (values.z - value_states(self.model, self.layout, facts, self.hparams.batch_tokens)).norm(dim=1)
        change = (wanted / values.h.norm(dim=1)).tolist()
        miss = (missed / wanted.clamp(min=1e-12)).tolist()
        numbers = zip(values.steps.tolist(), values.loss.tolist(), values.nll.tolist(), change, miss)
        fact_reports = [FactReport(f.request.prompt, f.request.target, f.request.case_id, *row) for f, row in zip(facts, numbers)]
        layer_reports = []
        for layer, solution in self.state.layers.items():
            W_0 = self.state.unedited[layer]
            layer_reports.append(LayerReport(layer, steps[layer], float((solution.weight - W_0).norm() / W_0.norm()), solution.drift()))
        worst = max(layer_reports, key=lambda report: report.drift)
        if worst.drift > _DRIFT_TOLERANCE:
            warnings.warn(
                f"The covariance of layer {worst.layer} has drifted by {worst.drift:.1e} (tolerance {_DRIFT_TOLERANCE:g}) after "
                f"{self.n_edits} edits; raise lambda_reg or mom2_update_weight for streams as long as this.",
                RLSEditWarning,
                stacklevel=3,
            )
        return EditReport(self.state.n_batches, self.n_edits, fact_reports, layer_reports, seconds)

    def _restore(self, found: Mapping[int, Tensor]) -> None:
        for layer, parameter in found.items():
            self.layout.edited[layer].restore(parameter)


def _targets(K: Tensor, W: Tensor, missing: Tensor, layers_left: int, kind: str) -> Tensor:
    """Target outputs V of one layer: the old output plus this layer's share of what is missing at the value layer."""
    output = K @ W
    if kind == "published":  # the authors' code takes z − h itself for the target output
        return output + (missing - output) / layers_left
    return output + missing / layers_left


def _pair_terms(pairs: AnchorPairs, layer: int, W: Tensor) -> tuple[Tensor, Tensor | None]:
    """``K_0ᵀK_0`` and, for anchors with values of their own, ``K_0ᵀV_0``."""
    d_k, d_v = W.shape
    if layer not in pairs.keys:
        raise AnchorError(f"Anchor pairs have no keys for layer {layer}, only for {sorted(pairs.keys)}. Give them for every edited layer.")
    K_0 = pairs.keys[layer].to(W)
    if K_0.dim() != 2 or K_0.shape[1] != d_k:
        raise AnchorError(
            f"Anchor keys of layer {layer} have shape {tuple(K_0.shape)}, but (anchors, {d_k}) is needed. Collect them from this model."
        )
    if layer not in pairs.values:
        return K_0.T @ K_0, None
    V_0 = pairs.values[layer].to(W)
    if V_0.shape != (K_0.shape[0], d_v):
        raise AnchorError(
            f"Anchor values of layer {layer} have shape {tuple(V_0.shape)}, but {(K_0.shape[0], d_v)} is needed, one row a key."
        )
    return K_0.T @ K_0, K_0.T @ V_0
