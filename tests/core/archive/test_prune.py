"""`flask prune`: the rows and files that it deletes and keeps, and the removal of the bytes."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.locations import transcript_path
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.files import TranscriptFiles
from ccm.core.transcripts.store import TranscriptStore
from ccm.core.webhooks.outbox import Outbox
from ccm.db import runs, trees
from ccm.db.driver.database import Database
from ccm.testing.service_process import APP
from tests.client import Client
from tests.conftest import ServeFunction
from tests.core.archive.conftest import of_type
from tests.core.archive.history import (
    FORK,
    OTHER,
    ROOT,
    SECRET,
    add_run,
    add_session,
    fill,
    transcript_lines,
    uuid_of,
    writing,
)
from tests.disks import SmallDisk
from tests.flask_commands import FLASK, Flask, variables

TABLES = ("ccr_sessions", "ccr_runs", "ccr_run_messages", "ccr_transcripts", "ccr_transcript_entries")


@pytest.fixture
def own_home(tmp_path: Path) -> Path:
    """Return a HOME of the test's own, because files in it are deleted."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def flask(own_home: Path) -> Flask:
    return Flask(own_home)


def ids(flask: Flask, url: str) -> list[str]:
    return [line["sessionId"] for line in of_type(flask.export(url), "session")]


def recent(**ago: int) -> str:
    return (datetime.now(UTC) - timedelta(**ago)).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@pytest.mark.parametrize("named", [ROOT, FORK, uuid_of(2004)])
def test_naming_any_session_deletes_its_whole_tree_and_no_other(flask: Flask, filled: str, named: str) -> None:
    other = flask.export(filled, "--session", OTHER)[1:]

    done = flask(filled, "prune", "--session", named)

    assert [done.returncode, done.stderr] == [0, ""]
    assert done.stdout.startswith(f"Deleted the tree of session {ROOT}: 2 sessions, 3 runs, 705 messages (")
    assert "3 transcripts and 0 files of Claude Code; latest activity 2026-03-01T10:04:00.000Z." in done.stdout
    assert f"  with session {FORK}\n" in done.stdout
    assert ids(flask, filled) == [OTHER]
    assert flask.export(filled)[1:-1] == other[:-1]
    assert flask(filled, "prune", "--session", ROOT).returncode == 1


def test_a_text_that_another_tree_shares_stays(flask: Flask, writable: Database, filled: str) -> None:
    flask(filled, "prune", "--session", OTHER)
    texts = writable.rows("SELECT COUNT(*) AS n FROM ccr_transcript_texts")[0]["n"]
    entries = writable.rows("SELECT COUNT(DISTINCT digest) AS n FROM ccr_transcript_entries")[0]["n"]
    assert texts == entries == 5

    flask(filled, "prune", "--session", ROOT)
    for table in (*TABLES, "ccr_transcript_texts"):
        assert writable.rows(f"SELECT COUNT(*) AS n FROM {table}")[0]["n"] == 0


def test_events_and_deliveries_are_deleted_with_their_runs(flask: Flask, writable: Database, filled: str) -> None:
    with writable.transaction() as transaction:
        outbox = Outbox(service=True)
        for run in runs.page(transaction, {}, limit=10, after=None):
            assert run.webhook_url is not None
            outbox.enqueue(transaction, "run.completed", run)

    def left() -> list[int]:
        return [
            writable.rows(f"SELECT COUNT(*) AS n FROM {table}")[0]["n"] for table in ("ccr_events", "ccr_deliveries")
        ]

    assert left() == [4, 8]
    flask(filled, "prune", "--session", ROOT)
    assert left() == [1, 2]
    flask(filled, "prune", "--session", OTHER)
    assert left() == [0, 0]


def test_a_dry_run_prints_the_same_and_changes_nothing(flask: Flask, filled: str) -> None:
    before = flask.export(filled)[1:]
    would = flask(filled, "prune", "--session", FORK, "--dry-run")
    assert flask.export(filled)[1:] == before

    did = flask(filled, "prune", "--session", FORK)
    assert would.stdout.replace("Would delete", "Deleted") == did.stdout


def test_only_a_dry_run_is_possible_beside_the_service(flask: Flask, filled: str, serve: ServeFunction) -> None:
    client = Client(serve(**variables(filled)).url)
    would = flask(filled, "prune", "--older-than", "1h", "--dry-run")
    refused = flask(filled, "prune", "--older-than", "1h")

    assert [would.returncode, would.stdout.count("Would delete")] == [0, 2]
    assert [refused.returncode, "Another CC Manager is at work" in refused.stderr] == [3, True]
    assert len(client.get("/api/sessions").json) == 3


def test_the_age_of_a_tree_counts_from_the_latest_activity_in_any_of_its_sessions(
    flask: Flask, writable: Database, filled: str
) -> None:
    # The root is years old; a fork of a fork was made two days ago.
    grandchild = uuid_of(40)
    add_session(writable, grandchild, parentSessionId=FORK, forkedFromRunId=uuid_of(1004))
    add_run(writable, grandchild, 5, mode="fork", parentRunId=uuid_of(1004), createdAt=recent(days=2))

    three_days = flask(filled, "prune", "--older-than", "3d")
    assert "session " + OTHER in three_days.stdout
    assert ids(flask, filled) == [ROOT, FORK, grandchild]
    assert flask(filled, "prune", "--older-than", "1w").stdout == "Nothing to delete.\n"
    forty_hours = flask(filled, "prune", "--older-than", "40h")
    assert "3 sessions, 4 runs" in forty_hours.stdout
    assert ids(flask, filled) == []


def test_a_tree_with_an_unfinished_run_is_left_alone(flask: Flask, writable: Database, filled: str) -> None:
    running = {"status": "running", "endedAt": None, "hasTranscript": 0}
    add_run(writable, ROOT, 5, [{"type": "system"}], mode="resume", parentRunId=uuid_of(1003), **running)

    by_age = flask(filled, "prune", "--older-than", "1d")
    assert by_age.returncode == 0
    assert f"Left alone: the tree of session {ROOT} has runs that have not ended (1)." in by_age.stdout
    assert ids(flask, filled) == [ROOT, FORK]
    by_name = flask(filled, "prune", "--session", FORK)
    assert [by_name.returncode, by_name.stdout] == [1, ""]
    assert by_name.stderr.startswith(f"Nothing was deleted: the tree of session {ROOT} has runs")
    assert ids(flask, filled) == [ROOT, FORK]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--dry-run"],
        ["--older-than", "1d", "--session", ROOT],
        ["--older-than", "0d"],
        ["--older-than", "90"],
        ["--older-than", "-1d"],
        ["--older-than", "1y"],
    ],
)
def test_a_usage_error_deletes_nothing(flask: Flask, tmp_path: Path, words: list[str]) -> None:
    assert flask(f"sqlite:///{tmp_path}/none.sqlite", "prune", *words).returncode == 2
    assert not (tmp_path / "none.sqlite").exists()


def test_claude_codes_own_files_are_deleted_and_the_agents_files_stay(
    flask: Flask, writable: Database, database_url: str, own_home: Path, project: Path
) -> None:
    add_session(writable, ROOT, cwd=str(project))
    add_run(writable, ROOT, 1, cwd=str(project))
    elsewhere = own_home / "elsewhere"
    add_run(
        writable,
        ROOT,
        2,
        cwd=str(project),
        mode="resume",
        parentRunId=uuid_of(1001),
        optionsJson=f'{{"env": {{"CLAUDE_CONFIG_DIR": "{elsewhere}"}}}}',
    )
    add_run(writable, ROOT, 3, cwd=str(project), sdkSessionId="not-a-uuid", mode="resume", parentRunId=uuid_of(1002))
    kept = [write(own_home, project, uuid_of(9999)), write(own_home, project, "not-a-uuid")]
    gone = [write(own_home, project, uuid_of(2001)), write(elsewhere, project, uuid_of(2002), "CLAUDE_CONFIG_DIR")]
    folder = gone[0].with_suffix("")
    (folder / "subagents").mkdir(parents=True)
    (folder / "subagents" / "agent-1.jsonl").write_text(SECRET)
    (folder / "a-link").symlink_to(project)

    done = flask(database_url, "prune", "--session", ROOT)

    assert "3 files of Claude Code" in done.stdout
    assert not any(path.exists() for path in (*gone, folder))
    assert all(path.exists() for path in kept)
    assert (project / "here-is-a-file.txt").read_text() == "hello\n"


def test_the_searched_directory_is_named_if_it_has_no_file_of_a_tree_with_transcripts(
    flask: Flask, writable: Database, filled: str, own_home: Path
) -> None:
    add_session(writable, uuid_of(40))
    add_run(writable, uuid_of(40), 5)
    note = f"no file of Claude Code was found in {own_home / '.claude'}"

    with_transcripts, without = (flask(filled, "prune", "--session", root) for root in (ROOT, uuid_of(40)))

    assert [note in with_transcripts.stdout, note in without.stdout] == [True, False]


def test_copies_of_transcripts_for_other_runs_are_deleted(
    flask: Flask, writable: Database, database_url: str, own_home: Path, project: Path
) -> None:
    add_session(writable, ROOT, cwd=str(project))
    add_run(writable, ROOT, 1, cwd=str(project))
    add_session(writable, FORK, parentSessionId=ROOT, forkedFromRunId=uuid_of(1001))
    own = {"CLAUDE_CONFIG_DIR": str(own_home / "configured")}
    forked: dict[str, Any] = {"mode": "fork", "parentRunId": uuid_of(1001)}
    add_run(writable, FORK, 2, cwd="/srv/other", optionsJson=json.dumps({"env": own}), **forked)
    add_session(writable, OTHER, parentSessionId=ROOT, forkedFromRunId=uuid_of(1001))
    own = {"HOME": str(own_home / "another-home")}
    add_run(writable, OTHER, 3, cwd="/srv/other", optionsJson=json.dumps({"env": own}), **forked)
    parent = uuid_of(2001)
    gone = [
        write(own_home, Path("/srv/other"), parent),
        write(own_home / "configured", Path("/srv/other"), parent, "CLAUDE_CONFIG_DIR"),
        write(own_home / "another-home", Path("/srv/other"), parent),
        # The directory may have any name.
        own_home / ".claude" / "projects" / "-srv-\U0001f600" / f"{parent}.jsonl",
        own_home / ".claude" / "projects" / "-srv-\U0001f600" / parent / "subagents" / "agent-1.jsonl",
        # The temporary file of a service that was killed while it wrote a transcript back.
        own_home / ".claude" / "projects" / "-srv-other" / f".ccm-{parent}-abcd_123",
    ]
    names = [f"{uuid_of(9999)}.jsonl", f".ccm-{uuid_of(9999)}-abcd", ".ccm-abcd", f"{parent}.txt", "memory"]
    names += [f"{uuid_of(9999)}.jsonl.incomplete-17", f"{parent}.jsonl.incomplete", f"{parent}.incomplete-17"]
    kept = [own_home / ".claude" / "projects" / "-srv-other" / name for name in names]
    kept.append(own_home / ".claude" / "history" / "x" / f"{parent}.jsonl")
    for path in (*gone, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SECRET)

    would = flask(database_url, "prune", "--session", ROOT, "--dry-run")
    assert "6 files of Claude Code" in would.stdout
    assert all(path.exists() for path in gone)
    assert "6 files of Claude Code" in flask(database_url, "prune", "--session", ROOT).stdout

    assert [path for path in gone if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []
    assert not (own_home / ".claude" / "projects" / "-srv-\U0001f600" / parent).exists()


def test_a_transcript_that_the_service_set_aside_is_deleted(
    flask: Flask, writable: Database, database_url: str, own_home: Path, project: Path
) -> None:
    add_session(writable, ROOT, cwd=str(project))
    stored = {"": transcript_lines(uuid_of(2001), "what the file has lost")}
    run_id = add_run(writable, ROOT, 1, cwd=str(project), transcript=stored)
    folder = write(own_home, project, uuid_of(2001)).parent
    with writable.transaction() as transaction:
        run = runs.find(transaction, run_id)
    assert run is not None
    store = TranscriptStore(Writer(writable, Notifier(), 2**20, lambda run, error: None), writable)
    assert TranscriptFiles(store, {"HOME": str(own_home)}).make_available(run, run)
    assert sorted(SECRET in path.read_text() for path in folder.iterdir()) == [False, True]

    assert "2 files of Claude Code" in flask(database_url, "prune", "--session", ROOT).stdout

    assert list(folder.iterdir()) == []


def write(home: Path, cwd: Path, sdk_session_id: str, variable: str = "HOME") -> Path:
    path = transcript_path(str(cwd), sdk_session_id, {variable: str(home)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SECRET)
    return path


def files_of(url: str) -> Iterator[Path]:
    path = Path(url.removeprefix("sqlite:///"))
    yield from (file for file in path.parent.glob(path.name + "*") if file.is_file())


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[tuple[Database, str]]:
    """Yield a SQLite database and its URL. The tests read its file."""
    url = f"sqlite:///{tmp_path}/db.sqlite"
    with writing(url) as database:
        yield database, url


def contains_secret(url: str) -> bool:
    return any(SECRET.encode() in file.read_bytes() for file in files_of(url))


def test_the_bytes_are_removed_from_the_database_and_its_log(flask: Flask, sqlite: tuple[Database, str]) -> None:
    database, url = sqlite
    fill(database)
    assert contains_secret(url)

    flask(url, "prune", "--session", ROOT)

    assert {file.name for file in files_of(url)} >= {"db.sqlite", "db.sqlite-wal", "db.sqlite-shm"}
    assert not contains_secret(url)
    assert os.stat(url.removeprefix("sqlite:///")).st_mode & 0o777 == 0o600
    assert database.rows("SELECT COUNT(*) AS n FROM ccr_runs") == [{"n": 1}]


@pytest.mark.parametrize("interrupted", [False, True], ids=["", "by the prune after a killed one"])
def test_the_words_of_deleted_texts_are_removed_from_the_search_index(
    flask: Flask, sqlite: tuple[Database, str], interrupted: bool
) -> None:
    database, url = sqlite
    fill(database)
    kept, gone = "ostrich", "cassowary"
    for seq, session_id, word in ((50, OTHER, kept), (51, ROOT, gone)):
        said = {"type": "assistant", "message": {"content": [{"type": "text", "text": f"A {word.upper()} runs."}]}}
        add_run(database, session_id, seq, [said], mode="resume")

    def words() -> list[bool]:
        return [any(word.encode() in file.read_bytes() for file in files_of(url)) for word in (kept, gone)]

    assert words() == [True, True]
    if interrupted:  # after its last deletion
        trees.delete(database, ROOT)
        assert words() == [True, True]
        flask(url, "prune", "--older-than", "9999w")
    else:
        flask(url, "prune", "--session", ROOT)

    assert words() == [True, False]
    left = {row["runId"] for row in database.rows('SELECT DISTINCT "runId" FROM ccr_search')}
    assert left <= {None, *(row["id"] for row in database.rows("SELECT id FROM ccr_runs"))}
    assert not database.rows("SELECT seq FROM ccr_run_metadata WHERE seq NOT IN (SELECT seq FROM ccr_runs)")


def test_the_file_is_rewritten_without_space_for_temporary_files(
    environ: dict[str, str], own_home: Path, sqlite: tuple[Database, str], small_disk: SmallDisk
) -> None:
    database, url = sqlite
    fill(database)
    with database.transaction() as transaction:
        transaction.execute("UPDATE ccr_sessions SET title = :title WHERE id = :id", title="x" * 2**24, id=OTHER)
    small_disk.fill()
    # A process of its own, because SQLite reads TMPDIR when it is loaded.
    own = {"HOME": str(own_home), "TMPDIR": str(small_disk.path), **variables(url)}
    command = [*FLASK, "prune", "--session", ROOT]

    done = subprocess.run(command, env=environ | own, cwd=APP.parent, capture_output=True, text=True, check=False)

    assert [done.returncode, done.stderr] == [0, ""]
    assert not contains_secret(url)


def test_a_reader_that_holds_the_log_is_reported_and_the_next_prune_clears_it(
    flask: Flask, sqlite: tuple[Database, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.db.trees.CLEAR_TIMEOUT", 0.1)
    database, url = sqlite
    fill(database)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM ccr_runs").fetchone()
        held = flask(url, "prune", "--session", ROOT)
    assert held.returncode == 1
    assert "still have their bytes in the database's files" in held.stderr
    assert contains_secret(url)

    later = flask(url, "prune", "--older-than", "9999w")
    assert [later.returncode, later.stdout] == [0, "Nothing to delete.\n"]
    assert not contains_secret(url)


def test_the_next_prune_completes_an_interrupted_one(
    flask: Flask, filled: str, monkeypatch: pytest.MonkeyPatch, writable: Database
) -> None:
    delete_by_index = trees._delete_by_index

    def cut_off(database: Database, table: str, owner: str, owner_id: Any) -> None:
        if owner_id == uuid_of(1004):
            raise KeyboardInterrupt
        delete_by_index(database, table, owner, owner_id)

    monkeypatch.setattr(trees, "_delete_by_index", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trees.delete(writable, ROOT)
    monkeypatch.undo()

    assert ids(flask, filled) == [ROOT, OTHER, FORK]
    assert "2 sessions, 3 runs, 700 messages" in flask(filled, "prune", "--session", ROOT).stdout
    assert ids(flask, filled) == [OTHER]


def test_a_service_answers_consistently_after_an_interrupted_prune(
    flask: Flask, filled: str, monkeypatch: pytest.MonkeyPatch, writable: Database, serve: ServeFunction
) -> None:
    delete_by_index = trees._delete_by_index

    def cut_off(database: Database, table: str, owner: str, owner_id: Any) -> None:
        delete_by_index(database, table, owner, owner_id)
        if table == "ccr_run_messages":
            raise KeyboardInterrupt

    monkeypatch.setattr(trees, "_delete_by_index", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trees.delete(writable, ROOT)
    monkeypatch.undo()

    service = serve(**variables(filled))
    client = Client(service.url)
    for number in (1001, 1003, 1004):
        run = client.run(uuid_of(number))
        assert [run["messageCount"], run["transcriptStored"], client.messages(run["id"])] == [0, False, []]
        stream = client.get(f"/api/runs/{run['id']}/stream").body
        assert [stream.count(b"event: "), stream.count(b"event: end")] == [1, 1]
    assert client.get(f"/api/sessions/{FORK}/messages", limit=5).json == []
    for kind, session_id in (("resume", ROOT), ("fork", ROOT), ("resume", FORK)):
        refused = client.post(f"/api/runs/{kind}", {"sessionId": session_id, "prompt": "Go on."})
        assert [refused.status, refused.error["code"]] == [409, "SESSION_NOT_RESUMABLE"]
    assert len(client.messages(uuid_of(1002))) == 1
    service.process.terminate()
    service.wait()
    assert not [line for line in service.log if "Traceback" in line]
    assert "2 sessions, 3 runs, 701 messages" in flask(filled, "prune", "--session", ROOT).stdout


def test_a_long_run_is_deleted_in_several_transactions(
    flask: Flask, writable: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.db.trees.ROWS", 100)
    fill(writable)
    assert "705 messages" in flask(database_url, "prune", "--session", ROOT).stdout
    assert writable.rows("SELECT COUNT(*) AS n FROM ccr_run_messages") == [{"n": 1}]
