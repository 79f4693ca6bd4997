"""Scripts for the stand-in for the Messages API, which are written into the prompt.

A prompt without directives is answered with a sentence that quotes it. A prompt with directives is a script: each call
of the model executes the next directive; after the last one the model answers "Done.". A directive is
`[[name argument]]`, with plain text or JSON as argument. DIRECTIVES lists them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# Each directive by its name: its form, and what the model does.
DIRECTIVES = {
    "text": ("[[text WORDS]]", "answers WORDS"),
    "tool": ("[[tool NAME {INPUT}]]", "calls a tool with INPUT, a JSON object"),
    "and": ("[[and]]", "joins the directives on both sides into one message, such as two calls of tools"),
    "chunks": ("[[chunks N]]", "streams a text of N small pieces"),
    "slow": ("[[slow N SECONDS]]", "streams N pieces, SECONDS apart"),
    "huge": ("[[huge N]]", "answers one piece of text of N characters"),
    "json": ("[[json {OBJECT}]]", "returns OBJECT as the structured output of the request"),
    "status": ("[[status CODE N]]", "answers the first N times with an HTTP error; without N always"),
    "hang": ("[[hang]]", "sends nothing until the client disconnects"),
    "stall": ("[[stall]]", "streams one piece, then nothing more"),
}
# The arguments of those that take numbers, which bound the memory of an answer.
NUMBERS = {
    "chunks": re.compile(r"\d{1,6}", re.ASCII),
    "slow": re.compile(r"\d{1,6}( \d{1,9}(\.\d+)?)?", re.ASCII),
    "huge": re.compile(r"\d{1,8}", re.ASCII),
    "status": re.compile(r"[45]\d\d( \d{1,9})?", re.ASCII),
}
# The beginnings of Claude Code's own texts in a user's message. The last one announces a message that the user sent in
# mid-turn: it belongs to the turn and starts none. Claude Code before 2.1.332 sends it as a message of role `system`.
NOTES = ("<system-reminder>", "[Image: ", "The user sent a new message while you were working:")


@dataclass(frozen=True)
class Directive:
    """One action of the model."""

    name: str
    argument: str = ""


def parse_script(prompt: str) -> list[list[Directive]]:
    """Return the steps of a prompt, one for each call of the model. The directives of one step form one message.

    Text in double brackets with another name, such as `[[ -f x ]]`, is no directive.

    Raises:
        ValueError: an argument is invalid.
    """
    steps: list[list[Directive]] = []
    joined = False
    at = prompt.find("[[")
    while at != -1:
        directive, end = _parse_directive(prompt, at + 2)
        if directive.name not in DIRECTIVES:
            end = at + 2
        elif directive.name == "and":
            joined = True
        elif joined and steps:
            steps[-1].append(directive)
            joined = False
        else:
            steps.append([directive])
        at = prompt.find("[[", end)
    for step in steps:
        for directive in step:
            _check(directive)
    return steps


def _parse_directive(prompt: str, start: int) -> tuple[Directive, int]:
    """Return the directive after `[[` at `start`, and the offset behind it.

    A JSON argument is decoded to find its end, because it may contain `]]`.
    """
    close = _find_close(prompt, start)
    name, _, rest = prompt[start:close].partition(" ")
    brace = prompt.find("{", start)
    if name in ("tool", "json") and start < brace < close:
        try:
            _, end = json.JSONDecoder().raw_decode(prompt, brace)
        except json.JSONDecodeError:
            end = close
        return Directive(name, prompt[start + len(name) : end].strip()), _find_close(prompt, end) + 2
    return Directive(name.strip(), rest.strip()), close + 2


def _find_close(prompt: str, start: int) -> int:
    """Return the offset of the next `]]`. Without one the rest of the prompt belongs to the directive."""
    close = prompt.find("]]", start)
    return len(prompt) if close == -1 else close


def _check(directive: Directive) -> None:
    """Check the argument of a directive.

    Raises:
        ValueError: it is invalid; the message names the directive and its form.
    """
    name, argument = directive.name, directive.argument
    valid = name not in NUMBERS or NUMBERS[name].fullmatch(argument) is not None
    if name in ("tool", "json"):
        text = argument.partition(" ")[2] or "{}" if name == "tool" else argument
        try:
            valid = isinstance(json.loads(text), dict)
        except ValueError:
            valid = False
    if not valid:
        raise ValueError(f"[[{name} {argument[:200]}]] must have the form {DIRECTIVES[name][0]}")


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
