"""`RLSEditor`: the whole algorithm, from requests to written weights."""

import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors import AnchorPairs
from easyedit_rls.errors import LayoutError, NumericalError, RequestError, RLSEditWarning, StateMismatchError
from easyedit_rls.history import Edit, Entry
from easyedit_rls.hparams import RLSEditHyperParams
from easyedit_rls.interrupts import deferred_interrupts
from easyedit_rls.keys import Fact, LayerWalk, locate_facts
from easyedit_rls.model.capture import undisturbed
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.sampling import sample_templates
from easyedit_rls.outcome import DRIFT_TOLERANCE, fact_reports, find_said, refuse_if_off, warn_if_drifted, warn_if_unsaid
from easyedit_rls.priors import make_priors
from easyedit_rls.progress import progress_bar
from easyedit_rls.rehearsal import due_edits, lost_edits
from easyedit_rls.reports import EditReport, LayerReport, RetractReport
from easyedit_rls.requests import EditRequest, parse_requests
from easyedit_rls.resume import attach, identify
from easyedit_rls.state import EditorState, fingerprint_of
from easyedit_rls.values import Values, optimise_values

logger = logging.getLogger(__name__)

_LEAST_TOKENS = 64


@dataclass
class _Change:
    """What is about to be written down."""

    entry: Entry = field(default_factory=lambda: Entry("edit"))
    data: dict[str, Tensor] = field(default_factory=dict)
    is_recorded: bool = False


class RLSEditor:
    """Edits facts into a causal language model, batch after batch, by recursive least squares (RLSEdit, arXiv 2601.15686).

    Weights are written in place. The editor keeps a state (a covariance and a float32 master weight for each edited layer) and
    checks before each batch that the model's weights are those it left. With `state_dir`, every batch that `edit` reports is on disk,
    and a new editor of the unedited model (or of the edited one, saved) with the same folder goes on where this one ended. Use it as a
    context manager, or `close` it at the end.

    Args:
        model: a Hugging Face causal language model in float32, bfloat16 or float16.
        tok: its fast tokenizer; its settings are not touched.
        hparams: settings.
        anchors: explicit anchors instead of second moments: `AnchorPairs`, or prompts whose outcome should stay.
        state: the state of an earlier editor of this model under the same objective; a fresh one if None.
        state_dir: folder of the ledger; None takes the setting of that name.
        show_progress: None shows progress bars on a terminal only.

    Attributes:
        state: what is remembered of the edits so far.

    Raises:
        LayoutError: the settings name a layer or module that the model lacks.
        LedgerError: the ledger is held by another editor, is damaged, or can't be written.
        StateMismatchError: the ledger belongs to another model or other settings; lists every difference.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tok: PreTrainedTokenizerBase,
        hparams: RLSEditHyperParams,
        *,
        anchors: AnchorPairs | Sequence[str] | None = None,
        state: EditorState | None = None,
        state_dir: str | Path | None = None,
        show_progress: bool | None = None,
    ) -> None:
        self.model = model
        self.tok = tok
        self.hparams = hparams
        self.layout = find_layout(model, hparams)
        self._anchors = anchors
        self._show_progress = show_progress
        self.state = EditorState() if state is None else state
        folder = state_dir or hparams.state_dir
        if folder is not None and self.state.ledger is None:
            attach(self.state, folder, model, self.layout, hparams, anchors)

    def edit(self, requests: Sequence[Mapping[str, Any] | EditRequest] | Mapping[str, Any] | EditRequest) -> EditReport:
        """Edit one batch of facts into the model: all of it, or nothing.

        Args:
            requests: one request or a list: EasyEdit's dicts, CounterFact records, or `EditRequest`.

        Returns:
            What happened to each fact and each layer.

        Raises:
            RequestError: a request is incomplete, contradicts itself, another one, or (on_conflict: error) an earlier edit.
            StateMismatchError: somebody else changed the edited weights.
            NumericalError: NaN in the weights, a prior that is not positive definite, or a batch past `max_deviation`.
            AnchorError: the second moments can't be had.
            LedgerError: the batch can't be written to disk.
        """
        parsed = parse_requests(requests, chat_template=self.hparams.chat_template)
        self.state.follow(self.layout.edited)
        superseded = self._superseded(parsed)
        return self._edit(parsed, superseded, due_edits(self.state.history, self.hparams.rehearsal, superseded))

    def rehearse(self) -> EditReport | None:
        """Look at all edits that stand, and edit those again that the model has lost: whose target is no longer the most probable text.

        Returns:
            What was done, or None if nothing was lost.

        Raises:
            RLSEditError: see `edit`.
        """
        self.state.follow(self.layout.edited)
        standing = due_edits(self.state.history, len(self.state.history.live))
        lost = lost_edits(self.model, self.tok, standing, self.hparams.batch_tokens)
        return self._edit([], [], lost) if lost else None

    def retract(self, edit_ids: Iterable[int] | int) -> RetractReport:
        """Take edits out of the objective exactly, as if they had never been made; the others stay where they are.

        Args:
            edit_ids: their numbers, from `FactReport.edit_id` or ``easyedit-rls state log``.

        Raises:
            RequestError: one of them names no edit that stands.
            StateMismatchError: somebody else changed the edited weights.
            LedgerError: the change can't be written to disk.
        """
        self.state.follow(self.layout.edited)
        wanted = self.state.history.check([edit_ids] if isinstance(edit_ids, int) else edit_ids)
        self._upkeep()
        with self._change() as change:
            steps = self._take_out(wanted)
            change.entry = Entry("retract", removed=tuple(wanted))
        return RetractReport(wanted, self.n_edits, self._layer_reports(steps))

    def amend(self, edit_id: int, request: Mapping[str, Any] | EditRequest) -> EditReport:
        """Replace one edit by another: the old one is taken out exactly, then the new one edited in, as one change.

        Args:
            edit_id: number of the old one.
            request: the new one.

        Raises:
            RLSEditError: see `edit` and `retract`.
        """
        parsed = parse_requests(request, chat_template=self.hparams.chat_template)
        self.state.follow(self.layout.edited)
        self.state.history.check([edit_id])
        return self._edit(parsed, sorted({edit_id, *self._superseded(parsed, besides=edit_id)}))

    def prepare(self) -> None:
        """Do now what the first edit would do: sample the context templates, and take the moments of the anchor term from cache or text.

        Raises:
            AnchorError: the moments can't be had.
            NumericalError: a weight of the model is not finite, or a prior is not positive definite.
        """
        with undisturbed(self.model):
            self._prepare()

    def rollback(self) -> None:
        """Take the last change back: weights and state are bit for bit those before it.

        Raises:
            StateMismatchError: there is no change to take back, or somebody else changed the weights since.
            LedgerError: it can't be written down; nothing was changed.
        """
        self.state.follow(self.layout.edited)
        found = self.state.found
        if found is None:
            raise StateMismatchError("No batch can be rolled back: only the last one can, and only once.")
        with deferred_interrupts():
            self.state.roll_back()
            self._restore(found)

    def reset(self) -> None:
        """Forget all edits and start anew from the weights as they are now; they count as unedited from here on."""
        self.state.clear()

    def adopt_weights(self) -> None:
        """Go on with the covariance of all edits so far, but from the weights as they are now."""
        if self.state.layers:
            self.state.adopt(self.layout.edited)

    def close(self) -> None:
        """Store the whole state in the ledger and let other editors have it. Without a ledger, nothing happens."""
        self.state.close()

    def __enter__(self) -> "RLSEditor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def n_edits(self) -> int:
        """Edits in the state."""
        return self.state.n_edits

    def _edit(self, requests: Sequence[EditRequest], superseded: list[int], due: Sequence[Edit] = ()) -> EditReport:
        """Edit, in passes as long as memory allows: nothing has happened when it runs out, so the batch begins anew with shorter ones."""
        given = self.hparams.batch_tokens
        while True:
            try:
                report = self._edit_once(requests, superseded, due)
                break
            except torch.OutOfMemoryError:
                if self.hparams.batch_tokens <= _LEAST_TOKENS:
                    raise
                self.hparams = replace(self.hparams, batch_tokens=self.hparams.batch_tokens // 2)
            torch.cuda.empty_cache()
        if self.hparams.batch_tokens < given:
            fits = self.hparams.batch_tokens
            message = f"Memory did not suffice for passes of {given} tokens; they have {fits} now. Set batch_tokens: {fits}."
            warnings.warn(message, RLSEditWarning, stacklevel=3)
        if self.state.journal is None:
            warn_if_drifted(report.layers, self.n_edits, stacklevel=3)
        warn_if_unsaid(report, self.hparams, stacklevel=3)
        return report

    def _edit_once(self, requests: Sequence[EditRequest], superseded: list[int], due: Sequence[Edit]) -> EditReport:
        with undisturbed(self.model):
            locate_facts(self.tok, requests, [])  # bad requests fail here, before the long work
            clock = [time.perf_counter()]
            self._upkeep()
            clock.append(time.perf_counter())
            lost = lost_edits(self.model, self.tok, due, self.hparams.batch_tokens)
            requests = [*requests, *(edit.request for edit in lost)]
            removed = sorted({*superseded, *(edit.edit_id for edit in lost)})
            clock.append(time.perf_counter())
            self._prepare()
            clock.append(time.perf_counter())
            facts = locate_facts(self.tok, requests, self.state.templates, self.hparams.statements)
            values = None if removed else self._optimise(facts)
            with self._change() as change:
                if values is None:  # what the new facts contradict, and what was lost, goes first, so that their values start without it
                    self._take_out(removed)
                    values = self._optimise(facts)
                clock.append(time.perf_counter())
                walk = LayerWalk(self.model, self.layout, facts, self.hparams.batch_tokens, self.hparams.keys)
                steps, factors, change.data = self._write(walk, values)
                edits = tuple(Edit(self.state.history.next_id + row, fact.request, row) for row, fact in enumerate(facts))
                clock.append(time.perf_counter())
                said = find_said(self.model, facts, self.hparams.batch_tokens)
                told, layer_reports = fact_reports(edits, walk, values, said, self.hparams.layers[-1]), self._layer_reports(steps)
                refuse_if_off(told, steps, self.hparams)
                clock.append(time.perf_counter())
                change.entry = Entry("edit", edits, tuple(removed), factors)
            clock.append(time.perf_counter())
        upkeep, *spans = [b - a for a, b in pairwise(clock)]
        seconds = dict(zip(("rehearsal", "prepare", "values", "weights", "check", "ledger"), spans))
        seconds["ledger"] += upkeep
        rehearsed = [edit.edit_id for edit in lost]
        return EditReport(self.state.n_batches, self.n_edits, told, layer_reports, superseded, rehearsed, seconds)

    def _superseded(self, requests: Sequence[EditRequest], besides: int | None = None) -> list[int]:
        """Earlier edits that the requests contradict, to be taken out first; one of them may be known already."""
        if self.hparams.on_conflict == "keep":
            return []
        targets: dict[tuple[str, ...], EditRequest] = {}
        for index, request in enumerate(requests):
            if targets.setdefault(request.question, request).continuation != request.continuation:
                other = targets[request.question].target
                raise RequestError(
                    f"gives {request.prompt!r} the target {request.target!r}, but another request of this batch {other!r}. "
                    "Keep one of them, or set on_conflict: keep.",
                    index=index,
                )
        found = [edit_id for edit_id in self.state.history.conflicts(requests) if edit_id != besides]
        if found and self.hparams.on_conflict == "error":
            numbers = ", ".join(map(str, found))
            raise RequestError(f"the same prompts were edited before, as edits {numbers}. Amend those, or set on_conflict: supersede.")
        return found

    @contextmanager
    def _change(self) -> Iterator[_Change]:
        """All or nothing: what happens inside is written down and can be rolled back as one change, or is undone if anything fails."""
        found = {layer: weight.snapshot() for layer, weight in self.layout.edited.items()}
        change = _Change()
        try:
            self.state.commit()
            yield change
            with deferred_interrupts():
                entry = replace(change.entry, weights=fingerprint_of(self.layout.edited))
                self.state.record(entry, change.data)
                self.state.found, change.is_recorded = found, True
        except BaseException:
            with deferred_interrupts():
                if change.is_recorded:  # an interrupt at the last moment
                    self.state.roll_back()
                for solution in self.state.layers.values():
                    if solution.has_pending:
                        solution.rollback()
                self._restore(found)
            raise

    def _upkeep(self) -> None:
        """Before a change, while nothing is at stake: store the state if it is time, and mend a covariance that has drifted."""
        self.state.checkpoint(self.hparams.checkpoint_every)
        if self.state.journal is not None:
            drift, layer = max((solution.drift(), layer) for layer, solution in self.state.layers.items())
            if drift > DRIFT_TOLERANCE:
                logger.warning("The covariance of layer %d has drifted by %.1e: all are rebuilt from the ledger", layer, drift)
                self.state.rebuild(self.layout.edited)

    def _prepare(self) -> None:
        """Before the first batch: context templates, and the prior of each layer."""
        if self.state.layers:
            return
        hp = self.hparams
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise LayoutError(
                    f"Weight {name} is offloaded: it can't be edited, nor run fast. Load the model onto devices that hold it whole."
                )
            if not bool(torch.isfinite(parameter).all()):
                raise NumericalError(f"Weight {name} holds NaN or infinite entries. Load the model again from sound weights.")
        weights = {layer: weight.read() for layer, weight in self.layout.edited.items()}
        templates = (
            sample_templates(self.model, self.tok, hp.n_templates, hp.seed) if hp.context_templates is None else list(hp.context_templates)
        )
        priors = make_priors(self.model, self.tok, hp, weights, self._anchors, self._show_progress)
        self.state.begin({layer: prior.solution for layer, prior in priors.items()}, weights, templates)
        if self.state.ledger is not None:
            self.state.begin_ledger(identify(self.model, self.layout, hp, self._anchors, templates), priors)
        logger.info("Prepared layers %s of %s", hp.layers, hp.model_name)

    def _optimise(self, facts: Sequence[Fact]) -> Values:
        with progress_bar(len(facts), f"batch {self.state.n_batches + 1}: values", "fact", self._show_progress) as bar:
            return optimise_values(self.model, self.layout, facts, self.hparams, bar)

    def _take_out(self, edit_ids: Sequence[int]) -> dict[int, float]:
        """Remove edits from the solutions and write the weights; returns the size of each layer's step."""
        before = {layer: solution.weight for layer, solution in self.state.layers.items()}
        self.state.take_out(edit_ids)
        for layer, weight in self.layout.edited.items():
            weight.write(self.state.layers[layer].weight)
        return {layer: self._step(layer, W) for layer, W in before.items()}

    def _write(self, walk: LayerWalk, values: Values) -> tuple[dict[int, float], dict[int, float], dict[str, Tensor]]:
        """Write the values into all layers, lowest first; returns the size of each layer's step, γ, and what each was given."""
        hp = self.hparams
        data = {"importance": walk.importance}
        steps, factors = {}, {}
        for i, (layer, weight) in enumerate(self.layout.edited.items()):
            solution, layers_left = self.state.layers[layer], len(hp.layers) - i
            W = solution.weight
            K = walk.keys(layer).to(W)
            if values.goals is None:
                share = walk.needed(layer, (values.z - walk.value_states(layer)) / layers_left)
            else:
                share = walk.left(layer, values.goals[i].state, values.goals[i].output)
            V = _targets(K, W, share.to(W), layers_left, hp.targets)
            factors[layer] = solution.update(K, V, walk.importance, joins_last=True)
            weight.write(solution.weight)
            steps[layer] = self._step(layer, W)
            data |= {f"K.{layer}": K, f"V.{layer}": V}
        return steps, factors, data

    def _step(self, layer: int, before: Tensor) -> float:
        return float((self.state.layers[layer].weight - before).norm() / self.state.unedited[layer].norm())

    def _layer_reports(self, steps: Mapping[int, float]) -> list[LayerReport]:
        reports = []
        for layer, solution in self.state.layers.items():
            W_0 = self.state.unedited[layer]
            deviation = float((solution.weight - W_0).norm() / W_0.norm())
            reports.append(LayerReport(layer, steps.get(layer, 0.0), deviation, solution.drift()))
        return reports

    def _restore(self, found: Mapping[int, Tensor]) -> None:
        for layer, parameter in found.items():
            self.layout.edited[layer].restore(parameter)


def _targets(K: Tensor, W: Tensor, share: Tensor, layers_left: int, kind: str) -> Tensor:
    """Target outputs V of one layer: the old output plus this layer's share of what is missing at the value layer."""
    output = K @ W
    share = share if K.dim() == 2 else share[:, None]  # a fact's rows all change alike
    if kind == "published":  # the authors' code takes z − h itself for the target output, and shares out what that leaves
        return output + share - output / layers_left
    return output + share
