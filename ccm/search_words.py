"""The words of texts and of searches. Both databases get the same words, so both find the same.

A word is a run of letters and digits, in any case and in any of Unicode's compatible forms. A script without spaces
between its words, such as Chinese, is cut into pairs of characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, Self

from ccm.json_text import from_json_text

# A longer text is found by the words of its beginning, because PostgreSQL limits the words of a row to 1 MiB.
INDEXED_CHARACTERS = 100_000
# A longer word, such as an encoded file, is found by its beginning.
WORD_CHARACTERS = 64
# Further words of a search are ignored, because a statement takes time for each word of each text.
SEARCH_WORDS = 100
# The last word of a search also finds longer words, unless it is shorter than this: half of all texts have a word that
# begins with a given letter.
PREFIX_CHARACTERS = 3
SNIPPET_CHARACTERS = 160
# How much of a snippet precedes the first word that was found.
LEAD_CHARACTERS = 40
# How many occurrences of words are considered for a snippet.
OCCURRENCES = 200

# Kana, Han, Thai, Lao, Burmese and Khmer.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
# Marks within words, which `\w` lacks: of European, Hebrew, Arabic and Indic scripts.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_ASCII_SEPARATORS = {code: " " for code in range(128) if not chr(code).isalnum()}
_WORD = re.compile(rf"[\w{_MARKS}{_UNSPACED}]+")
# Normalization takes quadratic time for a run of marks; UAX 15 limits them to 30. Separators may be cut as well.
_LONG_RUN = re.compile(r"([^\w\x00-\x7f]{30})[^\w\x00-\x7f]+")
_UNSPACED_PART = re.compile(rf"([{_UNSPACED}]+)")


class Search(NamedTuple):
    """The words of a search, of which a text must have all.

    Attributes:
        whole: words to be found as they are.
        prefix: the beginning of another word; empty for none.
    """

    whole: tuple[str, ...]
    prefix: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the search for a text, in which quotes and operators have no meaning."""
        found = list(dict.fromkeys(_words(text)))[:SEARCH_WORDS]
        last = found[-1] if found else ""
        # A single character of an unspaced script is the first of a pair.
        if len(last) >= PREFIX_CHARACTERS or (len(last) == 1 and _UNSPACED_PART.match(last)):
            return cls(tuple(found[:-1]), last)
        return cls(tuple(found), "")

    def __bool__(self) -> bool:
        return bool(self.whole or self.prefix)

    def exact(self) -> Self:
        """Return the search for the last word as it is."""
        return type(self)((*self.whole, self.prefix) if self.prefix else self.whole, "")

    def snippet(self, text: str) -> str:
        """Return the part of a text that has the most words of the search, on one line."""
        places = list(islice(self._places(text[:INDEXED_CHARACTERS]), OCCURRENCES))

        def distinct(place: tuple[int, str]) -> int:
            return len({word for at, word in places if place[0] <= at < place[0] + SNIPPET_CHARACTERS})

        first = max(places, key=distinct)[0] if places else 0
        begin = max(0, min(first - LEAD_CHARACTERS, len(text) - SNIPPET_CHARACTERS))
        if begin:  # at the beginning of a word
            begin = text.find(" ", begin, first) + 1 or begin
        end = begin + SNIPPET_CHARACTERS
        part = " ".join(text[begin:end].split())
        return f"{'… ' if begin else ''}{part}{' …' if end < len(text) else ''}"

    def _places(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the place of each word of a text that is found, and the word of the search that finds it."""
        whole = frozenset(self.whole)
        for match in _WORD.finditer(text):
            normal, at = _normal(match[0]), 0
            for word in _split(normal):
                is_longer = self.prefix and word.startswith(self.prefix)
                if is_longer or word in whole:
                    # Not from the beginning, because a text without spaces is a single match.
                    at = normal.find(word, at)
                    yield match.start() + at, self.prefix if is_longer else word


def indexed_words(text: str) -> str:
    """Return the distinct words of a text, separated by spaces; empty if it has none."""
    # The second cut is needed for pairs of characters, and for characters whose compatible form is longer.
    return " ".join(dict.fromkeys(_words(text[:INDEXED_CHARACTERS])))[: 2 * INDEXED_CHARACTERS]


def said(message_type: str, json: str, value: Mapping[str, Any] | None = None) -> str:
    """Return what a person or Claude says in an SDK message; empty if it is a message of another kind.

    Empty also if it cannot be parsed, because it is too deep or memory is short: it is stored, but not found.

    Args:
        json: the message.
        value: the same, parsed. Without it `json` is parsed, but only if it may contain such a text.
    """
    try:
        return _said(message_type, json, value)
    except (ValueError, RecursionError, MemoryError):
        return ""


def _said(message_type: str, json: str, value: Mapping[str, Any] | None) -> str:
    if message_type == "result":
        text = (from_json_text(json) if value is None else value).get("result")
        return text if isinstance(text, str) else ""
    if message_type not in ("assistant", "user") or (value is None and '"text"' not in json):
        return ""
    message = (from_json_text(json) if value is None else value).get("message")
    content: Any = message.get("content") if isinstance(message, dict) else None
    blocks = [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []
    # Inputs and results of tools may be much longer, and are not indexed.
    if message_type == "user" and any(block.get("type") == "tool_result" for block in blocks):
        return ""
    texts = [block.get("text") for block in blocks if block.get("type") == "text"]
    return "\n".join(text for text in texts if isinstance(text, str))


def _words(text: str) -> Iterator[str] | list[str]:
    if text.isascii():  # most texts are, and this takes a third of the time
        return [word[:WORD_CHARACTERS] for word in text.lower().translate(_ASCII_SEPARATORS).split()]
    return (word for run in _WORD.findall(_normal(text)) for word in _split(run))


def _normal(text: str) -> str:
    if not text.isascii():
        # Halfwidth sound marks, which are letters to `\w`, are marks once they are normalized.
        text = _LONG_RUN.sub(r"\1", text.replace("\uff9e", "\u3099").replace("\uff9f", "\u309a"))
    return unicodedata.normalize("NFKC", text).casefold()


def _split(run: str) -> Iterator[str]:
    """Yield the words of a run of letters, digits, marks and underscores."""
    for part in run.split("_"):
        for piece in [part] if part.isascii() else _UNSPACED_PART.split(part):
            if not piece.isascii() and _UNSPACED_PART.match(piece):
                yield from (piece[at : at + 2] for at in range(max(1, len(piece) - 1)))
            elif piece:
                yield piece[:WORD_CHARACTERS]
