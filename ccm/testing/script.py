"""What the stand-in for the Messages API does: a prompt is its script.

A prompt without a directive is answered with a sentence that quotes it. A prompt with directives is a script: each call
of the model takes the next one, in order; once the script is used up it answers "Done.". A directive is
`[[name argument]]`, its argument plain text or JSON:

| directive | the model |
|---|---|
| `[[text WORDS]]` | answers WORDS |
| `[[tool NAME {INPUT}]]` | calls a tool; several joined by `[[and]]` are called in one message |
| `[[chunks N]]` | streams a text of N small pieces |
| `[[slow N SECONDS]]` | streams N pieces, SECONDS apart |
| `[[huge N]]` | answers one piece of text of N characters |
| `[[json {OBJECT}]]` | gives OBJECT as the structured output that was asked for |
| `[[status CODE]]` | answers with an HTTP error; `[[status CODE N]]` only the first N times |
| `[[hang]]` | sends no byte until the client goes away |
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
    """One step of a script: what the model does at one call."""

    name: str
    argument: str = ""


def parse_script(prompt: str) -> list[list[Directive]]:
    """The steps of a prompt, one for each call of the model; a step of several directives is one message."""
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
    """The directive that begins at `start`; a JSON argument may hold `]]` itself, so it is decoded, not searched."""
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
    """The user's words in a message: the last text that is no note of Claude Code's own. Empty for a tool's result.

    The last, because Claude Code joins a turn that failed and the one after it into one message.
    """
    if isinstance(content, str):
        return content
    texts = [block["text"].strip() for block in content if block.get("type") == "text"]
    return next((text for text in reversed(texts) if not text.startswith(NOTES)), "")


def current_turn(messages: list[dict[str, Any]]) -> tuple[str, int]:
    """The user's last prompt, and how many answers the model has given to it already."""
    answers = 0
    for message in reversed(messages):
        if message.get("role") == "assistant":
            answers += 1
        elif message.get("role") == "user" and (prompt := prompt_of(message.get("content", ""))):
            return prompt, answers
    return "", answers


def closing_words(prompt: str, script: list[list[Directive]]) -> str:
    """What the model answers when nothing of the script is left."""
    if script:
        return "Done."
    return f"The stand-in for Claude heard: {prompt[:200]}"
