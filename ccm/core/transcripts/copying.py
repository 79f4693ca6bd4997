"""Copies the transcript files of one run into the database while they grow."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from ccm.core.claude.locations import find_transcript
from ccm.core.claude.regular_file import open_regular
from ccm.core.run_log import RunLog
from ccm.core.storage.run_loop import result_of
from ccm.core.transcripts.store import TranscriptStore
from ccm.db.transcripts import Entry, TranscriptKey
from ccm.models import Run

log = logging.getLogger(__name__)

# The type of lines that hold bodies of requests. They are not needed to continue a run.
LOCAL_ONLY = "api-request"
# The type of the entry that holds the content of the metadata file beside a subagent's transcript.
AGENT_METADATA = "agent_metadata"
# How much of a file is stored at a time. The run's event loop does nothing else while it reads that.
PART_BYTES = 2**20
# A longer line is not Claude Code's: a file that has lost its blocks, or that an agent has extended, is one long line.
MAX_LINE_BYTES = 2**27
NON_ASCII = re.compile("[^\0-\x7f]")


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
        # The main file. It stays open: if it is deleted during the run, what it has can still be read.
        self._main: BufferedReader | None = None
        self._main_key = TranscriptKey(run.sdk_session_id, "")
        # A write that nothing has waited for, because the run's event loop ended before.
        self._pending: Future[int] | None = None

    async def copy(self) -> None:
        """Store what the files have gained, in the run's event loop. A failure is logged; `finish` then tries again."""
        try:
            for write in self._steps():
                await result_of(write)
        except Exception as error:
            self._start_over()
            self._log.warning(
                "its transcript cannot be copied yet: %s: %s",
                type(error).__name__,
                error,
                event="transcript_copy_failed",
            )

    def finish(self) -> dict[str, Any]:
        """Store the rest after the end of the run. No fault here may prevent the run's end from being stored.

        Returns:
            The run's columns `hasTranscript` and `transcriptStored`.
        """
        try:
            stored = self._copy_rest()
            here = stored
            if not stored:
                # Without a file, what is stored already is all there is.
                stored = any(not key.subpath for key in self._store.of_session(self._run.sdk_session_id))
        except Exception as error:
            self._log.warning(
                "its transcript is not stored: %s: %s", type(error).__name__, error, event="transcript_store_failed"
            )
            here, stored = self._main is not None, False
        finally:
            if self._main is not None:
                self._main.close()
        return {"hasTranscript": int(here or stored), "transcriptStored": int(stored)}

    def _copy_rest(self) -> bool:
        """Store what the files have gained. Return whether the main file has any entries."""
        try:
            for write in self._steps():
                write.result()
        except Exception:
            if self._compare:
                raise
            self._start_over()  # an earlier write may be the one that failed
            return self._copy_rest()
        return self._main_key in self._places and self._places[self._main_key].length > 0

    def _start_over(self) -> None:
        """After a failure: compare each file with what is stored when it is next copied."""
        self._places.clear()
        self._pending = None
        self._compare = True

    def _steps(self) -> Iterator[Future[int]]:
        """Read what the files have gained, part by part. Yields the write of each; the next step needs its result."""
        if self._pending is not None:
            yield from self._wait_for(self._pending)
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

    def _copy_subagents(self, folder: Path) -> Iterator[Future[int]]:
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

    def _copy_file(
        self, key: TranscriptKey, file: BufferedReader, metadata: Entry | None = None
    ) -> Iterator[Future[int]]:
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

    def _extend(self, key: TranscriptKey, place: _Place, entries: list[Entry]) -> Iterator[Future[int]]:
        if entries:
            write = self._store.extend(key, place.length, entries)
            place.length += len(entries)
            yield from self._wait_for(write)

    def _merge(self, key: TranscriptKey, file: BufferedReader, metadata: Entry | None) -> Iterator[Future[int]]:
        """Copy a whole file, of which the database may have a part."""
        parts = list(_parts(file, 0))
        entries = [] if metadata is None else [metadata]
        entries += [entry for part, _ in parts for entry in part]
        if entries:
            write = self._store.merge(key, entries)
            yield from self._wait_for(write)
            self._places[key] = _Place(_identity(file), parts[-1][1] if parts else 0, write.result(), metadata)

    def _wait_for(self, write: Future[int]) -> Iterator[Future[int]]:
        self._pending = write
        yield write
        self._pending = None


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
        value = json.loads(text)
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
