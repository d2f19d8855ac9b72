"""What the package knows of a transformer: orientation, layout, hooks, padding, positions."""

import warnings
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from transformers.pytorch_utils import Conv1D

from easyedit_rls import RLSEditor
from easyedit_rls.data.requests import Probe
from easyedit_rls.errors import LayoutError, RequestError
from easyedit_rls.model.batching import pack_batches, pad, pass_overhead, run
from easyedit_rls.model.hooks import tap, undisturbed
from easyedit_rls.model.layout import cast_copy, find_layout
from easyedit_rls.model.subject import answer_rows, tokenize_fact
from easyedit_rls.model.weights import EditedWeight, fingerprint
from tests.conftest import tiny_gpt2, tiny_llama, tiny_settings


@pytest.mark.parametrize("module", [nn.Linear(6, 4), Conv1D(4, 6), nn.Linear(5, 5, bias=False), Conv1D(5, 5)])
def test_weights_have_one_orientation(module):
    weight = EditedWeight(module, "m")
    d_k, _ = weight.shape
    key = torch.randn(3, d_k)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(key @ weight.read() + bias, module(key))
    W = torch.randn(*weight.shape)
    weight.write(W)
    torch.testing.assert_close(key @ W + bias, module(key))
    assert torch.equal(weight.read(), W)
    assert weight.holds(W)
    assert not weight.holds(W + 1e-3)


def test_low_precision_weights_are_the_rounding_of_what_is_written():
    weight = EditedWeight(nn.Linear(6, 4).to(torch.bfloat16), "m")
    W = torch.randn(6, 4)
    weight.write(W)
    assert torch.equal(weight.read(), W.bfloat16().float())
    assert weight.holds(W)


def test_what_cannot_be_edited_is_named():
    with pytest.raises(LayoutError, match="Module m is a Embedding; only Linear and Conv1D"):
        EditedWeight(nn.Embedding(3, 3), "m")
    module = nn.Linear(3, 3)
    module.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LayoutError, match=r"quantized \(torch.int8\).*Load the model"):
        EditedWeight(module, "m")


def test_fingerprints_tell_models_apart():
    model = tiny_llama()
    first = fingerprint(model)
    assert fingerprint(tiny_llama()) == first
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] += 1e-3
    assert fingerprint(model) != first
    assert fingerprint(tiny_gpt2()) != first


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": [1, 7], "v_loss_layer": 7},
        "layers: no layer 7: its 4 layers are 0 to 3; v_loss_layer: 7, but the last"),
    ({"v_loss_layer": 9}, "v_loss_layer: 9, but the last of its 4 layers is 3. Change them"),
    ({"v_loss_layer": 2}, "v_loss_layer: 2, but the last of its 4 layers is 3. Change them"),
    ({"rewrite_module_tmp": "model.layers.{}.mlp.down_projj"},
        "rewrite_module_tmp: no module 'model.layers.1.mlp.down_projj' and 1 more like it "
        ".close names: model.layers.1.mlp.down_proj"),
    ({"layer_module_tmp": "transformer.h.{}"},
        "layer_module_tmp: no module 'transformer.h.0'.*easyedit-rls init MODEL"),
    ({"ln_f_module": "model.normm"}, "ln_f_module: no module 'model.normm' .close names: model.norm"),
    ({"lm_head_module": "head"}, "lm_head_module: no module 'head'"),
])  # fmt: skip
def test_layout_errors_say_what_there_is(change, message):
    with pytest.raises(LayoutError, match=message):
        find_layout(tiny_llama(), tiny_settings("llama", **change))


def test_every_difference_is_told_at_once():
    """Settings of a GPT-2 of 24 layers do not fit a Llama of four in any way."""
    deep = {"layers": [1, 2, 10, 11], "v_loss_layer": 23}
    with pytest.raises(LayoutError) as caught:
        find_layout(tiny_llama(), tiny_settings("gpt2", **deep))
    for module in ("transformer.h.0", "transformer.h.0.mlp.c_proj", "transformer.ln_f", "transformer.wte"):
        assert f"no module '{module}'" in str(caught.value)  # nor layers to count
    with pytest.raises(LayoutError) as caught:
        find_layout(
            tiny_llama(),
            tiny_settings(
                "llama", ln_f_module="ln_f", rewrite_module_tmp="model.layers.{}.mlp.c_proj", **deep
            ),
        )
    for told in (
        "layers: no layer 10, 11: its 4 layers are 0 to 3",
        "v_loss_layer: 23, but the last of its 4 layers is 3",
        "no module 'model.layers.1.mlp.c_proj' and 1 more like it",
        "ln_f_module: no module 'ln_f'",
        "easyedit-rls init",
    ):
        assert told in str(caught.value)
    find_layout(tiny_llama(), tiny_settings("llama"))


def test_taps_are_removed_also_after_an_exception():
    model = tiny_llama()
    layer = model.model.layers[1]

    def n_hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = n_hooks()
    with (
        pytest.raises(ZeroDivisionError),
        tap(inputs={"a": layer}, outputs={"b": layer}, edit={layer: lambda h: h}),
    ):
        assert n_hooks() == before + 3
        raise ZeroDivisionError
    assert n_hooks() == before


def test_stopping_skips_the_rest():
    model, reached = tiny_llama(), []
    model.model.layers[3].register_forward_hook(lambda *args: reached.append(3))
    with torch.no_grad(), tap(outputs={"h": model.model.layers[1]}, stop=True) as seen:
        model(torch.tensor([[5, 6]]))
    assert reached == []
    assert seen["h"].shape == (1, 2, 32)


def test_undisturbed_puts_every_flag_back():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [(m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), torch.inference_mode(), undisturbed(model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert not torch.is_inference_mode_enabled()
        raise ZeroDivisionError
    assert ([(m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]) == flags


def test_padding():
    left = pad([[1, 2, 3], [4]], "left", torch.device("cpu"))
    right = pad([[1, 2, 3], [4]], "right", torch.device("cpu"), after=torch.tensor([[0, 1], [1, 1]]))
    assert left.ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert left.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert right.ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert right.mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert right.positions.tolist() == [[1, 2, 3], [2, 2, 2]]


def test_chunks_cover_everything_within_the_limit():
    lengths = [3, 50, 7, 7, 1, 20, 9]
    groups = list(pack_batches(lengths, 24))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 24
    assert [1] in groups  # longer than the limit: alone


class KnowsCache(nn.Module):
    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False, **rest):
        return cache, rest


class KnowsPastKeyValues(nn.Module):
    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, **rest):
        return past_key_values, rest


@pytest.mark.parametrize("kind", [KnowsCache, KnowsPastKeyValues])
def test_the_cache_goes_by_the_name_that_the_model_knows(kind):
    """Transformers 5.24 renamed it; the old name still works there, but warns at every pass."""
    model, cache = kind(), object()
    model.config = tiny_llama().config
    model.weight = nn.Parameter(torch.zeros(1))
    assert run(model, pad([[1, 2]], "left", torch.device("cpu")), cache=cache, use_cache=True) == (cache, {})


def test_where_products_are_fast_a_pass_costs_more_of_them():
    assert (
        pass_overhead(torch.device("cuda"))
        == pass_overhead(torch.device("cpu"), torch.float16)
        > pass_overhead(torch.device("cpu"))
    )


@pytest.mark.parametrize(("dtype", "price"), [(torch.float32, 20), (torch.bfloat16, 250)])
@pytest.mark.parametrize("seed", range(20))
def test_chunks_cost_the_least(seed, dtype, price):
    """Against every way to cut sorted rows in two or three; a pass counts as so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 3 + 2 * seed, (40,), generator=generator).tolist()
    rows = sorted(lengths)

    def cost(places: list[int]) -> int:
        return sum(price + (end - start) * rows[end - 1] for start, end in pairwise([0, *places, len(rows)]))

    assert pass_overhead(torch.device("cpu"), dtype) == price
    groups = list(pack_batches(lengths, 10**6, price))
    ours = cost([sum(len(group) for group in groups[:k]) for k in range(1, len(groups))])
    few = [
        list(places)
        for n in range(3)
        for places in combinations(range(8, len(rows)), n)
        if all(b - a >= 8 for a, b in pairwise(places))
    ]
    assert ours <= min(map(cost, few))


@pytest.mark.parametrize(
    ("before", "subject", "after"),
    [
        ("The owner of ", "Yahoo!", " is"),  # ends in punctuation
        ("The owner of ", "Yahoo!", ", once known to all, is"),  # punctuation that joins what follows
        ("The mayor of ", "Zürich–Österreich", " is"),  # letters of several bytes
        ("", "東京", "の知事は"),  # starts the prompt; each letter is several tokens
        ("Paris, Texas is not ", "Paris", " in"),  # occurs twice
        ("A well known kind of bread is ", "rye", ""),  # ends the prompt
        ("The sign reads ", "{}", " to all"),
        ("They ", "re", "ad books"),  # shares its only token with what follows
    ],
)
def test_the_subjects_last_token(tok, before, subject, after):
    row = tokenize_fact(tok, before, subject, after, "Lima")
    decoded = [tok.decode(row.ids[: i + 1]) for i in range(len(row.ids))]
    end = before + subject
    assert decoded[row.place].startswith(end)
    assert not decoded[row.place - 1].startswith(end) or row.place == 0
    assert tok.decode(row.target).strip() == "Lima"
    assert tok.decode(row.ids[: row.target_start]) == before + subject + after


@pytest.mark.parametrize(("before", "after", "place"), [("", " am", 1), ("", "", 0), (" So", " am", None)])
def test_no_value_is_put_at_a_texts_first_token(tok, before, after, place):
    """Later tokens hardly read what is written at the attention sink; a prompt of one token has no other
    place.
    """
    row = tokenize_fact(tok, before, "I", after, "Lima")
    ends_at = [
        i for i in range(row.target_start) if tok.decode(row.ids[: i + 1]).strip() == f"{before}I".strip()
    ]
    assert row.place == (ends_at[0] if place is None else place)
    assert row.place < row.target_start


def test_the_answers_tokens(tok):
    (row,) = answer_rows(tok, [Probe("Bread is made of", "flour and water")])
    assert tok.decode(row.target).strip() == "flour and water"
    assert tok.decode(row.ids[: row.target_start]) == "Bread is made of"


@pytest.mark.parametrize("target", ["<unk>", "salt <unk>"])
def test_a_target_with_the_unknown_token_is_refused(tok, target):
    with pytest.raises(RequestError, match=r"target_new.*unknown token '<unk>'.*characters the model knows"):
        tokenize_fact(tok, "Bread and ", "butter", " need", target)


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(LayoutError, match="Load the fast tokenizer"):
        tokenize_fact(Slow(), "a ", "b", " c")


def test_a_twin_is_a_copy_in_another_type(model, settings):
    layout = find_layout(model, settings())
    low = cast_copy(layout, torch.bfloat16)
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in low.model.parameters())
    ours, theirs = ([name for name, _ in m.named_parameters()] for m in (model, low.model))  # tied ones once
    assert ours == theirs
    for (name, buffer), (_, other) in zip(model.named_buffers(), low.model.named_buffers()):
        assert torch.equal(buffer, other), name
        assert other.dtype == buffer.dtype
    for name, parameter in low.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16()), name
    assert (model.config._attn_implementation, low.model.config._attn_implementation) == ("sdpa", "eager")
    within = set(low.model.modules())
    assert {
        low.value_layer,
        low.loss_layer,
        *low.layers,
        *(weight.module for weight in low.edited.values()),
    } <= within
    assert low.value_layer not in set(model.modules())


@pytest.mark.parametrize("make", ["parametrized", "weight_norm", "spectral_norm", "pruned"])
def test_a_weight_that_is_computed_from_others_is_refused(make):
    """What is written there is lost at the next pass."""
    model = tiny_llama()
    module = model.model.layers[1].mlp.down_proj
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if make == "parametrized":
            torch.nn.utils.parametrizations.weight_norm(module)
        elif make == "weight_norm":
            torch.nn.utils.weight_norm(module)
        elif make == "spectral_norm":
            torch.nn.utils.spectral_norm(module)
        else:
            torch.nn.utils.prune.l1_unstructured(module, "weight", 0.2)
    with pytest.raises(LayoutError, match=r"down_proj.* computed from other.*Make it permanent first"):
        find_layout(model, tiny_settings("llama"))


def test_a_weight_that_is_pruned_for_good_is_fine():
    model = tiny_llama()
    module = model.model.layers[1].mlp.down_proj
    torch.nn.utils.prune.l1_unstructured(module, "weight", 0.2)
    torch.nn.utils.prune.remove(module, "weight")
    find_layout(model, tiny_settings("llama"))


@pytest.mark.parametrize("other", [2, 3])
@pytest.mark.parametrize("how", ["parameter", "module", "memory"])
def test_a_weight_that_is_another_ones_too_is_refused(other, how):
    """Layer 2 is edited too, layer 3 is not."""
    model = tiny_llama()
    mlp, twin = model.model.layers[1].mlp, model.model.layers[other].mlp
    if how == "parameter":
        twin.down_proj.weight = mlp.down_proj.weight
    elif how == "module":
        twin.down_proj = mlp.down_proj
    else:
        twin.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach()[:])
    with pytest.raises(
        LayoutError,
        match=rf"is also model\.layers\.{other}\.mlp\.down_proj\.weight: what is edited into layer 1",
    ):
        find_layout(model, tiny_settings("llama"))


def test_a_module_that_was_replaced_is_refused(tok):
    model = tiny_llama()
    editor = RLSEditor(model, tok, tiny_settings("llama", v_num_grad_steps=2))
    fact = {"prompt": "The river Oder", "subject": "Oder", "target_new": "people"}
    editor.edit(fact)
    model.model.layers[2].mlp.down_proj = torch.nn.Linear(48, 32, bias=False)
    with pytest.raises(LayoutError, match=r"was replaced or removed since\. Make a new editor"):
        editor.edit(fact)


def test_an_interrupt_leaves_no_hook_behind():
    """Even where it comes while hooks are being taken off again."""
    model = tiny_llama()
    layer = model.model.layers[0]
    handle = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(KeyboardInterrupt), undisturbed(model):
        layer.register_forward_hook(lambda *_: None)
        layer.register_forward_pre_hook(lambda *_: None)
        layer.__dict__["forward"] = lambda *_: None
        raise KeyboardInterrupt
    assert list(layer._forward_hooks) == [handle.id]
    assert not layer._forward_pre_hooks
    assert "forward" not in layer.__dict__
