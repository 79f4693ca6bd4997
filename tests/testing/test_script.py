"""How the stand-in for the Messages API finds the turn's prompt, and its progress, in Claude Code's requests."""

from __future__ import annotations

from typing import Any

import pytest

from ccm.testing.script import current_turn

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
