"""How the stand-in for the Messages API finds the turn's prompt, and its progress, in Claude Code's requests."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ccm.testing.script import DIRECTIVES, current_turn, parse_script

PROMPT = "[[tool Bash {}]] [[text After the tool.]]"
NOTE = "The user sent a new message while you were working:\nBy the way.\n\nAddress the message above."


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "done"}
CALL = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "Bash", "input": {}}]}
ANSWER = {"role": "assistant", "content": [text("After the tool.")]}


@pytest.mark.parametrize(
    "after_the_tool",
    [
        [user(RESULT)],
        [user(RESULT, text(NOTE))],
        [user(RESULT, text(NOTE), text(NOTE))],
        [user(RESULT), {"role": "system", "content": NOTE}],
        [user(RESULT), {"role": "system", "content": [text("By the way.")]}],
    ],
    ids=["no message", "beside the result", "two beside the result", "system, before 2.1.332", "system, in blocks"],
)
def test_a_message_during_a_turn_continues_the_turn(after_the_tool: list[dict[str, Any]]) -> None:
    messages = [user(text("<system-reminder>x</system-reminder>"), text(PROMPT)), CALL, *after_the_tool]

    assert current_turn(messages) == (PROMPT, 1)


def test_a_message_after_a_turn_is_a_prompt() -> None:
    messages = [user(text(PROMPT)), CALL, user(RESULT, text(NOTE)), ANSWER, user(text("And now?"))]

    assert current_turn(messages) == ("And now?", 0)


def names(prompt: str) -> list[list[str]]:
    return [[directive.name for directive in step] for step in parse_script(prompt)]


def test_joined_directives_are_one_step() -> None:
    assert names("[[text One.]] [[tool Bash {}]] [[and]] [[tool Read {}]]") == [["text"], ["tool", "tool"]]


def test_other_text_in_double_brackets_is_no_directive() -> None:
    assert names("if [[ -f x ]]; then [[wiki]] [[text [[Note]] [[hang]]") == [["text"], ["hang"]]


@pytest.mark.parametrize(
    ("prompt", "argument"),
    [
        ("Say it. [[text Hello", "Hello"),
        ('Do it. [[tool Bash {"command": "[[ -f x ]]"}', 'Bash {"command": "[[ -f x ]]"}'),
    ],
)
def test_a_directive_without_its_end_takes_the_rest_of_the_prompt(prompt: str, argument: str) -> None:
    assert [directive.argument for [directive] in parse_script(prompt)] == [argument]


@pytest.mark.parametrize(
    "directive",
    [
        *("slow", "slow x", "slow 1 x", "chunks -1", "huge 1e9", "status 200", "status 99", "status"),
        *("json", "json []", "tool Bash ls", "tool Bash {", "tool Bash []"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_form(directive: str) -> None:
    form, _ = DIRECTIVES[directive.partition(" ")[0]]
    with pytest.raises(ValueError, match=re.escape(f"must have the form {form}")):
        parse_script(f"[[{directive}]]")
