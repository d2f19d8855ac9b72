"""Where a text stands in another one, however both write accents, spaces and quotation marks."""

import re
import unicodedata

_JAMO = ((0x1160, 0x11FF), (0xD7B0, 0xD7FF))  # vowels and finals, which go on with a Hangul syllable
_ALIKE = str.maketrans({"’": "'", "ʼ": "'", "‘": "'", "′": "'", "“": '"', "”": '"', "„": '"', "″": '"'})


def find_spans(text: str, wanted: str) -> list[tuple[int, int]]:
    """All places where a text stands in another one, (first character, one past the last), in order.

    Where it is not there letter by letter, composed and decomposed characters count as the same, so do all
    kinds of white space, and straight and curly quotation marks. No place begins or ends between a letter and
    its accent then.

    >>> find_spans("Paris, Texas lies far from Paris", "Paris")
    [(0, 5), (27, 32)]
    >>> find_spans("L’Aquila\u00a0Nuova is in", "L'Aquila Nuova")
    [(0, 14)]
    >>> find_spans("The Cafe\u0301 Central", "Caf\u00e9")
    [(4, 9)]
    >>> find_spans("The Caf\u00e9 Central", "Cafe")
    []
    """
    if places := [match.start() for match in re.finditer(f"(?={re.escape(wanted)})", text)]:
        return [(start, start + len(wanted)) for start in places]
    folded, starts, ends = _folded(text)
    sought = _folded(wanted)[0]
    places = [match.start() for match in re.finditer(f"(?={re.escape(sought)})", folded)] if sought else []
    spans = [(starts[at], ends[at + len(sought) - 1]) for at in places]
    return [(start, end) for start, end in spans if start is not None and end is not None]


def stands_alone(text: str, start: int, end: int) -> bool:
    """Whether a place in a text is whole words: no letter or digit beside it.

    >>> [stands_alone("Paris, Parisians", *place) for place in find_spans("Paris, Parisians", "Paris")]
    [True, False]
    """
    return not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum())


def fold(text: str) -> str:
    """The text with what `find_spans` takes for alike made the same. A text stands in another one only where
    it does so with both folded; many are told apart faster that way.

    >>> fold("L’Aquila\u00a0 Nuova")
    "L'Aquila Nuova"
    """
    return _folded(text)[0]


def _folded(text: str) -> tuple[str, list[int | None], list[int | None]]:
    """The text with what is alike made the same; for each of its characters, where in the text a cluster
    begins and ends with it.

    None where a character is not the first, or not the last, of its cluster (a letter with its accents, a
    stretch of white space).
    """
    folded: list[str] = []
    starts: list[int | None] = []
    ends: list[int | None] = []
    borders = [
        at
        for at in range(len(text))
        if at == 0 or not (_joins(text[at]) or (text[at].isspace() and text[at - 1].isspace()))
    ]
    for start, end in zip(borders, [*borders[1:], len(text)]):
        cluster = text[start:end]
        characters = " " if cluster.isspace() else unicodedata.normalize("NFD", cluster.translate(_ALIKE))
        folded.append(characters)
        starts += [start, *[None] * (len(characters) - 1)]
        ends += [*[None] * (len(characters) - 1), end]
    return "".join(folded), starts, ends


def _joins(character: str) -> bool:
    """Whether a character belongs to the cluster before it."""
    return bool(unicodedata.combining(character)) or any(
        first <= ord(character) <= last for first, last in _JAMO
    )
