"""The paths of the API as clients write them, and what a client probably meant by one that does not exist."""

from __future__ import annotations

import difflib
import re

from flask import current_app
from pydantic.alias_generators import to_camel
from werkzeug.routing import Map, UnicodeConverter

from ccm.models.fields import RESERVED_RUN_IDS

# No path of the API has more segments.
SEGMENTS = 8
# How similar a segment of a path must be to one of the API to be taken for it.
SIMILARITY = 0.75
VERSION = re.compile(r"v\d+", re.ASCII)


class IdConverter(UnicodeConverter):
    """An id in a path. The names of actions are no ids, so `/api/runs/start` is a path with one method only."""

    # The pattern sees the rest of the path too.
    part_isolating = False

    def __init__(self, url_map: Map) -> None:
        super().__init__(url_map)
        self.regex = rf"(?!(?:{'|'.join(RESERVED_RUN_IDS)})\Z)[^/]+"


def template(rule: str) -> str:
    """Return the path of a rule of the URL map with its parameters as `{runId}`."""
    return re.sub(r"<(\w+)>", lambda name: f"{{{to_camel(name[1])}}}", rule)


def methods_below(path: str, method: str) -> list[str]:
    """Return the templates of the paths one segment below this one that take the method, in their order."""
    given = _segments(path)
    return [
        template(rule.rule)
        for rule in current_app.url_map.iter_rules()
        if method in (rule.methods or ()) and _is_below(_segments(rule.rule), given)
    ]


def _is_below(segments: list[str], given: list[str]) -> bool:
    return len(segments) == len(given) + 1 and all(
        segment == own or (segment.startswith("<") and own not in RESERVED_RUN_IDS)
        for segment, own in zip(segments, given, strict=False)
    )


def similar_paths(path: str) -> list[str]:
    """Return the paths that were probably meant: one with another spelling, or templates of those that lack an id.

    A client with an empty variable sends `/api/runs//messages` or `/api/runs/`.
    """
    parts = path[1:].split("/", SEGMENTS)
    lacking = [
        template(rule.rule)
        for rule in current_app.url_map.iter_rules()
        if "" in parts and [("" if "<" in part else part) for part in rule.rule[1:].split("/")] == parts
    ]
    spelt = _spelt(path)
    return [*([spelt] if spelt and (path.endswith("/") or not lacking) else []), *dict.fromkeys(lacking)]


def _spelt(path: str) -> str | None:
    """Return the existing path with another spelling, without extra slashes or a version, or of the same action."""
    known = {part for rule in current_app.url_map.iter_rules() for part in _segments(rule.rule) if "<" not in part}
    given = _segments(path)
    segments = [
        (difflib.get_close_matches(part.lower(), known, 1, SIMILARITY) or [part])[0]
        for part in given
        if not VERSION.fullmatch(part)
    ]
    action = ["api", "runs", segments[-1]] if segments and segments[-1] in RESERVED_RUN_IDS else []
    candidates = (given, segments, ["api", *segments], segments[1:], action)
    paths = [f"/{'/'.join(candidate)}" for candidate in candidates if candidate]
    return next((found for found in paths if allowed_methods(found)), None)


def allowed_methods(path: str) -> list[str]:
    """Return the methods of a path, none if there is no such path."""
    return sorted(current_app.url_map.bind("").allowed_methods(path))


def _segments(path: str) -> list[str]:
    return [part for part in path.split("/", SEGMENTS) if part]
