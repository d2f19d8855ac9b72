"""The gate's g after a long stream equals its formula, solved plainly in float64."""

import pytest
import torch

from easyedit_rls.model.gate import Decision
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rule import find_rule
from tests.tolerances import LEVERAGE_FLOAT32, LEVERAGE_FLOAT64

D_K, D_V, UPDATES = 40, 6, 1000


@pytest.mark.parametrize("name", ["rls", "memit_seq"])
def test_leverage_after_a_thousand_updates_retractions_and_a_resume(name):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = torch.logspace(-2, 1, D_K, dtype=torch.float64)
    text = random(4000, D_K) * spread
    moment = text.T @ text / len(text)
    rule = find_rule(name, {"n_0": 300.0} if name == "memit_seq" else {})
    solver = rule.begin(Prior(random(D_K, D_V), 300.0 * moment, 0.0, 1.0, None, moment))
    C_0 = solver.covariance()
    live = []
    for number in range(UPDATES):
        K, V, D = random(1, D_K) * spread, random(1, D_V), torch.tensor([0.5 + number % 3])
        solver = solver.update(K, V, D)
        live.append((K, V, D))
        if number % 3 == 2:
            solver = solver.retract(*live.pop(number % len(live)))
        if number == UPDATES // 2:
            solver, _ = rule.from_tensors({k: t.clone() for k, t in solver.tensors().items()}, "layer")
    A_0 = 300.0 * moment
    A_t = A_0 + sum(D.double() * K.T @ K for K, _, D in live)
    keys = torch.cat([random(200, D_K) * spread, live[0][0], live[-1][0]])
    prior, posterior = ((keys * torch.linalg.solve(A, keys.T).T).sum(1) for A in (A_0, A_t))
    wanted = 1 - posterior / prior
    assert 0 < float(wanted.min()) < float(wanted.max()) < 1
    decision = Decision()
    factors = torch.cat([torch.linalg.cholesky(C) for C in (C_0, solver.covariance())], 1)
    decision.factors = factors
    torch.testing.assert_close(decision.leverage(keys), wanted, **LEVERAGE_FLOAT64)
    decision.factors = factors.float()
    torch.testing.assert_close(decision.leverage(keys).double(), wanted, **LEVERAGE_FLOAT32)
    assert torch.equal(decision.leverage(3.0 * keys) > 0.5, decision.leverage(keys) > 0.5)
