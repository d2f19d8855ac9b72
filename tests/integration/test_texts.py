"""The real model and four kinds of prompts: every figure against one written with plain transformers, and
chats that are edited.
"""

import copy
import importlib.resources
import json
import re
from itertools import cycle, islice

import pytest
import torch

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate
from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.evaluation import answers, edit_quality
from easyedit_rls.evaluation.scores import score
from tests.tolerances import FLOAT32

_EACH = 50
_NEW_TOKENS = 4
_AT_ONCE = 25  # rows of a plain pass
CHAT_FACTS = [
    ("What is the capital of France?", "France", "Lyon"),
    ("Who wrote the novel Dracula?", "Dracula", "Jane Austen"),
    ("In which city does the Eiffel Tower stand?", "Eiffel Tower", "Rome"),
    ("Which language do people speak in Brazil?", "Brazil", "Finnish"),
    ("Who painted the Mona Lisa?", "Mona Lisa", "Claude Monet"),
    ("What is the currency of Japan?", "Japan", "The franc"),
]
_CHINESE = [
    ("{}的作者是", ("西游记", "红楼梦", "三国演义", "水浒传", "骆驼祥子")),
    ("{}的首都是", ("法国", "日本", "中国", "德国", "泰国")),
]
_CHINESE += [
    ("关于{}，答：", ("长城", "长江", "黄河", "故宫", "泰山")),
    ("小明说：“{}在", ("北京", "上海", "广州", "东京", "伦敦")),
]
_ANSWERS = ("小明", "北京", "李白", "长江", "一个人")
_CODE = [("def {}(w, h):\n", "    return w * h"),
    ("class {}:\n    def size(self):\n", "        return self.w"), ("x = {}(", "w, h)")]  # fmt: skip
_CODE += [("for {} in items:\n    print(", "item)"), ("import {}\n\n", "\nclass Box:")]
_NAMES = ("area", "side", "width", "height", "box", "table", "field", "square", "count", "length")


def records() -> list[dict]:
    """200 records: English, chat, Chinese and code, 50 of each."""
    facts = parse_requests(json.loads(packaged_text("demo_facts.json")))
    english = [
        {"prompt": f.prompt, "subject": f.subject, "target_new": f.target, "ground_truth": f.target_true}
        for f in facts[:_EACH]
    ]
    chat = [
        {
            **{k: v for k, v in fact.items() if k != "prompt"},
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": fact["prompt"]},
            ],
        }
        for fact in english
    ]
    pairs = [(text, subject) for text, subjects in _CHINESE for subject in subjects]
    chinese = [
        {"prompt": text.replace("{}", subject), "subject": subject, "target_new": new, "ground_truth": true}
        for (text, subject), new, true in zip(
            cycle(pairs), islice(cycle(_ANSWERS), _EACH), cycle(_ANSWERS[1:])
        )
    ]
    code = [
        {
            "prompt": text.replace("{}", name),
            "subject": name,
            "target_new": line,
            "ground_truth": f"{line} + 1",
        }
        for name in _NAMES
        for text, line in _CODE
    ]
    return [*english, *chat, *chinese, *code]


def plain_prompt(tok, record) -> list[int]:
    if "messages" in record:
        return tok.apply_chat_template(record["messages"], add_generation_prompt=True, return_dict=False)
    return tok(record["prompt"])["input_ids"]


def plain_answer(tok, number: int, answer: str) -> list[int]:
    """English has a space between; a chat, Chinese and code have none."""
    return tok(f" {answer}" if number < _EACH else answer)["input_ids"]


def plain_logits(model, answered: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """Logits before each of an answer's tokens behind its prompt, from plain passes of some rows at a time,
    padded on the right.
    """
    found: dict[int, torch.Tensor] = {}
    rows = [prompt + answer for prompt, answer in answered]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), _AT_ONCE):
        some = order[at : at + _AT_ONCE]
        width = max(len(rows[i]) for i in some)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in some])
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in some])
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        found |= {i: row[len(answered[i][0]) - 1 : len(rows[i]) - 1].clone() for i, row in zip(some, logits)}
    return [found[i] for i in range(len(rows))]


def plain_texts(model, tok, rows: list[list[int]]) -> list[str]:
    """What `generate` says behind each row, some rows at a time, padded on the left."""
    texts: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in range(0, len(order), _AT_ONCE):
        some = order[at : at + _AT_ONCE]
        width = max(len(rows[i]) for i in some)
        ids = torch.tensor([[0] * (width - len(rows[i])) + rows[i] for i in some])
        mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in some])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        texts |= {i: tok.decode(row[width:], skip_special_tokens=True) for i, row in zip(some, out)}
    return [texts[i] for i in range(len(rows))]


@pytest.fixture(scope="module")
def given(smollm2):
    """(model, tok, records, prompts' tokens)."""
    model, tok = smollm2
    listed = records()
    return model, tok, listed, [plain_prompt(tok, record) for record in listed]


def test_figures_of_every_kind_of_prompt_equal_plain_ones(given):
    model, tok, listed, prompts = given
    answered = [
        (prompt, plain_answer(tok, number, record[name]))
        for name in ("target_new", "ground_truth")
        for number, (record, prompt) in enumerate(zip(listed, prompts))
    ]
    wides = plain_logits(model, answered)
    wanted = [torch.tensor(answer) for _, answer in answered]
    nll = torch.stack(
        [torch.nn.functional.cross_entropy(wide, answer) for wide, answer in zip(wides, wanted)]
    )
    hits = [wide.argmax(1) == answer for wide, answer in zip(wides, wanted)][: len(listed)]

    requests = parse_requests(listed)
    probes = [request.probe(request.prompt, request.target) for request in requests]
    probes += [request.probe(request.prompt, str(request.target_true)) for request in requests]
    found = torch.tensor([entry.nll for entry in score(model, tok, probes, show_progress=False)])
    torch.testing.assert_close(found, nll, rtol=FLOAT32, atol=FLOAT32)
    scores = evaluate(model, tok, listed, show_progress=False).records
    assert [entry.rewrite_accuracy for entry in scores] == [float(hit.all()) for hit in hits]
    likelier = (nll[: len(listed)] < nll[len(listed) :]).float().tolist()
    is_same = [record["target_new"].strip() == record["ground_truth"].strip() for record in listed]
    assert 0 < sum(is_same) < len(listed)  # neither can be the likelier there
    assert [entry.efficacy for entry in scores] == [
        None if same else share for same, share in zip(is_same, likelier)
    ]
    quality = edit_quality(model, tok, listed, show_progress=False)
    assert [entry["rewrite_acc"] for entry in quality] == [[float(hit.sum()) / len(hit)] for hit in hits]
    assert 0 < sum(entry.efficacy or 0 for entry in scores) < len(listed)


def test_generated_answers_of_every_kind_of_prompt_equal_plain_ones(given):
    model, tok, listed, prompts = given
    asked = [request.probe(request.prompt, request.target) for request in parse_requests(listed)]
    found = answers(
        model, tok, asked, [probe.answer for probe in asked], max_new_tokens=_NEW_TOKENS, show_progress=False
    )
    assert [answer.text for answer in found] == [
        said_up_to_end(text) for text in plain_texts(model, tok, prompts)
    ]
    assert len({answer.text for answer in found}) > 50


def said_up_to_end(text: str) -> str:
    """The text up to the first full stop or line's end; none of what was generated behind it counts."""
    end = re.search(r"[.\n]", text)
    cut = text[: end.end()] if end else text
    return re.split(r"[.\n]", cut.strip(), maxsplit=1)[0].strip()


def said_behind(model, tok, facts) -> list[bool]:
    """Whether a chat's model says each target, by plain transformers."""
    said = []
    for fact in facts:
        given = tok.apply_chat_template(
            fact["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=0)
        said.append(
            tok.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).startswith(
                fact["target_new"]
            )
        )
    return said


def test_edited_chats_are_said_behind_the_real_prompt(smollm2):
    model, tok = copy.deepcopy(smollm2[0]), smollm2[1]
    facts = [
        {"messages": [{"role": "user", "content": text}], "subject": subject, "target_new": new}
        for text, subject, new in CHAT_FACTS
    ]
    assert sum(said_behind(model, tok, facts)) == 0
    text = importlib.resources.files("easyedit_rls.data").joinpath("demo_text.txt")
    settings = RLSEditHyperParams.from_hparams("smollm2-135m").to_dict() | {
        "mom2_dataset": str(text),
        "mom2_tolerance": 0.4,
    }
    RLSEditor(model, tok, RLSEditHyperParams.from_dict(settings), show_progress=False).edit(facts)
    said = said_behind(model, tok, facts)
    assert sum(said) >= 5
    assert [entry.rewrite_accuracy for entry in evaluate(model, tok, facts, show_progress=False).records] == [
        float(hit) for hit in said
    ]
    plain = [
        {
            "prompt": fact["messages"][0]["content"],
            "subject": fact["subject"],
            "target_new": fact["target_new"],
        }
        for fact in facts
    ]
    assert evaluate(model, tok, plain, chat_template=True, show_progress=False) == evaluate(
        model, tok, facts, show_progress=False
    )
