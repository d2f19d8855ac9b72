"""Rehearsal: standing edits that the model no longer answers are found, so that they can be edited again.

Later batches change the layers below an edited one, and with them the keys of earlier facts, which the
least-squares problem of that layer still knows as they were; so some facts are lost, although every equation
about them still holds. What was asked for is known, so a look tells which (closed-loop editing, as in REPAIR,
Wang et al. 2025, arXiv 2510.01879). `RLSEditor` then takes them out of the objective exactly and edits them
in anew, with keys and values of the model as it is now.
"""

from collections.abc import Collection, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.evaluation.scores import predict_rows
from easyedit_rls.facts.keys import locate_facts
from easyedit_rls.ledger.history import Edit, History


def due_edits(history: History, most: int, besides: Collection[int] = ()) -> list[Edit]:
    """Standing edits to look at before the next batch: each in its turn, so that the cost of a batch doesn't
    grow with their number.

    Args:
        history: all edits; which ones' turn it is follows from how many batches it holds, so it is the same
            after a restart.
        most: how many.
        besides: numbers of edits that are taken out anyway.
    """
    if not most or not history.live:
        return []
    ids = [
        edit_id
        for edit_id, edit in history.live.items()
        if edit_id not in besides and history.is_newest(edit)
    ]
    start = history.n_batches * most % max(len(ids), 1)
    return [history.live[edit_id] for edit_id in (ids[start:] + ids[:start])[:most]]


def lost_edits(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, edits: Sequence[Edit], batch_tokens: int
) -> list[Edit]:
    """Those of the edits whose target is no longer the most probable text after their prompt.

    Args:
        model: the edited model.
        tok: its tokenizer.
        edits: what to look at.
        batch_tokens: tokens in one pass, at most.
    """
    rows = [fact.rows[0] for fact in locate_facts(tok, [edit.request for edit in edits], [])]
    predicted = predict_rows(model, rows, batch_tokens=batch_tokens, desc="rehearsal", show_progress=False)
    return [edit for edit, row, top in zip(edits, rows, predicted) if top != row.target]
