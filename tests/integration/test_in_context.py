"""Editing in context, compared as a user compares it; and the questions about other relations."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from easyedit_rls.compare import stream
from easyedit_rls.compare.plan import Plan
from easyedit_rls.compare.progress import write_progress
from easyedit_rls.data.records import read_records
from easyedit_rls.data.requests import Probe
from easyedit_rls.editors.in_context import InContext
from easyedit_rls.evaluation import answers, evaluate, first_tokens, other_questions, perplexity
from easyedit_rls.evaluation.scores import score
from tests.conftest import tiny_llama, tiny_settings

ODER = "Fact: The river Oder flows through people\n"
ANNA = "Fact: Anna Keller was born in water\n"
TEMPLATE = 'settings.InContext.template="Fact: {}\n"'


def counterfact(prompt, subject, relation, target, paraphrase, neighbors):
    fact = {"prompt": prompt, "subject": subject, "relation_id": relation, "target_new": {"str": target}}
    return {
        "requested_rewrite": {**fact, "target_true": {"str": "stones"}},
        "paraphrase_prompts": [paraphrase],
        "neighborhood_prompts": neighbors,
        "generation_prompts": [f"{subject} likes"],
    }


RECORDS = [
    counterfact("The river {} flows through", "Oder", "P17", "people", "It is late. The Oder is in",
        ["The river Rhine", "The street to Oder"]),
    counterfact("{} was born in", "Anna Keller", "P19", "water", "Anna Keller comes from",
        ["Bakers know", "The river"]),
    counterfact("{} is made of", "bread", "P186", "leaves", "Of bread", ["Bakers know", "The river"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tok, demo_text):
    folder = tmp_path_factory.mktemp("in_context")
    tiny_llama().save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    (folder / "tiny.yaml").write_text(tiny_settings("llama").to_yaml())
    (folder / "records.json").write_text(json.dumps(RECORDS))
    (folder / "text.txt").write_text(demo_text[:3000], encoding="utf-8")
    return folder


def compare(folder, *changes):
    given = ["model.path=model", "model.hparams=tiny.yaml", "data.file=records.json", "data.batch=2"]
    given += ["eval=quick", "eval.every=1", "eval.text=text.txt", "threads=1", "out=out", *changes]
    command = [sys.executable, "-m", "easyedit_rls.cli.main", "compare", *given]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def done(folder):
    changes = ["alg_name=InContext,RLSEdit", TEMPLATE, "eval.answers=true", "eval.relations=3"]
    done = compare(folder, *changes)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out" / "results.json").read_text())


def last(done, name="InContext"):
    return done["contenders"][name]["checkpoints"][-1]["records"]


def unedited(folder):
    return json.loads((folder / "out" / "unedited.json").read_text())


def test_no_weight_changes(folder, done, tok):
    first, end = done["contenders"]["InContext"]["checkpoints"]
    assert first["deviation"] == end["deviation"] == {}
    text = (folder / "text.txt").read_text(encoding="utf-8")
    (found,) = {done["unedited"]["perplexity"], first["perplexity"], end["perplexity"]}
    assert found == pytest.approx(perplexity(tiny_llama(), tok, text, show_progress=False))
    assert done["contenders"]["InContext"]["settings"] == {"template": "Fact: {}\n", "n_facts": 4}


def test_every_prompt_is_asked_behind_its_facts(done, tok, monkeypatch, tmp_path):
    """The same as of records in which somebody wrote them by hand."""
    by_hand = [
        counterfact(ODER + "The river {} flows through", "Oder", "P17", "people",
            ODER + "It is late. The Oder is in", ["The river Rhine", ODER + "The street to Oder"]),
        counterfact(ANNA + "{} was born in", "Anna Keller", "P19", "water",
            ANNA + "Anna Keller comes from", ["Bakers know", "The river"]),
    ]  # fmt: skip
    found = last(done)
    requests = [json.loads(json.dumps(record)) for record in by_hand]
    (tmp_path / "records.json").write_text(json.dumps(requests))
    records = read_records(tmp_path / "records.json")
    wanted = evaluate(tiny_llama(), tok, [record.request for record in records], show_progress=False)
    names = ("efficacy", "generalization", "specificity", "rewrite_accuracy", "paraphrase_accuracy")
    for number, scores in enumerate(wanted.records):
        assert {name: found[number][name] for name in names} == {
            name: getattr(scores, name) for name in names
        }
    prompts = [record.request.prompt for record in records]
    said = answers(tiny_llama(), tok, prompts, ["", ""])
    assert [one["answer"] for one in found[:2]] == [one.text for one in said]
    bare = answers(tiny_llama(), tok, ["The river Oder flows through", "Anna Keller was born in"], ["", ""])
    assert [one.text for one in bare] != [one.text for one in said]


def test_locality_is_held_to_the_unedited_models_answers_without_facts(folder, done, tok):
    """One of two neighbors names an edited subject; the other's prompt stays as it is."""
    assert [record["locality"] for record in last(done)[1:]] == [1.0, 1.0]
    prompts = ["The street to Oder", ODER + "The street to Oder"]
    before, after = (
        one.predicted
        for one in score(
            tiny_llama(), tok, [Probe(prompt, "stones") for prompt in prompts], show_progress=False
        )
    )
    share = sum(a == b for a, b in zip(before, after)) / len(before)
    assert share < 1
    assert last(done)[0]["locality"] == pytest.approx((1 + share) / 2)


def test_other_relations_are_asked_of_all(folder, done, tok):
    records = read_records(folder / "records.json")
    questions = other_questions(records, 3)
    before = [record["other_tokens"] for record in unedited(folder)["figures"]["records"]]
    assert before == first_tokens(tiny_llama(), tok, questions, show_progress=False)
    for probe, token in zip(questions[0], before[0]):  # the token that the model itself holds likeliest
        ids = torch.tensor([tok(probe.prompt)["input_ids"]])
        assert int(tiny_llama()(ids).logits[0, -1].argmax()) == token
    assert done["unedited"]["other_relations"]["mean"] == 1
    facts = [ODER, ANNA, "Fact: bread is made of leaves\n"]
    behind = [[Probe(fact + probe.prompt, "") for probe in probes] for fact, probes in zip(facts, questions)]
    after = first_tokens(tiny_llama(), tok, behind, show_progress=False)
    assert [record["other_tokens"] for record in last(done)] == after
    shares = [sum(a == b for a, b in zip(old, new)) / 3 for old, new in zip(before, after)]
    assert [record["other_relations"] for record in last(done)] == shares
    assert min(shares) < 1
    assert "other_relations" not in done["contenders"]["InContext"]["checkpoints"][0]["records"][0]
    weights = done["contenders"]["RLSEdit"]["other_relations"]["mean"]
    assert weights != done["contenders"]["InContext"]["other_relations"]["mean"]


def test_the_tables_tell_of_it(folder, done):
    (row,) = [line for line in (folder / "out" / "table.md").read_text().splitlines() if "other" in line]
    assert row.startswith("| other relations as before | 1.000 (1.000–1.000) | ")
    assert "other relations as before" in (folder / "out" / "table.csv").read_text()
    assert "Other relations: up to 3 questions" in (folder / "out" / "report.html").read_text()
    assert "other_relations" in done["differences"]["InContext − RLSEdit"]


def test_nothing_is_asked_unless_wanted(folder):
    ran = compare(folder, "alg_name=InContext", "out=none")
    assert ran.returncode == 0, ran.stderr
    result = json.loads((folder / "none" / "results.json").read_text())
    assert "other_relations" not in result["unedited"]
    assert "other relations" not in (folder / "none" / "table.md").read_text()
    assert "Other relations" not in (folder / "none" / "report.html").read_text()


def test_it_goes_on_where_it_was_stopped(folder, done, monkeypatch, request, tmp_path):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    monkeypatch.chdir(folder)
    plan = Plan.load(folder / "out")

    def stopping(*args):
        write_progress(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "write_progress", stopping)
        stream.run_contender(tmp_path, plan, plan.contender("InContext"))
    edited = []
    edit = InContext.edit
    monkeypatch.setattr(
        InContext, "edit", lambda self, requests: edited.append(len(requests)) or edit(self, requests)
    )
    stream.run_contender(tmp_path, plan, plan.contender("InContext"))
    assert edited == [1]  # the second batch alone
    found = json.loads((tmp_path / "InContext" / "checkpoint-000003.json").read_text())
    assert found["records"] == last(done)


def test_faults_are_a_line(folder):
    failed = compare(folder, "alg_name=InContext", "settings.InContext.template=none", "out=x")
    assert failed.returncode == 2
    assert "InContext: In the settings of the editor InContext: Setting template is 'none'" in failed.stderr
    assert "Traceback" not in failed.stderr
    for n in (-1, 99):
        failed = compare(folder, "alg_name=InContext", f"eval.relations={n}", "out=x")
        assert failed.returncode == 2
        assert f"eval.relations is {n}; allowed: whole numbers from 0" in failed.stderr
