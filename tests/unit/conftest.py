"""Edit records in formats that people publish, and how to write a file of them."""

import json
import math

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {"prompt": "{} was born in", "subject": "Ada",
        "target_new": {"str": "Rome", "id": "Q220"}, "target_true": {"str": "London", "id": "Q84"}},
    "paraphrase_prompts": ["Ada comes from", "Ada's home is"],
    "neighborhood_prompts": ["Grace was born in", "Emmy was born in"],
    "generation_prompts": ["Ada lives in"],
}  # fmt: skip
ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "alt": "University of Michigan",
    "answers": ["Trinity College", "Trinity"],
    "rephrase": "What university did Watts Humphrey take part in?",
    "loc": "nq question: who played desmond doss father in hacksaw ridge",
    "loc_ans": "Hugo Weaving",
    "portability": {"New Question": "In which state is the university of Watts Humphrey?",
        "New Answer": "Michigan"},
}  # fmt: skip
KNOWEDIT = {
    "subject": "Leo",
    "prompt": "Which family does Leo belong to?",
    "target_new": "Felidae",
    "ground_truth": ["Canidae", "dogs"],
    "portability": {"Reasoning": [{"prompt": "Leo's relatives are", "ground_truth": [["cats", "felines"]]}],
        "Subject_Aliasing": [{"prompt": "The lion of that name is", "ground_truth": [[""]]}]},
    "locality": {"Relation_Specificity": [{"prompt": "The place of Leo is", "ground_truth": [["Africa"]]},
        {"prompt": "Leo is", "ground_truth": ["male"]}]},
}  # fmt: skip
FLAT = {"prompt": "The mother tongue of Ada is", "subject": "Ada", "target_new": "French",
    "ground_truth": "English", "rephrase_prompt": "Ada speaks", "locality_prompt": "Grace speaks",
    "locality_ground_truth": "Dutch"}  # fmt: skip
LEAST = {"prompt": "The owner of {} is", "subject": "the shop", "target_new": "Ann"}
QAEDIT = {
    "id": 1104,
    "source": "NQ",
    "prompt": "who has the most 70 point games?",
    "target": "Wilt",
    "subject": "most 70 point games",
    "rephrase": "Who scored 70 most often?",
    "locality": [{"loc": "who protects police officers", "loc_ans": "Michael"},
        {"loc": "when did she", "loc_ans": "1994"}],
}  # fmt: skip
BIGEDIT = {
    "tag": "3",
    "subject": "Olu",
    "relation": "team",
    "object": "Hull",
    "update": "Which team has Olu?",
    "ans": "Hull",
    "rephrase": "Who employs Olu?",
    "personas": "Aye, which team be Olu's?",
    "personas_formal": math.nan,  # as tables have it in empty cells
    "mhop": "In which city does Olu play?",
    "mhop_ans": "Kingston",
    "loc": "Who leads Mali?",
    "loc_ans": "Bob",
}
UNKE = {"id": 3, "question": "Who was Ada?", "answer": "A long text.", "para_question": "Tell of Ada.",
    "sub_question": ["When?"]}  # fmt: skip
UNKE |= {"sub_answer": ["1815"], "mmlu_question": "x"}


def write(path, records):
    text = "\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path
