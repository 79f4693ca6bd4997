"""The history of the original service as runs and sessions of ours.

There each resume got a new session id and names the one that it continued. Here the first resume of a run continues its
session, and its siblings become forks.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from ccm.core.archive.records import NOT_FOR_RUNS, SAFE_ID, UUID, ArchivedMessage, ArchivedRun
from ccm.core.executor import RESULT_ERRORS
from ccm.db.bun import BunDatabase, BunLink
from ccm.models import (
    ERROR,
    FORK,
    FRESH,
    MONEY_DIGITS,
    RESUME,
    RUNNING,
    STATUSES,
    storable,
    to_json_text,
)

# Of the ids that are made for what has none that can be used: the same ones at every import.
NAMESPACE = uuid.UUID("6ccb6f2c-5f6c-4d0e-9c3b-1f4c1a0f6a3e")
UNKNOWN_TIME = "1970-01-01T00:00:00.000Z"
# A number larger than this counts milliseconds and not seconds.
MILLISECONDS_FROM = 100_000_000_000


class Grouped(NamedTuple):
    """A run's place among the others. Ids are those that it has here."""

    link: BunLink
    created_at: str
    run_id: str
    sdk_session_id: str
    session_id: str
    mode: str
    parent: int | None


class BunSource:
    """The runs of a Bun database, parents first.

    Args:
        has_transcript: whether Claude Code has a run's transcript on this host, by the run's cwd and SDK session.
        tell: called with a sentence about whatever does not come in just as it was.
    """

    def __init__(
        self, database: BunDatabase, has_transcript: Callable[[str, str], bool], tell: Callable[[str], None]
    ) -> None:
        self._database = database
        self._has_transcript = has_transcript
        self._tell = tell
        links = [link for link in database.links() if link.id is not None]
        self._links = sorted(links, key=lambda link: (iso_time(link.created_at) or UNKNOWN_TIME, link.rowid))
        # The total that a run's result tells counts what it continued too.
        self._totals: dict[int, float | None] = {}

    @property
    def last_seq(self) -> int:
        return len(self._links)

    def runs(self) -> Iterator[ArchivedRun]:
        self._database.order_messages()
        grouped = self._group()
        for seq, number in enumerate(_parents_first(grouped), 1):
            yield self._run(grouped, number, seq)
        lost = self._database.orphans()
        if lost:
            self._tell(f"{lost} messages belong to no run and were left out.")

    # ---- which run belongs where

    def _group(self) -> list[Grouped]:
        links = self._links
        session_ids = [_text(link.session_id) for link in links]
        of_session: dict[str, list[int]] = {}
        for number, session_id in enumerate(session_ids):
            if session_id:
                of_session.setdefault(session_id, []).append(number)
        parents = _without_rings([self._parent(number, session_ids, of_session) for number in range(len(links))])
        continued: set[int] = set()
        grouped: list[Grouped] = []
        for number, link in enumerate(links):
            parent = parents[number]
            own = of_session.get(session_ids[number], [number])
            run_id = self._run_id(link)
            made = str(uuid.uuid5(NAMESPACE, str(link.id)))
            fits = SAFE_ID.fullmatch(session_ids[number]) is not None
            # Of two runs in one session the last has its transcript, which holds them both; the first has its name.
            sdk_session_id = session_ids[number] if fits and own[-1] == number else made
            session_id = session_ids[number] if fits and own[0] == number else made
            if parent is None:
                mode = FRESH
            elif link.mode == FORK or parent in continued:
                mode = FORK
            else:
                mode = RESUME
                continued.add(parent)
            at = iso_time(link.created_at) or UNKNOWN_TIME
            grouped.append(Grouped(link, at, run_id, sdk_session_id, session_id, mode, parent))
        return _with_sessions(grouped)

    def _parent(self, number: int, session_ids: list[str], of_session: dict[str, list[int]]) -> int | None:
        """The run that one continued: the last before it that has the session, else the first."""
        link = self._links[number]
        own = of_session.get(session_ids[number], [])
        if own and own[0] != number:
            return own[own.index(number) - 1]
        wanted = _text(link.parent_session_id)
        found = [other for other in of_session.get(wanted, []) if other != number] if wanted else []
        if wanted and not found:
            self._tell(
                f"Run {link.id} continued session {wanted}, which is not in this database: it begins a session of its "
                "own."
            )
        return next((other for other in reversed(found) if other < number), found[0] if found else None)

    def _run_id(self, link: BunLink) -> str:
        run_id = str(link.id)
        if SAFE_ID.fullmatch(run_id) and run_id not in NOT_FOR_RUNS:
            return run_id
        made = str(uuid.uuid5(NAMESPACE, f"run {run_id}"))
        self._tell(f"Run {run_id!r} has an id that no address can have: it becomes {made}.")
        return made

    # ---- what a run is

    def _run(self, grouped: list[Grouped], number: int, seq: int) -> ArchivedRun:
        group = grouped[number]
        parent = None if group.parent is None else grouped[group.parent]
        values = self._database.run(group.link.rowid)
        result = self._result(group.run_id, values["result_json"])
        self._totals[number] = total = _total(result)
        cwd = storable(_text(values["cwd"])) or ""
        status = values["status"] if values["status"] in STATUSES else ERROR
        duration = _whole(values["duration_ms"])
        local = (
            status != RUNNING
            and bool(UUID.fullmatch(group.sdk_session_id))
            and self._has_transcript(cwd, group.sdk_session_id)
        )
        if iso_time(values["created_at"]) is None:
            self._tell(f"Run {group.run_id} has no time that can be read: it is taken for {UNKNOWN_TIME}.")
        error = _error(status, values["status"], result)
        forked_from = parent if group.mode == FORK else None
        session = {
            "id": group.session_id,
            "parentSessionId": forked_from.session_id if forked_from else None,
            "forkedFromRunId": forked_from.run_id if forked_from else None,
            "cwd": cwd,
            "title": None,
            "metadataJson": "{}",
        }
        row = {
            "id": group.run_id,
            "seq": seq,
            "cwd": cwd,
            "sessionId": group.session_id,
            "sdkSessionId": group.sdk_session_id,
            "parentSessionId": session["parentSessionId"],
            "parentRunId": parent.run_id if parent else None,
            "mode": group.mode,
            "status": status,
            "prompt": storable(_text(values["prompt"])) or "",
            "optionsJson": "{}",
            "imageCount": 0,
            "resultType": storable(values["result_type"]),
            "resultJson": None if result is None else to_json_text(result),
            "errorCode": error[0],
            "errorMessage": error[1],
            "costUsd": total if group.parent is None else _difference(total, self._totals.get(group.parent)),
            "hasTranscript": int(local),
            "transcriptStored": 0,
            "durationMs": duration,
            "createdAt": group.created_at,
            "startedAt": group.created_at,
            "endedAt": None if status == RUNNING else _later(group.created_at, duration or 0),
        }
        return ArchivedRun(session, row, self._messages(group))

    def _result(self, run_id: str, text: Any) -> dict[str, Any] | None:
        if text is None or text == "":
            return None
        result = _parsed(text)
        if isinstance(result, dict):
            return result
        self._tell(f"Run {run_id} has a result that is no JSON object: it was left out.")
        return None

    def _messages(self, group: Grouped) -> Iterator[ArchivedMessage]:
        for index, message in enumerate(self._database.messages(group.link.id)):
            at = iso_time(message.created_at) or group.created_at
            raw = _parsed(message.json)
            if not isinstance(raw, dict):
                self._tell(
                    f"Message {index} of run {group.run_id} is no JSON object: it is kept as text, in the field "
                    "'unparsed'."
                )
                raw = {"type": _text(message.type) or "unknown", "unparsed": _text(message.json)}
            kind = storable(raw.get("type")) or storable(message.type) or "unknown"
            yield ArchivedMessage(at, kind, to_json_text(raw))


def _with_sessions(grouped: list[Grouped]) -> list[Grouped]:
    """Each resume in the session of its parent."""
    settled = list(grouped)
    for number in _parents_first(grouped):
        group = settled[number]
        if group.mode == RESUME and group.parent is not None:
            settled[number] = group._replace(session_id=settled[group.parent].session_id)
    return settled


def _parents_first(grouped: list[Grouped]) -> Iterator[int]:
    """The runs in order, but none before its parent, whatever the clocks said."""
    done: set[int] = set()
    for number in range(len(grouped)):
        line = []
        wanted: int | None = number
        while wanted is not None and wanted not in done:
            line.append(wanted)
            wanted = grouped[wanted].parent
        done.update(line)
        yield from reversed(line)


def _without_rings(parents: list[int | None]) -> list[int | None]:
    """The same parents, but none for a run that would be its own ancestor."""
    sound: set[int] = set()
    kept = list(parents)
    for number in range(len(kept)):
        line: list[int] = []
        seen: set[int] = set()
        wanted: int | None = number
        while wanted is not None and wanted not in sound:
            if wanted in seen:
                kept[line[-1]] = None
                break
            line.append(wanted)
            seen.add(wanted)
            wanted = kept[wanted]
        sound |= seen
    return kept


# ---- values as they may stand there


def iso_time(value: Any) -> str | None:
    """A time as ours are, in UTC with milliseconds: of ISO 8601, of SQLite's own form, or since 1970 in s or ms."""
    number = _number(value)
    try:
        if number is not None:
            seconds = number / 1000 if abs(number) >= MILLISECONDS_FROM else number
            time = datetime.fromtimestamp(0, UTC) + timedelta(seconds=seconds)
        elif isinstance(value, str):
            time = datetime.fromisoformat(value.strip())
        else:
            return None
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return time.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def _number(value: Any) -> float | None:
    """A finite number, also one that is written as a text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or not 0 <= number < MILLISECONDS_FROM * 1000 else round(number)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def _parsed(text: Any) -> Any:
    """What a text says, None if it is no JSON."""
    try:
        value = json.loads(text)
        to_json_text(value)
    except (TypeError, ValueError, RecursionError):
        return None
    return value


def _total(result: dict[str, Any] | None) -> float | None:
    total = (result or {}).get("total_cost_usd")
    return None if isinstance(total, bool | str) else _number(total)


def _difference(total: float | None, before: float | None) -> float | None:
    """What a run alone cost that continued another: the totals tell, if both are known."""
    if total is None or before is None or total < before:
        return None
    return round(total - before, MONEY_DIGITS)


def _error(status: str, told: Any, result: dict[str, Any] | None) -> tuple[str | None, str | None]:
    if status != ERROR:
        return None, None
    if told != ERROR:
        return "EXECUTION_ERROR", storable(f"The original service left this run in the status {told!r}.")
    subtype = str((result or {}).get("subtype"))
    said = (result or {}).get("result") or "The original service recorded that this run failed, and not why."
    return RESULT_ERRORS.get(subtype, "EXECUTION_ERROR"), storable(str(said))


def _later(at: str, milliseconds: int) -> str:
    return iso_time((datetime.fromisoformat(at) + timedelta(milliseconds=milliseconds)).isoformat()) or at
