"""A run as it comes in from outside, whatever it was read from; and which ids are let in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ccm.db.transcripts import Entry
from ccm.errors import CommandRefused

# Claude Code's own ids; it would take anything else for a session's title.
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# They stand where a run's id stands in an address.
NOT_FOR_RUNS = ("start", "resume", "fork")


@dataclass(frozen=True)
class ArchivedMessage:
    """The next message of a run; `json` is ASCII."""

    created_at: str
    type: str
    json: str


@dataclass(frozen=True)
class ArchivedApproval:
    """A question of a run and what became of it: its columns but for `seq` and those that name the run."""

    row: dict[str, Any]


@dataclass(frozen=True)
class ArchivedEntries:
    """A piece of one of Claude Code's transcript files."""

    project_key: str
    subpath: str
    updated_at_ms: int
    first_index: int
    entries: list[Entry]


@dataclass(frozen=True)
class ArchivedRun:
    """One run, and what it says.

    Args:
        session: the columns of its session that are known when that begins.
        row: the columns of the run. `messageCount` None: as many as there are. `seq` is its place in the source.
        parts: can be read until the next run is asked for.
        spare_id: what it can have for its SDK session id where a run that is here has that one; None: it is refused.
    """

    session: dict[str, Any]
    row: dict[str, Any]
    parts: Iterator[ArchivedMessage | ArchivedApproval | ArchivedEntries]
    spare_id: str | None = None


class Source(Protocol):
    """Something that runs come from, each after its parent and after the runs before it in its session."""

    @property
    def last_seq(self) -> int:
        """The highest `seq` of its runs, as far as it knows."""

    def runs(self) -> Iterator[ArchivedRun]:
        """
        Raises:
            CommandRefused: it cannot be read on; says where.
        """


class SourceError(CommandRefused):
    """What is read is not what it should be; says where."""


class DoesNotFit(SourceError):
    """A run cannot be taken in beside what is here; the ones after it may."""
