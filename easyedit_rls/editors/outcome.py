"""What a batch has done: reports, warnings, and the refusal of a batch that moved much and said little."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.reports import EditReport, FactReport, LayerReport
from easyedit_rls.errors import FillWarning, NumericalError, UnsaidWarning
from easyedit_rls.evaluation.scores import predict_rows
from easyedit_rls.facts.keys import Fact, LayerWalk
from easyedit_rls.facts.values import Values
from easyedit_rls.ledger.change import Change
from easyedit_rls.ledger.history import Edit
from easyedit_rls.solvers.fill import Gauge

_WRITTEN = 0.3  # largest miss of a value that counts as written
_FAR_NLL = 2.0  # nats a token: a value that leaves the target this improbable is not said when written
_NAMED = 3
_NEARLY_FULL = 0.6  # of a layer's memory: one that was filled so far had lost early edits (docs/method.md)


def find_said(model: PreTrainedModel, facts: Sequence[Fact], batch_tokens: int) -> list[bool]:
    """Whether the model says each fact: its target is the most probable text behind the bare prompt.

    Args:
        model: the edited model.
        facts: tokenized facts.
        batch_tokens: tokens in one pass, at most.
    """
    rows = [fact.rows[0] for fact in facts]
    predicted = predict_rows(model, rows, batch_tokens=batch_tokens, desc="check", show_progress=False)
    return [top == row.target for row, top in zip(rows, predicted)]


def fact_reports(
    edits: Sequence[Edit],
    walk: LayerWalk,
    values: Values,
    said: Sequence[bool],
    leverage: Sequence[tuple[float, bool]] | None = None,
) -> list[FactReport]:
    """A report of each fact, with the weights as they are now.

    Args:
        edits: the facts, with their numbers.
        walk: has gone through all edited layers.
        values: what was to be written.
        said: see `find_said`.
        leverage: of each fact's key, and whether it is open, where there is a gate.
    """
    wanted = (values.z - values.h).norm(dim=1)
    missed = (values.z - walk.value_states_now()).norm(dim=1)
    change = (wanted / values.h.norm(dim=1)).tolist()
    miss = (missed / wanted.clamp(min=1e-12)).tolist()
    numbers: Iterable[tuple[Any, ...]] = zip(
        values.steps.tolist(), values.loss.tolist(), values.nll.tolist(), change, miss, said
    )
    gate: Sequence[tuple[Any, ...]] = leverage or [(None, True)] * len(edits)
    about: list[tuple[Any, ...]] = [
        (edit.edit_id, edit.request.prompt, edit.request.target, edit.request.case_id) for edit in edits
    ]
    return [FactReport(*whose, *row, *own) for whose, row, own in zip(about, numbers, gate)]


def layer_reports(change: Change, gauge: Gauge) -> list[LayerReport]:
    """A report of each layer.

    Args:
        change: as far as it has come.
        gauge: of this stream.
    """
    start, reports = change.start, []
    for layer, solution in change.solutions.items():
        W_0, before = start.unedited[layer], start.solutions[layer].weight
        step, deviation = (float((solution.weight - W).norm() / W_0.norm()) for W in (before, W_0))
        fill = gauge.read(solution, start.beginnings, layer, start.unedited)
        reports.append(LayerReport(layer, step, deviation, solution.drift(), fill))
    return reports


def refuse_if_off(
    facts: Sequence[FactReport], steps: Mapping[int, float], hparams: RLSEditHyperParams
) -> None:
    """Refuse a batch that moves a layer by more than `max_deviation` while most of its facts stay unsaid.

    Args:
        facts: of this batch.
        steps: layer -> ‖W_t − W_{t−1}‖/‖W_0‖.
        hparams: `max_deviation`.

    Raises:
        NumericalError: it is such a batch; nothing of it may stay.
    """
    unsaid = sum(not fact.is_said for fact in facts)
    if hparams.max_deviation == "off" or 2 * unsaid <= len(facts):
        return
    layer, step = max(steps.items(), key=lambda item: item[1])
    if step > hparams.max_deviation:
        raise NumericalError(
            f"The batch was taken back: it moved layer {layer} by {step:.2f} of its norm "
            f"(max_deviation: {hparams.max_deviation:g}), "
            f"and still the model does not say {unsaid} of its {len(facts)} facts. "
            f"Raise mom2_update_weight ({hparams.mom2_update_weight:g}) or lambda_reg, "
            "edit fewer facts a batch, take other layers (`easyedit-rls tune`), or set max_deviation: off."
        )


def warn_if_full(report: EditReport, before: float, stacklevel: int) -> float:
    """Warn when a batch makes a layer's memory nearly full, with what helps.

    Args:
        report: of the batch.
        before: how full the fullest layer was before it.
        stacklevel: as for `warnings.warn`, counted from the caller.

    Returns:
        How full the fullest layer is; 0 for rules that have no such memory.
    """
    fill, layer = max(((one.fill or 0.0, one.layer) for one in report.layers), default=(0.0, -1))
    if before < _NEARLY_FULL <= fill:
        warnings.warn(
            f"The memory is filling up: the edits have settled {fill:.2f} of layer {layer} (1 is full), "
            "so new ones begin to push earlier ones out. Retract those that are no longer needed, "
            "set rehearsal, which edits lost ones again, or begin anew with memory: gated, which grows, "
            "with more layers, or with solver: forgetting.",
            FillWarning,
            stacklevel=stacklevel + 1,
        )
    return fill


def warn_if_unsaid(report: EditReport, hparams: RLSEditHyperParams, stacklevel: int) -> None:
    """Warn of facts that the model does not say after the batch, with what helps.

    Args:
        report: of the batch.
        hparams: settings it was made with.
        stacklevel: as for `warnings.warn`, counted from the caller.
    """
    if not report.unsaid:
        return
    named = ", ".join(f"{fact.prompt!r} ({fact.target!r})" for fact in report.unsaid[:_NAMED])
    more = ", …" if len(report.unsaid) > _NAMED else ""
    warnings.warn(
        f"The model does not say {len(report.unsaid)} of {len(report.facts)} facts of batch {report.batch}: "
        f"{named}{more}; largest miss {max(fact.miss for fact in report.unsaid):.2f}. "
        f"{' '.join(advice(report.unsaid, hparams))}",
        UnsaidWarning,
        stacklevel=stacklevel + 1,
    )


def advice(
    unsaid: Sequence[FactReport], hparams: RLSEditHyperParams, *, may_loosen: bool = True
) -> list[str]:
    """What helps facts that the model does not say: a sentence for values that fall short, one for weights.

    Args:
        unsaid: their reports.
        hparams: settings they were edited with.
        may_loosen: whether a weaker anchor is among the cures; it is none where other text has changed.
    """
    short = [fact for fact in unsaid if fact.miss <= _WRITTEN or not fact.nll <= _FAR_NLL]
    unwritten = [fact for fact in unsaid if not fact.miss <= _WRITTEN]
    sentences = []
    closed = [fact for fact in unsaid if not fact.is_open]
    if closed:
        sentences.append(
            f"The gate stays closed for {len(closed)}: raise gate_share_most ({hparams.gate_share_most:g}), "
            f"lower gate_prior ({hparams.gate_prior:g}), or edit another first layer."
        )
    if unwritten:
        name = "mom2_update_weight" if hparams.mom2_adjustment and hparams.mu_reg > 0 else "lambda_reg"
        cures = [] if hparams.keys == "each" else ["set keys: each"]
        cures += [f"lower {name} ({getattr(hparams, name):g})"] if may_loosen else []
        cure = ", ".join([*cures, "or edit more layers"]) if cures else "edit more layers"
        sentences.append(f"The weights do not reach the values of {len(unwritten)}: {cure}.")
    if short:
        sentences.append(
            f"The values themselves fall short for {len(short)} "
            f"(NLL up to {max(fact.nll for fact in short):.1f} nats a token): "
            f"raise v_num_grad_steps ({hparams.v_num_grad_steps}) "
            f"or clamp_norm_factor ({hparams.clamp_norm_factor:g})."
        )
    return sentences
