"""Reads an export, which is JSON Lines, and validates all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from ccm.core.archive.exporting import FORMAT, VERSION
from ccm.core.archive.fields import Line, columns
from ccm.core.archive.records import (
    UUID,
    ArchivedApproval,
    ArchivedEntries,
    ArchivedMessage,
    ArchivedRun,
    SourceError,
)
from ccm.db.transcripts import Entry, is_inside
from ccm.json_text import storable
from ccm.models import Approval, ApprovalStatus, Resolution, Run, Session
from ccm.models.fields import RESERVED_RUN_IDS

# The longest line. Messages are limited by CCM_MAX_MESSAGE_BYTES, and chunks of transcripts are hardly larger.
LINE_BYTES = 2**30


class LineSource:
    """The runs of an export.

    Args:
        name: the name of the stream in error messages.

    Raises:
        SourceError: it is no export, or has an unknown version.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._number = 0
        try:
            header = self._read()
        except SourceError:
            header = None
        if header is None or header.type != "export" or header.raw("format") != FORMAT:
            raise SourceError(
                f"{name} is neither an export of CC Manager (JSON Lines) nor the SQLite database of the original "
                "service."
            )
        if header.raw("version") != VERSION:
            raise header.error(
                f"the export has version {header.raw('version')!r} and this program knows {VERSION}; update it."
            )
        self.last_seq = header.integer("lastSeq")

    def _read(self) -> Line | None:
        """Return the next line, None at the end of the file."""
        data = self._stream.readline(LINE_BYTES)
        if not data:
            return None
        self._number += 1
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            cut = "" if data.endswith(b"\n") else " The file ends in it: it is truncated."
            raise SourceError(f"Line {self._number}: it is no JSON.{cut}") from None
        if not isinstance(fields, dict):
            raise SourceError(f"Line {self._number}: it is no JSON object.")
        return Line(self._number, fields)

    def _next(self) -> Line:
        line = self._read()
        if line is None:
            raise SourceError(
                f"The file ends with line {self._number} and not with a line of type 'end': it is truncated."
            )
        return line

    def runs(self) -> Iterator[ArchivedRun]:
        """Yield the runs.

        Raises:
            SourceError: a line is invalid. The message has its number.
        """
        session: Line | None = None
        session_count = run_count = 0
        line = self._next()
        while line.type != "end":
            if line.type == "session":
                session, line = line, self._next()
                session_count += 1
            elif line.type == "run" and session is not None:
                run = _Run(line, session)
                parts = run.parts(self._next)
                yield ArchivedRun(columns(session, Session), run.row(), parts)
                for _ in parts:
                    pass  # skip the parts that the caller has not read
                run_count += 1
                line = run.next
            else:
                raise line.error(f"a line of type {line.type!r} must not be here.")
        if (line.integer("sessions"), line.integer("runs")) != (session_count, run_count):
            raise line.error(
                f"it counts {line.integer('sessions')} sessions and {line.integer('runs')} runs, and the lines "
                f"before it have {session_count} and {run_count}: a part of the file is missing."
            )
        if self._read() is not None:
            raise SourceError(f"Line {self._number}: there must be nothing after the line of type 'end'.")


class _Run:
    """A run's own line and the lines of its parts. `next` is the line after them, once `parts` is exhausted."""

    def __init__(self, line: Line, session: Line) -> None:
        self._line = line
        self._session_id = session.id("sessionId")
        self._sdk_session_id = line.id("sdkSessionId")
        self._message_count = line.count("messageCount")
        self.next = line

    def row(self) -> dict[str, Any]:
        line = self._line
        if line.id("sessionId") != self._session_id:
            raise line.error(f"the run must follow the line of its session {line.id('sessionId')}.")
        if line.id("runId") in RESERVED_RUN_IDS:
            raise line.error(f"runId must not be {line.id('runId')!r}.")
        resumable = line.flag("hasTranscript") or line.flag("transcriptStored")
        if resumable and not UUID.fullmatch(self._sdk_session_id):
            raise line.error("sdkSessionId must be a UUID in lower case where there is a transcript.")
        error = {} if line.raw("error") is None else line.mapping("error")
        error_line = Line(line.number, error)
        return {
            **columns(line, Run),
            "id": line.id("runId"),
            "errorCode": error_line.text("code") if error else None,
            "errorMessage": None if error_line.raw("message") is None else error_line.text("message"),
        }

    def parts(self, read: Callable[[], Line]) -> Iterator[ArchivedMessage | ArchivedApproval | ArchivedEntries]:
        count = 0
        line = read()
        while line.type in ("message", "approval", "transcript"):
            if line.type == "message":
                yield self._message(line, count)
                count += 1
            elif line.type == "approval":
                yield self._approval(line)
            else:
                yield self._entries(line)
            line = read()
        if count != self._message_count:
            raise line.error(
                f"the run before it has {self._message_count} messages, and the file has {count} of them: a part of it "
                "is missing."
            )
        self.next = line

    def _message(self, line: Line, index: int) -> ArchivedMessage:
        if line.text("runId") != self._line.text("runId") or line.integer("index") != index:
            raise line.error(f"message {index} of run {self._line.text('runId')} should be here.")
        message = line.mapping("message")
        return ArchivedMessage(line.text("createdAt"), storable(message.get("type")) or "unknown", line.json(message))

    def _approval(self, line: Line) -> ArchivedApproval:
        if line.text("runId") != self._line.text("runId"):
            raise line.error(f"an approval of run {self._line.text('runId')} should be here.")
        row = columns(line, Approval, without=("resolution",))
        pending = row["status"] == ApprovalStatus.PENDING
        resolution = None if pending else line.one_of("resolution", tuple(Resolution))
        return ArchivedApproval({**row, "id": line.id("approvalId"), "resolution": resolution})

    def _entries(self, line: Line) -> ArchivedEntries:
        if line.text("sdkSessionId") != self._sdk_session_id or not UUID.fullmatch(self._sdk_session_id):
            raise line.error("sdkSessionId must be that of the run before it, and a UUID in lower case.")
        entries = line.mappings("entries")
        project_key, subpath = line.text("projectKey"), line.text("subpath")
        # They become file names below Claude Code's own directory.
        if not is_inside(project_key) or "/" in project_key or (subpath and not is_inside(subpath)):
            raise line.error("projectKey and subpath must stay within the directory of the transcripts.")
        return ArchivedEntries(
            project_key=project_key,
            subpath=subpath,
            updated_at_ms=line.count("updatedAtMs"),
            first_index=line.count("index"),
            entries=[Entry(storable(entry.get("uuid")), line.json(entry)) for entry in entries],
        )
