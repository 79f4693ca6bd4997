"""Scripts for the stand-in for the Messages API, which are written into the prompt.

A prompt without directives is answered with a sentence that quotes it. A prompt with directives is a script: each call
of the model executes the next directive; after the last one the model answers "Done.". A directive is
`[[name argument]]`, with plain text or JSON as argument:

| directive | the model |
|---|---|
| `[[text WORDS]]` | answers WORDS |
| `[[tool NAME {INPUT}]]` | calls a tool; several joined by `[[and]]` are called in one message |
| `[[chunks N]]` | streams a text of N small pieces |
| `[[slow N SECONDS]]` | streams N pieces, SECONDS apart |
| `[[huge N]]` | answers one piece of text of N characters |
| `[[json {OBJECT}]]` | returns OBJECT as the structured output of the request |
| `[[status CODE]]` | answers with an HTTP error; `[[status CODE N]]` only the first N times |
| `[[hang]]` | sends nothing until the client disconnects |
| `[[stall]]` | streams one piece, then nothing more |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

# The beginnings of Claude Code's own texts in a user's message. The last one announces a message that the user sent in
# mid-turn: it belongs to the turn and starts none. Claude Code before 2.1.332 sends it as a message of role `system`.
NOTES = ("<system-reminder>", "[Image: ", "The user sent a new message while you were working:")


@dataclass(frozen=True)
class Directive:
    """One action of the model."""

    name: str
    argument: str = ""


def parse_script(prompt: str) -> list[list[Directive]]:
    """Return the steps of a prompt, one for each call of the model. The directives of one step form one message."""
    steps: list[list[Directive]] = []
    joined = False
    at = prompt.find("[[")
    while at != -1:
        directive, end = _parse_directive(prompt, at + 2)
        if directive.name == "and":
            joined = True
        elif joined and steps:
            steps[-1].append(directive)
            joined = False
        else:
            steps.append([directive])
        at = prompt.find("[[", end)
    return steps


def _parse_directive(prompt: str, start: int) -> tuple[Directive, int]:
    """Return the directive after `[[` at `start`, and the offset behind it.

    A JSON argument is decoded to find its end, because it may contain `]]`.
    """
    close = prompt.find("]]", start)
    close = len(prompt) if close == -1 else close
    name, _, rest = prompt[start:close].partition(" ")
    brace = prompt.find("{", start)
    if name in ("tool", "json") and start < brace < close:
        try:
            _, end = json.JSONDecoder().raw_decode(prompt, brace)
        except json.JSONDecodeError:
            end = close
        return Directive(name, prompt[start + len(name) : end].strip()), prompt.find("]]", end) + 2
    return Directive(name.strip(), rest.strip()), close + 2


def prompt_of(content: Any) -> str:
    """Return the prompt in a user message: its last text that Claude Code did not insert. Empty for a tool's result.

    The last one counts, because Claude Code joins a failed turn and the next one into one message.
    """
    if isinstance(content, str):
        return content
    texts = [block["text"].strip() for block in content if block.get("type") == "text"]
    return next((text for text in reversed(texts) if not text.startswith(NOTES)), "")


def current_turn(messages: list[dict[str, Any]]) -> tuple[str, int]:
    """Return the user's last prompt, and how many answers the model has given since."""
    answers = 0
    for message in reversed(messages):
        if message.get("role") == "assistant":
            answers += 1
        elif message.get("role") == "user" and (prompt := prompt_of(message.get("content", ""))):
            return prompt, answers
    return "", answers
