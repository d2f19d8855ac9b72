"""Which facts are put in front of a prompt, and in which order; what is remembered of them."""

import pytest
import torch

from easyedit_rls import HyperParamsError, parse_requests
from easyedit_rls.cli.compare import _check
from easyedit_rls.compare.plan import Contender
from easyedit_rls.editors.base import EDITORS, Setup
from tests.conftest import tiny_settings


def fact(prompt, subject, target, **more):
    return {"prompt": prompt, "subject": subject, "target_new": target, **more}


ADA = fact("{} was born in", "Ada", "Rome")
RIVER = fact("The river {} flows through", "Oder", "Spain")
SETTINGS = {"template": "[{}]"}


def editor(*batches, **settings):
    made = EDITORS.get("InContext").begin(Setup(None, None, None, (), {**SETTINGS, **settings}))
    for batch in batches:
        made.edit(parse_requests(batch))
    return made


def test_the_facts_of_a_prompts_subjects_stand_in_the_order_of_edits():
    one = editor([RIVER], [ADA, fact("{} died in", "Ada", "Bonn")])
    assert one.in_front("Hybrid vehicles. Ada came from") == "[Ada was born in Rome][Ada died in Bonn]"
    assert (
        one.in_front("Ada swam in the Oder, as did")
        == "[The river Oder flows through Spain][Ada was born in Rome][Ada died in Bonn]"
    )
    assert one.in_front("Grace was born in") == ""
    assert editor().in_front("Ada was born in") == ""


def test_a_template_of_ones_own_leaves_braces_in_a_fact_alone():
    one = editor([fact("{} is", "the set", "{} or {0}")], template="Mind: {}.\n")
    assert one.in_front("Of the set") == "Mind: the set is {} or {0}.\n"
    assert editor([ADA]).describe() == {"template": "[{}]", "n_facts": 4}


@pytest.mark.parametrize(
    ("prompt", "is_there"),
    [
        ("What Ada's mother", True),
        ("(Ada)", True),
        ("ADA was", False),
        ("Adam was", False),
        ("Nevada and Canada", False),
        ("Canada, then Ada", True),
    ],
)
def test_a_subject_is_whole_words_and_letter_by_letter(prompt, is_there):
    assert bool(editor([ADA]).in_front(prompt)) is is_there


def test_a_subject_is_found_however_accents_and_spaces_are_written():
    one = editor([fact("{} lives in", "Ren\u00e9 Char", "Bern")])
    assert one.in_front("What Rene\u0301\u00a0Char wrote")
    assert not one.in_front("What Rene Char wrote")


def test_a_subject_in_a_script_without_spaces_has_letters_beside_it():
    assert editor([fact("{}的首都是", "波兰", "罗马")]).in_front("请问波兰的首都") == "[波兰的首都是罗马]"


def test_of_facts_that_contradict_each_other_the_newest_counts():
    """It stands where it was edited; a fact that the same prompt does not ask for stays."""
    one = editor([ADA, fact("{} died in", "Ada", "Bonn")], [fact("{}  was born in", "Ada", "Oslo")])
    assert one.in_front("Ada") == "[Ada died in Bonn][Ada  was born in Oslo]"


def test_of_too_many_facts_longer_subjects_and_newer_facts_go_first():
    names = [fact("{} paints", "Ada", "well"), fact("{} paints", "Ada Lee", "houses")]
    more = [fact("{} sings", "Ada", "low"), fact("{} reads", "Ada", "a lot")]
    prompt = "Ada Lee is"
    wanted = ["[Ada paints well]", "[Ada Lee paints houses]", "[Ada sings low]", "[Ada reads a lot]"]
    kept = {1: [1], 2: [1, 3], 3: [1, 2, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3]}
    for n_facts, which in kept.items():
        found = editor(names, more, n_facts=n_facts).in_front(prompt)
        assert found == "".join(wanted[i] for i in which)


def test_a_chats_fact_is_the_users_turn_with_its_answer():
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who leads Ada?"}]
    one = editor([{"messages": asked, "subject": "Ada", "target_new": "Ann"}])
    assert one.in_front("Tell me of Ada") == "[Who leads Ada? Ann]"
    _check([Contender("InContext")], tiny_settings("llama", chat_template=True))


def test_it_goes_on_from_its_memory():
    batches = [[ADA, RIVER], [fact("{} was born in", "Ada", "Oslo"), fact("{} lives in", "Zoë", "Köln")]]
    whole, begun, again = editor(*batches), editor(batches[0]), editor()
    memory = begun.memory()
    assert {name: tensor.dtype for name, tensor in memory.items()} == {"facts": torch.uint8}
    assert not editor().remember(memory, 2)  # one batch more than it knows of
    assert not editor().remember({}, 1)
    assert again.remember(memory, 1)
    again.edit(parse_requests(batches[1]))
    for prompt in ("Ada", "the Oder", "Zoë"):
        assert again.in_front(prompt) == whole.in_front(prompt) != ""
    assert editor().remember(editor().memory(), 0)
    assert torch.equal(again.memory()["facts"], whole.memory()["facts"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "no place"}, r"template is 'no place'; allowed: a text with \{\} once"),
        ({"template": "{} {}"}, "with {} once"),
        ({"template": 3}, "template is 3"),
        ({"n_facts": 0}, "n_facts is 0; allowed: 1 or above"),
        ({"n_facts": 1.5}, "n_facts of the editor InContext is 1.5; allowed: whole numbers"),
        ({"n_fact": 2}, r"editor InContext has no setting 'n_fact'. Did you mean n_facts\?"),
    ],
)
def test_settings_are_refused_before_any_work(settings, message):
    with pytest.raises(HyperParamsError, match=message):
        _check([Contender("InContext", settings)], tiny_settings("llama"))


def test_editors_put_nothing_in_front_of_prompts_unless_they_say_so():
    others = [EDITORS.get(name) for name in EDITORS.names() if name != "InContext"]
    assert all(cls.in_front(None, "Ada was born in") == "" for cls in others)
