"""The interface between the sources of an import and its storage: a run, its parts, valid ids and errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ccm.db.transcripts import Entry
from ccm.errors import CommandRefused

# Claude Code's session ids. It would read anything else as a session's title.
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class ArchivedMessage:
    """The next message of a run; `json` is ASCII."""

    created_at: str
    type: str
    json: str


@dataclass(frozen=True)
class ArchivedApproval:
    """An approval of a run: its columns without `seq`, `runId` and `sessionId`."""

    row: dict[str, Any]


@dataclass(frozen=True)
class ArchivedEntries:
    """Consecutive entries of one of Claude Code's transcript files, from `first_index` on."""

    project_key: str
    subpath: str
    updated_at_ms: int
    first_index: int
    entries: list[Entry]


@dataclass(frozen=True)
class ArchivedRun:
    """One run of a source.

    Args:
        session: the columns that its session has when it is created.
        row: the columns of the run. `seq` is its position in the source. `hasTranscript` is left out if unknown.
        parts: its messages, approvals and transcripts. Valid until the next run is requested.
        spare_id: the SDK session id to use if another run in the database has the run's own. None: refuse the run.
    """

    session: dict[str, Any]
    row: dict[str, Any]
    parts: Iterator[ArchivedMessage | ArchivedApproval | ArchivedEntries]
    spare_id: str | None = None


class SourceError(CommandRefused):
    """The source is invalid. The message says where."""


class DoesNotFit(SourceError):
    """A run conflicts with the database, or its parent is missing. Later runs may still be imported."""
