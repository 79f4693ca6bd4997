"""The words of texts and of searches, where a text is made to take long."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from ccm import search_words
from ccm.json_text import to_json_text
from ccm.search_words import OCCURRENCES, SEARCH_WORDS, Search, indexed_words, said

# Those with a combining class, and those that become such marks.
MARKS = [
    character
    for character in map(chr, range(sys.maxunicode + 1))
    if unicodedata.combining(character) or character in "\u0f73\u0f75\u0f81\uff9e\uff9f"
]


@pytest.fixture
def longest_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of marks, each of the longest run in a text that was normalized."""
    lengths = []
    normalize = unicodedata.normalize

    def watched(form: Literal["NFKC"], text: str) -> str:
        length = longest = 0
        for character in normalize("NFKD", text):
            length = length + 1 if unicodedata.combining(character) else 0
            longest = max(longest, length)
        lengths.append(longest)
        return normalize(form, text)

    monkeypatch.setattr(unicodedata, "normalize", watched)
    return lengths


def test_no_long_run_of_marks_is_normalized(longest_runs: list[int]) -> None:
    for mark in MARKS:
        indexed_words("a" + mark * 100)
    # In an order that takes quadratic time to sort.
    for first, second in ("\u0301\u0323", "\u0301\uff9e", "\u0301\u0f73"):
        indexed_words("a" + first * 100 + second * 100)
        indexed_words("a" + (first + second) * 100)
    assert len(longest_runs) == len(MARKS) + 6
    # A character has up to three marks.
    assert max(longest_runs) <= 90


def test_words_around_a_long_run_are_found() -> None:
    for separator in (" ", "-", "\u2014", "\u2500" * 80, "\u3000" * 80):
        assert indexed_words(f"caf\u00e9{separator}th\u00e9") == "caf\u00e9 th\u00e9"
    # The first 30 marks are a part of the word, and the letters after them are too.
    assert indexed_words("cafe" + "\u0301" * 50 + "s the") == "caf\u00e9" + "\u0301" * 29 + "s the"


def test_a_snippet_reads_no_more_words_than_it_considers(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    split = search_words._split

    def counted(run: str) -> Iterator[str]:
        for word in split(run):
            read.append(word)
            yield word

    monkeypatch.setattr(search_words, "_split", counted)
    # The words of a script without spaces are one match of the pattern.
    text = "\u7684" * 16_000
    search = Search.parse("\u7684\u7684")
    read.clear()
    assert search.snippet(text).startswith("\u7684\u7684")
    assert len(read) == OCCURRENCES


def test_a_snippet_of_a_text_without_spaces_is_around_the_words() -> None:
    text = "\u4e00" * 1_000 + "\u4e2d\u6587\u641c\u7d22" + "\u4e00" * 1_000
    for words in (
        "\u641c\u7d22",
        "\u4e2d\u6587 \u641c\u7d22",
        "\u641c\u7d22" + "".join(map(chr, range(0x4E01, 0x51E6))),
    ):
        assert "\u4e2d\u6587\u641c\u7d22" in Search.parse(words).snippet(text)


def test_a_search_has_a_bounded_number_of_words() -> None:
    search = Search.parse("".join(map(chr, range(0x4E00, 0x51E7))))
    assert search.exact().whole == tuple(chr(code) + chr(code + 1) for code in range(0x4E00, 0x4E00 + SEARCH_WORDS))


def of_type(kind: str, *content: dict[str, Any] | str) -> dict[str, Any]:
    return {"type": kind, "message": {"role": kind, "content": list(content)}}


TEXT = {"type": "text", "text": "A \ud800 kite \0 flies"}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (of_type("assistant", TEXT), TEXT["text"]),
        (of_type("assistant", {"type": "thinking", "thinking": "no"}, TEXT, TEXT), f"{TEXT['text']}\n{TEXT['text']}"),
        (of_type("assistant", {"type": "tool_use", "name": "Write", "input": {"text": "no"}}), ""),
        (of_type("assistant", {"type": "text", "text": 7}, "no"), ""),
        (of_type("user", TEXT), TEXT["text"]),
        (of_type("user", {"type": "tool_result", "content": [TEXT]}), ""),
        (of_type("user", {"type": "text", "text": 'a "tool_result"'}), 'a "tool_result"'),
        (of_type("system", TEXT), ""),
        ({"type": "user", "message": {"content": "text"}}, ""),
        ({"type": "assistant", "message": "text"}, ""),
        ({"type": "result", "result": TEXT["text"]}, TEXT["text"]),
        ({"type": "result", "result": None}, ""),
    ],
)
def test_what_is_said_is_the_same_in_a_message_and_in_its_json(message: dict[str, Any], text: str) -> None:
    json = to_json_text(message)

    assert said(message["type"], json) == text
    assert said(message["type"], json, message) == text
