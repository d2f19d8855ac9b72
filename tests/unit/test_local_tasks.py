"""Tasks of lm-eval on files as they are published: documents, choices and scores."""

import json

import pytest
import yaml

from easyedit_rls import DataError, HyperParamsError
from easyedit_rls.evaluation import local_tasks as tasks
from easyedit_rls.evaluation.abilities import abilities
from tests.conftest import tiny_llama

MULTIPLE = {"query": "Question: What flows?\n", "choices": ["A river", "A stone"], "gold": 0}
FILES = {
    "arc_easy.jsonl": [MULTIPLE] * 3,
    "arc_challenge.jsonl": [MULTIPLE] * 3,
    "piqa.jsonl": [MULTIPLE] * 3,
    "winogrande.jsonl": [
        {"context_options": ["The river", "The stone"], "continuation": "flows.", "gold": 0}
    ],
    "lambada_openai_first1000.jsonl": [{"context": "The river flows to the", "continuation": "sea"}],
    "mmlu_dev.jsonl": [
        {"subject": "a_b", "question": f"Old {i}?", "choices": list("wxyz"), "answer": 2} for i in range(7)
    ],
    "mmlu_test.jsonl": [{"subject": "a_b", "question": "New?", "choices": list("wxyz"), "answer": 1}],
    "gsm8k_test.jsonl": [{"question": f"How many {i}?", "answer": f"So.\n#### 1,00{i}"} for i in range(6)],
    "truthfulqa_mc.json": [
        {"question": "What?", "mc1_targets": {"no": 0, "yes": 1}, "mc2_targets": {"a": 1, "b": 0, "c": 1}}
    ],
    "glue/sst2.json": [{"sentence": f"good {i}", "label": i % 2} for i in range(14)],
    "glue/cola.json": [{"sentence": f"good {i}", "label": i % 2} for i in range(14)],
    "glue/sentiment_analysis.json": [{"sentence": f"good {i}", "label": str(i % 2)} for i in range(14)],
    "glue/mrpc.json": [{"sentence1": "x", "sentence2": "y", "label": i % 2} for i in range(14)],
    "glue/rte.json": [{"sentence1": "x", "sentence2": "y", "label": i % 2} for i in range(14)],
    "glue/nli.json": [
        {"sentence1": "x", "sentence2": "y", "label": ["entailment", "not_entailment"][i % 2]}
        for i in range(14)
    ],
    "glue/mmlu.json": [{"question": "x", "choices": list("wxyz"), "answer": i % 4} for i in range(14)],
    "glue/dialogue.json": [
        {"article": "x", "options": list("wxyz"), "answers": "ABCD"[i % 4]} for i in range(14)
    ],
}


@pytest.fixture
def folder(tmp_path):
    for name, documents in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(documents) if name.endswith(".json") else "\n".join(map(json.dumps, documents))
        path.write_text(text, encoding="utf-8")
    return tmp_path


def documents(name, folder):
    config = yaml.safe_load((tasks._FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return tasks.documents_of(config["local"], folder)


def test_worked_questions_stand_in_front(folder):
    (only,) = documents("mmlu", folder)
    assert only["shots"].startswith("The following are multiple choice questions (with answers) about a b.")
    assert only["shots"].count("Answer: C\n\n") == 5
    (only,) = documents("gsm8k", folder)
    assert (only["question"], only["number"]) == ("How many 5?", "1005")
    assert only["shots"].count("Question: ") == 5


def test_choices_and_truth(folder):
    assert documents("truthfulqa_mc1", folder)[0]["gold"] == 1
    mc2 = documents("truthfulqa_mc2", folder)[0]
    found = tasks._probability_of_the_true(mc2, [(-1.0, False), (-1.0, False), (-1.0, True)])
    assert found["acc"] == pytest.approx(2 / 3)
    golds = {
        name: [one["gold"] for one in documents(name, folder)] for name in tasks.GROUPS["glue"]
    }  # the first ten are left out
    assert golds["glue_sst2"] == golds["glue_sentiment"] == [0, 1, 0, 1]
    assert golds["glue_nli"] == [1, 0, 1, 0]
    assert golds["glue_mmlu"] == golds["glue_dialogue"] == [2, 3, 0, 1]


def test_f1_is_weighted_by_class():
    results = [(-1.0, False), (-2.0, False)]
    scored = [tasks._choice_and_truth({"gold": gold}, results) for gold in (0, 0, 0, 1)]
    assert [one["acc"] for one in scored] == [1, 1, 1, 0]
    precision, recall = 3 / 4, 1
    expected = 3 / 4 * 2 * precision * recall / (precision + recall)
    assert tasks._weighted_f1([one["f1"] for one in scored]) == pytest.approx(expected)


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(DataError, match=r"piqa.jsonl can't be read: .* It is published at https://"):
        documents("piqa", tmp_path)
    with pytest.raises(HyperParamsError, match=r"No local task arc_hard. There are arc, glue, "):
        tasks.local_tasks(["arc_hard"], tmp_path)


def test_the_harness_runs_all_of_them(folder, tok):
    pytest.importorskip("lm_eval", reason="pip install 'easyedit-rls[lm-eval]'")
    names = [*tasks.GROUPS, "gsm8k", "lambada", "mmlu", "piqa", "winogrande"]
    model = tiny_llama()
    model.config.max_position_embeddings = 1024  # worked problems are long
    found = abilities(model, tok, names, data=folder)
    assert found.keys() == set(tasks.local_names())
    assert set(found["glue_cola"]) == {"f1", "acc"}
    assert found["gsm8k"] == {"exact_match": 0}
    scores = [value for figures in found.values() for name, value in figures.items() if name != "perplexity"]
    assert all(0 <= score <= 1 for score in scores)
