"""Every decoder family: settings are made from the model, the fast path of keys and values equals the plain
one, and the edit lands.
"""

from dataclasses import replace

import pytest
import torch

from easyedit_rls import RLSEditHyperParams, RLSEditor
from easyedit_rls.anchors.moments import sum_moments
from easyedit_rls.data.requests import Probe, parse_requests
from easyedit_rls.errors import LayoutError
from easyedit_rls.evaluation.scores import score
from easyedit_rls.facts.keys import LayerWalk, locate_facts
from easyedit_rls.facts.values import losses_at, optimize_values, value_place
from easyedit_rls.model.hooks import tap, undisturbed
from easyedit_rls.model.layout import cast_copy, find_layout
from easyedit_rls.model.prefix_cache import PrefixCache, share_prefixes
from tests import zoo
from tests.reference import plain_key, plain_value
from tests.tolerances import BFLOAT16, BFLOAT16_SUM, LINEAR, PADDING, SUMS, VALUES

SETTINGS = {
    "layers": [1, 2], "v_lr": 0.3, "v_num_grad_steps": 12, "v_weight_decay": 0.01, "kl_factor": 0.0625,
    "early_stopping_margin": 0.0, "overshoot": 1.2, "statements": ["{}:"], "mom2_adjustment": False,
    "max_deviation": "off", "lambda_reg": 0.1,
    "context_templates": ["The weather was fine. ", "In the morning we met. "],
}  # fmt: skip

STRONGER = {
    "layers": [0, 1, 2],
    "v_num_grad_steps": 25,
    "early_stopping_margin": 2.0,
    "lambda_reg": 0.03,
    "context_templates": [],
}


@pytest.fixture(params=zoo.FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def located(name, tok, requests):
    model = zoo.make(name)
    hp = RLSEditHyperParams.for_model(model, **SETTINGS)
    facts = locate_facts(tok, parse_requests(requests), hp.context_templates, hp.statements)
    return model, find_layout(model, hp), facts, hp


def test_logits_are_the_models_own(located):
    """Norms, projections, scaled and capped logits, whatever comes after the layers."""
    model, layout, _, _ = located
    with torch.no_grad(), tap(outputs={"end": layout.loss_layer}) as seen:
        logits = model(torch.tensor([[5, 6, 7], [9, 8, 7]])).logits
    with torch.no_grad():
        torch.testing.assert_close(layout.logits(seen["end"].flatten(0, 1)), logits.flatten(0, 1))


@pytest.mark.filterwarnings(
    "default::easyedit_rls.errors.RLSEditWarning"
)  # λ is the same for keys of any length, some drift
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_lands_and_touches_nothing_else(name, dtype, tok, requests):
    model = zoo.make(name).to(dtype)
    facts = [
        request for request in requests if request["prompt"].endswith(("Oder", "{}"))
    ]  # random attention carries little
    parsed = parse_requests(facts)
    hp = RLSEditHyperParams.for_model(model, **{**SETTINGS, **STRONGER})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probes = [Probe(request.prompt, request.target) for request in parsed]
    unedited = score(model, tok, probes)
    least = (
        1.4 if name == "opt_post" else 2.303
    )  # nats: ten times as probable; that one's layers end in a norm, which only turns
    RLSEditor(model, tok, hp).edit(facts)
    for old, new in zip(unedited, score(model, tok, probes)):
        assert old.nll - new.nll > least
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {weight.parameter_name for weight in find_layout(model, hp).edited.values()}


def test_a_small_change_of_a_layers_output_is_met(name):
    """Whatever stands between the MLP's projection and the layer's output: nothing, a factor, a norm of it, a
    norm of the sum.
    """
    model = zoo.make(name)
    layout = find_layout(model, RLSEditHyperParams.for_model(model, layers=[1]))
    layer, module, residual = layout.layers[1], layout.edited[1].module, layout.residuals[1]
    assert (residual.norm is not None) == (name in ("gemma2", "gemma3", "glm4", "olmo2", "opt_post"))
    assert residual.scale == (pytest.approx(0.4, rel=BFLOAT16_SUM) if name == "granite" else 1.0)
    tokens = torch.tensor([[5, 6, 7]])

    def output(push):
        def add(out):
            return out + push.to(out).reshape(out.shape)

        inputs = {} if residual.norm is None else {"norm": residual.norm}
        with torch.no_grad(), tap(edit={module: add}, inputs=inputs, outputs={"end": layer}) as seen:
            model(tokens)
        return seen["end"][0].float(), seen["norm"].reshape(3, -1) if inputs else None

    before, norm_input = output(torch.zeros(3, 32))
    wanted = (
        output(torch.randn(3, 32) * 0.01 * before.norm() / before.numel() ** 0.5)[0] - before
    )  # one that can be had
    with torch.no_grad():
        change = output(residual.needed(wanted, norm_input))[0] - before
    closeness = torch.nn.functional.cosine_similarity(change, wanted, dim=1).min()
    assert closeness > 0.98  # a norm lets no change of length through
    assert float(change.norm() / wanted.norm()) == pytest.approx(1.0, abs=LINEAR)


@pytest.mark.filterwarnings(
    "default::easyedit_rls.errors.RLSEditWarning"
)  # λ is the same for keys of any length, some drift
@pytest.mark.parametrize("length", [300.0, 3000.0])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "glm4", "olmo2"])
def test_what_a_norm_lets_through_is_reached_however_long_hidden_states_are(name, length, tok, requests):
    """Hidden states of Gemma have lengths in the thousands; what one layer adds to them is bounded by its
    norm.
    """
    facts = [
        requests[i] for i in (0, 2, 3)
    ]  # subjects that end in unlike tokens: hardly anything else is left in such states
    plain = {"mom2_adjustment": False, "lambda_reg": 0.03, "context_templates": []}

    def misses(**changes):
        model = zoo.make(name)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(length)
        hp = RLSEditHyperParams.for_model(model, **{**plain, **changes})
        return [fact.miss for fact in RLSEditor(model, tok, hp, show_progress=False).edit(facts).facts]

    assert max(misses()) < 0.1
    assert (
        min(misses(value_at="hidden", v_lr=0.1 * length, max_deviation="off")) > 0.5
    )  # asks for what can't be had


@pytest.mark.filterwarnings(
    "default::easyedit_rls.errors.RLSEditWarning"
)  # λ is the same for keys of any length, some drift
def test_values_at_the_outputs_are_reached_in_any_model(name, tok, requests):
    """Also where no norm stands behind, and through what the layers below have changed for the tokens before
    the subject's last.
    """
    model = zoo.make(name)
    facts = [requests[i] for i in (0, 2, 3)]
    hp = RLSEditHyperParams.for_model(
        model, **{**SETTINGS, "value_at": "output", "v_lr": 0.1, "lambda_reg": 0.01, "context_templates": []}
    )
    report = RLSEditor(model, tok, hp, show_progress=False).edit(facts)
    assert max(fact.miss for fact in report.facts) < 0.1
    assert min(fact.value_change for fact in report.facts) > 0.05


def test_values_are_put_at_the_outputs_where_a_norm_stands_behind_them(name):
    """Unasked, and in settings made from the model."""
    model = zoo.make(name)
    hp = RLSEditHyperParams.for_model(model, layers=[1, 2])
    has_norm = name in ("gemma2", "gemma3", "glm4", "olmo2", "opt_post")
    assert hp.value_at == ("output" if has_norm else None)
    assert value_place(find_layout(model, hp), replace(hp, value_at=None)) == (
        "output" if has_norm else "hidden"
    )
    assert value_place(find_layout(model, hp), replace(hp, value_at="hidden")) == "hidden"


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "opt_post", "llama"])
def test_moments_are_weighed_by_what_comes_out_behind_a_norm(name):
    """One token at a time: k times the geometric mean of the norm's inputs' lengths over its own; k itself
    where no norm stands.
    """
    model = zoo.make(name)
    hp = RLSEditHyperParams.for_model(model, layers=[1, 2], mom2_tolerance=0)
    layout = find_layout(model, hp)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 600, (n,), generator=generator).tolist() for n in (7, 5, 7, 9)]
    found = sum_moments(model, layout, hp.layers, [texts[:2], texts[2:]], hp, show_progress=False)
    for layer, weight in layout.edited.items():
        keys, lengths = [], []
        for text in texts:
            with (
                torch.no_grad(),
                tap(inputs={"k": weight.module, "x": layout.residuals[layer].norm or weight.module}) as seen,
            ):
                model(torch.tensor([text]))
            keys.append(seen["k"].reshape(len(text), -1))
            lengths.append(seen["x"].reshape(len(text), -1).norm(dim=1, keepdim=True))
        length = torch.cat(lengths)
        K = torch.cat(keys) * (length.log().mean().exp() / length if name != "llama" else 1.0)
        torch.testing.assert_close(found[layer].mean, K.T @ K / len(K), **SUMS)


def test_a_text_longer_than_the_sliding_window_is_refused(tok, requests):
    """Padding in the middle of a row would count as text there."""
    model = zoo.make("mistral")
    model.config.sliding_window = 4
    with pytest.raises(LayoutError, match="tokens with its padding; the model's sliding window is 4"):
        RLSEditor(model, tok, RLSEditHyperParams.for_model(model, **SETTINGS)).edit(requests)


def test_keys_equal_the_plain_path(located):
    model, layout, facts, hp = located
    assert (
        share_prefixes([row.ids[: row.place] for fact in facts for row in fact.rows], torch.device("cpu"))
        is not None
    )
    walk = LayerWalk(model, layout, facts, 10_000)
    for layer in hp.layers:
        for key, fact in zip(walk.advance_to(layer), facts):
            torch.testing.assert_close(key, plain_key(model, layout, fact, layer), rtol=0, atol=PADDING)


def test_values_equal_the_plain_path(located):
    model, layout, facts, hp = located
    with undisturbed(model):
        values = optimize_values(model, layout, facts, hp)
    for i, fact in enumerate(facts):
        z, loss, _, steps = plain_value(model, layout, fact, hp)
        assert int(values.steps[i]) == steps
        assert float((values.z[i] - z).norm() / (z - values.h[i]).norm().clamp(min=1e-6)) < VALUES
        assert float(values.loss[i]) == pytest.approx(loss, rel=VALUES)


def test_losses_on_a_copy_in_bfloat16_are_alike(located):
    """At δ = 0 and few steps on; the copy has the family's own buffers, biases and scales."""
    model, layout, facts, hp = located
    with undisturbed(model):
        low = cast_copy(layout, torch.bfloat16)
        values = optimize_values(model, layout, facts, replace(hp, v_dtype="bfloat16"))
        for delta in (torch.zeros_like(values.delta), values.delta):
            exact = losses_at(model, layout, facts, hp, delta)
            torch.testing.assert_close(
                losses_at(low.model, low, facts, hp, delta), exact, rtol=BFLOAT16, atol=BFLOAT16
            )


def test_heads_run_once_whatever_they_share(located):
    """What is cached equals what each text alone caches, in any selection, and shared tokens are run once."""
    model, layout, facts, _ = located
    texts = [row.ids[: row.place] for fact in facts for row in fact.rows]
    n_tokens = []
    handle = layout.lower_layers[0].register_forward_hook(
        lambda module, args, out: n_tokens.append(args[0].shape[0] * args[0].shape[1])
    )
    with torch.no_grad():
        heads = PrefixCache(model, layout.loss_layer, set(texts), 10_000)
        handle.remove()
        some = texts[::2] + texts[:1]
        cache, mask = heads.select(some)
        for i, text in enumerate(some):
            if text:
                alone, _ = PrefixCache(model, layout.loss_layer, [text], 10_000).select([text])
                for whole, part in zip(cache.layers, alone.layers):
                    torch.testing.assert_close(
                        whole.keys[i][:, mask[i].bool()], part.keys[0], rtol=0, atol=PADDING
                    )
                    torch.testing.assert_close(
                        whole.values[i][:, mask[i].bool()], part.values[0], rtol=0, atol=PADDING
                    )
    assert sum(n_tokens) < sum(map(len, set(texts)))  # padding and all


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_of_many_texts_equal_one_at_a_time(name, attention, tok):
    """Texts packed as trees, or in rows of their own where a model takes none."""
    model = zoo.make(name)
    if attention == "eager":
        model = type(model)._from_config(model.config, attn_implementation="eager").eval()
        model.load_state_dict(zoo.make(name).state_dict())
    elif name == "gemma2":
        pytest.skip("Gemma 2 caps attention's logits, which PyTorch's can't")
    subjects = ("bread", "river", "bees")
    probes = [
        Probe(f"The slow {a} and the {b}", f"{c} is warm")
        for a in subjects
        for b in subjects
        for c in subjects
    ]
    probes += [
        Probe("The slow bread", "is"),
        Probe("A long text that begins like none of the others, and then goes on and on and on", "b"),
    ]
    for one, probe in zip(score(model, tok, probes, batch_tokens=100), probes):
        (alone,) = score(model, tok, [probe])
        assert one.nll == pytest.approx(alone.nll, abs=PADDING, rel=PADDING)
        assert one.predicted == alone.predicted
