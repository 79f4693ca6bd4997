"""The database of the original service as a source of an import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ccm.core.archive.bun import values
from ccm.core.archive.bun.database import BunDatabase
from ccm.core.archive.bun.session_assignment import UNKNOWN_TIME, AssignedRun, assign_sessions
from ccm.core.archive.records import ArchivedMessage, ArchivedRun
from ccm.json_text import storable, to_json_text
from ccm.models import RunMode, RunStatus


class BunSource:
    """The runs of a Bun database, parents first.

    Args:
        warn: called with a sentence for each thing that is not imported unchanged.
    """

    def __init__(self, database: BunDatabase, warn: Callable[[str], None]) -> None:
        self._database = database
        self._warn = warn
        # All runs without their long texts. Kept in memory, because a parent may be anywhere in the table.
        self._links = list(database.links())
        self.last_seq = len(self._links)
        # The total costs of the runs so far, by rowid. The total of a result includes the runs that it continued.
        self._totals: dict[int, float | None] = {}

    def runs(self) -> Iterator[ArchivedRun]:
        self._database.order_messages()
        runs = assign_sessions([link for link in self._links if link.id is not None], self._warn)
        for seq, run in enumerate(runs, 1):
            yield self._run(run, seq)
        if len(runs) < len(self._links):
            self._warn(f"Runs without an id were left out: {len(self._links) - len(runs)}.")
        lost = self._database.orphans()
        if lost:
            self._warn(f"Messages that belong to no run were left out: {lost}.")

    # ---- the columns of a run

    def _run(self, run: AssignedRun, seq: int) -> ArchivedRun:
        parent = run.parent
        stored = self._database.run(run.link.rowid)
        result = self._result(run.run_id, stored["result_json"])
        self._totals[run.link.rowid] = total = values.total(result)
        cwd = storable(values.text(stored["cwd"])) or ""
        status = stored["status"] if stored["status"] in tuple(RunStatus) else RunStatus.ERROR
        duration = values.whole(stored["duration_ms"])
        if values.iso_time(stored["created_at"]) is None:
            self._warn(f"Run {run.run_id} has no valid time. It is dated {UNKNOWN_TIME}.")
        error = values.error(status, stored["status"], result)
        forked_from = parent if run.mode == RunMode.FORK else None
        session = {
            "id": run.session_id,
            "parentSessionId": forked_from.session_id if forked_from else None,
            "forkedFromRunId": forked_from.run_id if forked_from else None,
            "cwd": cwd,
            "title": None,
            "metadataJson": "{}",
        }
        row = {
            "id": run.run_id,
            "seq": seq,
            "cwd": cwd,
            "sessionId": run.session_id,
            "sdkSessionId": run.sdk_session_id,
            "parentSessionId": session["parentSessionId"],
            "parentRunId": parent.run_id if parent else None,
            "mode": run.mode,
            "status": status,
            "prompt": storable(values.text(stored["prompt"])) or "",
            "optionsJson": "{}",
            "imageCount": 0,
            "resultType": storable(stored["result_type"]),
            "resultJson": None if result is None else to_json_text(result),
            "errorCode": error[0],
            "errorMessage": error[1],
            "costUsd": values.own_cost(total, self._totals[parent.link.rowid]) if parent else total,
            "transcriptStored": 0,
            "durationMs": duration,
            "createdAt": run.created_at,
            "startedAt": run.created_at,
            "endedAt": None if status == RunStatus.RUNNING else values.later(run.created_at, duration or 0),
        }
        return ArchivedRun(session, row, self._messages(run), spare_id=run.made_id)

    def _result(self, run_id: str, text: Any) -> dict[str, Any] | None:
        if text is None or text == "":
            return None
        result = values.parsed(text)
        if isinstance(result, dict):
            return result
        self._warn(f"Run {run_id} has a result that is no JSON object. The result was left out.")
        return None

    def _messages(self, run: AssignedRun) -> Iterator[ArchivedMessage]:
        for index, message in enumerate(self._database.messages(run.link.id)):
            at = values.iso_time(message.created_at) or run.created_at
            raw = values.parsed(message.message_json)
            if not isinstance(raw, dict):
                self._warn(
                    f"Message {index} of run {run.run_id} is no JSON object. It is kept as text, in the field "
                    "'unparsed'."
                )
                kind, unparsed = values.text(message.message_type), values.text(message.message_json)
                raw = {"type": kind or "unknown", "unparsed": unparsed}
            kind = storable(raw.get("type")) or storable(message.message_type) or "unknown"
            yield ArchivedMessage(at, kind, to_json_text(raw))
