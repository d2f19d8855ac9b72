"""Second moments: right, cached by all that changes them, and readable by and from EasyEdit."""

import logging
import sys

import numpy as np
import pytest
import torch

from easyedit_rls import AnchorError, RLSEditor
from easyedit_rls.anchors import cache as anchors
from easyedit_rls.anchors.moments import Moment, _Convergence, sum_moments
from easyedit_rls.anchors.text import token_blocks
from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.model.layout import find_layout
from tests.reference import hidden_at
from tests.tolerances import FLOAT32

TEXT = (
    "Bread needs flour, water and salt.\n\nThe river is slow here, and the water is warm.\n \nSome keep bees."
)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def plain_moment(model, layout, tok, layer, texts):
    """E[k kᵀ] in float64, one text and one token at a time."""
    keys = []
    for text in texts:
        ids = tok(text)["input_ids"]
        keys += [
            hidden_at(model, layout.edited[layer].module, ids, i, is_input=True).double()
            for i in range(len(ids))
        ]
    K = torch.stack(keys)
    return K.T @ K / len(K), len(K)


@pytest.mark.parametrize("batch_tokens", [10, 10_000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_moments_over_a_text_file_equal_the_plain_mean(model, tok, settings, text_file, batch_tokens, dtype):
    hp = settings(mom2_dataset=text_file, batch_tokens=batch_tokens, mom2_dtype=dtype, seed=batch_tokens)
    found = anchors.moments(model, tok, hp)
    texts = [part.strip() for part in TEXT.replace(" \n", "\n").split("\n\n")]
    for layer in hp.layers:
        expected, n_tokens = plain_moment(model, find_layout(model, hp), tok, layer, texts)
        assert found[layer].n_tokens == n_tokens
        assert found[layer].mean.dtype == getattr(torch, dtype)
        assert float((found[layer].mean.double() - expected).norm() / expected.norm()) < FLOAT32


@pytest.mark.parametrize("n_texts", [20, 2000])
def test_the_error_of_moments_is_estimated_from_two_halves(n_texts):
    """Keys of unlike variances, alike within a text, as in language; against the error that is known here."""
    generator = torch.Generator().manual_seed(n_texts)
    scale = torch.logspace(-2, 2, 40)
    texts = scale * (
        torch.randn(n_texts, 1, 40, generator=generator) + torch.randn(n_texts, 5, 40, generator=generator)
    )
    watch = _Convergence(texts[:10].flatten(0, 1))
    for start in range(0, n_texts, 10):
        half = torch.arange(10)[:, None].expand(10, 5).flatten() % 2
        watch.add(texts[start : start + 10].flatten(0, 1), half)
    keys = texts.flatten(0, 1) / scale / 2**0.5
    true = float((keys.T @ keys / len(keys) - torch.eye(40)).norm() / 40**0.5)
    assert true / 1.5 < watch.error() < true * 1.5


def test_no_more_text_is_read_than_the_tolerance_needs(model, tok, settings):
    hp = settings(mom2_dataset="self", mom2_n_samples=400, layers=[1])
    asked = []

    def blocks():
        for block in token_blocks(model, tok, hp):
            asked.append(len(block))
            yield block

    layout = find_layout(model, hp)
    whole = sum_moments(
        model, layout, [1], token_blocks(model, tok, hp), settings(mom2_tolerance=0, layers=[1])
    )[1]
    loose = settings(mom2_tolerance=1.5 * whole.error, layers=[1])
    some = sum_moments(model, layout, [1], blocks(), loose)[1]
    assert 0 < some.n_tokens < whole.n_tokens
    assert sum(asked) < 400  # the rest was not even sampled
    assert whole.error < some.error < loose.mom2_tolerance


def test_the_number_of_texts_limits_what_is_read(model, tok, settings, text_file):
    few = {
        anchors.moments(model, tok, settings(mom2_dataset=text_file, mom2_n_samples=1, seed=seed))[1].n_tokens
        for seed in range(6)
    }
    lengths = {len(tok(text)["input_ids"]) for text in TEXT.replace(" \n", "\n").split("\n\n")}
    assert few <= lengths
    assert len(few) > 1  # which text comes first depends on the seed: neighbors in a file are alike


def rows_of(model, tok, hparams):
    return [row for block in token_blocks(model, tok, hparams) for row in block]


def test_the_shipped_text_is_read_in_an_order_of_its_own(model, tok, settings):
    """No longer rows than the model has positions, and nothing of the text that perplexity is measured on."""
    first, other = (rows_of(model, tok, settings(mom2_n_samples=10_000, seed=seed)) for seed in (3, 4))
    assert first != other
    assert sorted(first) == sorted(other)
    assert max(map(len, first)) <= min(512, model.config.max_position_embeddings)
    assert len(first) == len(paragraphs("ordinary_text.txt"))
    assert len({tuple(row) for row in first}) == len(first)
    assert not paragraphs("ordinary_text.txt") & paragraphs("demo_text.txt")


def paragraphs(name):
    text = packaged_text(name)
    return {part.strip() for part in text.split("\n\n") if part.strip()}


def test_text_from_the_model_itself_is_repeatable_and_varied(model, tok, settings):
    first, again, other = (
        rows_of(model, tok, settings(mom2_dataset="self", seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert len({tuple(row) for row in first}) == len(first) == 8
    assert all(len(row) == len(first[0]) for row in first)
    assert not set(tok.all_special_ids) & {token for row in first for token in row}


def test_moments_are_cached_by_all_that_changes_them(model, tok, settings, text_file, monkeypatch):
    calls = []
    real = anchors.sum_moments
    monkeypatch.setattr(
        anchors, "sum_moments", lambda *args, **kwargs: calls.append(args[2]) or real(*args, **kwargs)
    )
    base = {"mom2_dataset": text_file, "mom2_n_samples": 3, "layers": [1]}
    first = anchors.moments(model, tok, settings(**base))
    again = anchors.moments(model, tok, settings(**base))
    assert calls == [[1]]
    assert torch.equal(first[1].mean, again[1].mean)
    assert first[1].n_tokens == again[1].n_tokens
    anchors.moments(model, tok, settings(**{**base, "layers": [1, 2]}))  # only the new layer
    assert calls == [[1], [2]]
    for change in ({"mom2_n_samples": 2}, {"mom2_dtype": "float64"}, {"mom2_dataset": "self"}):
        anchors.moments(model, tok, settings(**{**base, **change}))
    assert len(calls) == 5
    with open(text_file, "a") as file:
        file.write("\n\nMore.")
    anchors.moments(model, tok, settings(**base))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    anchors.moments(model, tok, settings(**base))
    assert len(calls) == 7


def test_a_cached_file_of_another_width_is_refused(model, tok, settings, text_file, requests):
    hp = settings(mom2_dataset=text_file, layers=[1], mom2_n_samples=2, seed=11)
    (place,) = anchors._cache_places(model, find_layout(model, hp), tok, hp).values()
    anchors._write_cached(place, Moment(torch.eye(7), 5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AnchorError, match=r"width 7, but the layer's is .*Delete it"):
        RLSEditor(model, tok, hp).edit(requests)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def stats_path(tmp_path, layout, layer, n=100):
    return (
        tmp_path
        / "tiny"
        / "wikipedia_stats"
        / f"{layout.edited[layer].parameter_name.removesuffix('.weight')}_float32_mom2_{n}.npz"
    )


def test_easyedits_files_are_found_before_any_text(model, tok, settings, tmp_path):
    """In the format its runningstats writes: sums, counts, constructor names, sample size."""
    model.config._name_or_path = "some/folder/tiny"
    hp = settings(mom2_dataset="wikipedia", stats_dir=str(tmp_path), mom2_n_samples=100)
    layout = find_layout(model, hp)
    expected = {}
    for layer in hp.layers:
        d_k = layout.edited[layer].shape[0]
        K = torch.randn(50, d_k)
        expected[layer] = K.T @ K / 50
        path = stats_path(tmp_path, layout, layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            **{
                "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
                "mom2.count": 50,
                "mom2.mom2": (K.T @ K).numpy(),
                "sample_size": 100,
            },
        )
    found = anchors.moments(model, tok, hp)
    for layer in hp.layers:
        assert found[layer].n_tokens == 50
        torch.testing.assert_close(found[layer].mean, expected[layer])


def test_written_files_read_back(tmp_path):
    moment = Moment(torch.eye(3) * 2, 40)
    anchors.write_npz(tmp_path / "a" / "b.npz", moment, n_texts=9)
    back = anchors.read_npz(tmp_path / "a" / "b.npz", 3)
    assert back.n_tokens == 40
    torch.testing.assert_close(back.mean, moment.mean)
    with np.load(tmp_path / "a" / "b.npz", allow_pickle=False) as stored:
        assert int(stored["sample_size"]) == 9
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.npz"]


def test_bad_npz_files(tmp_path, model, tok, settings):
    anchors.write_npz(tmp_path / "narrow.npz", Moment(torch.eye(3), 4), 1)
    with pytest.raises(AnchorError, match="width 3, but the layer's is 5"):
        anchors.read_npz(tmp_path / "narrow.npz", 5)
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(AnchorError, match="no second moments of EasyEdit"):
        anchors.read_npz(tmp_path / "junk.npz", 5)
    np.savez(tmp_path / "pickled.npz", **{"mom2.mom2": np.array([{}], dtype=object), "mom2.count": 1})
    with pytest.raises(AnchorError, match="no second moments"):
        anchors.read_npz(tmp_path / "pickled.npz", 5)


@pytest.mark.parametrize(("source", "message"), [
    ("/nowhere/text.txt", "/nowhere/text.txt can't be read: No such file"),
    ("stats.npz", "Give the name of its text"),
])  # fmt: skip
def test_sources_that_are_none(model, tok, settings, source, message):
    with pytest.raises(AnchorError, match=message):
        anchors.moments(model, tok, settings(mom2_dataset=source))


def test_an_empty_file_is_refused(model, tok, settings, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(AnchorError, match="has no text"):
        anchors.moments(model, tok, settings(mom2_dataset=str(tmp_path / "empty.txt")))


def test_a_dataset_without_the_package_names_the_extra(model, tok, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AnchorError, match=r"pip install 'easyedit-rls\[datasets\]'"):
        anchors.moments(model, tok, settings(mom2_dataset="wikipedia"))


def test_a_dataset_is_streamed_shuffled_and_cut(model, tok, settings, monkeypatch):
    """The datasets package itself is not a dependency; this stands for its streaming interface."""
    asked = []

    class Stream(list):
        def shuffle(self, seed, buffer_size):
            asked.append(("shuffle", seed))
            return self

        def take(self, n):
            asked.append(("take", n))
            return self[:n]

    class Datasets:
        @staticmethod
        def load_dataset(name, config, split, streaming):
            asked.append((name, config, split, streaming))
            return Stream({"text": text} for text in TEXT.split("\n\n"))

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    found = anchors.moments(model, tok, settings(mom2_dataset="wikitext2", mom2_n_samples=2, seed=5))
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True), ("shuffle", 5), ("take", 2)]
    assert found[1].n_tokens > 0


def test_reading_from_the_cache_is_logged(model, tok, settings, text_file, caplog):
    hp = settings(mom2_dataset=text_file, mom2_n_samples=3)
    anchors.moments(model, tok, hp)
    with caplog.at_level(logging.INFO):
        anchors.moments(model, tok, hp)
    assert "read from" in caplog.text
