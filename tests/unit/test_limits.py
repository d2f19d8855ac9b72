"""How long a text may be: read off a model's modules, and as its own forward pass has it."""

import pytest
import torch

from easyedit_rls.errors import ModelError, RequestError
from easyedit_rls.model.limits import n_positions, n_token_rows, refuse_unfit
from tests import zoo

TABLES = {"codegen", "gpt2", "gpt_bigcode", "gptj", "opt", "opt_post"}
POSITIONS = 16


def short(name):
    family, settings, _ = zoo._FAMILIES[name]
    return zoo._build(
        family, {**settings, "n_positions" if "n_embd" in settings else "max_position_embeddings": POSITIONS}
    )


def runs(model, n: int) -> bool:
    ids = torch.arange(n)[None]
    try:
        with torch.no_grad():
            model(input_ids=ids)
    except (IndexError, RuntimeError):  # the latter: where rotations are gathered
        return False
    return True


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_only_tables_of_positions_end(name):
    model = short(name)
    assert runs(model, POSITIONS)
    assert runs(model, POSITIONS + 1) == (name not in TABLES)
    assert n_positions(model) == (POSITIONS if name in TABLES else None)
    assert n_token_rows(model) == 600


def test_what_is_refused(tok):
    model = short("gpt2")
    refuse_unfit(model, tok, [[5] * (POSITIONS + 1)])  # the last is predicted
    with pytest.raises(
        RequestError,
        match=rf"Request 7: It has {POSITIONS + 2} tokens, but the model has {POSITIONS} positions. Cut it.",
    ):
        refuse_unfit(model, tok, [[5], [5] * (POSITIONS + 2)], [3, 7], what="It", cure="Cut it.")
    with pytest.raises(RequestError, match=rf"Request 0: .* {POSITIONS + 2} tokens"):
        refuse_unfit(model, tok, [[5] * POSITIONS], n_new=2)
    refuse_unfit(model, tok, [[599], []])
    with pytest.raises(ModelError, match="of request 3 has id 600"):
        refuse_unfit(model, tok, [[1], [2, 600, 3]], [2, 3])
