"""The comparison of what a page shows with what its samples print: it notices what a reader would."""

from __future__ import annotations

import json

import pytest

from tests.docs import Sample
from tests.shell import check_output

RUN = '{"id": "160f5bda-edc4-4a77-aa69-dad3a26497bb", "status": "completed", "costUsd": 0.02, "error": null}'
OTHER_RUN = '{"id": "88e8b9d1-20c7-45ed-89a7-57411d201dee", "status": "completed", "costUsd": 7, "error": null}'


@pytest.mark.parametrize(
    ("language", "shown", "printed"),
    [
        ("json", RUN, OTHER_RUN),
        ("json", '{"status": "completed", "...": "..."}', RUN),
        ("json", "[1]", "[5, 6]"),
        ("json", '{"a": "..."}', '"an earlier document" {"a": "any text"}'),
        ("text", "completed", "completed\n"),
        ("text", "...\nid: 1\n...\nid: end", ": connected\n\nid: 1\nid: 2\nid: end\n\n"),
        ("text", "data: " + '{"status": "completed", "...": "..."}', f"data: {RUN}"),
        ("text", "2026-11-22T09:40:11.310Z INFO a run", "2026-12-01T00:00:00.000Z INFO a run"),
    ],
)
def test_ids_times_numbers_and_what_dots_stand_for_may_differ(language: str, shown: str, printed: str) -> None:
    check_output(Sample(language, shown, follows=True), printed)


@pytest.mark.parametrize(
    ("language", "shown", "printed"),
    [
        ("json", RUN, json.dumps(json.loads(RUN) | {"new": 1})),
        ("json", '{"status": "completed", "gone": 1, "...": "..."}', RUN),
        ("json", RUN, OTHER_RUN.replace("completed", "error")),
        ("json", RUN, OTHER_RUN.replace(": 7", ': "7"')),
        ("json", RUN, OTHER_RUN.replace("null", "{}")),
        ("json", "[1, 2]", "[1]"),
        ("json", "[]", "curl: (7) Failed to connect"),
        ("json", '{"a": true}', '{"a": false}'),
        ("json", '{"a": 1}', '{"a": true}'),
        ("text", "completed", "error"),
        ("text", "completed", "completed\nerror"),
        ("text", "2\n204", "2\n200"),
        ("text", "...\nid: 1\nid: end", "id: 1\nid: 2\nid: end"),
        ("text", 'data: {"status": "completed", "...": "..."}', 'data: {"status": "error", "id": 1}'),
    ],
)
def test_other_keys_types_words_and_lines_are_noticed(language: str, shown: str, printed: str) -> None:
    with pytest.raises(AssertionError, match="shown:"):
        check_output(Sample(language, shown, follows=True), printed)
