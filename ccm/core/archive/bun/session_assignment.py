"""Assigns the runs of the original service to sessions.

In the original service each resume got a new session id and names the session it continued. Here the first resume of a
run continues its session, and further ones become forks.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ccm.core.archive.bun import values
from ccm.core.archive.bun.database import BunLink
from ccm.models import RunMode
from ccm.models.fields import RESERVED_RUN_IDS, RUN_ID

# The namespace of generated ids, which replace unusable ones. Every import generates the same ids.
NAMESPACE = uuid.UUID("6ccb6f2c-5f6c-4d0e-9c3b-1f4c1a0f6a3e")
UNKNOWN_TIME = "1970-01-01T00:00:00.000Z"


class AssignedRun(NamedTuple):
    """A run with its ids in our database. `made_id` is a generated UUID that no other run has."""

    link: BunLink
    created_at: str
    run_id: str
    made_id: str
    sdk_session_id: str
    session_id: str
    mode: RunMode
    parent: AssignedRun | None


def assign_sessions(links: Sequence[BunLink], warn: Callable[[str], None]) -> list[AssignedRun]:
    """Return the runs in the order of their times, but each after its parent, with its session.

    Args:
        warn: called with a sentence for each thing that is not imported unchanged.
    """
    links = sorted(links, key=lambda link: (_time(link), link.rowid))
    # The indexes of the runs of each original session id, in order.
    sharing: dict[str, list[int]] = {}
    for number, link in enumerate(links):
        if session_id := values.text(link.session_id):
            sharing.setdefault(session_id, []).append(number)
    parents = [_parent(number, link, sharing, warn) for number, link in enumerate(links)]
    order = _parents_first(parents)
    modes = _modes(links, parents)
    runs: dict[int, AssignedRun] = {}
    for number in order:
        link, mode, above = links[number], modes[number], parents[number]
        parent = None if above is None else runs[above]
        session_id = values.text(link.session_id)
        shared = sharing.get(session_id, [number])
        made = str(uuid.uuid5(NAMESPACE, str(link.id)))
        fits = RUN_ID.fullmatch(session_id) is not None
        own = session_id if fits and shared[0] == number else made
        runs[number] = AssignedRun(
            link=link,
            created_at=_time(link),
            run_id=_run_id(link, warn),
            made_id=made,
            # Of the runs that share a session id, the last has the transcript, which includes the earlier ones.
            sdk_session_id=session_id if fits and shared[-1] == number else made,
            session_id=parent.session_id if parent is not None and mode == RunMode.RESUME else own,
            mode=mode,
            parent=parent,
        )
    return list(runs.values())


def _time(link: BunLink) -> str:
    return values.iso_time(link.created_at) or UNKNOWN_TIME


def _parent(number: int, link: BunLink, sharing: Mapping[str, list[int]], warn: Callable[[str], None]) -> int | None:
    """Return the run that a run continued: the last one before it with that session id, or else the first."""
    shared = sharing.get(values.text(link.session_id), [number])
    if shared[0] != number:
        return shared[shared.index(number) - 1]
    wanted = values.text(link.parent_session_id)
    found = [other for other in sharing.get(wanted, []) if other != number]
    if wanted and not found:
        warn(
            f"Run {link.id} continued session {wanted}, which is not in this database. It begins a session of its own."
        )
    return next((other for other in reversed(found) if other < number), found[0] if found else None)


def _parents_first(parents: list[int | None]) -> list[int]:
    """Return the runs in order, but each after its parent, even if timestamps say otherwise.

    Args:
        parents: the parent of each run. It is set to None where a run would be its own ancestor.
    """
    ordered: dict[int, None] = {}
    for number in range(len(parents)):
        path: dict[int, None] = {}
        wanted: int | None = number
        while wanted is not None and wanted not in ordered and wanted not in path:
            path[wanted] = None
            wanted = parents[wanted]
        from_the_top = list(reversed(path))
        if wanted in path:
            parents[from_the_top[0]] = None
        ordered.update(dict.fromkeys(from_the_top))
    return list(ordered)


def _modes(links: Sequence[BunLink], parents: Sequence[int | None]) -> list[RunMode]:
    """Return the mode of each run: the first run that resumes another continues its session, the others fork it."""
    modes: list[RunMode] = []
    continued: set[int] = set()
    for link, parent in zip(links, parents, strict=True):
        if parent is None:
            modes.append(RunMode.FRESH)
        elif link.mode == RunMode.FORK or parent in continued:
            modes.append(RunMode.FORK)
        else:
            modes.append(RunMode.RESUME)
            continued.add(parent)
    return modes


def _run_id(link: BunLink, warn: Callable[[str], None]) -> str:
    run_id = str(link.id)
    if RUN_ID.fullmatch(run_id) and run_id not in RESERVED_RUN_IDS:
        return run_id
    made = str(uuid.uuid5(NAMESPACE, f"run {run_id}"))
    warn(f"Run {run_id!r} has an id that cannot be part of a URL. It becomes {made}.")
    return made
