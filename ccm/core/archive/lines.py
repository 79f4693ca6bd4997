"""Reads an export, which is JSON Lines, and validates all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
        # The line that was read last.
        self._line: Line
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
        self.last_seq = header.get("lastSeq", int)

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
        self._line = line
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
                session = line
                session_count += 1
                self._next()
            elif line.type == "run" and session is not None:
                parts = self._parts(line)
                yield ArchivedRun(columns(session, Session), _row(line, session), parts)
                for _ in parts:
                    pass  # skip the parts that the caller has not read
                run_count += 1
            else:
                raise line.error(f"a line of type {line.type!r} must not be here.")
            line = self._line
        counted = line.get("sessions", int), line.get("runs", int)
        if counted != (session_count, run_count):
            raise line.error(
                f"it counts {counted[0]} sessions and {counted[1]} runs, and the lines before it have {session_count} "
                f"and {run_count}: a part of the file is missing."
            )
        if self._read() is not None:
            raise SourceError(f"Line {self._number}: there must be nothing after the line of type 'end'.")

    def _parts(self, run: Line) -> Iterator[ArchivedMessage | ArchivedApproval | ArchivedEntries]:
        """Yield the parts of a run. Afterwards `_line` is the line that follows them."""
        run_id, sdk_session_id, message_count = run.id("runId"), run.id("sdkSessionId"), run.count("messageCount")
        count = 0
        line = self._next()
        while line.type in ("message", "approval", "transcript"):
            if line.type == "message":
                if line.get("runId", str) != run_id or line.get("index", int) != count:
                    raise line.error(f"message {count} of run {run_id} should be here.")
                yield _message(line)
                count += 1
            elif line.type == "approval":
                if line.get("runId", str) != run_id:
                    raise line.error(f"an approval of run {run_id} should be here.")
                yield _approval(line)
            else:
                yield _entries(line, sdk_session_id)
            line = self._next()
        if count != message_count:
            raise line.error(
                f"the run before it has {message_count} messages, and the file has {count} of them: a part of it is "
                "missing."
            )


def _row(line: Line, session: Line) -> dict[str, Any]:
    """Return the columns of a run."""
    if line.id("sessionId") != session.id("sessionId"):
        raise line.error(f"the run must follow the line of its session {line.id('sessionId')}.")
    if line.id("runId") in RESERVED_RUN_IDS:
        raise line.error(f"runId must not be {line.id('runId')!r}.")
    resumable = line.get("hasTranscript", bool) or line.get("transcriptStored", bool)
    if resumable and not UUID.fullmatch(line.id("sdkSessionId")):
        raise line.error("sdkSessionId must be a UUID in lower case where there is a transcript.")
    error = {} if line.raw("error") is None else line.get("error", dict)
    error_line = Line(line.number, error)
    return {
        **columns(line, Run),
        "id": line.id("runId"),
        "errorCode": error_line.get("code", str) if error else None,
        "errorMessage": None if error_line.raw("message") is None else error_line.get("message", str),
    }


def _message(line: Line) -> ArchivedMessage:
    message = line.get("message", dict)
    return ArchivedMessage(line.get("createdAt", str), storable(message.get("type")) or "unknown", line.json(message))


def _approval(line: Line) -> ArchivedApproval:
    row = columns(line, Approval, without=("resolution",))
    pending = row["status"] == ApprovalStatus.PENDING
    resolution = None if pending else line.one_of("resolution", tuple(Resolution))
    return ArchivedApproval({**row, "id": line.id("approvalId"), "resolution": resolution})


def _entries(line: Line, sdk_session_id: str) -> ArchivedEntries:
    if line.get("sdkSessionId", str) != sdk_session_id or not UUID.fullmatch(sdk_session_id):
        raise line.error("sdkSessionId must be that of the run before it, and a UUID in lower case.")
    entries = line.get("entries", list)
    project_key, subpath = line.get("projectKey", str), line.get("subpath", str)
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
