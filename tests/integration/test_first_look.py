"""`easyedit-rls init` tries what it wrote: both outcomes, on a tiny model."""

from dataclasses import replace

import pytest
import torch

from easyedit_rls import RLSEditHyperParams
from easyedit_rls.anchors.cache import cache_folder
from easyedit_rls.cli.main import main
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.model.gate import has_gates
from easyedit_rls.tuning import trial
from easyedit_rls.tuning.trial import try_settings
from tests.conftest import tiny_llama, tiny_settings


@pytest.fixture
def easy(monkeypatch, requests):
    """Facts that a random model can be made to say: their subjects end the prompt."""
    monkeypatch.setattr(trial, "_facts", lambda n: parse_requests([requests[1], requests[3]]))


@pytest.fixture
def folder(tok, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    return tmp_path


def cached():
    return {path: path.stat().st_mtime_ns for path in cache_folder().rglob("*.safetensors")}


def test_sound_settings_need_no_advice_and_leave_no_trace(tok, easy):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hp = tiny_settings("llama", mom2_update_weight=10.0, early_stopping_margin=2.0)
    trial.moments(model, tok, hp)  # the settings' own, as an editor would have them
    stored = cached()
    look = try_settings(model, tok, hp, show_progress=False)
    assert look.advice() == []
    assert (look.before["rewrite_accuracy"], look.after["rewrite_accuracy"]) == (0, 1)
    assert look.largest_step == max(layer.step for layer in look.report.layers) > 0
    assert look.hparams == hp
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert stored.items() <= cached().items()
    assert all("demo_text.txt" in path.name for path in cached().keys() - stored.keys())


def test_advice_says_what_to_change(tok, easy):
    model = tiny_llama()
    stiff = try_settings(model, tok, tiny_settings("llama", mom2_update_weight=1e6), show_progress=False)
    assert stiff.advice()[0] == "The model does not say 2 of 2 facts."
    assert "lower mom2_update_weight (1e+06)" in stiff.advice()[1]
    off = try_settings(
        model, tok, tiny_settings("llama", mom2_update_weight=1e6, max_deviation=1e-9), show_progress=False
    )
    assert (off.report, off.after) == (None, {})
    assert "set max_deviation: off" in off.advice()[0]
    fine = try_settings(model, tok, tiny_settings("llama", mom2_update_weight=10.0,
        early_stopping_margin=2.0), show_progress=False)  # fmt: skip
    for harm in (
        {"specificity": fine.before["specificity"] - 0.2},
        {"perplexity": 1.1 * fine.before["perplexity"]},
    ):
        (sentence,) = replace(fine, after={**fine.after, **harm}).advice()
        assert sentence.startswith("Other text has changed")
        assert "raise mom2_update_weight (10)" in sentence
    both = replace(stiff, after={**stiff.after, "specificity": stiff.before["specificity"] - 0.2}).advice()
    assert any("raise mom2_update_weight" in sentence for sentence in both)
    assert not any("lower mom2_update_weight" in sentence for sentence in both)  # not both ways at once


def test_a_text_shorter_than_the_keys_are_wide_is_no_obstacle(tok, easy, monkeypatch):
    """Second moments of few tokens are singular; without λ there would be no prior."""
    hp = tiny_settings(
        "llama",
        mom2_dataset="self",
        mom2_n_samples=1,
        mom2_update_weight=10.0,
        lambda_reg=0.0,
        early_stopping_margin=2.0,
    )
    monkeypatch.setattr("easyedit_rls.anchors.text.TEXT_TOKENS", 20)
    assert try_settings(tiny_llama(), tok, hp, show_progress=False).report is not None
    monkeypatch.setattr(trial, "_held", lambda model, tok, hparams, show_progress: hparams)
    assert "is not positive definite" in try_settings(tiny_llama(), tok, hp, show_progress=False).refusal


def test_init_says_what_its_settings_do(folder, capsys, easy, monkeypatch):
    own = RLSEditHyperParams.for_model
    sound = {"layers": [1, 2], "mom2_update_weight": 10.0, "early_stopping_margin": 2.0, "v_lr": 0.3,
        "clamp_norm_factor": 4.0}  # fmt: skip
    quick = {"context_templates": [], "statements": []}
    for name, changes in (
        ("sound", {**sound, "max_deviation": "off"}),
        ("stiff", {"mom2_update_weight": 1e6}),
    ):
        monkeypatch.setattr(
            RLSEditHyperParams,
            "for_model",
            lambda model, changes=changes, **given: own(model, **{**given, **quick, **changes}),
        )
        out = folder / f"{name}.yaml"
        assert main(["init", str(folder / "model"), "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        assert out.is_file()
        assert "Trying them on 8 facts, about 1 min" in shown
        for row in (
            "rewrite accuracy",
            "paraphrase accuracy",
            "specificity",
            "perplexity of the demo's text",
            "largest step",
        ):
            assert row in shown
        assert ("These settings will do" in shown) == (name == "sound")
        assert ("lower mom2_update_weight (1e+06)" in shown) == (name == "stiff")


def test_init_tries_nothing_where_told(folder, capsys, monkeypatch):
    monkeypatch.setattr("easyedit_rls.cli.init.try_settings", None)
    assert main(["init", str(folder / "model"), "--out", str(folder / "own.yaml"), "--no-trial"]) == 0
    shown = capsys.readouterr().out
    assert "Trying" not in shown
    assert "Next: easyedit-rls tune" in shown
    assert (folder / "own.yaml").is_file()


@pytest.mark.parametrize("max_deviation", ["off", 1e-9])
def test_settings_with_a_gate_leave_none(tok, easy, monkeypatch, max_deviation):
    """Whether the trial succeeds or the batch is refused."""
    monkeypatch.setattr("easyedit_rls.anchors.ordinary.N_KEYS", 500)
    model = tiny_llama()
    weight = 1e6 if max_deviation != "off" else 10.0
    hp = tiny_settings("llama", memory="gated", mom2_update_weight=weight, max_deviation=max_deviation)
    look = try_settings(model, tok, hp, show_progress=False)
    assert (look.report is None) == (max_deviation != "off")
    assert not has_gates(model)
    assert not any(module._forward_hooks for module in model.modules())
