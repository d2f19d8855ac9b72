"""The records that a command works on: read, checked against the model, and what is left out of them is
said.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.records import EditRecord, LeftOut, listed, read_records, reason, refusal
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.errors import DataError, RequestError, RLSEditWarning
from easyedit_rls.evaluation.easyedit import refuse_unfit_quality
from easyedit_rls.evaluation.metrics import refuse_unfit_records
from easyedit_rls.facts.keys import locate_facts, refuse_unfit_facts
from easyedit_rls.facts.templates import templates_of

Check = Callable[[Sequence[EditRecord]], None]


def records_of(data: DictConfig) -> list[EditRecord]:
    """The records that a command's ``data`` names.

    Raises:
        DataError: there is no file of that name, or none is named.
        RequestError: a record is wrong.
    """
    if data.file is None:
        raise DataError("data.file is missing. Give a file of records: data.file=FILE.")
    return read_records(data.file, data.first, data.count, joint=data.joint, on_bad=data.on_bad)


def fitting(records: Sequence[EditRecord], check: Check, source: str | Path, on_bad: str) -> list[EditRecord]:
    """The records that a check lets pass.

    All are checked together first; where one is wrong, each by itself, so that all of them are named.

    Args:
        records: of one file.
        check: raises a RequestError for records that a model can't take.
        source: the file, for messages.
        on_bad: 'error' refuses them, 'skip' leaves them out, all edits of a file's record together.

    Raises:
        RequestError: a record does not fit (on_bad: error).
        DataError: none does.
    """
    try:
        check(records)
        return list(records)
    except RequestError:
        faults = _faults(records, check)
    if on_bad == "error":
        raise refusal(
            [
                RequestError(f"{exc.problem} (in {source})", index=index, field=exc.field)
                for index, exc in faults.items()
            ]
        )
    left_out = [LeftOut(index, reason(exc)) for index, exc in faults.items()]
    gone = {one.index for one in left_out}
    kept = [record for record in records if record.index not in gone]
    said = listed(left_out, len({record.index for record in records}))
    if not kept:
        raise DataError(f"{source} has no record that can be used: {said}")
    warnings.warn(f"{source}: left out {said}", RLSEditWarning, stacklevel=2)
    return kept


def without_contradictions(
    records: Sequence[EditRecord], batch: int, on_conflict: str, source: str | Path, on_bad: str
) -> list[EditRecord]:
    """Records as they go into batches; none asks what another of its batch asks for another answer to.

    Args:
        records: of one file.
        batch: edits a batch.
        on_conflict: the setting; with 'keep' both stay, with 'error' none may contradict any earlier one
            either.
        source: the file, for messages.
        on_bad: 'error' refuses them, 'skip' leaves the later one out, all edits of a file's record together.

    Raises:
        RequestError: two contradict each other (on_bad: error).
    """
    faults: dict[int, RequestError] = {}
    kept = list(records)
    while on_conflict != "keep" and (found := _contradiction(kept, batch, on_conflict)) is not None:
        faults[found[0]] = found[1]
        kept = [record for record in kept if record.index not in faults]
    if faults and on_bad == "error":
        raise refusal(
            [
                RequestError(f"{exc.problem} (in {source})", index=index, field=exc.field)
                for index, exc in faults.items()
            ]
        )
    if faults:
        left_out = [LeftOut(index, reason(exc)) for index, exc in sorted(faults.items())]
        said = listed(left_out, len({record.index for record in records}))
        warnings.warn(f"{source}: left out {said}", RLSEditWarning, stacklevel=2)
    return kept


def _contradiction(
    records: Sequence[EditRecord], batch: int, on_conflict: str
) -> tuple[int, RequestError] | None:
    """The first record that contradicts an earlier one of its batch, or with on_conflict: error of any, and
    what to say of it.
    """
    asked: dict[tuple[str, ...], EditRecord] = {}
    for place, record in enumerate(records):
        if place % batch == 0 and on_conflict != "error":
            asked = {}
        earlier = asked.setdefault(record.request.question, record)
        if earlier.request.continuation != record.request.continuation:
            given = f"gives {record.request.prompt!r} the target {record.request.target!r}"
            return record.index, RequestError(
                f"{given}, but record {earlier.index} of the same batch {earlier.request.target!r}. "
                "Keep one, or set on_conflict: keep."
            )
    return None


def fits(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: RLSEditHyperParams,
    templates: Sequence[str] | None = None,
    *,
    portability: bool = False,
) -> Check:
    """A check whether the model can take records: whether they can be edited and measured, as far as their
    tokens tell.

    Args:
        model: the model.
        tok: its tokenizer.
        hparams: settings of the edits.
        templates: texts before prompts; None takes those of the settings.
        portability: whether all of EasyEdit's figures are measured too.
    """
    before = templates_of(model, tok, hparams) if templates is None else templates

    def check(records: Sequence[EditRecord]) -> None:
        requests = parse_requests([record.request for record in records], chat_template=hparams.chat_template)
        refuse_unfit_facts(model, tok, locate_facts(tok, requests, before, hparams.statements))
        refuse_unfit_records(model, tok, requests)
        if portability:
            refuse_unfit_quality(
                model, tok, [record.easyedit for record in records], chat_template=hparams.chat_template
            )

    return check


def _faults(records: Sequence[EditRecord], check: Check) -> dict[int, RequestError]:
    """The first fault of each of the file's records that the check refuses, by its number."""
    faults: dict[int, RequestError] = {}
    for record in records:
        try:
            check([record])
        except RequestError as exc:
            faults.setdefault(record.index, exc)
    return faults
