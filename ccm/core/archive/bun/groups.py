"""Which run of the original service belongs into which session here.

There each resume got a new session id and names the one that it continued. Here the first resume of a run continues its
session, and its siblings become forks.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ccm.core.archive.bun import values
from ccm.core.archive.bun.database import BunLink
from ccm.core.archive.records import NOT_FOR_RUNS
from ccm.models import RunMode
from ccm.models.fields import RUN_ID

# Of the ids that are made for what has none that can be used: the same ones at every import.
NAMESPACE = uuid.UUID("6ccb6f2c-5f6c-4d0e-9c3b-1f4c1a0f6a3e")
UNKNOWN_TIME = "1970-01-01T00:00:00.000Z"


class Group(NamedTuple):
    """A run's place among the others, which `parent` is the number of. Ids are those that it has here.

    `made_id` is a UUID that is its own whatever the others are.
    """

    link: BunLink
    created_at: str
    run_id: str
    made_id: str
    sdk_session_id: str
    session_id: str
    mode: str
    parent: int | None


class _Sessions:
    """The runs of each session id there, in order."""

    def __init__(self, links: Sequence[BunLink]) -> None:
        self._ids = [values.text(link.session_id) for link in links]
        self._runs: dict[str, list[int]] = {}
        for number, session_id in enumerate(self._ids):
            if session_id:
                self._runs.setdefault(session_id, []).append(number)

    def id(self, number: int) -> str:
        return self._ids[number]

    def shared_with(self, number: int) -> list[int]:
        """The runs that have a run's session id, itself among them."""
        return self._runs.get(self._ids[number], [number])

    def runs(self, session_id: str) -> list[int]:
        return self._runs.get(session_id, [])


def group(links: Sequence[BunLink], tell: Callable[[str], None]) -> list[Group]:
    """The runs in the order of their times, each with its session.

    Args:
        tell: called with a sentence about whatever cannot be as it was.
    """
    links = sorted(links, key=lambda link: (_time(link), link.rowid))
    sessions = _Sessions(links)
    parents = _without_rings([_parent(number, link, sessions, tell) for number, link in enumerate(links)])
    continued: set[int] = set()
    groups: list[Group] = []
    for number, (link, parent) in enumerate(zip(links, parents, strict=True)):
        if parent is None:
            mode = RunMode.FRESH
        elif link.mode == RunMode.FORK or parent in continued:
            mode = RunMode.FORK
        else:
            mode = RunMode.RESUME
            continued.add(parent)
        session_id, shared = sessions.id(number), sessions.shared_with(number)
        made = str(uuid.uuid5(NAMESPACE, str(link.id)))
        fits = RUN_ID.fullmatch(session_id) is not None
        groups.append(
            Group(
                link=link,
                created_at=_time(link),
                run_id=_run_id(link, tell),
                made_id=made,
                # Of the runs that share one, the last has its transcript, which holds them all.
                sdk_session_id=session_id if fits and shared[-1] == number else made,
                session_id=session_id if fits and shared[0] == number else made,
                mode=mode,
                parent=parent,
            )
        )
    for number in parents_first(groups):
        resumed = groups[number].parent
        if groups[number].mode == RunMode.RESUME and resumed is not None:
            groups[number] = groups[number]._replace(session_id=groups[resumed].session_id)
    return groups


def parents_first(groups: Sequence[Group]) -> Iterator[int]:
    """The numbers of the runs in order, but none before its parent's, whatever the clocks said."""
    done: set[int] = set()
    for number in range(len(groups)):
        line = []
        wanted: int | None = number
        while wanted is not None and wanted not in done:
            line.append(wanted)
            wanted = groups[wanted].parent
        done.update(line)
        yield from reversed(line)


def _time(link: BunLink) -> str:
    return values.iso_time(link.created_at) or UNKNOWN_TIME


def _parent(number: int, link: BunLink, sessions: _Sessions, tell: Callable[[str], None]) -> int | None:
    """The run that one continued: the last before it that has the session, else the first."""
    shared = sessions.shared_with(number)
    if shared[0] != number:
        return shared[shared.index(number) - 1]
    wanted = values.text(link.parent_session_id)
    found = [other for other in sessions.runs(wanted) if other != number]
    if wanted and not found:
        tell(f"Run {link.id} continued session {wanted}, which is not in this database: it begins one of its own.")
    return next((other for other in reversed(found) if other < number), found[0] if found else None)


def _without_rings(parents: Sequence[int | None]) -> list[int | None]:
    """The same parents, but none for a run that would be its own ancestor."""
    kept = list(parents)
    sound: set[int] = set()
    for number in range(len(kept)):
        line: list[int] = []
        wanted: int | None = number
        while wanted is not None and wanted not in sound:
            line.append(wanted)
            sound.add(wanted)
            wanted = kept[wanted]
        if wanted in line:
            kept[line[-1]] = None
    return kept


def _run_id(link: BunLink, tell: Callable[[str], None]) -> str:
    run_id = str(link.id)
    if RUN_ID.fullmatch(run_id) and run_id not in NOT_FOR_RUNS:
        return run_id
    made = str(uuid.uuid5(NAMESPACE, f"run {run_id}"))
    tell(f"Run {run_id!r} has an id that no address can have: it becomes {made}.")
    return made
