"""The copy of a run's transcript, which follows Claude Code's files while they grow."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ccm.core.storage.writer import Writer
from ccm.core.transcripts import copying
from ccm.core.transcripts.store import TranscriptStore
from ccm.db import transcripts
from ccm.db.transcripts import Entry
from ccm.errors import StorageRejected
from tests.core.transcripts.host import ONE, Host, entry, loaded, run

WHOLE = {"hasTranscript": 1, "transcriptStored": 1}
LINES = [entry(f"uuid-{n}", parentUuid=f"uuid-{n - 1}" if n else None) for n in range(6)]


class Copied:
    """A run's copy, and its files on a host."""

    def __init__(self, folder: Path, store: TranscriptStore) -> None:
        self.host = Host(folder, store)
        self.store = store
        self.main = self.host.path("/one")
        self.agent = self.main.with_suffix("") / "subagents" / "agent-1.jsonl"
        self.copy = self.host.files.begin_copy(run())

    def write(self, *lines: object, file: Path | None = None) -> None:
        path = file or self.main
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.writelines(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines)

    def update(self) -> None:
        asyncio.run(self.copy.copy(at_result=False))

    def finish(self) -> dict[str, Any]:
        """End the run, and return the columns that its end stores."""
        return self.store.submit(self.copy.finish()).result()

    def stored(self, subpath: str = "") -> list[Any]:
        return loaded(self.store, ONE._replace(subpath=subpath)) or []


@pytest.fixture
def copied(store: TranscriptStore, tmp_path: Path) -> Copied:
    return Copied(tmp_path, store)


def test_each_copy_reads_what_is_new(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    parse, read = copying.parse, []

    def note(line: bytes) -> Entry | None:
        read.append(line)
        return parse(line)

    monkeypatch.setattr(copying, "parse", note)
    for number in range(3):
        copied.write(LINES[number])
        copied.update()
        assert copied.stored() == LINES[: number + 1]
    copied.update()
    copied.write(LINES[3])

    assert copied.finish() == WHOLE
    assert copied.stored() == LINES[:4]
    assert [json.loads(line) for line in read] == LINES[:4]


def test_little_waits_at_a_result_for_the_next_copy_or_the_end(copied: Copied) -> None:
    copied.write(LINES[0])
    asyncio.run(copied.copy.copy(at_result=True))
    assert copied.stored() == []
    asyncio.run(copied.copy.copy(at_result=True))
    assert copied.stored() == LINES[:1]
    copied.write({**LINES[1], "text": "x" * copying.LATER_BYTES})
    asyncio.run(copied.copy.copy(at_result=True))
    assert len(copied.stored()) == 2
    copied.write(LINES[2])
    asyncio.run(copied.copy.copy(at_result=True))

    assert len(copied.stored()) == 2
    assert copied.finish() == WHOLE
    assert len(copied.stored()) == 3


def test_a_line_is_stored_when_it_is_complete(copied: Copied) -> None:
    text = json.dumps(LINES[1])
    copied.write(LINES[0], text[:20])
    copied.update()
    before = copied.stored()
    copied.write(text[20:])
    copied.update()
    without_newline = copied.stored()
    copied.write("\n", LINES[2], text[:20])

    assert copied.finish() == WHOLE
    assert [before, without_newline, copied.stored()] == [LINES[:1], LINES[:2], LINES[:3]]


def test_a_large_file_is_stored_in_parts(copied: Copied, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, writes = writer.submit, []

    def note(work: Any) -> Any:
        writes.append(work)
        return submit(work)

    monkeypatch.setattr(copying, "PART_BYTES", 2 * len(json.dumps(LINES[0])))
    monkeypatch.setattr(writer, "submit", note)
    copied.write(*LINES)

    assert copied.finish() == WHOLE
    assert len(writes) == 3
    assert copied.stored() == LINES


def test_transcripts_of_subagents_are_copied_with_their_latest_metadata(copied: Copied) -> None:
    copied.write(LINES[0])
    copied.write(LINES[1], file=copied.agent)
    copied.update()
    metadata = copied.agent.with_suffix(".meta.json")
    metadata.write_text('{"agentType": "a"}')
    copied.update()
    metadata.write_text('{"agentType": "b"}')
    copied.write(LINES[2], file=copied.agent)

    assert copied.finish() == WHOLE
    kinds = [{"agentType": name, "type": "agent_metadata"} for name in "ab"]
    assert copied.stored("subagents/agent-1") == [LINES[1], *kinds, LINES[2]]


def test_a_file_that_is_deleted_during_the_run_is_stored_with_all_that_it_had(copied: Copied) -> None:
    copied.write(LINES[0])
    copied.update()
    copied.write(LINES[1])
    copied.main.unlink()
    copied.write(*LINES[2:4])
    copied.update()
    copied.write(LINES[4])

    assert copied.finish() == WHOLE
    assert copied.stored() == LINES[:5]


def test_a_file_that_stays_deleted_is_stored_with_all_that_it_had(copied: Copied) -> None:
    copied.write(LINES[0])
    copied.update()
    copied.write(LINES[1])
    copied.main.unlink()

    assert copied.finish() == WHOLE
    assert copied.stored() == LINES[:2]


@pytest.mark.parametrize("size", [0, 1, -1])
def test_a_truncated_file_takes_no_stored_entry(copied: Copied, size: int) -> None:
    copied.write(*LINES[:3])
    copied.update()
    os.truncate(copied.main, size % copied.main.stat().st_size)
    copied.write("\n", LINES[3])

    assert copied.finish() == WHOLE
    assert copied.stored() == LINES[:4]


def test_what_could_not_be_stored_is_stored_at_the_end(
    copied: Copied, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StorageRejected("no")

    copied.write(LINES[0])
    copied.update()
    with monkeypatch.context() as patch:
        patch.setattr(transcripts, "extend", refuse)
        copied.write(LINES[1])
        copied.update()
    assert "run r: its transcript cannot be copied yet: StorageRejected: no" in caplog.text
    copied.write(LINES[2])

    assert copied.finish() == WHOLE
    assert copied.stored() == LINES[:3]


def test_a_transcript_that_cannot_be_stored_is_only_on_this_host(
    copied: Copied, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StorageRejected("no")

    for name in ("append", "extend"):
        monkeypatch.setattr(transcripts, name, refuse)
    copied.write(LINES[0])

    assert copied.finish() == {"hasTranscript": 1, "transcriptStored": 0}
    assert "run r: its transcript is not stored: StorageRejected: no" in caplog.text


@pytest.mark.parametrize("compare", [False, True])
def test_an_end_with_an_uncertain_commit_stores_the_rest_once(copied: Copied, compare: bool) -> None:
    copied.write(LINES[0])
    copied.update()
    copied.write(*LINES[1:3], {"type": "cost-state"})
    end = copied.copy.finish()
    if compare:
        end = copied.host.files.complete_copy(run())
    assert copied.stored() == LINES[:1]
    columns = copied.store.submit(lambda transaction: [end(transaction), end(transaction)]).result()

    assert columns == [WHOLE, WHOLE]
    assert copied.stored() == [*LINES[:3], {"type": "cost-state"}]


def test_a_copy_that_the_end_of_the_run_interrupts_is_continued(copied: Copied, writer: Writer) -> None:
    gate, waiting = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        waiting.set()
        gate.wait()

    async def interrupted() -> None:
        task = asyncio.create_task(copied.copy.copy(at_result=False))
        await asyncio.sleep(0)
        task.cancel()

    copied.write(*LINES[:2])
    held = writer.submit(hold)
    waiting.wait()
    asyncio.run(interrupted())
    gate.set()
    held.future.result()
    copied.write(LINES[2])

    assert copied.finish() == WHOLE
    assert copied.stored() == LINES[:3]


@pytest.mark.parametrize("place", ["main", "subagent"])
def test_a_file_that_is_no_transcript_is_not_read_to_its_end(
    copied: Copied, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """A file that has lost its blocks reads as one endless line of zeros."""
    copied.write(LINES[0])
    path = copied.main if place == "main" else copied.agent
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(2**40)

    assert copied.finish() == {"hasTranscript": 1, "transcriptStored": 0}
    assert "one of its lines is too long" in caplog.text
