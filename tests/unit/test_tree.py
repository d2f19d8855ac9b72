"""Texts packed as trees: every text is in a row, its path spells it, and a token sees the tokens of its own
path only.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyedit_rls.model.prefix_tree import grow, takes_trees, tree_batch
from tests import zoo

TEXTS = st.sets(st.lists(st.integers(2, 4), min_size=1, max_size=9).map(tuple), min_size=1, max_size=30)


@given(TEXTS, st.sampled_from([0, 1, 5, 12, 100]))
def test_every_text_is_spelt_by_its_path(texts, width):
    trees = grow(texts, width)
    assert sorted(text for tree in trees for text in tree.paths) == sorted(texts)
    for tree in trees:
        assert len(tree.ids) <= max(width, max(map(len, tree.paths)))
        for text, path in tree.paths.items():
            assert tuple(tree.ids[place] for place in path) == text
            assert [tree.parents[place] for place in path] == [-1, *path[:-1]]
            assert [tree.depths[place] for place in path] == list(range(len(text)))


@given(TEXTS)
def test_in_one_row_every_beginning_stands_once(texts):
    (tree,) = grow(texts, 1000)
    assert len(tree.ids) == len({text[:n] for text in texts for n in range(1, len(text) + 1)})


@given(TEXTS)
def test_without_width_a_row_is_a_text_and_what_it_begins_with(texts):
    trees = grow(texts, 0)
    assert all(tree.is_chain for tree in trees)
    assert len(trees) == len(
        [text for text in texts if not any(other != text and other[: len(text)] == text for other in texts)]
    )


def test_a_token_sees_its_own_path():
    model = zoo.make("llama")
    trees = grow([(5, 6, 7), (5, 6, 8, 9), (4,)], 10) + grow([(3, 2)], 10)
    batch = tree_batch(trees, model)
    assert batch.mask.dtype == torch.bool
    assert batch.mask.shape == (2, 1, 6, 6)
    for row, tree in zip(batch.mask[:, 0], trees):
        for path in tree.paths.values():
            assert row[path[-1]].nonzero()[:, 0].tolist() == path
    assert (
        batch.mask[1, 0, 2:].sum(1).tolist() == [1] * 4
    )  # padding sees itself, so that nothing is divided by nought
    model.set_attn_implementation("eager")
    added = tree_batch(trees, model).mask
    assert torch.equal(added == 0, batch.mask)
    assert added.dtype == model.dtype


def test_plain_rows_keep_the_plain_mask():
    batch = tree_batch(grow([(5, 6, 7), (5, 6)], 0) + grow([(4,)], 0), zoo.make("llama"))
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_all_but_bloom_take_trees(name):
    """Bloom makes its positions of the mask."""
    assert takes_trees(zoo.make(name), 20) == (name != "bloom")


@pytest.mark.parametrize("make", [zoo.without_attention, zoo.by_count])
def test_models_that_look_back_otherwise_take_none(make):
    assert not takes_trees(make(), 20)


def test_recurrence_is_seen(monkeypatch):
    """A model that takes positions and a mask, and still mixes neighbors."""
    model = zoo.make("llama")
    layer = model.model.layers[1]
    true = layer.forward
    monkeypatch.setattr(
        layer,
        "forward",
        lambda hidden, *args, **kwargs: true(hidden + 0.1 * hidden.roll(1, 1), *args, **kwargs),
    )
    assert not takes_trees(model, 20)


def test_kernels_that_know_padding_only_are_not_tried(monkeypatch):
    model = zoo.make("llama")
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **rest: pytest.fail("tried"))
    assert not takes_trees(model, 20)


def test_a_mask_that_is_refused_is_no_error(monkeypatch, caplog):
    model = zoo.make("llama")
    true = model.forward

    def forward(input_ids, attention_mask, position_ids, use_cache):
        if attention_mask.ndim != 2:
            raise ValueError("two dimensions, please")
        return true(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", forward)
    with caplog.at_level("INFO", "easyedit_rls"):
        assert not takes_trees(model, 20)
    assert "two dimensions, please" in caplog.text


@pytest.mark.parametrize("setting", ["sliding_window", "attention_chunk_size"])
def test_texts_longer_than_a_window_run_alone(setting):
    model = zoo.make("mistral")
    setattr(model.config, setting, 8)
    assert takes_trees(model, 8)
    assert not takes_trees(model, 9)
