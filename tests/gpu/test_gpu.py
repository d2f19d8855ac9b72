"""On a GPU: the same as on the CPU, up to rounding; and what is written on one is read on the other."""

import json
import subprocess
import sys

import pytest
import torch

from easyedit_rls import RLSEditor, evaluate, perplexity
from easyedit_rls.data.requests import Probe, parse_requests
from easyedit_rls.evaluation import edit_quality, generate
from easyedit_rls.evaluation.scores import score
from easyedit_rls.solvers.packed import PackedSymmetric
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from tests.conftest import FAMILIES
from tests.helpers import FADING
from tests.tolerances import FLOAT32, FLOAT64, PADDING, TWO_DEVICES, TWO_DEVICES_BFLOAT16

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")


@pytest.fixture
def there(family):
    return FAMILIES[family]().to("cuda")


def edited(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters()}


def assert_near(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert float((weight - other[name]).norm()) <= TWO_DEVICES * float(weight.norm()), name


@pytest.mark.parametrize("n", [65, 4096, 4500])
def test_a_symmetric_update_in_blocks_equals_the_dense_one(n):
    g = torch.Generator("cuda").manual_seed(0)
    M, G, H = (torch.randn(n, m, generator=g, dtype=torch.float64, device="cuda") for m in (n, 30, 20))
    M = M + M.T
    packed = PackedSymmetric.from_dense(M)
    packed.update_([(G, 1.0), (H, -1.0)])
    torch.testing.assert_close(packed.to_dense(), M + G @ G.T - H @ H.T, rtol=0, atol=FLOAT64 * n)


def test_the_recursion_equals_the_batch_solution():
    g = torch.Generator("cuda").manual_seed(0)
    eye, W = torch.eye(300, device="cuda"), torch.randn(300, 40, generator=g, device="cuda")
    state = RecursiveLeastSquares.assemble(eye / 4, W, eye, 0, "layer")
    A, B = 4 * eye.double(), 4 * W.double()
    for _ in range(5):
        K, V = (
            torch.randn(10, 300, generator=g, device="cuda"),
            torch.randn(10, 40, generator=g, device="cuda"),
        )
        state = state.update(K, V)
        A, B = A + K.double().T @ K.double(), B + K.double().T @ V.double()
    true = torch.linalg.solve(A, B)
    assert float((state.weight.double() - true).norm() / true.norm()) < FLOAT32


@pytest.mark.parametrize(
    "changes",
    [{}, {"keys": "each"}, {"v_dtype": "bfloat16"}, FADING[0.9], {"mom2_adjustment": False}],
)
def test_an_edit_equals_the_cpus(family, model, there, tok, requests, settings, changes):
    hparams = settings(**changes)
    reports = []
    for one in (model, there):
        editor = RLSEditor(one, tok, hparams)
        editor.edit(requests[:2])
        reports.append(editor.edit(requests[2:]))
        assert all(
            solution.weight.device.type == one.device.type for solution in editor.state.layers.values()
        )
    if (
        "v_dtype" in changes
    ):  # values in eight bits part by more than a weight's tolerance: the edit has to land
        parsed = [Probe(r.prompt, r.target) for r in parse_requests(requests)]
        for a, b in zip(score(model, tok, parsed), score(there, tok, parsed)):
            assert a.nll == pytest.approx(b.nll, **TWO_DEVICES_BFLOAT16)
    else:
        assert_near(edited(model), edited(there))
    assert reports[1].n_edits == reports[0].n_edits == len(requests)


def test_taking_back_leaves_the_weights_as_they_were(there, tok, requests, settings):
    before = edited(there)
    editor = RLSEditor(there, tok, settings())
    editor.edit(requests[:2])
    middle = edited(there)
    editor.edit(requests[2:])
    editor.rollback()
    assert all(torch.equal(weight, middle[name]) for name, weight in edited(there).items())
    editor.retract([1, 2])
    assert_near(before, edited(there))


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_ledger_goes_on_elsewhere(family, tok, requests, settings, tmp_path, first):
    second = {"cpu": "cuda", "cuda": "cpu"}[first]
    hparams = settings(state_dir=str(tmp_path / "ledger"))
    with RLSEditor(FAMILIES[family]().to(first), tok, hparams) as editor:
        editor.edit(requests[:2])
        here = edited(editor.model)
    with RLSEditor(FAMILIES[family]().to(second), tok, hparams) as editor:
        assert editor.n_edits == 2
        assert all(torch.equal(weight, here[name]) for name, weight in edited(editor.model).items())
        editor.edit(requests[2:])
        assert editor.model.device.type == second


def test_figures_equal_the_cpus(model, there, tok, requests, demo_text):
    parsed = parse_requests(requests)
    probes = [Probe(f"{a.prompt} {b.prompt}", c.target) for a in parsed for b in parsed for c in parsed]
    for a, b in zip(score(model, tok, probes), score(there, tok, probes)):
        assert a.nll == pytest.approx(b.nll, abs=PADDING, rel=PADDING)
        assert a.predicted == b.predicted
    records = [
        {
            "prompt": r.prompt,
            "target_new": r.target,
            "locality": {"n": {"prompt": "The", "ground_truth": "end"}},
        }
        for r in parsed
    ]
    assert edit_quality(model, tok, records) == edit_quality(there, tok, records)
    assert evaluate(model, tok, requests).rewrite_accuracy == evaluate(there, tok, requests).rewrite_accuracy
    assert perplexity(model, tok, demo_text[:2000]) == pytest.approx(
        perplexity(there, tok, demo_text[:2000]), rel=1e-4
    )
    prompts = [r.prompt for r in parsed]
    assert generate(model, tok, prompts, max_new_tokens=8) == generate(there, tok, prompts, max_new_tokens=8)


def test_commands_take_it(model, tok, requests, settings, tmp_path):
    """`edit` and `compare`, with the GPU as what they take unasked."""
    model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    (tmp_path / "settings.yaml").write_text(settings().to_yaml(), encoding="utf-8")
    (tmp_path / "records.json").write_text(json.dumps(requests), encoding="utf-8")
    given = [
        f"model.path={tmp_path}/model",
        f"model.hparams={tmp_path}/settings.yaml",
        f"data.file={tmp_path}/records.json",
        "data.batch=2",
    ]
    command = [sys.executable, "-m", "easyedit_rls.cli.main"]
    subprocess.run([*command, "edit", *given, f"out={tmp_path}/edited"], check=True, cwd=tmp_path)
    assert (tmp_path / "edited" / "edits.json").is_file()
    names = ["alg_name=RLSEdit,RLSEdit--soft", "settings.RLSEdit--soft.lambda_reg=1", "eval.fluency=0"]
    subprocess.run(
        [*command, "compare", *given, *names, f"out={tmp_path}/compared"], check=True, cwd=tmp_path
    )
    assert json.loads((tmp_path / "compared" / "plan.json").read_text(encoding="utf-8"))["device"] == "cuda"
    assert (tmp_path / "compared" / "report.html").is_file()
