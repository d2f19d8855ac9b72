"""`RLSEditor` on tiny models: edits land, equal the batch solution, and are repeatable; anchors hold."""

import copy

import pytest
import torch

from easyedit_rls import (
    AnchorError,
    AnchorPairs,
    LayoutError,
    NumericalError,
    RequestError,
    RLSEditor,
    anchor_pairs,
    evaluate,
)
from easyedit_rls.anchors.cache import moments as moments_of
from easyedit_rls.data.requests import EditRequest, parse_requests
from easyedit_rls.editors import rls as editor_module
from easyedit_rls.facts.keys import LayerWalk, locate_facts, value_states
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from tests.helpers import same, tensors_of
from tests.tolerances import DRIFT, SOLVED, SUMS


def target_nll(model, tok, requests):
    from easyedit_rls.data.requests import Probe
    from easyedit_rls.evaluation.scores import score

    return [s.nll for s in score(model, tok, [Probe(r.prompt, r.target) for r in parse_requests(requests)])]


def test_edits_land_and_only_the_edited_weights_change(model, tok, requests, settings):
    before, nll_before = tensors_of(model), target_nll(model, tok, requests)
    editor = RLSEditor(model, tok, settings(mom2_update_weight=1.0, early_stopping_margin=1.0))
    report = editor.edit(requests[:2])
    assert editor.edit(requests[2:]).n_edits == len(requests)
    after = tensors_of(model)
    names = {weight.parameter_name for weight in editor.layout.edited.values()}
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    gains = [a - b for a, b in zip(nll_before, target_nll(model, tok, requests))]
    assert sorted(gains)[1] > 2.3  # ten times as probable, but for the one that random attention can't reach
    assert evaluate(model, tok, requests).rewrite_accuracy >= 0.75
    assert all(fact.miss < 0.5 for fact in report.facts)
    assert report.to_dict()["layers"][0]["drift"] < DRIFT


@pytest.mark.parametrize("targets", ["residual", "published"])
def test_the_weights_are_the_batch_solution_of_keys_and_targets(
    model, tok, requests, settings, targets, monkeypatch
):
    """Rebuilt in float64 from what each layer was given, over two batches, with importances."""
    hp = settings(targets=targets)
    editor = RLSEditor(model, tok, hp)
    W_0 = {layer: weight.read().double() for layer, weight in editor.layout.edited.items()}
    given = {layer: [] for layer in W_0}
    real = RecursiveLeastSquares.update

    def update(state, K, V, importance, **how):
        given[int(state.name.split()[-1])].append((K.double(), V.double(), importance.double()))
        return real(state, K, V, importance, **how)

    monkeypatch.setattr(RecursiveLeastSquares, "update", update)
    weighted = [{**request, "importance": 0.5 + i} for i, request in enumerate(requests)]
    editor.edit(weighted[:2])
    editor.edit(weighted[2:])
    moments = moments_of(
        model, tok, hp
    )  # of the edited model; the prior came from the unedited one, cached by fingerprint
    assert set(moments) == set(W_0)
    for layer, parts in given.items():
        K, V, d = (torch.cat(column) for column in zip(*parts))
        assert d.tolist() == [0.5, 1.5, 2.5, 3.5]
        state = editor.state.layers[layer]
        A = torch.linalg.inv(state.covariance().double())
        prior = A - K.T @ (d[:, None] * K)
        solution = torch.linalg.solve(A, prior @ W_0[layer] + K.T @ (d[:, None] * V))
        assert (
            float((editor.layout.edited[layer].read() - solution).norm() / (solution - W_0[layer]).norm())
            < SOLVED
        )


@pytest.mark.parametrize("keys", ["mean", "each"])
def test_targets_are_the_old_output_plus_a_share_of_what_is_missing(
    model, tok, requests, settings, keys, monkeypatch
):
    hp = settings(keys=keys)
    editor = RLSEditor(model, tok, hp)
    facts = locate_facts(tok, parse_requests(requests), hp.context_templates)
    seen = []
    real = RecursiveLeastSquares.update

    def update(state, K, V, importance, **how):
        seen.append((K, V, state.weight.clone(), value_states(model, editor.layout, facts, 10_000)))
        return real(state, K, V, importance, **how)

    monkeypatch.setattr(RecursiveLeastSquares, "update", update)
    z = []
    real_values = editor_module.optimize_values
    monkeypatch.setattr(editor_module, "optimize_values", lambda *args: z.append(real_values(*args)) or z[0])
    editor.edit(requests)
    for layers_left, (K, V, W, h) in zip((2, 1), seen):
        share = (z[0].z - h) / layers_left
        torch.testing.assert_close(V, K @ W + (share if keys == "mean" else share[:, None]), **SUMS)
    rows = LayerWalk(model, editor.layout, facts, 10_000, keys).advance_to(2)
    torch.testing.assert_close(seen[1][0], rows, **SUMS)


def test_the_published_targets_miss_by_more(model, tok, requests, settings):
    misses = {}
    for targets in ("residual", "published"):
        report = RLSEditor(copy.deepcopy(model), tok, settings(targets=targets, mom2_update_weight=0.1)).edit(
            requests
        )
        misses[targets] = sum(fact.miss for fact in report.facts)
    assert misses["residual"] < misses["published"]


def test_two_runs_with_one_seed_are_identical(family, tok, requests, settings):
    from tests.conftest import FAMILIES

    results = []
    for seed in (0, 0, 1):
        model = FAMILIES[family]()
        torch.manual_seed(1234 + len(results))  # the caller's random state must not matter
        editor = RLSEditor(model, tok, settings(context_templates=None, seed=seed))
        editor.edit(requests[:2])
        editor.edit(requests[2:])
        results.append((tensors_of(model), editor.state.templates))
    assert results[0][1] == results[1][1] != results[2][1]
    assert same(results[0][0], results[1][0])
    assert not same(results[0][0], results[2][0])


def test_preparing_beforehand_changes_nothing_but_when(family, tok, requests, settings):
    from tests.conftest import FAMILIES

    results = []
    for prepares in (False, True):
        model = FAMILIES[family]()
        editor = RLSEditor(model, tok, settings(context_templates=None, n_templates=2))
        if prepares:
            editor.prepare()
            assert sorted(editor.state.layers) == [1, 2]
            assert editor.n_edits == 0
        editor.edit(requests)
        assert len(editor.state.templates) == 2
        results.append(tensors_of(model))
    assert same(*results)


def test_the_callers_world_is_as_found(model, tok, requests, settings, monkeypatch):
    monkeypatch.setattr(tok, "padding_side", "left")
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    torch.manual_seed(7)
    rng, given = torch.get_rng_state(), copy.deepcopy(requests)
    RLSEditor(model, tok, settings(context_templates=None)).edit(requests)
    assert torch.equal(torch.get_rng_state(), rng)
    assert tok.padding_side == "left"
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == flags
    assert requests == given
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_editing_works_inside_inference_mode(model, tok, requests, settings):
    twin = copy.deepcopy(model)
    RLSEditor(twin, tok, settings()).edit(requests)
    with torch.inference_mode():
        RLSEditor(model, tok, settings()).edit(requests)
    assert same(tensors_of(model), tensors_of(twin))


def test_a_layer_that_the_model_lacks(model, tok, settings):
    with pytest.raises(LayoutError, match="no layer 9: its 4 layers are 0 to 3"):
        RLSEditor(model, tok, settings(layers=[1, 9], v_loss_layer=9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_keep_an_exact_master(model, tok, requests, settings, dtype):
    model.to(dtype)
    editor = RLSEditor(model, tok, settings())
    editor.edit(requests[:2])
    editor.edit(requests[2:])
    for layer, state in editor.state.layers.items():
        weight = editor.layout.edited[layer]
        assert state.weight.dtype == torch.float32
        assert weight.parameter.dtype == dtype
        assert not torch.equal(state.weight, weight.read())  # more than its rounding
        assert weight.holds(state.weight)


def test_anchor_prompts_keep_their_outcome(model, tok, requests, settings):
    """With a heavy pull toward explicit anchors, their keys map to what they did before;
    without, they don't.
    """
    kept = "Bread needs flour, water and salt."
    moved = {}
    for name, anchors, mu in (("anchored", [kept], 5.0), ("free", [requests[0]["prompt"]], 1e-3)):
        twin = copy.deepcopy(model)
        hp = settings(mu_reg=mu, lambda_reg=0.5)
        pairs = anchor_pairs(twin, tok, hp, [kept])
        editor = RLSEditor(twin, tok, hp, anchors=anchors)
        W_0 = editor.layout.edited[2].read()
        editor.edit(requests)
        K_0 = pairs.keys[2]
        moved[name] = float((K_0 @ (editor.layout.edited[2].read() - W_0)).norm() / (K_0 @ W_0).norm())
    assert moved["anchored"] < 0.05
    assert moved["free"] > 10 * moved["anchored"]


def test_anchor_pairs_with_values_of_their_own_are_fitted(model, tok, requests, settings):
    hp = settings(mu_reg=5.0, lambda_reg=0.1)
    pairs = anchor_pairs(model, tok, hp, ["Bread needs"])
    wanted = {
        layer: torch.randn(len(K_0), 32, generator=torch.Generator().manual_seed(layer))
        for layer, K_0 in pairs.keys.items()
    }
    editor = RLSEditor(model, tok, hp, anchors=AnchorPairs(pairs.keys, wanted))
    editor.edit(requests[:1])
    for layer, V_0 in wanted.items():
        K_0 = pairs.keys[layer]
        assert float((K_0 @ editor.layout.edited[layer].read() - V_0).norm() / V_0.norm()) < 0.05


@pytest.mark.parametrize(("pairs", "message"), [
    (AnchorPairs({1: torch.ones(3, 5), 2: torch.ones(3, 5)}, {}), "keys of layer 1 have shape"),
    (AnchorPairs({1: torch.ones(3, 48)}, {}), "no keys for layer 2|keys of layer 1 have shape"),
    ([], "missing or empty"),
    (["ok", ""], "missing or empty"),
])  # fmt: skip
def test_bad_anchors(model, tok, requests, settings, pairs, message):
    with pytest.raises(AnchorError, match=message):
        RLSEditor(model, tok, settings(), anchors=pairs).edit(requests)


def test_a_singular_prior_names_the_cure(model, tok, requests, settings):
    before = tensors_of(model)
    with pytest.raises(NumericalError, match=r"Prior of layer 1 .*Raise lambda_reg"):
        RLSEditor(model, tok, settings(lambda_reg=0.0), anchors=["One text"]).edit(requests)
    assert same(tensors_of(model), before)


def test_a_batch_is_tokenized_once(model, tok, requests, settings, monkeypatch):
    """Where the templates are given; the check before the long work and the edit share the facts."""
    from easyedit_rls.facts import keys as keys_module

    real, n_texts = keys_module.tokenize_fact, []
    monkeypatch.setattr(
        keys_module, "tokenize_fact", lambda *args, **kwargs: n_texts.append(1) or real(*args, **kwargs)
    )
    editor = RLSEditor(model, tok, settings())
    by_hand = EditRequest("Some say the ", "Rhine", " has", "people", paraphrases=["a list can't be hashed"])
    for batch in (requests[:2], requests[2:], [by_hand]):
        n_texts.clear()
        editor.edit(batch)
        assert len(n_texts) == len(batch) * (1 + 2 + 1)  # bare, in two templates, and the KL prompt
    with pytest.raises(RequestError, match=r"Request 1, field 'target_new'"):
        editor.edit([requests[0], {**requests[1], "target_new": "<unk>"}])
