"""`flask import` of the original service's database: grouping into sessions, odd values, and read-only access."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ccm.core.archive.bun.values import iso_time
from ccm.core.claude.locations import transcript_path
from tests.client import Client
from tests.conftest import ServeFunction
from tests.core.archive.conftest import of_type
from tests.core.archive.history import add_bun_run, add_run, add_session, make_bun, uuid_of, writing
from tests.flask_commands import Flask, variables

A, B, C, D, E = (uuid_of(number) for number in range(11, 16))


@pytest.fixture
def bun(tmp_path: Path) -> Path:
    path = tmp_path / "bun.sqlite"
    make_bun(path)
    return path


def lines_of(flask: Flask, url: str, kind: str) -> dict[str, dict[str, Any]]:
    key = {"run": "runId", "session": "sessionId"}[kind]
    return {line[key]: line for line in of_type(flask.export(url), kind)}


def day(number: int) -> str:
    return f"2025-06-{number:02}T10:00:00.000Z"


def cost(total: float | None) -> str:
    return json.dumps({"type": "result", "subtype": "success"} | ({} if total is None else {"total_cost_usd": total}))


def test_the_first_resume_of_a_run_continues_its_session_and_its_siblings_become_forks(
    flask: Flask, bun: Path, database_url: str
) -> None:
    add_bun_run(bun, "root", A, created_at=day(1), result_json=cost(0.1))
    add_bun_run(bun, "sibling", C, A, created_at=day(3), result_json=cost(0.25))
    add_bun_run(bun, "first", B, A, created_at=day(2), result_json=cost(0.3))
    add_bun_run(bun, "second", D, B, created_at=day(4), result_json=cost(None))
    add_bun_run(bun, "of the fork".replace(" ", "-"), E, C, created_at=day(5), result_json=cost(0.2))

    done = flask(database_url, "import", str(bun))

    assert [done.returncode, done.stderr] == [0, ""]
    assert "Imported 2 sessions, 5 runs, 5 messages" in done.stdout
    runs = lines_of(flask, database_url, "run")
    place = {name: (run["sessionId"], run["mode"], run["parentRunId"]) for name, run in runs.items()}
    assert place == {
        "root": (A, "fresh", None),
        "first": (A, "resume", "root"),
        "second": (A, "resume", "first"),
        "sibling": (C, "fork", "root"),
        "of-the-fork": (C, "resume", "sibling"),
    }
    assert {name: run["sdkSessionId"] for name, run in runs.items()} == dict(
        zip(("root", "first", "sibling", "second", "of-the-fork"), (A, B, C, D, E), strict=True)
    )
    assert [runs[name]["costUsd"] for name in ("root", "first", "sibling", "second", "of-the-fork")] == [
        *(0.1, 0.2, 0.15),
        *(None, None),
    ]
    sessions = lines_of(flask, database_url, "session")
    assert [sessions[C][name] for name in ("parentSessionId", "forkedFromRunId", "runCount")] == [A, "root", 2]
    root = sessions[A]
    assert [root[name] for name in ("title", "runCount", "messageCount", "costUsd")] == [None, 3, 3, 0.3]
    assert [root["firstRunAt"], root["lastRunAt"], root["headRunId"]] == [day(1), day(4), None]
    by_seq = sorted(runs, key=lambda name: runs[name]["seq"])
    assert by_seq == ["root", "first", "sibling", "second", "of-the-fork"]
    assert runs["root"]["endedAt"] == "2025-06-01T10:00:01.500Z"


def test_a_fork_stays_a_fork(flask: Flask, bun: Path, database_url: str) -> None:
    add_bun_run(bun, "root", A, created_at=day(1))
    add_bun_run(bun, "its-fork", B, A, created_at=day(2), mode="fork")
    add_bun_run(bun, "its-resume", C, A, created_at=day(3))
    flask(database_url, "import", str(bun))

    runs = lines_of(flask, database_url, "run")
    assert [runs["its-fork"]["sessionId"], runs["its-resume"]["sessionId"]] == [B, A]


def test_a_repeated_import_adds_the_new_runs(flask: Flask, bun: Path, database_url: str) -> None:
    add_bun_run(bun, "r1", A, created_at=day(1))
    add_bun_run(bun, "r2", "", created_at=day(2))
    flask(database_url, "import", str(bun))
    before = flask.export(database_url)[1:]
    again = flask(database_url, "import", str(bun))
    assert "Imported 0 sessions, 0 runs, 0 messages and 0 transcripts; here already: 2 runs." in again.stdout
    assert flask.export(database_url)[1:] == before

    add_bun_run(bun, "r3", B, A, created_at=day(3))
    later = flask(database_url, "import", str(bun))

    assert "Imported 0 sessions, 1 run, 1 message" in later.stdout
    runs = lines_of(flask, database_url, "run")
    assert [runs["r3"]["sessionId"], runs["r3"]["seq"]] == [A, 3]


def test_a_run_without_a_session_id_gets_a_session_of_its_own(flask: Flask, bun: Path, database_url: str) -> None:
    add_bun_run(bun, "r1", "", created_at=day(1))
    add_bun_run(bun, "r2", None, "", created_at=day(2))
    flask(database_url, "import", str(bun))

    runs = lines_of(flask, database_url, "run")
    assert [run["mode"] for run in runs.values()] == ["fresh", "fresh"]
    assert len({run["sessionId"] for run in runs.values()}) == 2
    assert [run["sessionId"] == run["sdkSessionId"] for run in runs.values()] == [True, True]


def test_runs_with_one_session_id_follow_one_another_and_the_last_has_the_transcript(
    flask: Flask, bun: Path, database_url: str, home: Path, project: Path
) -> None:
    transcript = transcript_path(str(project), A, {"HOME": str(home)})
    transcript.parent.mkdir(parents=True, exist_ok=True)
    transcript.write_text("{}\n")
    add_bun_run(bun, "r1", A, created_at=day(1), cwd=str(project))
    add_bun_run(bun, "r2", A, A, created_at=day(2), cwd=str(project))
    done = flask(database_url, "import", str(bun))

    runs = lines_of(flask, database_url, "run")
    assert [run["sessionId"] for run in runs.values()] == [A, A]
    assert [runs["r2"]["parentRunId"], runs["r2"]["mode"], runs["r2"]["sdkSessionId"]] == ["r1", "resume", A]
    assert [runs["r1"]["hasTranscript"], runs["r2"]["hasTranscript"]] == [False, True]
    assert lines_of(flask, database_url, "session")[A]["headRunId"] == "r2"
    assert "because their transcript is here: 1 run." in done.stdout


def test_invalid_values_are_reported(flask: Flask, bun: Path, database_url: str) -> None:
    odd = ['{"type": "user", "text": "\\u0000 \\ud83d"}', "{broken", "[1]", '{"no": "type"}']
    add_bun_run(bun, "orphan", A, E, created_at=day(1), sent=odd)
    add_bun_run(bun, "a/b", B, created_at=day(2), status="waiting", result_json="{broken", duration_ms="x")
    add_bun_run(bun, "going-on", C, created_at=day(3), status="running", result_json=None)
    add_bun_run(bun, "../../etc", "../../../etc/passwd", created_at="soon", prompt=None)
    with closing(sqlite3.connect(bun)) as connection, connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("INSERT INTO ccr_run_messages (run_id, \"index\", message_json) VALUES ('gone', 0, '{}')")

    done = flask(database_url, "import", str(bun))

    assert done.returncode == 0
    warnings = done.stderr.splitlines()
    for sentence in (
        f"Run orphan continued session {E}, which is not in this database. It begins a session of its own.",
        "Message 1 of run orphan is no JSON object. It is kept as text, in the field 'unparsed'.",
        "Message 2 of run orphan is no JSON object. It is kept as text, in the field 'unparsed'.",
        "Run going-on had not ended. It is now error / INTERRUPTED.",
        "Messages that belong to no run were left out: 1.",
    ):
        assert sentence in warnings
    assert "Run 'a/b' has an id that cannot be part of a URL" in done.stderr
    runs = {run["prompt"]: run for run in lines_of(flask, database_url, "run").values()}
    assert [runs["Prompt of orphan"]["mode"], runs["Prompt of orphan"]["messageCount"]] == ["fresh", 4]
    waiting = runs["Prompt of a/b"]
    assert [waiting["status"], waiting["result"], waiting["durationMs"]] == ["error", None, None]
    assert "'waiting'" in waiting["error"]["message"]
    assert runs["Prompt of going-on"]["error"]["code"] == "INTERRUPTED"
    assert runs[""]["createdAt"] == "1970-01-01T00:00:00.000Z"
    assert "/" not in runs[""]["runId"] + runs[""]["sdkSessionId"] + runs[""]["sessionId"]
    lines = of_type(flask.export(database_url), "message")
    messages = [line["message"] for line in lines if line["runId"] == "orphan"]
    assert messages[0] == {"type": "user", "text": "\0 \ud83d"}
    assert messages[1] == {"type": "assistant", "unparsed": "{broken"}
    assert [messages[2]["unparsed"], messages[3]] == ["[1]", {"no": "type"}]


def test_older_tables_without_mode_and_index_are_read(flask: Flask, tmp_path: Path, database_url: str) -> None:
    path = tmp_path / "old.sqlite"
    make_bun(
        path,
        "CREATE TABLE ccr_runs (id TEXT, cwd TEXT, session_id TEXT, status TEXT, prompt TEXT, created_at);"
        "CREATE TABLE ccr_run_messages (id INTEGER, run_id TEXT, message_json TEXT);"
        f"INSERT INTO ccr_runs VALUES ('r1', '/srv', '{A}', 'completed', 'Hi', 1748772000);"
        "INSERT INTO ccr_run_messages VALUES (2, 'r1', '{\"n\": 2}'), (1, 'r1', '{\"n\": 1}');",
    )
    assert flask(database_url, "import", str(path)).returncode == 0

    lines = of_type(flask.export(database_url), "message")
    assert [line["message"]["n"] for line in lines] == [1, 2]
    assert lines_of(flask, database_url, "run")["r1"]["createdAt"] == "2025-06-01T10:00:00.000Z"


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("2025-06-01T10:00:00.123Z", "2025-06-01T10:00:00.123Z"),
        ("2025-06-01T12:00:00+02:00", "2025-06-01T10:00:00.000Z"),
        ("2025-06-01 10:00:00", "2025-06-01T10:00:00.000Z"),
        (1748772000, "2025-06-01T10:00:00.000Z"),
        (1748772000123, "2025-06-01T10:00:00.123Z"),
        ("1748772000123", "2025-06-01T10:00:00.123Z"),
        (1748772000.5, "2025-06-01T10:00:00.500Z"),
        (None, None),
        ("", None),
        ("soon", None),
        (float("inf"), None),
        (1e300, None),
        (b"x", None),
    ],
)
def test_times_in_all_formats_are_read(stored: Any, read: str | None) -> None:
    assert iso_time(stored) == read


def test_a_parent_with_a_later_timestamp_than_its_child_comes_first(flask: Flask, bun: Path, database_url: str) -> None:
    add_bun_run(bun, "child", B, A, created_at=day(1))
    add_bun_run(bun, "root", A, created_at=day(2))
    add_bun_run(bun, "ring-1", C, D, created_at=day(3))
    add_bun_run(bun, "ring-2", D, C, created_at=day(4))
    assert flask(database_url, "import", str(bun)).returncode == 0

    runs = lines_of(flask, database_url, "run")
    assert [runs["child"]["parentRunId"], runs["child"]["sessionId"]] == ["root", A]
    assert runs["root"]["seq"] < runs["child"]["seq"]
    assert sorted(runs[name]["mode"] for name in ("ring-1", "ring-2")) == ["fresh", "resume"]


@pytest.fixture
def bun_with_log(bun: Path) -> Iterator[Path]:
    """Yield a Bun database whose last run is still in its write-ahead log, as while its service runs."""
    add_bun_run(bun, "r1", A, created_at=day(1))
    connection = sqlite3.connect(bun)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("SELECT COUNT(*) FROM ccr_runs").fetchall()  # keeps the log open
    add_bun_run(bun, "r2", B, A, created_at=day(2))
    yield bun
    connection.close()


def test_the_database_is_read_with_its_log_and_never_changed(
    flask: Flask, bun_with_log: Path, database_url: str
) -> None:
    log = bun_with_log.with_name("bun.sqlite-wal")
    before = bun_with_log.read_bytes(), log.read_bytes()
    assert b"Prompt of r2" not in before[0]

    assert "2 runs" in flask(database_url, "import", str(bun_with_log)).stdout
    assert (bun_with_log.read_bytes(), log.read_bytes()) == before


def test_reading_a_cleanly_closed_database_leaves_no_files_beside_it(
    flask: Flask, bun: Path, tmp_path: Path, home: Path
) -> None:
    with closing(sqlite3.connect(bun)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    add_bun_run(bun, "r1", A, created_at=day(1))
    before = bun.read_bytes()

    assert "1 run," in flask(f"sqlite:///{tmp_path}/db.sqlite", "import", str(bun)).stdout
    assert bun.read_bytes() == before
    assert [path.name for path in tmp_path.glob("bun*")] == ["bun.sqlite"]


def test_another_programs_database_is_refused(flask: Flask, tmp_path: Path) -> None:
    path = tmp_path / "foreign.sqlite"
    make_bun(path, "CREATE TABLE recipes (id TEXT);")
    refused = flask(f"sqlite:///{tmp_path}/db.sqlite", "import", str(path))
    assert [refused.returncode, "not the original service's" in refused.stderr] == [1, True]
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(path.read_bytes()[:100] + os.urandom(4000))
    assert flask(f"sqlite:///{tmp_path}/db.sqlite", "import", str(broken)).returncode == 1
    assert not (tmp_path / "db.sqlite").exists()


def test_a_run_that_was_continued_here_since_is_not_continued_twice(flask: Flask, bun: Path, database_url: str) -> None:
    add_bun_run(bun, "root", A, created_at=day(1))
    flask(database_url, "import", str(bun))
    with writing(database_url) as own:
        add_run(own, A, 5, mode="resume", parentRunId="root")
    add_bun_run(bun, "late", B, A, created_at=day(2))

    done = flask(database_url, "import", str(bun))

    assert "it becomes a fork" in done.stderr
    assert lines_of(flask, database_url, "session")[B]["parentSessionId"] == A


def test_a_fork_of_a_run_that_became_a_fork_here_descends_from_it(flask: Flask, bun: Path, database_url: str) -> None:
    add_bun_run(bun, "root", A, created_at=day(1))
    flask(database_url, "import", str(bun))
    with writing(database_url) as own:
        add_run(own, A, 5, mode="resume", parentRunId="root")
    add_bun_run(bun, "moved", B, A, created_at=day(2))
    add_bun_run(bun, "beyond", C, B, created_at=day(3))
    add_bun_run(bun, "aside", D, B, created_at=day(4), mode="fork")

    done = flask(database_url, "import", str(bun))

    assert [done.returncode, "Imported 2 sessions, 3 runs" in done.stdout] == [0, True]
    runs = lines_of(flask, database_url, "run")
    assert [runs[name]["sessionId"] for name in ("moved", "beyond", "aside")] == [B, B, D]
    assert lines_of(flask, database_url, "session")[D]["parentSessionId"] == B


@pytest.mark.parametrize("gone_on", [False, True])
def test_a_session_id_stays_with_the_run_that_has_it_here(
    flask: Flask, bun: Path, database_url: str, gone_on: bool
) -> None:
    add_bun_run(bun, "r1", A, created_at=day(1))
    flask(database_url, "import", str(bun))
    if gone_on:
        with writing(database_url) as own:
            add_run(own, A, 5, mode="resume", parentRunId="r1")
    # In the original service, the last of the runs that share a session id has it.
    add_bun_run(bun, "r2", A, A, created_at=day(2))
    add_bun_run(bun, "r3", B, created_at=day(3))

    done = flask(database_url, "import", str(bun))

    assert [done.returncode, "2 runs, " in done.stdout] == [0, True]
    runs = lines_of(flask, database_url, "run")
    made = runs["r2"]["sdkSessionId"]
    assert f"Run r2 has the SDK session {A} of run r1, which is here already: it gets {made}" in done.stderr
    assert [runs["r1"]["sdkSessionId"], runs["r2"]["parentRunId"], runs["r3"]["sessionId"]] == [A, "r1", B]
    assert runs["r2"]["sessionId"] == (made if gone_on else A)
    again = flask(database_url, "import", str(bun))
    assert [again.returncode, "here already: 3 runs." in again.stdout] == [0, True]


def test_two_databases_with_the_same_session_id_become_two_sessions(
    flask: Flask, bun: Path, tmp_path: Path, database_url: str
) -> None:
    second = tmp_path / "second.sqlite"
    make_bun(second)
    add_bun_run(bun, "r1", A, created_at=day(1))
    add_bun_run(second, "r2", A, created_at=day(2))
    add_bun_run(second, "r3", B, A, created_at=day(3))
    flask(database_url, "import", str(bun))

    assert flask(database_url, "import", str(second)).returncode == 0

    runs = lines_of(flask, database_url, "run")
    assert [runs["r1"]["sessionId"], runs["r2"]["mode"]] == [A, "fresh"]
    assert runs["r2"]["sessionId"] == runs["r3"]["sessionId"] == runs["r2"]["sdkSessionId"] != A


def test_imported_history_is_served(flask: Flask, bun: Path, database_url: str, serve: ServeFunction) -> None:
    with writing(database_url) as own:
        add_session(own, uuid_of(50))
        add_run(own, uuid_of(50), 1)
    for number in range(1, 6):
        add_bun_run(bun, f"r{number}", uuid_of(60 + number), created_at=day(number))
    assert flask(database_url, "import", str(bun)).returncode == 0

    client = Client(serve(**variables(database_url)).url)
    newest_first = [uuid_of(1001), "r5", "r4", "r3", "r2", "r1"]
    assert [run["id"] for run in client.get("/api/runs").json] == newest_first
    page = client.get("/api/runs", limit=4)
    assert [run["id"] for run in client.get(page.next or "").json] == newest_first[4:]
    assert client.messages("r3") == [{"type": "assistant", "text": "I am r3."}]
    assert client.get(f"/api/sessions/{uuid_of(63)}/runs").json == [client.run("r3")]
    refused = client.post("/api/runs/resume", {"sessionId": uuid_of(63), "prompt": "Go on."})
    assert [refused.status, refused.error["code"]] == [409, "SESSION_NOT_RESUMABLE"]
