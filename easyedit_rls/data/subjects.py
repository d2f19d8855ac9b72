"""The subject of a prompt that comes without one, told by what a rewording leaves as it is."""

import re

from easyedit_rls._base.common_prefix import common_prefix
from easyedit_rls.errors import RequestError

_WORD = re.compile(r"\w+(?:[-'’.&/]\w+)*")
_NAME = re.compile(
    r"[A-Z0-9À-ÖØ-Þ]|[^\x00-\u024f]"
)  # a capital or a digit somewhere (iPad, d'Adda), or another script
_OPENERS = {
    "a",
    "at",
    "by",
    "for",
    "from",
    "how",
    "in",
    "is",
    "of",
    "on",
    "the",
    "to",
    "was",
    "what",
    "when",
    "where",
    "which",
    "who",
    "whose",
}


def find_subject(prompt: str, rewording: str) -> str:
    """The one name that both texts share.

    Of each stretch of words that both hold, what begins and ends with a word that looks like a name counts;
    question words and the like at the start of the prompt don't.

    Args:
        prompt: e.g. "Which family does Ramalinaceae belong to?"
        rewording: the same question in other words, e.g. "What family are Ramalinaceae?"

    Raises:
        RequestError: they share no name, or several.

    >>> find_subject("What artist created Call the Doctor?", "Which artist created Call the Doctor?")
    'Call the Doctor'
    """
    words, others = list(_WORD.finditer(prompt)), [_plain(word) for word in _WORD.finditer(rewording)]
    texts = [_plain(word) for word in words]
    first = 1 if texts and texts[0].lower() in _OPENERS else 0
    spans: list[tuple[int, int]] = []
    for i in range(first, len(texts)):
        if _NAME.search(texts[i]) and not (spans and i < spans[-1][1]):
            length = max(common_prefix([texts[i:], others[j:]]) for j in range(len(others) + 1))
            named = [k for k in range(i, i + length) if _NAME.search(texts[k])]
            if named:
                spans.append((i, named[-1] + 1))
    found = [_span(prompt, words[i].start(), words[k - 1].start() + len(texts[k - 1])) for i, k in spans]
    names = list(dict.fromkeys(found))
    if len(names) != 1:
        what = f"several names, {', '.join(map(repr, names))}" if names else "no name"
        raise RequestError(
            f"is missing, and {prompt!r} shares {what} with its rewording {rewording!r}. Add the subject.",
            field="subject",
        )
    return names[0]


def _plain(word: re.Match[str]) -> str:
    """The word without a possessive ending."""
    return re.sub(r"['’]s$", "", word.group())


def _span(text: str, start: int, end: int) -> str:
    """The text between, with the bracket or quotation mark that it opens closed."""
    for opening, closing in (("(", ")"), ('"', '"'), ("“", "”")):
        inside = text[start:end]
        if (
            opening in inside
            and inside.count(opening) % 2 != (inside.count(closing) if closing != opening else 0) % 2
        ):
            end += text.startswith(closing, end)
    return text[start:end]
