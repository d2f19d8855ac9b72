"""What stands between a prompt and what is said behind it: a space or nothing, as the prompt's own end
tells.
"""

import unicodedata

_WITHOUT_SPACES = (  # Unicode blocks of scripts that put no spaces between words, with their punctuation
    (0x0E00, 0x109F),  # Thai, Lao, Tibetan, Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x312F),  # radicals, CJK punctuation, Hiragana, Katakana, Bopomofo
    (0x3190, 0x4DBF),  # CJK signs, Katakana's small letters, Han A
    (0x4E00, 0xA4CF),  # Han, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar B
    (0xAA60, 0xAA7F),  # Myanmar A
    (0xF900, 0xFAFF),  # Han, for compatibility
    (0xFE30, 0xFE4F),  # CJK punctuation, for compatibility
    (0xFF00, 0xFFEF),  # full-width and half-width forms
    (0x16FE0, 0x1B2FF),  # Tangut, Khitan, Kana, Nushu
    (0x1F200, 0x1F2FF),  # enclosed Han
    (0x20000, 0x3FFFF),  # Han B and above
)
_OPENING = ("Ps", "Pi", "Pc")  # opening brackets and quotation marks, and what ties words together
_TYING = "/\\@#"


def joint(prompt: str, target: str) -> str:
    """The space that belongs between the two, or nothing.

    A space, where the prompt ends in a letter, a digit or punctuation of a language with spaces, and the
    target brings none along. A digit or a mark that many languages share belongs to the language of the last
    letter before it.

    Args:
        prompt: as it is given.
        target: likewise.

    >>> english = ("The Eiffel Tower stands in", "He was born in 1990", "Q: Who? A:",
    ...            "She said (loudly)", "The city of “Rome”")
    >>> for prompt in (*english, "그의 이름은"):
    ...     print(repr(joint(prompt, "x")), end=" ")
    ' ' ' ' ' ' ' ' ' ' ' '
    >>> for prompt in ("西游记的作者是", "西遊記の作者は", "ผู้แต่งคือ", "答：", "答:",
    ...                "写于1592", "", "def f():\\n", "It is ", "It is\u00a0"):
    ...     print(repr(joint(prompt, "x")), end=" ")
    '' '' '' '' '' '' '' '' '' ''
    >>> for prompt in ("the so-called “", 'He said "', "f(", "snake_", "/usr/",
    ...                "mail@", "It costs $", "x =", 'He said "no"'):
    ...     print(repr(joint(prompt, "x")), end=" ")
    '' '' '' '' '' '' '' '' ' '
    >>> joint("The Eiffel Tower stands in", " Rome")
    ''
    """
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return ""
    last, kind = prompt[-1], unicodedata.category(prompt[-1])
    if kind[0] not in "LMNP" or kind in _OPENING or last in _TYING or (last == '"' and prompt.count('"') % 2):
        return ""
    return " " if _has_spaces(prompt) else ""


def has_no_spaces(text: str) -> bool:
    """Whether a text is written in scripts that put no spaces between words, from end to end.

    >>> [has_no_spaces(text) for text in ("西游记", "Journey", "")]
    [True, False, False]
    """
    return bool(text) and all(map(_is_without_spaces, text))


def _is_without_spaces(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _WITHOUT_SPACES)


def _has_spaces(prompt: str) -> bool:
    """Whether the language that the prompt ends in puts spaces between words; one that can't be told does."""
    for character in reversed(prompt):
        if _is_without_spaces(character):
            return False
        if unicodedata.category(character)[0] == "L":
            return True
    return True
