"""Chats: requests with messages, prompts as a template writes them, templates within the user's turn."""

import json

import pytest

from easyedit_rls.cli.compare import _check
from easyedit_rls.compare.plan import Contender
from easyedit_rls.data.records import read_records
from easyedit_rls.data.requests import EditRequest, Probe, as_chat, parse_requests
from easyedit_rls.errors import HyperParamsError, LayoutError, RequestError
from easyedit_rls.evaluation import edit_quality, evaluate, generate
from easyedit_rls.facts.keys import locate_facts
from easyedit_rls.model.chat import prepare
from easyedit_rls.model.subject import answer_rows, prompt_rows, subject_tokens
from tests.conftest import tiny_llama, tiny_settings
from tests.tokenizers import byte_level

CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TRIMS = "<s>" + CHATML.replace("m.content", "m.content | trim")
LLAMA2 = (
    "{% for m in messages %}"
    "{{ '<s>[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' <end>' }}"
    "{% endfor %}"
)
ONLY_USERS = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}"
    "{{ m.content }}\n{% endfor %}Answer:"
)
SHOUTS = CHATML.replace("m.content", "m.content | upper")

EARLIER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."}]  # fmt: skip
CHAT = {"messages": [*EARLIER, {"role": "user", "content": "What is bread made of?"}], "subject": "bread",
    "target_new": "Leaves", "ground_truth": "Flour", "rephrase_prompt": "Tell me what bread is made of.",
    "locality": {"n": {"prompt": "What is cake made of?", "ground_truth": "Flour"}}}  # fmt: skip
TURNS = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."))


@pytest.fixture
def chat_tok(demo_text):
    def make(template):
        tok = byte_level(demo_text, ("<s>",))
        tok.chat_template = template
        return tok

    return make


def messages_of(chat, text):
    return [{"role": role, "content": content} for role, content in (*chat, ("user", text))]


def test_messages_are_a_request():
    (request,) = parse_requests(CHAT)
    assert (request.before, request.subject, request.after, request.chat) == (
        "What is ",
        "bread",
        " made of?",
        TURNS,
    )
    assert request.neighbors == (Probe("What is cake made of?", "Flour", None, TURNS),)
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    (alone,) = parse_requests({**CHAT, "messages": [{"role": "user", "content": "What is {} made of?"}]})
    assert (alone.prompt, alone.chat) == ("What is bread made of?", ())
    (plain,) = parse_requests(
        {**{k: v for k, v in CHAT.items() if k != "messages"}, "prompt": "What is {} made of?"}
    )
    assert (
        as_chat([plain, request]) == parse_requests([plain, request], chat_template=True) == [alone, request]
    )
    assert EditRequest.from_dict(json.loads(json.dumps(alone.to_dict()))) == alone
    assert len({plain.question, alone.question, request.question}) == 3


@pytest.mark.parametrize(("messages", "message"), [
    ([], "is no list of turns"),
    ("What is bread?", "is no list of turns"),
    ([{"role": "user"}], "has turn 0.*both texts"),
    ([{"role": "user", "content": ["bread"]}], "has turn 0"),
    (EARLIER, "ends in a turn of the 'assistant'. Let the user's"),
    ([{"role": "user", "content": " "}], "empty turn"),
    ([{"role": "user", "content": "What is cake?"}], "does not contain the subject 'bread'"),
])  # fmt: skip
def test_faults_in_messages_are_named(messages, message):
    with pytest.raises(RequestError, match=f"Request 1, field 'messages': .*{message}"):
        parse_requests([CHAT, {**CHAT, "messages": messages}])


def test_a_prompt_beside_messages_is_refused():
    with pytest.raises(RequestError, match=r"Request 0, field 'messages': stands beside a prompt\. Give one"):
        parse_requests({**CHAT, "prompt": "What is bread made of?"})
    with pytest.raises(RequestError, match=r"Request 0, field 'messages': stands beside a prompt\. Give one"):
        edit_quality(None, None, [{**CHAT, "prompt": "What is bread made of?"}])


@pytest.mark.parametrize("template", [CHATML, TRIMS, LLAMA2, ONLY_USERS])
@pytest.mark.parametrize("text", ["What is bread?", "  What is bread?\n", "bread"])
@pytest.mark.parametrize("chat", [(), TURNS[1:2]])
def test_a_chat_is_what_the_template_makes_of_it(chat_tok, template, text, chat):
    tok = chat_tok(template)
    messages = messages_of(chat, text)
    plain = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_rows(tok, [Probe(text, "", None, chat)]) == [tuple(plain)]
    at = text.index("bread")
    ids, inside = subject_tokens(tok, text[:at], "bread", text[at + 5 :], chat)
    assert tok.decode([ids[i] for i in inside]).strip(" \n?") == "bread"
    (row,) = answer_rows(tok, [Probe(text, "Leaves", None, chat)])
    between = " " if template == LLAMA2 else ""
    assert (
        tok.decode(row.ids)
        == tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + between + "Leaves"
    )
    (row,) = answer_rows(tok, [Probe(text, "Leaves", "\n", chat)])  # its own joint wins
    assert tok.decode(row.target) == "\nLeaves"
    assert row.ids[: row.target_start] == tuple(plain)


def test_templates_stand_within_the_users_turn(chat_tok):
    tok = chat_tok(CHATML)
    (fact,) = locate_facts(tok, parse_requests(CHAT), ["It is so. "], ["{}:"])
    head = "<|system|>\nBe brief.<end>\n<|user|>\nHi<end>\n<|assistant|>\nHello.<end>\n<|user|>\n"
    tail = "What is bread made of?<end>\n<|assistant|>\nLeaves"
    assert [tok.decode(row.ids) for row in fact.rows] == [head + tail, head + "It is so. " + tail]
    assert [tok.decode(row.ids) for row in (*fact.statements, fact.kl_prompt)] == [
        "<s>bread: Leaves",
        "<s>bread is a",
    ]
    assert all(tok.decode([row.ids[row.place]]).strip() in "bread" for row in fact.rows)


def test_without_a_template_chats_are_refused(demo_text):
    tok = byte_level(demo_text)
    with pytest.raises(LayoutError, match=r"has no chat template.*tok\.chat_template, or use plain prompts"):
        locate_facts(tok, parse_requests(CHAT), [])


def test_what_a_template_refuses_or_changes_is_refused(chat_tok):
    with pytest.raises(
        RequestError,
        match=r"Request 0, field 'messages': The chat template refuses turns of system, .*only users.*Change",
    ):
        locate_facts(chat_tok(ONLY_USERS), parse_requests(CHAT), [])
    with pytest.raises(RequestError, match="The chat template changes the user's turn 'What is bread"):
        prepare(chat_tok(SHOUTS), [("What is bread", None, ())])
    with pytest.raises(RequestError, match="leaves the user's turn out"):
        prepare(chat_tok("Hello"), [("What is bread", None, ())])


def test_every_metric_takes_chats_and_makes_them(chat_tok):
    model, tok = tiny_llama(900), chat_tok(CHATML)
    plain = {**{k: v for k, v in CHAT.items() if k != "messages"}, "prompt": "What is bread made of?"}
    chat = {**CHAT, "messages": [{"role": "user", "content": "What is bread made of?"}]}
    assert evaluate(model, tok, plain, chat_template=True) == evaluate(model, tok, chat)
    assert edit_quality(model, tok, [plain], chat_template=True) == edit_quality(model, tok, [chat])
    spoken = [text["role"] for text in chat["messages"]]
    assert spoken == ["user"]
    wanted = tok.apply_chat_template(chat["messages"], add_generation_prompt=True, tokenize=False)
    assert generate(
        model, tok, [Probe("What is bread made of?", "", None, ())], max_new_tokens=6
    ) == generate(model, byte_level_without_start(tok), [wanted], max_new_tokens=6)


def byte_level_without_start(tok):
    class Plain:
        """The tokenizer without its post-processor."""

        def __getattr__(self, name):
            return getattr(tok, name)

        def __call__(self, texts, add_special_tokens=True, **kwargs):
            return tok(texts, add_special_tokens=False, **kwargs)

    return Plain()


def test_records_of_chats(tmp_path):
    (tmp_path / "records.json").write_text(json.dumps([CHAT]), encoding="utf-8")
    (record,) = read_records(tmp_path / "records.json")
    assert record.request == parse_requests({**CHAT, "case_id": 0})[0]
    assert record.easyedit["messages"] == CHAT["messages"]
    assert "prompt" not in record.easyedit


def test_comparisons_have_one_form():
    hparams = tiny_settings("llama", chat_template=True)
    _check([Contender("RLSEdit"), Contender("RLSEdit--b", {"chat_template": True})], hparams)
    with pytest.raises(
        HyperParamsError, match=r"RLSEdit--b has a chat_template of its own.*chat_template=true"
    ):
        _check([Contender("RLSEdit--b", {"chat_template": False})], hparams)
    with pytest.raises(HyperParamsError, match="MEMIT edits plain prompts only"):
        _check([Contender("MEMIT")], hparams)
