"""Transcripts in the database, and the files that they are copied from and restored to."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.locations import transcript_path
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.copying import parse
from ccm.core.transcripts.store import TranscriptStore, extend, merge
from ccm.db.driver.database import Database
from ccm.db.transcripts import Entry, TranscriptKey
from ccm.errors import StorageRejected
from tests.core.transcripts.host import ONE, SESSION, Host, entry, loaded, run

# Deeper than the faster parser takes.
DEEP = "[" * 300 + "]" * 300
FORK = "22222222-2222-4222-8222-222222222222"


def count(reader: Database, what: str) -> int:
    with reader.transaction() as transaction:
        return int(transaction.value(f"SELECT {what}"))


def put(store: TranscriptStore, lines: Sequence[object], key: TranscriptKey = ONE) -> None:
    """Store lines as a file has them that is merged into what is stored."""
    store.submit(partial(merge, key=key, entries=entries(lines))).result()


def entries(lines: Sequence[object]) -> list[Entry]:
    found = [parse(json.dumps(line).encode()) for line in lines]
    return [entry for entry in found if entry is not None]


def test_an_entry_is_not_merged_twice_by_its_uuid(store: TranscriptStore) -> None:
    put(store, [entry("a"), entry("b"), entry("b")])
    put(store, [entry("b"), entry("c"), {"type": "mode"}, {"type": "mode"}])

    assert loaded(store) == [entry("a"), entry("b"), entry("c"), {"type": "mode"}, {"type": "mode"}]


def test_an_entry_is_loaded_as_it_was_stored(store: TranscriptStore) -> None:
    odd: list[dict[str, Any]] = [
        {"type": "x", "uuid": "\0 \ud800", "text": "NUL \0, lone \ud800, mark \x01, emoji 😀", "n": [1.5, None, {}]},
        {"type": "x", "uuid": 7, SESSION: SESSION + SESSION},
    ]
    put(store, odd)

    assert loaded(store) == odd


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            '{"type":"x",  "n":1.50,"é":"\U0001f600 \\ud800"}',
            '{"type":"x",  "n":1.50,"\\u00e9":"\\ud83d\\ude00 \\ud800"}',
        ),
        ('{"type": "x"}', '{"type": "x"}'),
        (f'{{"type": "x", "n": {DEEP}}}', f'{{"type": "x", "n": {DEEP}}}'),
        ('{"type": "x", "n": NaN}', '{"type": "x", "n": NaN}'),
        ('{"type": "x"', None),
        ('{"type": "x"} {}', None),
        ('{"type": "x", "text": "a\tb"}', None),
        ('["x"]', None),
        ("\0\0\0", None),
        ('{"type": "api-request-blob"}', None),
    ],
)
def test_a_line_is_stored_as_it_is_but_in_ascii(line: str, text: str | None) -> None:
    found = parse(f"{line}\n".encode())

    assert (None if found is None else found.text) == text


def test_more_entries_than_one_lookup_takes(store: TranscriptStore) -> None:
    many = [entry(f"{number}") for number in range(2_500)]
    put(store, [*many, entry("last")])
    put(store, [*many, entry("after it")])

    assert loaded(store) == [*many, entry("last"), entry("after it")]


def test_text_that_a_fork_copies_is_stored_once(store: TranscriptStore, reader: Database) -> None:
    queries = [entry(f"{number}", text="x" * 10_000 + str(number)) for number in range(20)]
    put(store, queries)
    before = count(reader, "SUM(LENGTH(text)) FROM ccr_transcript_texts")
    copy = [{**line, "sessionId": FORK} for line in queries]
    of_fork = ONE._replace(sdk_session_id=FORK)
    put(store, [*copy, entry("new", FORK)], of_fork)

    assert count(reader, "SUM(LENGTH(text)) FROM ccr_transcript_texts") - before < 200
    assert loaded(store, of_fork) == [*copy, entry("new", FORK)]
    assert loaded(store) == queries


def test_a_write_with_an_uncertain_commit_is_stored_once(
    store: TranscriptStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write runs twice, as after a COMMIT whose answer was lost."""
    submit = writer.submit
    first = [entry("a"), {"type": "mode"}, entry("b")]
    second = [{"type": "mode"}, entry("c")]

    def twice(work: Any) -> Any:
        return submit(lambda transaction: [work(transaction), work(transaction)][-1])

    monkeypatch.setattr(writer, "submit", twice)
    writes = [
        partial(extend, key=ONE, length=0, entries=entries(first)),
        partial(extend, key=ONE, length=3, entries=entries(second)),
    ]
    lengths = [store.submit(write) for write in writes]

    assert [length.result() for length in lengths] == [3, 5]
    assert loaded(store) == [*first, *second]
    assert store.submit(partial(merge, key=ONE, entries=entries([*first, *second]))).result() == 5
    assert loaded(store) == [*first, *second]


def test_nothing_is_stored_after_a_gap(store: TranscriptStore) -> None:
    with pytest.raises(StorageRejected):
        store.submit(partial(extend, key=ONE, length=1, entries=entries([entry("b")]))).result()

    assert loaded(store) is None


# ---- files


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_entries_that_the_copy_lacks_are_stored_from_files_and_restored_elsewhere(
    store: TranscriptStore, tmp_path: Path
) -> None:
    here, there = Host(tmp_path / "here", store), Host(tmp_path / "there", store)
    put(store, [entry("b")])  # what was copied before the kill, of a file that lost the rest
    main = here.write("/one", entry("a"), {"type": "cost-state"}, entry("b"), {"type": "api-request-blob"}, entry("c"))
    with main.open("a") as file:
        file.write('{"type": "torn')
    agent = main.with_suffix("") / "subagents" / "agent-1.jsonl"
    agent.parent.mkdir(parents=True)
    agent.write_text(json.dumps(entry("s")) + "\n")
    agent.with_suffix(".meta.json").write_text('{"agentType": "general"}')

    assert here.complete_copy() == {"hasTranscript": 1, "transcriptStored": 1}

    parent = run(transcript_stored=1)
    assert there.files.is_available(parent, "/two", {})
    assert there.files.make_available(parent, run(cwd="/two", id="next"))
    back = there.path("/two")
    assert lines(back) == [entry("a"), {"type": "cost-state"}, entry("b"), entry("c")]
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
    put(store, STORED)
    host.write("/one", *FILES[kind])

    assert host.complete_copy() == {"hasTranscript": 1, "transcriptStored": 1}

    expected = FILES["whole"] if kind == "whole" else STORED
    assert loaded(store) == expected


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_lacks_stored_entries_is_renamed_and_replaced(
    store: TranscriptStore, tmp_path: Path, kind: str
) -> None:
    host = Host(tmp_path, store)
    put(store, STORED)
    path = host.write("/one", *FILES[kind])
    before = path.read_bytes()

    assert host.files.make_available(run(transcript_stored=1), run(id="next"))

    aside = list(path.parent.glob("*.incomplete-*"))
    assert lines(path) == (FILES["whole"] if kind == "whole" else STORED)
    assert [file.read_bytes() for file in aside] == ([] if kind == "whole" else [before])


def test_without_a_file_the_stored_entries_are_kept(store: TranscriptStore, tmp_path: Path) -> None:
    host = Host(tmp_path, store)
    assert host.complete_copy() == {"hasTranscript": 0, "transcriptStored": 0}
    put(store, STORED)

    assert host.complete_copy() == {"hasTranscript": 1, "transcriptStored": 1}


def test_a_transcript_is_found_in_any_project(store: TranscriptStore, tmp_path: Path) -> None:
    host = Host(tmp_path, store)
    host.write("/a-key-of-its-own", entry("a"))

    assert host.files.is_available(run(), "/one", {})
    assert host.complete_copy() == {"hasTranscript": 1, "transcriptStored": 1}


def test_the_name_of_a_project_is_claude_codes() -> None:
    names = {"/a/é😀b": "-a----b", "/a/e\u0301": "-a-e-", "/a.b c": "-a-b-c"}
    for cwd, name in names.items():
        assert transcript_path(cwd, SESSION, {"HOME": "/h"}).parent.name == name.replace("é", "-")


def test_a_complete_file_is_not_changed(store: TranscriptStore, tmp_path: Path) -> None:
    host = Host(tmp_path, store)
    put(store, [entry("stored")])
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
    put(store, [entry("a")])
    parent = run(transcript_stored=False)

    assert not host.files.is_available(parent, "/one", {})
    assert not host.files.make_available(parent, run(id="next"))
    assert not host.path("/one").exists()


def test_a_stored_path_outside_the_session_is_not_written(store: TranscriptStore, tmp_path: Path) -> None:
    host = Host(tmp_path / "home", store)
    put(store, [entry("a")])
    for subpath in ("../../../../../evil", "/tmp/evil", "a/../../../evil", "evil\\..\\evil", "evil\nevil"):
        put(store, [entry("s")], ONE._replace(subpath=subpath))

    assert host.files.make_available(run(transcript_stored=1), run(id="next"))

    assert lines(host.path("/one")) == [entry("a")]
    assert list(tmp_path.rglob("*evil*")) == []


def test_two_concurrent_forks_find_one_complete_file(
    store: TranscriptStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, store)
    put(store, STORED)
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
    put(store, STORED)
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

    # The stored entries count if the file itself cannot be read.
    assert host.complete_copy()["hasTranscript"] == 1
    if place == "main":
        with pytest.raises(OSError, match=r"regular|directory"):
            host.files.make_available(run(transcript_stored=1), run(id="next"))
