"""Edit records as the authors of data sets publish them, one reader a format.

A format is told by a record's fields. `readers` has what makes edits of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from easyedit_rls.data import readers
from easyedit_rls.data.readers import FLAT, OTHER_NAMES, SHARED, Flat

Tells = Callable[[Mapping[str, Any]], bool]
Read = Callable[[Mapping[str, Any]], list[Flat]]


@dataclass(frozen=True)
class Format:
    """A published format.

    Attributes:
        name: of the data set that has it.
        tells: whether a record has it; asked in the order of `FORMATS`.
        read: gives a record's edits.
        fields: all that its records hold, whether they are read or not, those of ``requested_rewrite`` among
            them.
        beginnings: of further fields' names.
        names: what the format calls a field that our messages would name otherwise.
    """

    name: str
    tells: Tells
    read: Read
    fields: frozenset[str]
    beginnings: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def unknown(self, raw: Mapping[str, Any]) -> list[str]:
        """Fields of a record that the format does not have."""
        rewrites = raw.get("requested_rewrite")
        inner = (
            [rewrites] if isinstance(rewrites, Mapping) else rewrites if isinstance(rewrites, list) else []
        )
        names = [*raw, *(name for part in inner if isinstance(part, Mapping) for name in part)]
        unread = (
            name for name in dict.fromkeys(map(str, names)) if name not in self.fields and name not in SHARED
        )
        return [name for name in unread if not name.startswith(self.beginnings)]


def format_of(raw: Mapping[str, Any]) -> Format:
    """The format of a record. One that has EasyEdit's own names is read by these, whatever else it holds."""
    is_flat = _has("prompt", "target_new")(raw) or "messages" in raw
    return FORMATS[-1] if is_flat else next(one for one in FORMATS if one.tells(raw))


def _has(*names: str, but: str = "") -> Tells:
    return lambda raw: all(name in raw for name in names) and but not in raw


def _is_chain(raw: Mapping[str, Any]) -> bool:
    return isinstance(raw.get("requested_rewrite"), list)


_SECTIONS = (
    "locality locality_ans locality_prompt locality_ground_truth "
    "portability portability_prompt portability_ground_truth "
    "portability_personas portability_hop portability_hop_ans"
)
_REWRITE = (
    "requested_rewrite prompt subject target_new target_true relation_id question "
    # AKEW's
    "prompt_full fact_new fact_true fact_new_uns unsfact_triplets_GPT subject_id time_new time_true "
    "answer_GPT answer_new answer_new_alias answer_true answer_true_alias target_old loc loc_ans"
)
_CHAIN = (
    "questions answer answer_alias answer_extended new_answer new_answer_alias new_answer_extended "
    "single_hops new_single_hops orig"
)
_HALLU = (
    "topic subject relation object question "
    "multiple_choices multiple_choice_with_letters multiple_choice_labels "
    "paraphrased_question yes_question no_question locality_question reversed_relation_question"
)
_COUNTERFACT = (
    f"{_REWRITE} pararel_idx paraphrase_prompts neighborhood_prompts attribute_prompts generation_prompts"
)
_ZSRE = "subject src alt pred rephrase answers loc loc_ans cond portability"
_BIGEDIT = "tag subject relation object update ans rephrase loc loc_ans mhop mhop_ans ground_truth timestep"
_UNKE = "id question answer para_question para_answer sub_question sub_answer"
_QAEDIT = "id source prompt target subject rephrase locality portability ground_truth"
_EASYEDIT = f"{FLAT} {_SECTIONS} {' '.join(OTHER_NAMES.values())} id"


_is_hallu = _has("question", "object", "subject")
# Our name = theirs, where it is another
_ZSRE_NAMES = "prompt=src target_new=alt rephrase_prompt=rephrase ground_truth=answers"
_BIGEDIT_NAMES = "prompt=update target_new=ans rephrase_prompt=rephrase"
_HALLU_NAMES = "prompt=question target_new=object rephrase_prompt=paraphrased_question"
_HALLU_BEGINNINGS = "output_ eval_ question_ answer_"
_UNKE_NAMES = "prompt=question subject=question target_new=answer rephrase_prompt=para_question"
_QAEDIT_NAMES = "target_new=target rephrase_prompt=rephrase"


def _format(
    name: str, tells: Tells, read: Read, fields: str, names: str = "", beginnings: str = ""
) -> Format:
    """A format; `names` are pairs of our name and its own, `fields` and `beginnings` as they are."""
    theirs = dict(pair.split("=") for pair in names.split())
    return Format(name, tells, read, frozenset(fields.split()), tuple(beginnings.split()), theirs)


FORMATS = (
    _format("MQuAKE", _is_chain, readers.mquake, f"{_REWRITE} {_CHAIN}"),
    _format("CounterFact", _has("requested_rewrite"), readers.counterfact, _COUNTERFACT),
    _format("ZsRE", _has("src", "alt"), readers.zsre, _ZSRE, _ZSRE_NAMES),
    _format("WikiBigEdit", _has("update", "ans"), readers.wikibigedit, _BIGEDIT, _BIGEDIT_NAMES, "personas"),
    _format("HalluEditBench", _is_hallu, readers.halluedit, _HALLU, _HALLU_NAMES, _HALLU_BEGINNINGS),
    _format("UnKE", _has("question", "answer", but="prompt"), readers.unke, _UNKE, _UNKE_NAMES, "mmlu_"),
    _format("QAEdit", _has("prompt", "target", but="target_new"), readers.qaedit, _QAEDIT, _QAEDIT_NAMES),
    _format("EasyEdit", lambda raw: True, readers.easyedit, _EASYEDIT),
)
