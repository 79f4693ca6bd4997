"""Transcripts in the database: the SDK's conformance suite, the mirror, and transcript files."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk.testing import run_session_store_conformance

from ccm.core.claude.locations import transcript_path
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.files import TranscriptFiles
from ccm.core.transcripts.store import Mirror, TranscriptStore
from ccm.db import transcripts
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.db.transcripts import TranscriptKey
from ccm.errors import StorageRejected
from ccm.models import Run, RunMode, RunStatus
from ccm.models.json_field import JsonText

SESSION = "11111111-1111-4111-8111-111111111111"
FORK = "22222222-2222-4222-8222-222222222222"
KEY = {"project_key": "-p", "session_id": SESSION}
RUN = Run(
    id="r",
    seq=1,
    session_id="s",
    sdk_session_id="s",
    parent_run_id=None,
    parent_session_id=None,
    mode=RunMode.FRESH,
    status=RunStatus.RUNNING,
    cwd="/",
    prompt="",
    options=JsonText("{}"),
    image_count=1,
    timeout_ms=86_400_000,
    approvals=True,
    approval_timeout_ms=1_000,
    webhook_url=None,
    fork_at_message=None,
    fork_at_index=None,
    result_type=None,
    result=None,
    error_code=None,
    error_message=None,
    cost_usd=None,
    message_count=0,
    duration_ms=None,
    queue_position=None,
    pending_approvals=0,
    has_transcript=False,
    transcript_stored=False,
    created_by=None,
    created_at="",
    started_at=None,
    ended_at=None,
)


@pytest.fixture
def writer(writable: Database) -> Iterator[Writer]:
    writer = Writer(writable, Notifier(), 2**20, lambda run, error: None)
    writer.start()
    yield writer
    writer.stop(time.monotonic() + 30)


@pytest.fixture
def store(writer: Writer, reader: Database) -> TranscriptStore:
    return TranscriptStore(writer, reader)


def count(reader: Database, what: str) -> int:
    with reader.transaction() as transaction:
        return int(transaction.value(f"SELECT {what}"))


def entry(uuid: str, session: str = SESSION, **fields: object) -> dict[str, Any]:
    return {"type": "assistant", "uuid": uuid, "sessionId": session, **fields}


def loaded(store: TranscriptStore, key: Mapping[str, str] = KEY) -> list[Any] | None:
    """The entries that a transcript has, None if there is none."""
    place = TranscriptKey(key["session_id"], key["project_key"], key.get("subpath", ""))
    return [json.loads(text) for text in store.texts(place)] or None


class Loadable:
    """The store with a `load`, which the suite needs and the service never calls: a run gets a `Mirror`."""

    def __init__(self, store: TranscriptStore) -> None:
        self.append = store.append
        self._store = store

    async def load(self, key: Mapping[str, str]) -> list[Any] | None:
        return loaded(self._store, key)


def test_the_sdks_conformance_suite_passes(store: TranscriptStore, writer: Writer) -> None:
    made: list[int] = []

    def empty() -> Any:
        def clear(transaction: Transaction) -> None:
            for table in ("ccr_transcript_entries", "ccr_transcripts", "ccr_transcript_texts"):
                transaction.execute(f"DELETE FROM {table}")

        writer.write(clear)
        made.append(1)
        return Loadable(store)

    asyncio.run(run_session_store_conformance(empty))
    assert len(made) == 7  # one to look at, and one for each contract of append and load; the others are optional


def test_an_entry_is_not_stored_twice_by_its_uuid(store: TranscriptStore) -> None:
    async def twice() -> Any:
        await store.append(KEY, [entry("a"), entry("b"), entry("b")])
        await store.append(KEY, [entry("b"), entry("c"), {"type": "mode"}, {"type": "mode"}])
        return loaded(store)

    assert asyncio.run(twice()) == [entry("a"), entry("b"), entry("c"), {"type": "mode"}, {"type": "mode"}]


def test_an_entry_is_loaded_as_it_was_stored(store: TranscriptStore) -> None:
    odd: list[dict[str, Any]] = [
        {"type": "x", "uuid": "\0 \ud800", "text": "NUL \0, lone \ud800, mark \x01, emoji 😀", "n": [1.5, None, {}]},
        {"type": "x", "uuid": 7, SESSION: SESSION + SESSION},
    ]
    asyncio.run(store.append(KEY, odd))

    assert loaded(store) == odd


def test_more_entries_than_one_lookup_takes(store: TranscriptStore) -> None:
    many = [entry(f"{number}") for number in range(2_500)]
    asyncio.run(store.append(KEY, many))
    asyncio.run(store.append(KEY, [*many, entry("last")]))

    assert loaded(store) == [*many, entry("last")]


def test_text_that_a_fork_copies_is_stored_once(store: TranscriptStore, reader: Database) -> None:
    queries = [entry(f"{number}", text="x" * 10_000 + str(number)) for number in range(20)]
    asyncio.run(store.append(KEY, queries))
    before = count(reader, "SUM(LENGTH(text)) FROM ccr_transcript_texts")
    copy = [{**line, "sessionId": FORK} for line in queries]
    asyncio.run(store.append({**KEY, "session_id": FORK}, [*copy, entry("new", FORK)]))

    assert count(reader, "SUM(LENGTH(text)) FROM ccr_transcript_texts") - before < 200
    assert loaded(store, {**KEY, "session_id": FORK}) == [*copy, entry("new", FORK)]
    assert loaded(store) == queries


def test_an_append_with_an_uncertain_commit_is_stored_once(
    store: TranscriptStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write runs twice, as after a COMMIT whose answer was lost."""
    submit = writer.submit
    first = [entry("a"), {"type": "mode"}, entry("b")]
    second = [{"type": "mode"}, entry("b"), {"type": "mode"}, entry("c")]

    def twice(work: Any) -> Any:
        return submit(lambda transaction: [work(transaction), work(transaction)])

    monkeypatch.setattr(writer, "submit", twice)

    async def both() -> Any:
        await asyncio.gather(store.append(KEY, first), store.append(KEY, second))
        return loaded(store)

    assert asyncio.run(both()) == [*first, {"type": "mode"}, {"type": "mode"}, entry("c")]


def test_a_mirror_stores_and_never_loads(store: TranscriptStore) -> None:
    mirror = Mirror(store, SESSION)
    asyncio.run(mirror.append({**KEY, "subpath": "subagents/agent-1"}, [entry("s")]))
    with_a_subagents_only = mirror.whole
    asyncio.run(mirror.append(KEY, [entry("a")]))

    assert [with_a_subagents_only, mirror.whole] == [False, True]
    assert loaded(store) == [entry("a")]
    assert asyncio.run(mirror.load(KEY)) is None


def test_a_mirror_is_not_whole_after_a_refused_entry(store: TranscriptStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StorageRejected("no")

    mirror = Mirror(store, SESSION)
    asyncio.run(mirror.append(KEY, [entry("a")]))
    monkeypatch.setattr(transcripts, "append", refuse)
    with pytest.raises(StorageRejected):
        asyncio.run(mirror.append(KEY, [entry("b")]))

    assert not mirror.whole


# ---- files


class Host:
    """A host with a HOME of its own, and Claude Code's files of one run in it."""

    def __init__(self, folder: Path, store: TranscriptStore) -> None:
        self.home = folder
        self.files = TranscriptFiles(store, {"HOME": str(folder)})

    def path(self, cwd: str) -> Path:
        return self.home / ".claude" / "projects" / cwd.replace("/", "-") / f"{SESSION}.jsonl"

    def write(self, cwd: str, *lines: object) -> Path:
        path = self.path(cwd)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return path


def run(**fields: Any) -> Run:
    values = {**vars(RUN), "sdk_session_id": SESSION, "cwd": "/one", "options": "{}", **fields}
    return Run(**values)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_entries_that_the_mirror_lacks_are_stored_from_files_and_restored_elsewhere(
    store: TranscriptStore, tmp_path: Path
) -> None:
    here, there = Host(tmp_path / "here", store), Host(tmp_path / "there", store)
    asyncio.run(store.append({**KEY, "project_key": "-one"}, [entry("b")]))  # all entries before the kill
    main = here.write("/one", entry("a"), {"type": "cost-state"}, entry("b"), {"type": "api-request-blob"}, entry("c"))
    with main.open("a") as file:
        file.write('{"type": "torn')
    agent = main.with_suffix("") / "subagents" / "agent-1.jsonl"
    agent.parent.mkdir(parents=True)
    agent.write_text(json.dumps(entry("s")) + "\n")
    agent.with_suffix(".meta.json").write_text('{"agentType": "general"}')

    assert here.files.complete_copy(run()) == {"hasTranscript": 1, "transcriptStored": 1}

    parent = run(transcript_stored=1)
    assert there.files.is_available(parent, "/two", {})
    assert there.files.make_available(parent, run(cwd="/two", id="next"))
    back = there.path("/two")
    assert lines(back) == [entry("a"), entry("b"), entry("c")]
    copy = back.with_suffix("") / "subagents" / "agent-1.jsonl"
    assert lines(copy) == [entry("s")]
    assert json.loads(copy.with_suffix(".meta.json").read_text()) == {"agentType": "general"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in (back, copy, copy.with_suffix(".meta.json"))} == {0o600}
    assert sorted(os.listdir(back.parent)) == [SESSION, f"{SESSION}.jsonl"]


STORED = [entry(f"uuid-{n}", parentUuid=f"uuid-{n - 1}" if n else None) for n in range(3)]
FILES: dict[str, list[Any]] = {
    "whole": [*STORED, entry("uuid-3", parentUuid="uuid-2")],
    "started anew": STORED[1:],
    "truncated": STORED[:1],
    "without its middle": [STORED[0], STORED[2]],
    "empty": [],
}


@pytest.mark.parametrize("kind", FILES)
def test_stored_entries_are_never_lost(store: TranscriptStore, tmp_path: Path, kind: str) -> None:
    host = Host(tmp_path, store)
    asyncio.run(store.append({**KEY, "project_key": "-one"}, STORED))
    host.write("/one", *FILES[kind])

    assert host.files.complete_copy(run()) == {"hasTranscript": 1, "transcriptStored": 1}

    expected = FILES["whole"] if kind == "whole" else STORED
    assert loaded(store, {**KEY, "project_key": "-one"}) == expected


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_lacks_stored_entries_is_renamed_and_replaced(
    store: TranscriptStore, tmp_path: Path, kind: str
) -> None:
    host = Host(tmp_path, store)
    asyncio.run(store.append({**KEY, "project_key": "-one"}, STORED))
    path = host.write("/one", *FILES[kind])
    before = path.read_bytes()

    assert host.files.make_available(run(transcript_stored=1), run(id="next"))

    aside = list(path.parent.glob("*.incomplete-*"))
    assert lines(path) == (FILES["whole"] if kind == "whole" else STORED)
    assert [file.read_bytes() for file in aside] == ([] if kind == "whole" else [before])


def test_without_a_file_the_mirrored_entries_are_kept(store: TranscriptStore, tmp_path: Path) -> None:
    host = Host(tmp_path, store)
    asyncio.run(store.append({**KEY, "project_key": "-one"}, STORED))

    assert host.files.complete_copy(run()) == {"hasTranscript": 1, "transcriptStored": 1}
    failed = Mirror(store, SESSION)
    with pytest.raises(KeyError):
        asyncio.run(failed.append({"session_id": SESSION}, STORED))
    assert host.files.complete_copy(run(), failed) == {"hasTranscript": 0, "transcriptStored": 0}


def test_a_transcript_is_found_in_any_project(store: TranscriptStore, tmp_path: Path) -> None:
    host = Host(tmp_path, store)
    host.write("/a-key-of-its-own", entry("a"))

    assert host.files.is_available(run(), "/one", {})
    assert host.files.complete_copy(run()) == {"hasTranscript": 1, "transcriptStored": 1}


def test_the_name_of_a_project_is_claude_codes() -> None:
    names = {"/a/é😀b": "-a----b", "/a/e\u0301": "-a-e-", "/a.b c": "-a-b-c"}
    for cwd, name in names.items():
        assert transcript_path(cwd, SESSION, {"HOME": "/h"}).parent.name == name.replace("é", "-")


def test_a_complete_file_is_not_changed(store: TranscriptStore, tmp_path: Path) -> None:
    host = Host(tmp_path, store)
    asyncio.run(store.append({**KEY, "project_key": "-one"}, [entry("stored")]))
    path = host.write("/one", entry("stored"), entry("local"))
    before = path.read_bytes(), path.stat().st_mtime_ns

    assert host.files.make_available(run(transcript_stored=1), run(cwd="/two", id="next"))

    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not host.path("/two").exists()


def test_a_fully_stored_transcript_is_not_searched_for_on_this_host(
    store: TranscriptStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, store)
    looked: list[str] = []
    monkeypatch.setattr("ccm.core.transcripts.files.find_transcript", lambda cwd, *_: looked.append(cwd))

    assert host.files.is_available(run(transcript_stored=1), "/one", {})
    assert looked == []
    assert not host.files.is_available(run(), "/one", {})
    assert looked != []


def test_a_partly_stored_transcript_is_not_provided(store: TranscriptStore, tmp_path: Path) -> None:
    host = Host(tmp_path, store)
    asyncio.run(store.append({**KEY, "project_key": "-one"}, [entry("a")]))
    parent = run(transcript_stored=False)

    assert not host.files.is_available(parent, "/one", {})
    assert not host.files.make_available(parent, run(id="next"))
    assert not host.path("/one").exists()


def test_a_stored_path_outside_the_session_is_not_written(store: TranscriptStore, tmp_path: Path) -> None:
    host = Host(tmp_path / "home", store)
    key = {**KEY, "project_key": "-one"}
    asyncio.run(store.append(key, [entry("a")]))
    for subpath in ("../../../../../evil", "/tmp/evil", "a/../../../evil", "evil\\..\\evil", "evil\nevil"):
        asyncio.run(store.append({**key, "subpath": subpath}, [entry("s")]))

    assert host.files.make_available(run(transcript_stored=1), run(id="next"))

    assert lines(host.path("/one")) == [entry("a")]
    assert list(tmp_path.rglob("*evil*")) == []


def test_two_concurrent_forks_find_one_complete_file(
    store: TranscriptStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, store)
    asyncio.run(store.append({**KEY, "project_key": "-one"}, STORED))
    path = host.write("/one", *STORED[:1])
    both = threading.Barrier(2)
    uuids = store.uuids

    def together(key: Any) -> list[str]:
        """Let both forks check the file at the same time, unless a lock separates them."""
        with suppress(threading.BrokenBarrierError):
            both.wait(1)
        return uuids(key)

    monkeypatch.setattr(store, "uuids", together)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(host.files.make_available, run(transcript_stored=1), run(id=name)) for name in ("a", "b")]
        assert [job.result() for job in jobs] == [True, True]

    assert lines(path) == STORED
    assert len(list(path.parent.glob("*.incomplete-*"))) == 1


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
@pytest.mark.parametrize("place", ["main", "subagent", "metadata"])
def test_only_regular_files_are_read(store: TranscriptStore, tmp_path: Path, kind: str, place: str) -> None:
    host = Host(tmp_path, store)
    asyncio.run(store.append({**KEY, "project_key": "-one"}, STORED))
    main = host.write("/one", *STORED)
    agent = main.with_suffix("") / "subagents" / "agent-1.jsonl"
    agent.parent.mkdir(parents=True)
    agent.write_text(json.dumps(entry("s")) + "\n")
    path = {"main": main, "subagent": agent, "metadata": agent.with_suffix(".meta.json")}[place]
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()

    # The mirrored entries count if the file itself cannot be read.
    assert host.files.complete_copy(run())["hasTranscript"] == 1
    if place == "main":
        with pytest.raises(OSError, match=r"regular|directory"):
            host.files.make_available(run(transcript_stored=1), run(id="next"))
