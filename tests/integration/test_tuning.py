"""Search for settings and causal tracing, on tiny models; `init`, `tune` and `locate` as a user runs them."""

import json

import pytest
import torch

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate, parse_requests, perplexity
from easyedit_rls.cli.main import main
from easyedit_rls.errors import RequestError
from easyedit_rls.model.gate import has_gates
from easyedit_rls.model.hooks import tap
from easyedit_rls.model.subject import subject_tokens
from easyedit_rls.tuning.search import Search, objective
from easyedit_rls.tuning.trace import KINDS, PLACES, Trace, trace
from tests.conftest import FAMILIES, tiny_llama, tiny_settings
from tests.tolerances import PROBABILITY


@pytest.fixture
def records(requests):
    extra = {
        "rephrase_prompt": "People say of {}",
        "locality": {"others": {"prompt": "The town of", "ground_truth": "people"}},
    }
    return parse_requests(
        [
            {**request, **extra, "rephrase_prompt": f"People say of {request['subject']}"}
            for request in requests
        ]
    )


@pytest.fixture
def search(tok, records, demo_text):
    start = tiny_settings("llama", early_stopping_margin=1.0)
    return Search(tiny_llama(), tok, start, records, demo_text, batch=2, max_tokens=512)


def test_the_objective_punishes_the_worst_part():
    fine = {"rewrite_accuracy": 0.9, "paraphrase_accuracy": 0.9, "specificity": 0.9, "perplexity": 22.0,
        "perplexity_before": 20.0}  # fmt: skip
    assert objective(fine) == pytest.approx(0.9)
    assert objective({**fine, "perplexity": 18.0}) == pytest.approx(
        4 / (3 / 0.9 + 1)
    )  # a gain counts as no loss
    assert objective({**fine, "paraphrase_accuracy": 0.1}) < 0.4
    assert objective({**fine, "paraphrase_accuracy": 0.0}) == 0.0
    assert objective({**fine, "perplexity": 50.0}) == 0.0


def test_a_search_begins_with_what_it_was_given_and_leaves_the_model_alone(search, tok, records, demo_text):
    model = search._model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    best = search.run(4, 1000.0, seen.append)
    assert seen == search.trials
    assert len(seen) == 4
    assert best.objective == max(trial.objective for trial in seen)
    assert search.best is best
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first = search.settings(seen[0])
    start = tiny_settings("llama")
    assert (first.layers, first.v_lr, first.mom2_update_weight) == (
        start.layers,
        start.v_lr,
        pytest.approx(50.0),
    )  # moved into the range
    for trial in (seen[0], seen[-1]):
        editor = RLSEditor(model, tok, search.settings(trial))
        for at in (0, 2):
            editor.edit(records[at : at + 2])
        after = evaluate(model, tok, records).means()
        assert trial.figures["rewrite_accuracy"] == after["rewrite_accuracy"]
        assert trial.figures["specificity"] == after["specificity"]
        assert trial.figures["perplexity"] == pytest.approx(perplexity(model, tok, demo_text, max_tokens=512))
        model.load_state_dict(before)
    layers = [tuple(trial.changes["layers"]) for trial in seen]
    assert len(set(layers)) > 1
    assert all(list(some) == list(range(some[0], some[-1] + 1)) for some in layers)


def test_another_rules_own_settings_are_searched(tok, records, demo_text):
    start = tiny_settings("llama", solver="memit_seq-rect", solver_settings={"n_0": 70}, on_conflict="keep")
    search = Search(tiny_llama(), tok, start, records, demo_text, batch=2, max_tokens=512)
    search.run(3, 1000.0)
    assert [trial.error for trial in search.trials] == [None] * 3
    tried = [search.settings(trial).rule.describe() for trial in search.trials]
    assert tried[0]["n_0"] == pytest.approx(70)
    assert tried[0]["rect"]["share"] == pytest.approx(0.4)
    assert len({own["n_0"] for own in tried}) == len({own["rect"]["share"] for own in tried}) == 3
    assert not any({"lambda_reg", "mom2_update_weight"} & trial.changes.keys() for trial in search.trials)
    assert start.solver_settings == {"n_0": 70}


def test_a_search_keeps_its_time_and_goes_on_after_a_failure(search, monkeypatch):
    def fail(self, requests):
        raise RequestError("is broken.", field="prompt")

    with monkeypatch.context() as patched:
        patched.setattr(RLSEditor, "edit", fail)
        failed = search.run(1, 1000.0)
    assert (failed.objective, failed.figures) == (0.0, {})
    assert "field 'prompt': is broken." in failed.error
    search.run(50, 0.0)
    assert len(search.trials) == 1  # no time for another
    search.run(2, 1000.0)
    assert [trial.error is None for trial in search.trials] == [False, True]


def test_records_without_paraphrases_are_refused(tok, requests, demo_text):
    with pytest.raises(RequestError, match=r"hold no paraphrases.*CounterFact"):
        Search(tiny_llama(), tok, tiny_settings("llama"), parse_requests(requests), demo_text)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_traces_equal_whole_runs(family, tok, requests):
    """One place put back by hooks on a whole pass, one row at a time, against the runs that start where
    states begin to differ.
    """
    model = FAMILIES[family]()
    parsed = parse_requests(requests)[2:3]  # "Some say Mount Sainte-Victoire has": every place exists
    found = trace(model, tok, parsed, samples=2, window=2, seed=3)
    ids, inside = subject_tokens(tok, parsed[0].before, parsed[0].subject, parsed[0].after)
    embed = model.get_input_embeddings()
    layers = model.model.layers if family == "llama" else model.transformer.h
    mlps = [layer.mlp.down_proj if family == "llama" else layer.mlp.c_proj for layer in layers]
    attentions = [layer.self_attn if family == "llama" else layer.attn for layer in layers]
    tokens = torch.tensor([ids])
    spread = embed.weight[[ids[i] for i in inside]].std()
    blur = torch.randn(2, len(inside), 32, generator=torch.Generator().manual_seed(3)) * 3.0 * spread

    def last(edit, outputs=None):
        with torch.no_grad(), tap(edit=edit, outputs=outputs) as seen:
            return model(tokens).logits[0, -1].softmax(0), seen

    everything = {
        **dict(enumerate(layers)),
        **{("MLP", i): m for i, m in enumerate(mlps)},
        **{("attention", i): m for i, m in enumerate(attentions)},
    }
    clean, states = last({}, everything)
    answer = int(clean.argmax())

    def blurred(noise):
        def change(output):
            output = output.clone()
            output[0, list(inside)] += noise
            return output

        return {embed: change}

    def restored(key, position):
        def change(output):
            output = output.clone()
            output[0, position] = states[key][0, position]
            return output

        return change

    base = torch.stack([last(blurred(noise))[0][answer] for noise in blur]).mean()
    assert found.clean == pytest.approx(float(clean[answer]), abs=PROBABILITY)
    assert found.blurred == pytest.approx(float(base), abs=PROBABILITY)
    positions = [inside[0], inside[-1], inside[-1] + 1, len(ids) - 1]
    for layer in range(4):
        window = range(max(0, layer - 1), min(4, max(0, layer - 1) + 2))
        for place, position in enumerate(positions):
            if place == 2 and position == len(ids) - 1:
                continue
            for kind in KINDS:
                if kind == "hidden state":
                    edits = {layers[layer]: restored(layer, position)}
                else:
                    modules = mlps if kind == "MLP" else attentions
                    edits = {modules[i]: restored((kind, i), position) for i in window}
                put_back = [last({**blurred(noise), **edits})[0][answer] for noise in blur]
                wanted = pytest.approx(float(torch.stack(put_back).mean() - base), abs=PROBABILITY)
                assert float(found.effects[kind][place, layer]) == wanted, (kind, PLACES[place], layer)


def test_advice_is_what_lies_around_the_peak():
    effect = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.2, 0.6])
    found = Trace(0.5, 0.0, {kind: effect.repeat(len(PLACES), 1) for kind in KINDS}, 1, 2)
    assert found.advice() == [1, 2, 3]
    with pytest.raises(RequestError, match="Give facts"):
        trace(tiny_llama(), None, [])


@pytest.fixture
def folder(tok, tmp_path, requests):
    """A model, records and settings on disk, as a user has them."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    (tmp_path / "records.json").write_text(
        json.dumps(
            [
                {
                    "requested_rewrite": {
                        "prompt": request["prompt"].replace(request["subject"], "{}"),
                        "subject": request["subject"],
                        "target_new": {"str": request["target_new"]},
                        "target_true": {"str": "the"},
                    },
                    "paraphrase_prompts": [f"People say of {request['subject']}"],
                    "neighborhood_prompts": ["The town of"],
                }
                for request in requests
            ]
        )
    )
    return tmp_path


def test_init_tune_and_locate_from_nothing(folder, capsys):
    model = str(folder / "model")
    settings = folder / "own.yaml"
    assert main(["init", model, "--out", str(settings)]) == 0
    assert "model.layers (0 to 3)" in capsys.readouterr().out
    hp = RLSEditHyperParams.from_hparams(settings)
    assert (hp.layers, hp.model_name) == ([0, 1], model)
    assert main(["init", model, "--out", str(settings)]) == 2
    assert "is there already" in capsys.readouterr().err
    quick = RLSEditHyperParams.from_dict(
        {
            **hp.to_dict(),
            "mom2_n_samples": 8,
            "lambda_reg": 0.1,
            "v_num_grad_steps": 5,
            "context_templates": [],
        }
    )
    settings.write_text(quick.to_yaml())

    data = ["--data", str(folder / "records.json")]
    assert (
        main(
            [
                "tune",
                model,
                *data,
                "--hparams",
                str(settings),
                "--trials",
                "2",
                "--batch",
                "4",
                "--out",
                str(folder / "tuned"),
            ]
        )
        == 0
    )
    assert "What was tried, best first" in capsys.readouterr().out
    tried = json.loads((folder / "tuned" / "trials.json").read_text())
    best = max(tried, key=lambda trial: trial["objective"])
    found = RLSEditHyperParams.from_hparams(folder / "tuned" / "best.yaml")
    assert found == RLSEditHyperParams.from_dict({**quick.to_dict(), **best["changes"]})

    assert (
        main(["locate", model, *data, "--count", "2", "--samples", "2", "--out", str(folder / "where")]) == 0
    )
    assert "Advice: layers:" in capsys.readouterr().out
    assert {file.name for file in (folder / "where").iterdir()} == {"trace.png", "trace.svg", "trace.json"}
    assert json.loads((folder / "where" / "trace.json").read_text())["n_facts"] == 2


def test_what_is_not_there_is_said_in_a_line(folder, capsys):
    assert main(["init", "./nowhere"]) == 2
    assert "There is no folder" in capsys.readouterr().err
    assert main(["tune", str(folder / "model"), "--data", str(folder / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["tune", "--help"])
    assert caught.value.code == 0
    assert "harmonic mean" in capsys.readouterr().out


def test_a_search_behind_a_gate_leaves_none(tok, records, demo_text, monkeypatch):
    monkeypatch.setattr("easyedit_rls.anchors.ordinary.N_KEYS", 500)
    start = tiny_settings("llama", memory="gated", early_stopping_margin=1.0)
    search = Search(tiny_llama(), tok, start, records, demo_text, batch=2, max_tokens=512)
    search.run(2, 1000.0, lambda trial: None)
    assert all(trial.error is None for trial in search.trials)
    assert not has_gates(search._model)
