"""Copies the transcript files of one run into the database while they grow."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from ccm.core.claude.locations import find_transcript
from ccm.core.claude.regular_file import open_regular
from ccm.core.run_log import RunLog
from ccm.core.storage.run_loop import result_of
from ccm.core.transcripts.store import TranscriptStore, extend, merge
from ccm.db.driver.transaction import Transaction
from ccm.db.transcripts import Entry, TranscriptKey
from ccm.errors import StorageDown
from ccm.json_text import from_json_text
from ccm.models import Run

log = logging.getLogger(__name__)

# The type of lines that hold bodies of requests. They are not needed to continue a run.
LOCAL_ONLY = "api-request"
# The type of the entry that holds the content of the metadata file beside a subagent's transcript.
AGENT_METADATA = "agent_metadata"
# How much of a file is stored at a time. The run's event loop does nothing else while it reads that.
PART_BYTES = 2**20
# A main file that has gained less than this at a result is copied later: that saves most runs a commit.
LATER_BYTES = 2**16
# A longer line is not Claude Code's: a file that has lost its blocks, or that an agent has extended, is one long line.
MAX_LINE_BYTES = 2**27
NON_ASCII = re.compile("[^\0-\x7f]")

# Stores the rest of a transcript in the transaction that ends its run. Returns the run's columns `hasTranscript` and
# `transcriptStored`.
TranscriptEnd = Callable[[Transaction], dict[str, Any]]


@dataclass
class _Place:
    """How far one file has been copied.

    Attributes:
        identity: its device and inode.
        offset: the bytes that were read.
        length: the entries that its transcript has in the database.
        metadata: the metadata that was stored last.
    """

    identity: tuple[int, int]
    offset: int = 0
    length: int = 0
    metadata: Entry | None = None

    def is_in(self, file: BufferedReader) -> bool:
        """Return whether this is a place in `file`, which may have been replaced or truncated."""
        if self.identity != _identity(file):
            return False
        file.seek(max(self.offset - 1, 0))
        return self.offset == 0 or file.read(1) == b"\n"


# Stores a part of a file in a transaction of the writer. Returns the new length of its transcript.
Write = Callable[[Transaction], int]
# A part of a file: its place and its write.
Step = tuple[_Place, Write]


class TranscriptCopy:
    """The stored copy of one run's transcript. For one thread at a time.

    Args:
        run: the run.
        store: receives the copy.
        environ: the environment of its Claude Code, which determines where the files are.
        stored_before: a part may be stored already, so that each file is compared with it first.
    """

    def __init__(
        self, run: Run, store: TranscriptStore, environ: Mapping[str, str], *, stored_before: bool = False
    ) -> None:
        self._run = run
        self._log = RunLog(log, run.id)
        self._store = store
        self._environ = environ
        self._compare = stored_before
        self._places: dict[TranscriptKey, _Place] = {}
        # Whether the last copy was left to the next one, or to the end of the run.
        self._postponed = False
        # The main file. It stays open: if it is deleted during the run, what it has can still be read.
        self._main: BufferedReader | None = None
        self._main_key = TranscriptKey(run.sdk_session_id, "")
        # A write that has not been waited for, with its place. It stays if the run's event loop ends before.
        self._pending: tuple[_Place, Future[int]] | None = None

    async def copy(self, at_result: bool) -> None:
        """Store what the files have gained, in the run's event loop. A failure is logged; `finish` then tries again.

        Args:
            at_result: the run may be about to end. What little the main file has gained is then left to the next copy.
        """
        try:
            self._postponed = at_result and not self._postponed and self._gained() < LATER_BYTES
            if self._postponed:
                return
            for place, write in self._steps():
                self._pending = place, self._store.submit(write)
                await result_of(self._pending[1])
                self._complete_pending()
        except Exception as error:
            self._start_over()
            self._log.warning(
                "its transcript cannot be copied yet: %s: %s",
                type(error).__name__,
                error,
                event="transcript_copy_failed",
            )

    def _gained(self) -> int:
        """Return the bytes of the main file that have not been read."""
        path = find_transcript(self._run.cwd, self._run.sdk_session_id, self._environ)
        place = self._places.get(self._main_key)
        return (0 if path is None else path.stat().st_size) - (0 if place is None else place.offset)

    def finish(self) -> TranscriptEnd:
        """Store the rest after the end of the run, except for the last part, which its end stores.

        No fault in it may prevent the run's end from being stored.
        """
        last: Write | None = None
        try:
            last = self._copy_rest()
            main = self._places.get(self._main_key)
            here = stored = main is not None and main.length > 0
            if not stored:
                # Without a file, what is stored already is all there is.
                stored = any(not key.subpath for key in self._store.of_session(self._run.sdk_session_id))
        except Exception as error:
            self._log_unstored(error)
            here, stored = self._main is not None, False
        finally:
            if self._main is not None:
                self._main.close()
        return partial(self._store_last, last, here or stored, stored)

    def _store_last(self, last: Write | None, here: bool, stored: bool, transaction: Transaction) -> dict[str, Any]:
        try:
            if last is not None:
                with transaction.savepoint():
                    last(transaction)
        except StorageDown:
            raise
        except Exception as error:
            self._log_unstored(error)
            stored = False
        return {"hasTranscript": int(here), "transcriptStored": int(stored)}

    def _log_unstored(self, error: Exception) -> None:
        self._log.warning(
            "its transcript is not stored: %s: %s", type(error).__name__, error, event="transcript_store_failed"
        )

    def _copy_rest(self) -> Write | None:
        """Store what the files have gained, except for the last write, which is returned."""
        last: Write | None = None
        try:
            self._complete_pending()
            for _, write in self._steps():
                if last is not None:
                    self._store.submit(last).result()
                last = write
        except Exception:
            if self._compare:
                raise
            self._start_over()  # an earlier write may be the one that failed
            return self._copy_rest()
        return last

    def _complete_pending(self) -> None:
        if self._pending is not None:
            place, write = self._pending
            place.length = write.result()
            self._pending = None

    def _start_over(self) -> None:
        """After a failure: compare each file with what is stored when it is next copied."""
        self._places.clear()
        self._pending = None
        self._compare = True

    def _steps(self) -> Iterator[Step]:
        """Read what the files have gained, part by part. The writes must be done in this order."""
        path, latest = self._open_main()
        if path is not None and latest is not None:
            if self._main is not None:
                if not os.path.sameopenfile(self._main.fileno(), latest.fileno()):
                    yield from self._copy_file(self._main_key, self._main)
                self._main.close()
            self._main, self._main_key = latest, self._main_key._replace(project_key=path.parent.name)
        if self._main is not None:
            yield from self._copy_file(self._main_key, self._main)
        if path is not None:
            yield from self._copy_subagents(path.parent / self._run.sdk_session_id)

    def _copy_subagents(self, folder: Path) -> Iterator[Step]:
        for path in sorted(folder.rglob("*.jsonl")):
            key = self._main_key._replace(subpath=path.relative_to(folder).with_suffix("").as_posix())
            with open_regular(path) as file:
                yield from self._copy_file(key, file, _metadata(path))

    def _open_main(self) -> tuple[Path | None, BufferedReader | None]:
        """Open the main transcript file, and return its path as well. Both are None if it cannot be read."""
        try:
            path = find_transcript(self._run.cwd, self._run.sdk_session_id, self._environ)
            return path, None if path is None else open_regular(path)
        except OSError as error:
            self._log.warning("its transcript cannot be read: %s", error, event="transcript_unreadable")
            return None, None

    def _copy_file(self, key: TranscriptKey, file: BufferedReader, metadata: Entry | None = None) -> Iterator[Step]:
        place = self._places.get(key)
        if place is None and not self._compare:
            place = self._places[key] = _Place(_identity(file))
        if place is None or not place.is_in(file):
            yield from self._merge(key, file, metadata)
            return
        if metadata != place.metadata and metadata is not None:
            place.metadata = metadata
            yield from self._extend(key, place, [metadata])
        for entries, offset in _parts(file, place.offset):
            place.offset = offset
            yield from self._extend(key, place, entries)

    def _extend(self, key: TranscriptKey, place: _Place, entries: list[Entry]) -> Iterator[Step]:
        if entries:
            write = partial(extend, key=key, length=place.length, entries=entries)
            place.length += len(entries)
            yield place, write

    def _merge(self, key: TranscriptKey, file: BufferedReader, metadata: Entry | None) -> Iterator[Step]:
        """Copy a whole file, of which the database may have a part."""
        parts = list(_parts(file, 0))
        entries = [] if metadata is None else [metadata]
        entries += [entry for part, _ in parts for entry in part]
        if entries:
            offset = parts[-1][1] if parts else 0
            place = self._places[key] = _Place(_identity(file), offset, len(entries), metadata)
            yield place, partial(merge, key=key, entries=entries)


def _identity(file: BufferedReader) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _parts(file: BufferedReader, offset: int) -> Iterator[tuple[list[Entry], int]]:
    """Yield the entries after an offset in parts, each with the offset at which it ends.

    Raises:
        OSError: the file cannot be read, or is not a transcript.
    """
    file.seek(offset)
    entries: list[Entry] = []
    start = offset
    while line := file.readline(MAX_LINE_BYTES):
        found = parse(line)
        if found is None and not line.endswith(b"\n"):
            if len(line) == MAX_LINE_BYTES:
                raise OSError(errno.EFBIG, "one of its lines is too long")
            break  # Claude Code is writing this line, or was killed while it did
        offset += len(line)
        if found is not None:
            entries.append(found)
        if offset - start >= PART_BYTES:
            yield entries, offset
            entries, start = [], offset
    if offset > start:
        yield entries, offset


def parse(line: bytes) -> Entry | None:
    """Return a transcript's line as an entry, or None if it is broken or not needed to continue a run.

    Its text stays as it is but for non-ASCII characters, which are escaped.
    """
    text = line.decode("utf-8", "replace").strip()
    try:
        value = from_json_text(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or str(value.get("type")).startswith(LOCAL_ONLY):
        return None
    uuid = value.get("uuid")
    is_plain = isinstance(uuid, str) and uuid.isascii() and uuid.isprintable()
    if not text.isascii():
        text = NON_ASCII.sub(lambda char: json.dumps(char[0])[1:-1], text)
    return Entry(uuid if is_plain else None, text)


def metadata_file(transcript: Path) -> Path:
    """Return the path of the metadata file beside a subagent's transcript."""
    return transcript.with_suffix(".meta.json")


def _metadata(transcript: Path) -> Entry | None:
    try:
        with open_regular(metadata_file(transcript)) as stream:
            content = json.loads(stream.read(MAX_LINE_BYTES))
    except (FileNotFoundError, ValueError):
        return None  # there is no such file, or Claude Code is writing it
    return parse(json.dumps({**content, "type": AGENT_METADATA}).encode())
