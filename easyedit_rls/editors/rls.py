"""`RLSEditor`: the whole algorithm, from requests to written weights."""

import logging
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.arguments import listed
from easyedit_rls._base.progress import progress_bar
from easyedit_rls.anchors.pairs import AnchorPairs
from easyedit_rls.anchors.prior import make_priors
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest, parse_requests
from easyedit_rls.editors.arguments import refuse_wrong_types
from easyedit_rls.editors.gated import find_memory, is_full
from easyedit_rls.editors.outcome import (
    fact_reports,
    find_said,
    layer_reports,
    refuse_if_off,
    warn_if_full,
    warn_if_unsaid,
)
from easyedit_rls.editors.rehearsal import due_edits, lost_edits
from easyedit_rls.editors.reports import EditReport, RetractReport
from easyedit_rls.errors import RequestError, RLSEditWarning
from easyedit_rls.facts.keys import Fact, KnownFacts, LayerWalk, locate_facts, refuse_unfit_facts
from easyedit_rls.facts.targets import target_outputs
from easyedit_rls.facts.templates import templates_of
from easyedit_rls.facts.values import Values, optimize_values
from easyedit_rls.ledger.change import Change
from easyedit_rls.ledger.history import Edit
from easyedit_rls.ledger.resume import attach, identify
from easyedit_rls.ledger.state import EditorState
from easyedit_rls.model.hooks import undisturbed
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.weights import refuse_unsound
from easyedit_rls.solvers.fill import Gauge

logger = logging.getLogger(__name__)

_LEAST_TOKENS = 64


class RLSEditor:
    """Edits facts into a causal language model, batch after batch, by recursive least squares (RLSEdit, arXiv
    2601.15686).

    Weights are written in place. The editor keeps a state (a covariance and a float32 master weight for each
    edited layer) and checks before each batch that the model's weights are those it left. With `state_dir`,
    every batch that `edit` reports is on disk, and a new editor of the unedited model (or of the edited one,
    saved) with the same folder goes on where this one ended. Use it as a context manager, or `close` it at
    the end.

    Args:
        model: a Hugging Face causal language model in float32, bfloat16 or float16.
        tok: its fast tokenizer; its settings are not touched.
        hparams: settings.
        anchors: explicit anchors instead of second moments: `AnchorPairs`, or prompts whose outcome should
            stay.
        state: the state of an earlier editor of this model under the same objective; a fresh one if None.
        state_dir: folder of the ledger; None takes the setting of that name.
        show_progress: None shows progress bars on a terminal only.

    Attributes:
        state: what is remembered of the edits so far.
        memory: where the model has them.

    Raises:
        ArgumentError: hparams or anchors are of another kind.
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
        refuse_wrong_types(tok, hparams, state, state_dir)
        if not isinstance(anchors, AnchorPairs | None):
            anchors = listed(anchors, "anchors")
        self.model, self.tok, self.hparams = model, tok, hparams
        self._anchors, self._show_progress, self._gauge = anchors, show_progress, Gauge()
        self._fullest = 0.0  # layer of the last batch
        self.state = state or EditorState()
        self.layout = replace(find_layout(model, hparams), casts=self.state.casts)
        folder = state_dir or hparams.state_dir
        self.layout, self.memory = find_memory(model, tok, self.layout, hparams)
        if folder is not None and self.state.ledger is None:
            attach(self.state, folder, model, self.layout, self.memory, hparams, anchors)
        elif not self.state.layers:
            self.memory.refuse_unknown()

    def edit(
        self, requests: Sequence[Mapping[str, Any] | EditRequest] | Mapping[str, Any] | EditRequest
    ) -> EditReport:
        """Edit one batch of facts into the model: all of it, or nothing.

        Args:
            requests: one request or a list: EasyEdit's dicts, CounterFact records, or `EditRequest`.

        Returns:
            What happened to each fact and each layer.

        Raises:
            RequestError: a request is incomplete, contradicts itself, another one, or (on_conflict: error) an
                earlier edit; or it is longer than the model's table of positions.
            ModelError: a token of a request is none of the model's.
            StateMismatchError: somebody else changed the edited weights.
            NumericalError: NaN in the weights, a prior that is not positive definite, or a batch past
                `max_deviation`.
            AnchorError: the second moments can't be had.
            LedgerError: the batch can't be written to disk.
        """
        parsed = parse_requests(requests, chat_template=self.hparams.chat_template)
        with self.state.mutex:
            self._sync()
            superseded = self._superseded(parsed)
            return self._edit(
                parsed, superseded, due_edits(self.state.history, self.hparams.rehearsal, superseded)
            )

    def rehearse(self) -> EditReport | None:
        """Look at all edits that stand, and edit those again that the model has lost: whose target is no
        longer the most probable text.

        Returns:
            What was done, or None if nothing was lost.

        Raises:
            RLSEditError: see `edit`.
        """
        with self.state.mutex:
            self._sync()
            standing = due_edits(self.state.history, len(self.state.history.live))
            lost = lost_edits(self.model, self.tok, standing, self.hparams.batch_tokens)
            return self._edit([], [], lost) if lost else None

    def retract(self, edit_ids: Iterable[int] | int) -> RetractReport:
        """Take edits out of the objective exactly, as if they had never been made; the others stay where they
        are.

        Args:
            edit_ids: their numbers, from `FactReport.edit_id` or ``easyedit-rls state log``.

        Raises:
            RequestError: one of them names no edit that stands.
            StateMismatchError: somebody else changed the edited weights.
            LedgerError: the change can't be written to disk.
        """
        with self.state.mutex:
            self._sync()
            wanted = self.state.history.check([edit_ids] if isinstance(edit_ids, int) else edit_ids)
            self.state.checkpoint(self.hparams.checkpoint_every)
            with self.state.change(self.memory, "retract") as change:
                self._open(change, wanted)
                change.gate = self.memory.gate
                reports = layer_reports(change, self._gauge)
            return RetractReport(wanted, self.n_edits, reports)

    def amend(self, edit_id: int, request: Mapping[str, Any] | EditRequest) -> EditReport:
        """Replace one edit by another: the old one is taken out exactly, then the new one edited in, as one
        change.

        Args:
            edit_id: number of the old one.
            request: the new one.

        Raises:
            RLSEditError: see `edit` and `retract`.
        """
        parsed = parse_requests(request, chat_template=self.hparams.chat_template)
        with self.state.mutex:
            self._sync()
            self.state.history.check([edit_id])
            return self._edit(parsed, sorted({edit_id, *self._superseded(parsed, besides=edit_id)}))

    def prepare(self) -> None:
        """Do now what the first edit would do: sample the context templates, and take the moments of the
        anchor term from cache or text.

        Raises:
            AnchorError: the moments can't be had.
            NumericalError: a weight of the model is not finite, or a prior is not positive definite.
        """
        with self.state.mutex, undisturbed(self.model):
            self._prepare()

    def rollback(self) -> None:
        """Take the last change back: weights and state are bit for bit those before it.

        Raises:
            StateMismatchError: there is no change to take back, or somebody else changed the weights since.
            LedgerError: it can't be written down; nothing was changed.
        """
        with self.state.mutex:
            self._sync()
            self.state.roll_back(self.memory)

    def reset(self) -> None:
        """Forget all edits, and count the weights as they are as unedited; edits behind gates are gone."""
        with self.state.mutex:
            self.state.reset()
            self.memory.reset()

    def adopt_weights(self) -> None:
        """Go on with the covariance of all edits so far, but from the weights as they are now."""
        with self.state.mutex:
            if self.state.layers:
                self.state.adopt(self.memory)

    def close(self) -> None:
        """Store the whole state in the ledger, if there is one, and let other editors have it."""
        with self.state.mutex:
            self.state.close()

    def __enter__(self) -> "RLSEditor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_edits(self) -> int:
        """Edits in the state."""
        return self.state.n_edits

    def _sync(self) -> None:
        """Before each call: the modules are the model's, and the weights those that the state knows."""
        self.layout.refuse_if_replaced()
        self.state.sync_with_weights(self.memory)

    def _edit(
        self, requests: Sequence[EditRequest], superseded: list[int], due: Sequence[Edit] = ()
    ) -> EditReport:
        """Edit; where memory runs out nothing has happened, and the batch begins anew in shorter passes."""
        given, history = self.hparams.batch_tokens, self.state.history
        while True:
            try:
                report = self._edit_once(requests, superseded, due)
                break
            except torch.OutOfMemoryError:
                if self.hparams.batch_tokens <= _LEAST_TOKENS or self.state.history is not history:
                    raise  # the latter: the batch is done, and its report ran out of memory
                self.hparams = replace(self.hparams, batch_tokens=self.hparams.batch_tokens // 2)
            torch.cuda.empty_cache()
        if self.hparams.batch_tokens < given:
            fits = self.hparams.batch_tokens
            message = (
                f"Memory did not suffice for passes of {given} tokens; they have {fits} now. "
                f"Set batch_tokens: {fits}."
            )
            warnings.warn(message, RLSEditWarning, stacklevel=3)
        warn_if_unsaid(report, self.hparams, stacklevel=3)
        self._fullest = warn_if_full(report, self._fullest, stacklevel=3)
        return report

    def _edit_once(
        self, requests: Sequence[EditRequest], superseded: list[int], due: Sequence[Edit]
    ) -> EditReport:
        with undisturbed(self.model):
            known: KnownFacts = {}
            self._locate(requests, self._templates(), known)  # bad requests fail here, before the long work
            clock = [time.perf_counter()]
            self.state.checkpoint(self.hparams.checkpoint_every)
            if is_full(self.state.now, self.hparams, self._gauge):
                self.state.begin_shard(self.memory)
            clock.append(time.perf_counter())
            lost = lost_edits(self.model, self.tok, due, self.hparams.batch_tokens)
            requests = [*requests, *(edit.request for edit in lost)]
            removed = sorted({*superseded, *(edit.edit_id for edit in lost)})
            clock.append(time.perf_counter())
            self._prepare(requests, known)
            clock.append(time.perf_counter())
            facts = self._locate(requests, self._templates(), known)
            with self.state.change(self.memory) as change:
                # what the new facts contradict, and what was lost, goes first: their values start without it
                self._open(change, removed)
                values = self._optimize(facts)
                clock.append(time.perf_counter())
                walk = LayerWalk(self.model, self.layout, facts, self.hparams.batch_tokens, self.hparams.keys)
                self._write(change, walk, values, facts)
                change.gate = self.memory.gate
                next_id = self.state.history.next_id
                change.edits = tuple(Edit(next_id + row, fact.request, row) for row, fact in enumerate(facts))
                clock.append(time.perf_counter())
                said = find_said(self.model, facts, self.hparams.batch_tokens)
                told = fact_reports(change.edits, walk, values, said, self.memory.leverage)
                of_layers = layer_reports(change, self._gauge)
                refuse_if_off(told, {report.layer: report.step for report in of_layers}, self.hparams)
                clock.append(time.perf_counter())
            clock.append(time.perf_counter())
        upkeep, *spans = [b - a for a, b in pairwise(clock)]
        seconds = dict(zip(("rehearsal", "prepare", "values", "weights", "check", "ledger"), spans))
        seconds["ledger"] += upkeep
        again = [edit.edit_id for edit in lost]
        return EditReport(self.state.n_batches, self.n_edits, told, of_layers, superseded, again, seconds)

    def _superseded(self, requests: Sequence[EditRequest], besides: int | None = None) -> list[int]:
        """Earlier edits that the requests contradict, to be taken out first; one of them may be known
        already.
        """
        if self.hparams.on_conflict == "keep":
            return []
        targets: dict[tuple[str, ...], EditRequest] = {}
        for index, request in enumerate(requests):
            if targets.setdefault(request.question, request).continuation != request.continuation:
                other = targets[request.question].target
                raise RequestError(
                    f"gives {request.prompt!r} the target {request.target!r}, "
                    f"but another request of this batch {other!r}. "
                    "Keep one of them, or set on_conflict: keep.",
                    index=index,
                )
        found = [edit_id for edit_id in self.state.history.conflicts(requests) if edit_id != besides]
        if found and self.hparams.on_conflict == "error":
            numbers = ", ".join(map(str, found))
            raise RequestError(
                f"the same prompts were edited before, as edits {numbers}. "
                "Amend those, or set on_conflict: supersede."
            )
        return found

    def _templates(self) -> Sequence[str]:
        """Context templates, as far as they are known: none before the first batch, if they are sampled."""
        return self.state.now.templates if self.state.layers else self.hparams.context_templates or ()

    def _locate(
        self, requests: Sequence[EditRequest], templates: Sequence[str], known: KnownFacts
    ) -> list[Fact]:
        """Tokenize requests that are not known yet, and see that the model can take all of them."""
        facts = locate_facts(self.tok, requests, templates, self.hparams.statements, known)
        refuse_unfit_facts(self.model, self.tok, facts)
        return facts

    def _prepare(self, requests: Sequence[EditRequest] = (), known: KnownFacts | None = None) -> None:
        """Before the first batch: context templates, and the prior of each layer; requests that are too long
        behind these fail here.
        """
        if self.state.layers:
            return
        hp = self.hparams
        refuse_unsound(self.model)
        weights = {layer: weight.read() for layer, weight in self.layout.edited.items()}
        templates = templates_of(self.model, self.tok, hp)
        self._locate(requests, templates, {} if known is None else known)
        priors = make_priors(self.model, self.tok, hp, weights, self._anchors, self._show_progress)
        has_ledger = self.state.ledger is not None
        self.state.begin(
            priors,
            templates,
            identify(self.model, self.layout, hp, self._anchors, templates) if has_ledger else None,
        )
        self.memory.begin(priors.__getitem__)
        logger.info("Prepared layers %s of %s", hp.layers, hp.model_name)

    def _optimize(self, facts: Sequence[Fact]) -> Values:
        with progress_bar(
            len(facts), f"batch {self.state.n_batches + 1}: values", "fact", self._show_progress
        ) as bar:
            return optimize_values(self.model, self.layout, facts, self.hparams, bar)

    def _open(self, change: Change, removed: Sequence[int]) -> None:
        """Take edits out, mend what has drifted, and write the weights."""
        change.open(removed)
        self.memory.hold_full(change.shards)
        for layer in change.solutions if removed or change.rebuilt else ():
            self.memory.write(layer, change.solutions[layer])

    def _write(self, change: Change, walk: LayerWalk, values: Values, facts: Sequence[Fact]) -> None:
        """Write the values into all layers, lowest first."""
        for layer in self.layout.edited:
            W = change.solutions[layer].weight
            K = walk.advance_to(layer).to(W.device)
            V = target_outputs(K, W, walk, values, layer, self.hparams)
            change.bring_in(layer, K, V, walk.importance)
            self.memory.write(layer, change.solutions[layer], K)
        if any(solution.looks_after for solution in change.solutions.values()):
            again = LayerWalk(self.model, self.layout, facts, self.hparams.batch_tokens, self.hparams.keys)
            for layer in self.layout.edited:
                change.look_after(layer, again.advance_to(layer).to(K.device), walk.importance)
