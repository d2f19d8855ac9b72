"""Every update rule against its formula, solved plainly in float64."""

import pytest
import torch

from easyedit_rls.errors import AnchorError, HyperParamsError
from easyedit_rls.solvers.base import SOLVERS, register_solver
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rule import find_rule
from tests.conftest import tiny_settings
from tests.tolerances import RULES_FLOAT32, RULES_FLOAT64

D_K, D_V, BATCHES, ROWS = 24, 7, 5, 3
FREE = 0.5  # eigenvalues of the moment below it are free
SETTINGS = {
    "memit": {"n_0": 40.0},
    "memit_seq": {"n_0": 40.0, "norm_weight": 0.7},
    "emmet": {"n_0": 40.0, "ridge": 0.3},
    "alphaedit": {"L2": 0.6, "threshold": FREE},
    "betaedit": {"moment_weight": 30.0, "ridge": 0.5, "threshold": FREE, "every": 2 * ROWS},
    "evoedit": {"L2": 0.4, "threshold": FREE},
    "lyaplock": {"n_0": 3.0, "alpha": 0.5},
}


class Stream:
    """Keys, residuals and importances of batches, and a moment with eigenvalues on both sides of `FREE`."""

    def __init__(self, seed=0, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        mixed = torch.linalg.qr(draw(D_K, D_K).double())[0]
        self.C = (mixed * torch.logspace(-2, 1, D_K, dtype=torch.float64)) @ mixed.T
        self.W_0 = draw(D_K, D_V)
        self.batches = [(draw(ROWS, D_K), draw(ROWS, D_V), draw(ROWS).abs() + 0.5) for _ in range(BATCHES)]

    def prior(self, n_0=40.0, lam=0.0):
        return Prior(self.W_0, n_0 * self.C, lam, 1.0, None, self.C)

    def run(self, name, settings=None, prior=None):
        """The weight behind each batch; targets are V = K W + r, with W as the rule has it."""
        state, found = find_rule(name, settings or {}).begin(prior or self.prior()), []
        for K, r, D in self.batches:
            state = state.update(K, K @ state.weight.to(K) + r, D)
            found.append(state.weight.double().clone())  # the rule may take its memory back
        return found

    def weighted(self):
        for K, r, D in self.batches:
            root = D.double().sqrt()[:, None]
            yield root * K.double(), root * r.double()


def plain(name, s):
    """The weights that the published formula gives, by general solves in float64."""
    own, C, I = SETTINGS[name], s.C, torch.eye(D_K, dtype=torch.float64)  # noqa: E741
    W, S, found = s.W_0.double(), torch.zeros_like(C), []
    values, vectors = torch.linalg.eigh(C)
    P = vectors[:, values < FREE] @ vectors[:, values < FREE].T
    solve, W_0, KV, D, Z, renewed = (
        torch.linalg.solve,
        s.W_0.double(),
        torch.zeros_like(s.W_0).double(),
        None,
        0,
        0,
    )
    for i, (K, r) in enumerate(s.weighted()):
        if name == "memit":
            W = W + solve(own["n_0"] * C + K.T @ K, K.T @ r)
        elif name == "memit_seq":
            S = S + K.T @ K
            W = W + solve(own["n_0"] * C + own["norm_weight"] * I + S, K.T @ r)
        elif name == "emmet":
            B = torch.linalg.inv(own["n_0"] * C)
            W = W + B @ K.T @ solve(K @ B @ K.T + own["ridge"] * torch.eye(len(K)).double(), r)
        elif name == "alphaedit":
            W = W + solve(P @ (S + K.T @ K) + own["L2"] * I, P @ K.T @ r)
            S = S + K.T @ K
        elif name == "betaedit":
            lam = own["moment_weight"]
            if i * ROWS - renewed >= own["every"]:
                values, vectors = torch.linalg.eigh((S / (i * ROWS) + lam * C) / (lam + 1))
                P, renewed = vectors[:, values < FREE] @ vectors[:, values < FREE].T, i * ROWS
            S = S + K.T @ K
            W = W + solve(P @ (S + lam * C) + own["ridge"] * I, P @ K.T @ r)
        elif name == "evoedit":
            W = W + P @ K.T @ solve(K @ P @ K.T + own["L2"] * torch.eye(len(K)).double(), r)
            Q = torch.linalg.svd(P @ K.T, full_matrices=False)[0]
            P = P - Q @ Q.T
        else:
            aZ = 1.0 if D is None else Z / (own["alpha"] * D) ** 0.5
            A = K.T @ K + S + aZ * own["n_0"] * C
            W = W + solve(A, K.T @ r + aZ * own["n_0"] * C @ (W_0 - W) + KV - S @ W)
            harm = torch.trace((W - W_0).T @ C @ (W - W_0))
            if D is None:
                D = harm
                Z = (own["alpha"] * D) ** 0.5
            root = (own["alpha"] * D) ** 0.5
            Z = max(Z + (harm - own["alpha"] * D) / root, root)
            S, KV = S + K.T @ K, KV + K.T @ (K @ W)
        found.append(W)
    return found


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, RULES_FLOAT64), (torch.float32, RULES_FLOAT32)]
)
def test_a_rule_is_its_formula(name, dtype, tolerance):
    for seed in range(3):
        stream = Stream(seed, dtype)
        expected = plain(name, stream)
        for one, other in zip(stream.run(name, SETTINGS[name]), expected, strict=True):
            change = (other - stream.W_0.double()).norm()
            assert change > 0
            assert float((one - other).norm() / change) < tolerance


def test_rls_without_lambda_is_memit_of_a_stream():
    stream = Stream()
    for one, other in zip(stream.run("rls"), stream.run("memit_seq", {"n_0": 40.0}), strict=True):
        assert float((one - other).norm() / (other - stream.W_0).norm()) < RULES_FLOAT64
    lam = 0.7**0.5
    constrained = stream.run("memit_seq", {"n_0": 40.0, "norm_weight": 0.7})
    for one, other in zip(stream.run("rls", prior=stream.prior(lam=lam)), constrained, strict=True):
        assert float((one - other).norm() / (other - stream.W_0).norm()) < RULES_FLOAT64


def test_emmet_with_a_ridge_of_one_is_memit():
    stream = Stream()
    for one, other in zip(
        stream.run("emmet", {"n_0": 40.0, "ridge": 1.0}), stream.run("memit", {"n_0": 40.0})
    ):
        assert float((one - other).norm() / (other - stream.W_0).norm()) < RULES_FLOAT64


def test_memit_of_a_stream_takes_edits_out():
    stream, rule = Stream(), find_rule("memit_seq", {"n_0": 40.0})
    given = [(K, stream.W_0.new_zeros(ROWS, D_V) + i, D) for i, (K, _, D) in enumerate(stream.batches)]
    state, without = rule.begin(stream.prior()), rule.begin(stream.prior())
    for i, (K, V, D) in enumerate(given):
        state = state.update(K, V, D)
        without = without if i == 1 else without.update(K, V, D)
    state = state.retract(*given[1])
    assert state.n_edits == without.n_edits
    assert float((state.weight - without.weight).norm() / without.weight.norm()) < RULES_FLOAT64


@pytest.mark.parametrize(
    "name", sorted({*SETTINGS, "rls-sphere", "memit_seq-rect-ote", "alphaedit-prune"} - {"memit_seq"})
)
def test_a_rule_that_takes_nothing_out_says_so(name):
    stream = Stream()
    K, r, D = stream.batches[0]
    state = find_rule(name).begin(stream.prior()).update(K, r, D)
    with pytest.raises(HyperParamsError, match=r"can't take edits out.*Take solver: rls"):
        state.retract(K, r, D)


@pytest.mark.parametrize("name", [*SETTINGS, "rls", "forgetting", "memit_seq-sphere-ote", "alphaedit-rect"])
def test_tensors_give_the_state_and_the_one_before_bit_for_bit(name):
    stream, rule = Stream(), find_rule(name, SETTINGS.get(name, {}))
    before = rule.begin(stream.prior())
    for K, r, D in stream.batches[:3]:
        state = before.update(K, r, D)
        stored = {key: tensor.clone() for key, tensor in state.tensors(before).items()}
        last, earlier = before, state
        for one, other in zip(rule.from_tensors(stored, "layer"), (state, before), strict=True):
            again, expected = one.update(K, r, D), other.update(K, r, D)
            assert torch.equal(one.weight, other.weight)
            assert torch.equal(again.weight, expected.weight)
            assert one.n_edits == other.n_edits
        before, _ = earlier, last


def test_filters_are_their_formulas():
    stream = Stream()
    K, r, D = stream.batches[0]
    W, bare = stream.W_0, stream.run("memit_seq", {"n_0": 40.0})[0]
    step = bare - W

    def filtered(name, **own):
        return (
            find_rule(f"memit_seq-{name}", {"n_0": 40.0, name: own})
            .begin(stream.prior())
            .update(K, K @ W + r, D)
            .weight
            - W
        )

    ratio = (step / W).abs()
    kept = ratio >= ratio.flatten().sort(descending=True).values[round(0.3 * ratio.numel()) - 1]
    assert torch.allclose(filtered("rect", share=0.3), torch.where(kept, step, 0), atol=RULES_FLOAT64)
    A = W.T / (W.T.norm(dim=1, keepdim=True) + 1e-8)  # PyTorch's layout, as published
    values, vectors = torch.linalg.eigh(A.T @ A / len(A))
    rank = int((values.flip(0).cumsum(0) / values.sum() <= 0.5).sum()) + 1
    U = vectors[:, -rank:]
    assert torch.allclose(filtered("sphere"), step - 0.5 * U @ U.T @ step, atol=RULES_FLOAT64)
    assert torch.allclose(filtered("prune"), step, atol=RULES_FLOAT64)  # no direction outgrows W_0


def test_prune_restrains_what_outgrows_the_weight():
    from easyedit_rls.solvers.prune import Prune, PruneSettings

    W_0, step = torch.diag(torch.tensor([2.0, 1.0])).double(), torch.diag(torch.tensor([5.0, 0.5])).double()
    restrained = torch.log(torch.tensor(5.0 / 2.0).double()) / torch.log(torch.tensor(1.2).double()) + 2.0
    expected = torch.diag(torch.tensor([float(restrained), 0.5])).double()
    assert torch.allclose(Prune(PruneSettings())(step, W_0, W_0), expected, atol=RULES_FLOAT64)


def test_feedback_gives_back_what_filters_took():
    """W − A^-1 E is the solution without filters: the objective of all edits is kept."""
    stream = Stream()
    state = find_rule("memit_seq-rect-ote", {"n_0": 40.0, "rect": {"share": 0.4}}).begin(stream.prior())
    exact = find_rule("memit_seq", {"n_0": 40.0}).begin(stream.prior())
    for K, r, D in stream.batches:
        state, exact = state.update(K, r, D), exact.update(K, r, D)
    E = state._parts.E
    missing = state.weight - torch.linalg.solve(state._parts.inner.information(), E)
    assert float((missing - exact.weight).norm() / exact.weight.norm()) < RULES_FLOAT64
    assert float((state.weight - exact.weight).norm() / exact.weight.norm()) > 1e-3


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("memit_sek", {}, "no solver 'memit_sek'.*Did you mean memit_seq"),
    ("rls-spere", {}, "no filter 'spere'.*Did you mean sphere"),
    ("rls-ote", {}, "stands last, behind them"),
    ("rls-ote-rect", {}, "stands last, behind them"),
    ("memit", {"n0": 3}, "no setting 'n0'.*Did you mean n_0"),
    ("memit", {"n_0": 0}, "solver memit: Setting n_0 is 0; allowed: above 0"),
    ("memit", {"n_0": "many"}, "allowed: above 0"),
    ("betaedit", {"every": 2.5}, "every of the solver betaedit is 2.5; allowed: whole numbers"),
    ("forgetting", {"factor": 2}, "factor is 2; allowed: above 0, and up to 1, or 'adaptive'"),
    ("rls-rect", {"rect": 3}, "Settings of the filter rect are 3"),
])  # fmt: skip
def test_names_and_settings_are_checked(name, settings, message):
    with pytest.raises(HyperParamsError, match=message):
        find_rule(name, settings)


def test_rules_that_need_moments_say_so():
    for name in SETTINGS:
        with pytest.raises(AnchorError, match=r"needs second moments.*Set mom2_adjustment"):
            find_rule(name).begin(Prior(torch.ones(3, 2), None, 1.0))
    with pytest.raises(HyperParamsError, match="Leave out ote"):
        find_rule("evoedit-rect-ote").begin(Stream().prior())


def test_anchors_with_values_of_their_own_are_for_least_squares_alone():
    stream = Stream()
    with pytest.raises(AnchorError, match="without anchor values"):
        find_rule("memit").begin(Prior(stream.W_0, stream.C, 1.0, 1.0, stream.W_0, stream.C))


def test_a_filter_breaks_retraction():
    found = {name: find_rule(name).can_retract for name in ("rls", "memit_seq", "rls-rect", "memit")}
    assert found == {"rls": True, "memit_seq": True, "rls-rect": False, "memit": False}


def test_a_rule_says_all_of_its_settings():
    rule = find_rule("memit_seq-rect-ote", {"n_0": 5, "rect": {"share": 0.3}})
    assert rule.describe() == {"n_0": 5, "norm_weight": 0.0, "rect": {"share": 0.3}}
    assert find_rule("memit_seq-rect-ote", rule.describe()).describe() == rule.describe()
    with pytest.raises(HyperParamsError, match="'rls-rect-rect' has the filter rect twice"):
        find_rule("rls-rect-rect")


def test_what_needs_retraction_is_refused_beforehand():
    assert tiny_settings("llama", solver="memit_seq", rehearsal=3).rehearsal == 3
    for name in ("memit", "rls-rect"):
        with pytest.raises(HyperParamsError, match=f"rehearsal is 3; allowed: 0 where solver is {name}"):
            tiny_settings("llama", solver=name, rehearsal=3)


def test_a_name_belongs_to_one_class():
    with pytest.raises(HyperParamsError, match=r"Two solvers are named 'rls'.*Rename one"):
        register_solver("rls")(type("Other", (), {}))


def test_all_built_in_rules_are_tested_here():
    own = [name for name in SOLVERS.names() if SOLVERS.get(name).__module__.startswith("easyedit_rls.")]
    assert set(own) == {*SETTINGS, "rls", "forgetting"}
