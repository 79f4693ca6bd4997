"""Claude Code's own transcript files: taken over into the database where the mirror lacks something, and written back
from it where this host has none, after Claude Code's own clean-up or on another host.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ccm.core.sdk import transcript_path
from ccm.core.transcript_store import Mirror, TranscriptStore, entry
from ccm.db.transcripts import Entry, TranscriptKey
from ccm.models import Run

log = logging.getLogger(__name__)

# Lines that Claude Code does not mirror: bodies of requests, and what they cost.
LOCAL_ONLY = ("api-request", "cost-state")
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

    def mirror(self, run: Run) -> Mirror:
        """What copies a run's transcript while it is written."""
        return Mirror(self._store, run.sdk_session_id)

    def keep(self, run: Run, mirror: Mirror | None = None) -> dict[str, Any]:
        """After a run's end: have the database hold its transcript whole.

        Args:
            mirror: its own, if it was whole to the end; else Claude Code's files are taken over.

        Returns:
            What the run's row is to say: `hasTranscript`, `transcriptStored`.
        """
        main = self._path(run, run.cwd, run.options)
        stored = (mirror is not None and mirror.whole) or self._take_over(main, run.sdk_session_id)
        return {"hasTranscript": int(stored or main.is_file()), "transcriptStored": int(stored)}

    def can_provide(self, parent: Run, cwd: str, options: Mapping[str, Any]) -> bool:
        """Whether a run in `cwd` with these options can continue a parent."""
        return bool(parent.transcript_stored) or self._is_here(parent, cwd, options)

    def provide(self, parent: Run, run: Run) -> bool:
        """Make sure that Claude Code finds the transcript of a parent when `run` continues it.

        Returns:
            Whether there is one.

        Raises:
            OSError: it cannot be written back.
            StorageError: it cannot be read.
        """
        if self._is_here(parent, run.cwd, run.options):
            return True
        return bool(parent.transcript_stored) and self._write_back(
            parent.sdk_session_id, self._path(parent, run.cwd, run.options)
        )

    def _path(self, run: Run, cwd: str, options: Mapping[str, Any]) -> Path:
        return transcript_path(cwd, run.sdk_session_id, {**self._environ, **options.get("env", {})})

    def _is_here(self, run: Run, cwd: str, options: Mapping[str, Any]) -> bool:
        return any(self._path(run, directory, options).is_file() for directory in (cwd, run.cwd))

    def _take_over(self, main: Path, sdk_session_id: str) -> bool:
        """Store a session's files as they are now, instead of what is stored of it."""
        folder = main.parent / sdk_session_id
        key = TranscriptKey(sdk_session_id, main.parent.name)
        try:
            files = {key: _entries(main)}
            for file in sorted(folder.rglob("*.jsonl")):
                subpath = file.relative_to(folder).with_suffix("").as_posix()
                files[key._replace(subpath=subpath)] = _metadata(file) + _entries(file)
            if not files[key]:
                return False
            self._store.replace(key, files)
        except FileNotFoundError:
            return False  # a run that was ended before Claude Code wrote anything
        except Exception as error:
            # Whatever it is, the end of the run is still to be stored.
            log.warning("the transcript %s is not stored: %s: %s", main, type(error).__name__, error)
            return False
        return True

    def _write_back(self, sdk_session_id: str, main: Path) -> bool:
        """Write a session's transcripts to where Claude Code looks for them. A file that is there is never touched."""
        stored = self._store.of_session(sdk_session_id)
        if not stored or stored[0].subpath:
            return False
        folder = main.parent / sdk_session_id
        # The main one last: where it stands, all of it does.
        for key in reversed([key for key in stored if key.project_key == stored[0].project_key]):
            if not key.subpath:
                _write(main, self._store.texts(key))
            elif _is_place(key.subpath):
                file = folder / f"{key.subpath}.jsonl"
                metadata = [text for text in self._store.texts(key) if _is_metadata(text)]
                _write(file, (text for text in self._store.texts(key) if not _is_metadata(text)))
                if metadata:
                    content = json.loads(metadata[-1])
                    del content["type"]
                    _write(_metadata_file(file), [json.dumps(content)])
            else:
                log.warning("SDK session %s: %r is no place for a transcript", sdk_session_id, key.subpath)
        log.info("the transcript %s was written back", main)
        return True


def _entries(file: Path) -> list[Entry]:
    entries = []
    with file.open(encoding="utf-8") as lines:
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
    if not file.is_file():
        return []
    return [entry({**json.loads(file.read_text(encoding="utf-8")), "type": AGENT_METADATA})]


def _is_metadata(text: str) -> bool:
    return AGENT_METADATA in text and json.loads(text).get("type") == AGENT_METADATA


def _is_place(subpath: str) -> bool:
    """Whether a stored subpath stays where it belongs; an import may have brought it."""
    parts = PurePosixPath(subpath).parts
    return bool(parts) and subpath.isprintable() and "\\" not in subpath and not {"..", "/"} & set(parts)


def _write(file: Path, lines: Iterable[str]) -> None:
    """A new file, whole or not at all, its owner's alone; one that is there stays as it is."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".ccm-")
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines)
        try:
            os.link(name, file)
        except FileExistsError:
            log.debug("%s is there already", file)
    finally:
        os.unlink(name)
