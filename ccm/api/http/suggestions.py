"""The names and values that a client probably meant by one that is unknown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What clients call our names and values, because other APIs do, in the form that `_plain` returns.
OTHER_WORDS = {
    # Names.
    "after": ("lastindex", "offset"),
    "cursor": ("offset", "page", "pagetoken"),
    "cwd": ("dir", "directory", "folder", "path", "workdir", "workingdir", "workingdirectory", "workspace"),
    "decision": ("action", "allow", "answer", "approve", "approved", "behavior", "deny", "response"),
    "limit": ("count", "max", "pagesize", "perpage", "size"),
    "message": ("feedback", "reason"),
    "metadata": ("labels", "meta", "tags"),
    "order": ("direction", "orderby", "sort", "sortby"),
    "prompt": ("content", "input", "instruction", "message", "messages", "query", "task", "text"),
    "q": ("find", "query", "search", "term", "text"),
    "title": ("name", "summary"),
    "wait": ("block", "timeout"),
    "webhookUrl": ("callback", "callbackurl", "webhook"),
    # Values.
    "allow": ("accept", "allowed", "approve", "approved", "yes"),
    "allowed": ("accepted", "allow", "approved"),
    "cancelled": ("aborted", "canceled", "killed", "stopped"),
    "completed": ("done", "finished", "ok", "succeeded", "success", "successful"),
    "denied": ("declined", "deny", "rejected"),
    "deny": ("declined", "denied", "no", "reject", "rejected"),
    "enqueue": ("queue", "wait"),
    "error": ("errored", "failed", "failure"),
    "expired": ("timedout", "timeout"),
    "fresh": ("new", "start"),
    "interrupt": ("cancel", "stop"),
    "pending": ("open", "waiting"),
    "resume": ("continue",),
    "running": ("active", "inprogress", "pending", "queued", "started", "waiting"),
}
# Words that look like one of ours and mean something else, such as `model` for the filter `mode`.
FALSE_FRIENDS = frozenset({"model"})
# The shortest beginning of a word that stands for it, such as `bypass` for `bypassPermissions`.
PREFIX_CHARACTERS = 4


def same_word(given: str, known: Iterable[str]) -> str | None:
    """Return the known word that differs from the given one in case, `_` and `-` only, such as a snake_case name."""
    return next((word for word in known if _plain(word) == _plain(given)), None)


def suggestion(given: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant, None if there is none."""
    words, plain = list(known), _plain(given)
    near = [] if plain in FALSE_FRIENDS else difflib.get_close_matches(plain, map(_plain, words), n=1)
    longer = [word for word in words if len(plain) >= PREFIX_CHARACTERS and _plain(word).startswith(plain)]
    return (
        same_word(given, words)
        or next((word for word in words if plain in OTHER_WORDS.get(word, ())), None)
        or (same_word(near[0], words) if near else None)
        or (longer[0] if len(longer) == 1 else None)
    )


def did_you_mean(word: str | None) -> str:
    """Return the end of a sentence without a full stop that offers a word, if there is one."""
    return f"; did you mean {word}?" if word else "."


def alternatives(words: Iterable[str]) -> str:
    """Return words as a sentence names them: `a`, `a or b`, `a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _plain(word: str) -> str:
    return re.sub(r"[\s_-]", "", word).lower()
