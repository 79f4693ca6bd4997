"""Claude Code's own transcript files: taken over into the database where the mirror lacks something, and written back
from it where this host has none, after Claude Code's own clean-up or on another host.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import Any

from ccm.core.claude.locations import find_transcript, transcript_path
from ccm.core.claude.regular_file import open_regular
from ccm.core.transcripts.store import Mirror, TranscriptStore, entry
from ccm.db.transcripts import Entry, TranscriptKey
from ccm.models import Run

log = logging.getLogger(__name__)

# Lines that Claude Code does not mirror: bodies of requests, and what they cost.
LOCAL_ONLY = ("api-request", "cost-state")
UUID = re.compile(rb'"uuid": ?"([^"]+)"')
# The type of the entry that holds what stands in a file of its own beside a subagent's transcript.
AGENT_METADATA = "agent_metadata"


class TranscriptFiles:
    """The transcripts of runs on this host, and the database's copies of them.

    Args:
        store: the copies.
        environ: what agents inherit; it says where Claude Code keeps its files.
    """

    def __init__(self, store: TranscriptStore, environ: Mapping[str, str]) -> None:
        self._store = store
        self._environ = environ
        self._locks = _Locks()

    def mirror(self, run: Run) -> Mirror:
        """What copies a run's transcript while it is written."""
        return Mirror(self._store, run.sdk_session_id)

    def keep(self, run: Run, mirror: Mirror | None = None, *, complete: bool = False) -> dict[str, Any]:
        """After a run's end: have the database hold its transcript whole.

        Args:
            mirror: its own; None if the service that had it has died.
            complete: Claude Code has said all that it had to say, the mirror's share included.

        Returns:
            What the run's row is to say: `hasTranscript`, `transcriptStored`.
        """
        if mirror is not None and mirror.whole and complete:
            return {"hasTranscript": 1, "transcriptStored": 1}
        main: Path | None = None
        try:
            main = self._readable(run)
            entries = {} if main is None else _read(main, run.sdk_session_id)
            here = any(entries.values())
            if here:
                self._store.merge(entries)
            # Where there is no file any more, what has been mirrored is all that there is.
            stored = here or (not (mirror is not None and mirror.failed) and self._is_stored(run.sdk_session_id))
        except Exception as error:
            # Whatever it is, the end of the run is still to be stored.
            log.warning("run %s: its transcript is not stored: %s: %s", run.id, type(error).__name__, error)
            here, stored = main is not None, False
        return {"hasTranscript": int(here or stored), "transcriptStored": int(stored)}

    def can_provide(self, parent: Run, cwd: str, options: Mapping[str, Any]) -> bool:
        """Whether a run in `cwd` with these options can continue a parent."""
        if parent.transcript_stored:
            return True  # and no project directory need be looked through
        try:
            here = self._find(parent, cwd, options)
            return here is not None and here.stat().st_size > 0
        except OSError as error:
            log.warning("the transcript of run %s cannot be looked for: %s", parent.id, error)
            return False

    def provide(self, parent: Run, run: Run) -> bool:
        """Make sure that Claude Code finds the transcript of a parent when `run` continues it.

        Returns:
            Whether there is one.

        Raises:
            OSError: it cannot be written back.
            StorageError: it cannot be read.
        """
        # Of two forks at once the second waits until the first has the file whole: else it would set that aside, which
        # the first one's Claude Code is about to read.
        with self._locks.of(parent.sdk_session_id):
            return self._provide(parent, run)

    def _provide(self, parent: Run, run: Run) -> bool:
        here = self._find(parent, run.cwd, run.options.value)
        if here is not None and self._is_whole(here, parent):
            return True
        if not parent.transcript_stored:
            return False
        if here is not None:
            # `flask prune` knows this name too.
            aside = here.with_suffix(f".jsonl.incomplete-{time.time_ns()}")
            log.warning("the transcript %s lacks what is stored of it; it is now %s", here, aside.name)
            here.rename(aside)
        path = transcript_path(run.cwd, parent.sdk_session_id, self._agent_environ(run.options.value))
        return self._write_back(parent.sdk_session_id, here or path)

    def _agent_environ(self, options: Mapping[str, Any]) -> dict[str, str]:
        return {**self._environ, **options.get("env", {})}

    def _readable(self, run: Run) -> Path | None:
        """The main transcript that a run has left, None if this user finds or reads none."""
        try:
            main = find_transcript(run.cwd, run.sdk_session_id, self._agent_environ(run.options.value))
            if main is not None:
                open_regular(main).close()
        except OSError as error:
            # What has been mirrored is all that can be had.
            log.warning("run %s: its transcript cannot be read: %s", run.id, error)
            return None
        return main

    def _find(self, parent: Run, cwd: str, options: Mapping[str, Any]) -> Path | None:
        """The transcript on this host."""
        environ = self._agent_environ(options)
        found = (find_transcript(directory, parent.sdk_session_id, environ) for directory in (cwd, parent.cwd))
        return next((path for path in found if path is not None), None)

    def _is_stored(self, sdk_session_id: str) -> bool:
        return any(not key.subpath for key in self._store.of_session(sdk_session_id))

    def _is_whole(self, main: Path, run: Run) -> bool:
        """Whether a file has every entry that is stored of it. Claude Code begins a file anew that was deleted while it
        was at work, and a file may be cut or lose blocks when the host fails.
        """
        with open_regular(main) as file:
            content = file.read()
        here = set(UUID.findall(content))  # a search in the bytes: what stands in another line as its parent is no line
        keys = [key for key in self._store.of_session(run.sdk_session_id) if not key.subpath and run.transcript_stored]
        uuids = self._store.uuids(keys[0]) if keys else []
        return bool(content) and here.issuperset(uuid.encode() for uuid in uuids)

    def _write_back(self, sdk_session_id: str, main: Path) -> bool:
        """Write a session's transcripts to where Claude Code looks for them. A file that is there is not touched."""
        stored = self._store.of_session(sdk_session_id)
        project_key = next((key.project_key for key in stored if not key.subpath), None)
        if project_key is None or not self._store.uuids(TranscriptKey(sdk_session_id, project_key)):
            return False
        folder = main.parent / sdk_session_id
        # The main one last: where it stands, all of it does.
        for key in reversed([key for key in stored if key.project_key == project_key]):
            if not key.subpath:
                _write(main, self._store.texts(key), sdk_session_id)
            elif _is_place(key.subpath):
                file = folder / f"{key.subpath}.jsonl"
                metadata = [text for text in self._store.texts(key) if _is_metadata(text)]
                _write(file, (text for text in self._store.texts(key) if not _is_metadata(text)), sdk_session_id)
                if metadata:
                    content = json.loads(metadata[-1])
                    del content["type"]
                    _write(_metadata_file(file), [json.dumps(content)], sdk_session_id)
            else:
                log.warning("SDK session %s: %r is no place for a transcript", sdk_session_id, key.subpath)
        log.info("the transcript %s was written back", main)
        return True


class _Locks:
    """A lock for each key that somebody has at the moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # With the number of those that have the lock or wait for it.
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def of(self, key: str) -> Iterator[None]:
        with self._lock:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                users = self._locks[key][1] - 1
                if users:
                    self._locks[key] = lock, users
                else:
                    del self._locks[key]


def _read(main: Path, sdk_session_id: str) -> dict[TranscriptKey, list[Entry]]:
    """The files of a session: its main transcript and those of its subagents."""
    folder = main.parent / sdk_session_id
    key = TranscriptKey(sdk_session_id, main.parent.name)
    files = {key: _entries(main)}
    for file in sorted(folder.rglob("*.jsonl")):
        subpath = file.relative_to(folder).with_suffix("").as_posix()
        files[key._replace(subpath=subpath)] = _metadata(file) + _entries(file)
    return files


def _entries(file: Path) -> list[Entry]:
    entries = []
    with TextIOWrapper(open_regular(file), encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue  # Claude Code was killed while it wrote it, and will not read it either
            if isinstance(value, dict) and not str(value.get("type")).startswith(LOCAL_ONLY):
                entries.append(entry(value))
    return entries


def _metadata_file(transcript: Path) -> Path:
    return transcript.with_suffix(".meta.json")


def _metadata(transcript: Path) -> list[Entry]:
    file = _metadata_file(transcript)
    try:
        with open_regular(file) as stream:
            content = json.loads(stream.read())
    except (FileNotFoundError, ValueError):
        return []  # there is none, or Claude Code was killed while it wrote it
    return [entry({**content, "type": AGENT_METADATA})]


def _is_metadata(text: str) -> bool:
    return AGENT_METADATA in text and json.loads(text).get("type") == AGENT_METADATA


def _is_place(subpath: str) -> bool:
    """Whether a stored subpath stays where it belongs; an import may have brought it."""
    parts = PurePosixPath(subpath).parts
    return bool(parts) and subpath.isprintable() and "\\" not in subpath and not {"..", "/"} & set(parts)


def _write(file: Path, lines: Iterable[str], sdk_session_id: str) -> None:
    """A new file, whole or not at all, its owner's alone; one that is there stays as it is.

    What a kill in the midst leaves has the session's name, by which `flask prune` finds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".ccm-{sdk_session_id}-")
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines)
        try:
            os.link(name, file)
        except FileExistsError:
            log.debug("%s is there already", file)
    finally:
        os.unlink(name)
