"""Keeps Claude Code's transcript files and their copies in the database consistent.

During and after a run, its files are copied (core/transcripts/copying.py). Before a run that continues another, the
copy is written to a file if this host has none: Claude Code has deleted it, or the run was made on another host.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ccm.core.claude.locations import find_transcript, transcript_path
from ccm.core.claude.regular_file import open_regular
from ccm.core.transcripts.copying import AGENT_METADATA, TranscriptCopy, TranscriptEnd, metadata_file
from ccm.core.transcripts.store import TranscriptStore
from ccm.db.transcripts import TranscriptKey, is_inside
from ccm.models import Run

log = logging.getLogger(__name__)

UUID = re.compile(rb'"uuid": ?"([^"]+)"')


class TranscriptFiles:
    """The transcripts of runs on this host, and their copies in the database.

    Args:
        store: the copies.
        environ: the environment that agents inherit; it determines where Claude Code keeps its files.
    """

    def __init__(self, store: TranscriptStore, environ: Mapping[str, str]) -> None:
        self._store = store
        self._environ = environ
        # One lock for each SDK session. It exists only while a thread holds it or waits for it.
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._locks_guard = threading.Lock()

    def begin_copy(self, run: Run) -> TranscriptCopy:
        """Return the copy of the transcript of a run that is about to begin."""
        return TranscriptCopy(run, self._store, self._agent_environ(run.options.value))

    def complete_copy(self, run: Run) -> TranscriptEnd:
        """Complete the copy of a run whose service has died."""
        environ = self._agent_environ(run.options.value)
        return TranscriptCopy(run, self._store, environ, stored_before=True).finish()

    def is_available(self, parent: Run, cwd: str, options: Mapping[str, Any]) -> bool:
        """Return whether a run in `cwd` with these options can continue `parent`.

        It can if the transcript is in the database or on this host.
        """
        if parent.transcript_stored:
            return True  # no need to search the project directories
        try:
            here = self._find(parent, cwd, options)
            return here is not None and here.stat().st_size > 0
        except OSError as error:
            log.warning(
                "run %s: cannot search for its transcript: %s",
                parent.id,
                error,
                extra={"event": "transcript_search_failed", "run_id": parent.id},
            )
            return False

    def make_available(self, parent: Run, run: Run) -> bool:
        """Make sure that Claude Code finds the parent's transcript when `run` continues it.

        Returns:
            False if the transcript is neither on this host nor in the database.

        Raises:
            OSError: the file cannot be read or written.
            StorageError: the stored copy cannot be read.
        """
        # The second of two concurrent forks waits until the file is complete. Otherwise it would rename the unfinished
        # file, which the first fork's Claude Code is about to read.
        with self._locks_guard:
            lock = self._locks.setdefault(parent.sdk_session_id, threading.Lock())
        with lock:
            return self._make_available(parent, run)

    def _make_available(self, parent: Run, run: Run) -> bool:
        here = self._find(parent, run.cwd, run.options.value)
        if here is not None and self._is_complete(here, parent):
            return True
        if not parent.transcript_stored:
            return False
        if here is not None:
            # `flask prune` searches for this name too.
            aside = here.with_suffix(f".jsonl.incomplete-{time.time_ns()}")
            log.warning(
                "the transcript %s lacks stored entries, renaming it to %s",
                here,
                aside.name,
                extra={"event": "transcript_set_aside", "run_id": parent.id},
            )
            here.rename(aside)
        path = transcript_path(run.cwd, parent.sdk_session_id, self._agent_environ(run.options.value))
        return self._write_back(parent.sdk_session_id, here or path)

    def _agent_environ(self, options: Mapping[str, Any]) -> dict[str, str]:
        return {**self._environ, **options.get("env", {})}

    def _find(self, parent: Run, cwd: str, options: Mapping[str, Any]) -> Path | None:
        """Return the parent's transcript file on this host, as a run in `cwd` would find it."""
        environ = self._agent_environ(options)
        found = (find_transcript(directory, parent.sdk_session_id, environ) for directory in (cwd, parent.cwd))
        return next((path for path in found if path is not None), None)

    def _find_main_key(self, sdk_session_id: str) -> TranscriptKey | None:
        """Return the key of the stored main transcript of an SDK session, or None."""
        return next((key for key in self._store.of_session(sdk_session_id) if not key.subpath), None)

    def _is_complete(self, main: Path, run: Run) -> bool:
        """Return whether a file has every stored entry.

        It may lack some: Claude Code starts a new file if the file is deleted while it works, and a file may be
        truncated or lose blocks if the host crashes.
        """
        with open_regular(main) as file:
            content = file.read()
        here = set(UUID.findall(content))  # matches `uuid` only: a uuid that occurs as `parentUuid` is no entry
        key = self._find_main_key(run.sdk_session_id) if run.transcript_stored else None
        uuids = [] if key is None else self._store.uuids(key)
        return bool(content) and here.issuperset(uuid.encode() for uuid in uuids)

    def _write_back(self, sdk_session_id: str, main: Path) -> bool:
        """Write a session's stored transcripts to the files that Claude Code reads. Existing files are not changed.

        Returns:
            False if no main transcript is stored.
        """
        main_key = self._find_main_key(sdk_session_id)
        if main_key is None or not self._store.uuids(main_key):
            return False
        stored = self._store.of_session(sdk_session_id)
        folder = main.parent / sdk_session_id
        # The main transcript last: if it exists, all others do.
        for key in reversed([key for key in stored if key.project_key == main_key.project_key]):
            if not key.subpath:
                _write(main, self._store.texts(key), sdk_session_id)
            elif is_inside(key.subpath):
                file = folder / f"{key.subpath}.jsonl"
                metadata = [text for text in self._store.texts(key) if _is_metadata(text)]
                _write(file, (text for text in self._store.texts(key) if not _is_metadata(text)), sdk_session_id)
                if metadata:
                    content = json.loads(metadata[-1])
                    del content["type"]
                    _write(metadata_file(file), [json.dumps(content)], sdk_session_id)
            else:
                log.warning(
                    "SDK session %s: skipping a transcript with the unsafe path %r",
                    sdk_session_id,
                    key.subpath,
                    extra={"event": "transcript_skipped", "sdk_session_id": sdk_session_id},
                )
        log.info(
            "the transcript %s was restored from the database",
            main,
            extra={"event": "transcript_restored", "sdk_session_id": sdk_session_id},
        )
        return True


def _is_metadata(text: str) -> bool:
    return AGENT_METADATA in text and json.loads(text).get("type") == AGENT_METADATA


def _write(file: Path, lines: Iterable[str], sdk_session_id: str) -> None:
    """Create a file atomically, readable by its owner only. An existing file is not changed.

    If the service is killed meanwhile, a temporary file remains. Its name has the session's id, by which `flask prune`
    finds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".ccm-{sdk_session_id}-")
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines)
        try:
            os.link(name, file)
        except FileExistsError:
            log.debug("%s exists already", file)
    finally:
        os.unlink(name)
