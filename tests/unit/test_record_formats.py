"""Files of edit records in every format that people publish, and how each field is understood."""

import json
import math

import pytest

from easyedit_rls.data.records import read_file, read_records
from tests.unit.conftest import BIGEDIT, COUNTERFACT, FLAT, KNOWEDIT, LEAST, QAEDIT, UNKE, ZSRE, write


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_every_format_in_one_file(tmp_path, name):
    counterfact, zsre, knowedit, flat, least = read_records(
        write(tmp_path / name, [COUNTERFACT, ZSRE, KNOWEDIT, FLAT, LEAST])
    )
    assert counterfact.request.case_id == 7
    assert counterfact.request.paraphrases == ("Ada comes from", "Ada's home is")
    assert counterfact.easyedit["rephrase_prompt"] == "Ada comes from"
    near = {"prompt": ["Grace was born in", "Emmy was born in"], "ground_truth": ["London", "London"]}
    assert counterfact.easyedit["locality"] == {"neighborhood": near}
    assert [(probe.prompt, probe.answer) for probe in counterfact.request.neighbors] == list(
        zip(*near.values())
    )
    assert counterfact.generation_prompts == ("Ada lives in",)

    assert (zsre.request.subject, zsre.request.target, zsre.request.target_true) == (
        "Watts Humphrey",
        "University of Michigan",
        "Trinity College",
    )
    assert zsre.easyedit["locality"]["neighborhood"] == {
        "prompt": [ZSRE["loc"]],
        "ground_truth": ["Hugo Weaving"],
    }
    assert zsre.easyedit["portability"] == {
        "one_hop": {"prompt": [ZSRE["portability"]["New Question"]], "ground_truth": ["Michigan"]}
    }
    assert zsre.request.case_id == 1

    assert knowedit.request.target_true == "Canidae"
    assert knowedit.easyedit["portability"] == {
        "Reasoning": {"prompt": ["Leo's relatives are"], "ground_truth": ["cats"]}
    }
    assert knowedit.easyedit["locality"]["Relation_Specificity"]["ground_truth"] == ["Africa", "male"]
    assert knowedit.easyedit["rephrase_prompt"] is None

    assert flat.easyedit["locality"] == {
        "neighborhood": {"prompt": ["Grace speaks"], "ground_truth": ["Dutch"]}
    }
    assert len(flat.request.neighbors) == 1
    assert (least.request.prompt, least.request.target_true) == ("The owner of the shop is", None)
    assert least.easyedit["locality"] == least.easyedit["portability"] == {}


REWRITES = [
    {"prompt": "{} was performed by", "subject": "Hey Jude", "question": "Who performed Hey Jude?",
        "target_new": {"str": "Madonna"}, "target_true": {"str": "The Beatles"}},
    {"prompt": "{} is a citizen of", "subject": "Madonna", "question": "Of what country is Madonna?",
        "target_new": {"str": "Peru"}},
]  # fmt: skip
MQUAKE = {"case_id": 7, "requested_rewrite": REWRITES, "questions": ["Whose citizen?", "Of where?"],
    "new_answer": "Peru", "answer": "UK"}  # fmt: skip
AKEW = {
    **COUNTERFACT,
    "requested_rewrite": {**COUNTERFACT["requested_rewrite"],
        "prompt_full": "Where was Ada born? Ada was born in", "fact_new_uns": "Ada is of Rome. So they say.",
        "unsfact_triplets_GPT": [{"subject": "Ada", "prompt": "{} is of", "target": "Rome"}]},
}  # fmt: skip


def test_a_chain_of_edits_is_an_edit_each(tmp_path):
    path = write(tmp_path / "r.json", [MQUAKE, {**MQUAKE, "case_id": 8}])
    first, second, *_ = found = read_file(path, count=1).records
    assert len(found) == 2  # a record is never cut apart
    assert [record.request.case_id for record in found] == ["7.0", "7.1"]
    assert (first.request.prompt, first.request.target, first.request.target_true) == (
        "Hey Jude was performed by",
        "Madonna",
        "The Beatles",
    )
    assert second.request.target_true is None
    assert first.easyedit["portability"] == {
        "single_hop": {"prompt": ["Who performed Hey Jude?"], "ground_truth": ["Madonna"]}
    }
    asked = second.easyedit["portability"]
    assert asked["single_hop"]["ground_truth"] == ["Peru"]
    assert asked["multi_hop"] == {"prompt": ["Whose citizen?", "Of where?"], "ground_truth": ["Peru", "Peru"]}
    assert [record.index for record in read_records(path)] == [0, 0, 1, 1]


def test_formats_with_other_names(tmp_path):
    qaedit, bigedit, unke, akew = read_records(write(tmp_path / "r.json", [QAEDIT, BIGEDIT, UNKE, AKEW]))
    assert (qaedit.request.target, qaedit.request.case_id) == ("Wilt", 1104)
    assert qaedit.request.paraphrases == ("Who scored 70 most often?",)
    near = {"prompt": ["who protects police officers", "when did she"], "ground_truth": ["Michael", "1994"]}
    assert qaedit.easyedit["locality"] == {"neighborhood": near}
    assert [probe.answer for probe in qaedit.request.neighbors] == ["Michael", "1994"]

    assert (bigedit.request.prompt, bigedit.request.target) == ("Which team has Olu?", "Hull")
    assert bigedit.easyedit["portability"] == {
        "personas": {"prompt": ["Aye, which team be Olu's?"], "ground_truth": ["Hull"]},
        "mhop": {"prompt": ["In which city does Olu play?"], "ground_truth": ["Kingston"]},
    }
    assert bigedit.easyedit["locality"] == {
        "neighborhood": {"prompt": ["Who leads Mali?"], "ground_truth": ["Bob"]}
    }

    assert (unke.request.before, unke.request.subject, unke.request.after) == ("", "Who was Ada?", "")
    assert (unke.request.target, unke.request.paraphrases) == ("A long text.", ("Tell of Ada.",))
    assert unke.easyedit["portability"] == {"sub_question": {"prompt": ["When?"], "ground_truth": ["1815"]}}

    assert (akew.request.prompt, akew.request.target) == (
        "Where was Ada born? Ada was born in",
        "Ada is of Rome. So they say.",
    )
    assert akew.easyedit["portability"] == {
        "sub_question": {"prompt": ["Ada is of"], "ground_truth": ["Rome"]}
    }
    assert len(akew.request.neighbors) == 2


def test_items_of_easyedits_data_sets(tmp_path):
    """WikiBigEdit's, MQuAKE's and AKEW's classes give these."""
    big = {**FLAT, "rephrase": "Ada talks", "locality": "Who leads Mali?", "locality_ans": "Bob"}
    big |= {"portability_personas": "Aye?", "portability_hop": "Of where?", "portability_hop_ans": "Peru"}
    for name in ("rephrase_prompt", "locality_prompt", "locality_ground_truth"):
        del big[name]
    chain = {**LEAST, "portability_prompt": ["a", "b"], "portability_ground_truth": ["c", "d"]}
    many = {**LEAST, "rephrase": ["x", "y"], "locality": ["a", "b"], "locality_ans": ["c", "d"]}
    big_edit, chained, manifold = read_records(write(tmp_path / "r.json", [big, chain, many]))
    assert big_edit.request.paraphrases == ("Ada talks",)
    assert big_edit.easyedit["locality"] == {
        "neighborhood": {"prompt": ["Who leads Mali?"], "ground_truth": ["Bob"]}
    }
    hops = {
        "personas": {"prompt": ["Aye?"], "ground_truth": ["French"]},
        "hop": {"prompt": ["Of where?"], "ground_truth": ["Peru"]},
    }
    assert big_edit.easyedit["portability"] == hops
    assert chained.easyedit["portability"] == {"one_hop": {"prompt": ["a", "b"], "ground_truth": ["c", "d"]}}
    assert manifold.request.paraphrases == ("x", "y")
    assert [(probe.prompt, probe.answer) for probe in manifold.request.neighbors] == [("a", "c"), ("b", "d")]


def test_neighbors_with_answers_of_their_own(tmp_path):
    near = [{"prompt": "nq question: who?", "target": " Bob"}, "Emmy was born in"]
    (record,) = read_records(write(tmp_path / "r.json", [{**COUNTERFACT, "neighborhood_prompts": near}]))
    assert [(probe.prompt, probe.answer) for probe in record.request.neighbors] == [
        ("nq question: who?", " Bob"),
        ("Emmy was born in", "London"),
    ]


def test_a_table(tmp_path):
    columns = (
        "topic,subject,relation,object,question,output_llama,eval_llama,multiple_choices,"
        "paraphrased_question,"
    )
    columns += (
        "multiple_choice_with_letters,multiple_choice_labels,yes_question,no_question,locality_question,"
    )
    columns += "reversed_relation_question,question_2hop,answer_2hop,question_3hop,answer_3hop"
    row = (
        'art,Moses,of,marble,"Of what is Moses, made?",Papyrus,0.0,x,'
        "From what is Moses?,A. marble  B. bronze,A,"
    )
    row += '"Is Moses of ""marble""?",Is it of bronze?,Who led?,What is of marble?,Who made it?,Michel,,'
    (tmp_path / "r.csv").write_text(f"\ufeff{columns}\r\n{row}\r\n", encoding="utf-8")
    found = read_file(tmp_path / "r.csv")
    (record,) = found.records
    assert (found.unknown, dict(found.formats)) == ((), {"HalluEditBench": 1})
    assert (record.request.prompt, record.request.subject, record.request.target) == (
        "Of what is Moses, made?",
        "Moses",
        "marble",
    )
    assert record.request.paraphrases == ("From what is Moses?",)
    assert {name: tuple(pair.values()) for name, pair in record.easyedit["portability"].items()} == {
        "multiple_choice": (["Of what is Moses, made? A. marble  B. bronze"], ["A"]),
        "yes": (['Is Moses of "marble"?'], ["Yes"]),
        "no": (["Is it of bronze?"], ["No"]),
        "reversed_relation": (["What is of marble?"], ["Moses"]),
        "2hop": (["Who made it?"], ["Michel"]),
    }


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.JSONL", "r.json"])
def test_lines_end_at_line_feeds_alone(tmp_path, name):
    """U+2028 and U+0085 end lines for `str.splitlines`, not for JSON lines; a byte-order mark is none of the
    text.
    """
    records = [{**LEAST, "target_new": f"Ann{sign}Lee"} for sign in ("\u2028", "\x85")]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = f"[{','.join(lines)}]" if name.endswith(".json") else "\r\n".join([*lines, ""])
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [record.request.target for record in read_records(tmp_path / name)] == [
        "Ann\u2028Lee",
        "Ann\x85Lee",
    ]


@pytest.mark.parametrize("nothing", [None, "", " ", [], [""], [[]], {"str": ""}])
def test_a_true_answer_that_nobody_knows_is_no_fault(tmp_path, nothing):
    (record,) = read_records(write(tmp_path / "r.json", [{**LEAST, "ground_truth": nothing}]))
    assert record.request.target_true is None


def test_easyedits_own_names_decide_whatever_else_a_record_holds(tmp_path):
    more = {"question": "What is it?", "object": "Paris", "update": "x", "ans": "y", "src": "x", "alt": ""}
    (record,) = read_file(write(tmp_path / "r.json", [{**LEAST, **more}])).records
    assert (record.request.prompt, record.request.target) == ("The owner of the shop is", "Ann")


@pytest.mark.parametrize("record", [
    {"text": "Ada speaks", "subject": "Ada", "target_new": "French"},
    {"prompt": "Ada speaks", "concept": "Ada", "labels": "French"},
    {"text": "Ada speaks", "concept": "Ada", "labels": "French"},
])  # fmt: skip
def test_knowedits_names_may_be_mixed(tmp_path, record):
    (read,) = read_records(write(tmp_path / "r.json", [record]))
    assert (read.request.prompt, read.request.subject, read.request.target) == ("Ada speaks", "Ada", "French")


@pytest.mark.parametrize("true", [None, {"str": ""}, {"str": math.nan}, {"str": "<|endoftext|>"}])
def test_neighbors_without_an_answer_are_left_out(tmp_path, true):
    """The last is what stands for the true answer in MEMIT's ZsRE."""
    near = ["Emmy was born in", {"prompt": "nq question: who?", "target": "Bob"}]
    fact = {**COUNTERFACT["requested_rewrite"], "target_true": true}
    (record,) = read_records(
        write(tmp_path / "r.json", [{**COUNTERFACT, "requested_rewrite": fact, "neighborhood_prompts": near}])
    )
    assert record.request.target_true is None
    assert [(probe.prompt, probe.answer) for probe in record.request.neighbors] == [
        ("nq question: who?", "Bob")
    ]


def test_braces_in_a_question_are_text(tmp_path):
    (record,) = read_records(write(tmp_path / "r.json", [{**UNKE, "question": "What does {} mean?"}]))
    assert record.request.prompt == record.request.subject == "What does {} mean?"
