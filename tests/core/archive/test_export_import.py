"""`flask export` and `flask import` on both databases."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ccm.core.archive.exporting import export
from ccm.db import runs, sessions
from ccm.db.driver.database import Database
from tests.client import Client
from tests.conftest import ServeFunction
from tests.core.archive.conftest import of_type
from tests.core.archive.history import FORK, ODD, OTHER, ROOT, add_run, add_session, fill, uuid_of, writing
from tests.flask_commands import FLASK, Flask, variables
from tests.postgresql import new_database

ROOT_FOLDER = Path(__file__).parents[3]


@pytest.fixture
def other_url(database_url: str, tmp_path: Path, postgresql: str) -> str:
    """An empty database of the other kind."""
    return new_database(postgresql) if database_url.startswith("sqlite") else f"sqlite:///{tmp_path}/other.sqlite"


@pytest.fixture
def other(other_url: str) -> Iterator[Database]:
    database = Database(other_url)
    yield database
    database.close()


# ---- export and import


def test_an_export_of_an_imported_export_is_the_same(flask: Flask, filled: str, other_url: str, tmp_path: Path) -> None:
    exported = flask(filled, "export")
    file = tmp_path / "export.jsonl"
    file.write_text(exported.stdout)

    imported = flask(other_url, "import", str(file))

    assert [imported.returncode, imported.stderr] == [0, ""]
    assert "3 sessions, 4 runs, 706 messages and 4 transcripts; here already: 0 runs" in imported.stdout
    assert flask(other_url, "export").stdout.splitlines()[1:] == exported.stdout.splitlines()[1:]
    lines = exported.stdout.splitlines()
    assert len(lines) > 700
    assert json.loads(lines[0]) | {"exportedAt": None} == {
        "type": "export",
        "format": "cc-manager",
        "version": 1,
        "exportedAt": None,
        "lastSeq": 4,
    }


def test_an_import_can_be_repeated_and_can_read_standard_input(flask: Flask, filled: str, other_url: str) -> None:
    exported = flask(filled, "export").stdout

    first = flask(other_url, "import", "-", given=exported)
    second = flask(other_url, "import", "-", given=exported)

    assert [first.returncode, second.returncode] == [0, 0]
    assert "Imported 0 sessions, 0 runs, 0 messages and 0 transcripts; here already: 4 runs." in second.stdout
    assert flask(other_url, "export").stdout.splitlines()[1:] == exported.splitlines()[1:]


def test_a_message_is_exported_exactly_as_it_is_stored(flask: Flask, filled: str) -> None:
    messages = of_type(flask.export(filled), "message")

    assert messages[1]["message"] == ODD
    assert [message["index"] for message in messages[:4]] == [0, 1, 2, 3]
    assert set(messages[0]) == {"type", "runId", "index", "createdAt", "message"}


def test_a_truncated_export_imports_its_complete_runs_and_the_whole_export_adds_the_rest(
    flask: Flask, filled: str, other_url: str
) -> None:
    exported = flask(filled, "export").stdout
    lines = exported.splitlines(keepends=True)
    middle = next(number for number, line in enumerate(lines) if f'"runId":"{uuid_of(1004)}","index":650' in line)
    cut = "".join(lines[:middle]) + lines[middle][:20]

    broken = flask(other_url, "import", "-", given=cut)
    assert broken.returncode == 1
    assert f"Line {middle + 1}: it is no JSON. The file ends in it: it is truncated." in broken.stderr
    assert "2 sessions, 3 runs, 6 messages" in broken.stdout
    at_line_end = flask(other_url, "import", "-", given="".join(lines[:middle]))
    assert [at_line_end.returncode, f"ends with line {middle}" in at_line_end.stderr] == [1, True]

    whole = flask(other_url, "import", "-", given=exported)
    assert whole.returncode == 0
    assert flask(other_url, "export").stdout.splitlines()[1:] == exported.splitlines()[1:]


def test_the_rest_of_an_interrupted_import_gets_the_positions_it_would_have_had(
    flask: Flask, filled: str, other_url: str
) -> None:
    with writing(other_url) as own:
        add_session(own, uuid_of(50))
        add_run(own, uuid_of(50), 50)
    exported = flask(filled, "export").stdout
    middle = exported.index(f'{{"type":"session","sessionId":"{FORK}"')

    assert flask(other_url, "import", "-", given=exported[:middle]).returncode == 1
    assert flask(other_url, "import", "-", given=exported).returncode == 0

    seqs = {run["runId"]: run["seq"] for run in of_type(flask.export(other_url), "run")}
    assert seqs == {uuid_of(1050): 50, **{uuid_of(1000 + seq): 45 + seq for seq in (1, 2, 3, 4)}}


def test_an_export_does_not_contain_what_is_written_meanwhile(
    writable: Database, reader: Database, database_url: str
) -> None:
    fill(writable)
    with reader.transaction() as transaction:
        lines = export(transaction, None)
        beginning = [next(lines), next(lines)]
        add_run(writable, ROOT, 5, [{"type": "late"}], mode="resume", parentRunId=uuid_of(1003))
        add_session(writable, uuid_of(60))
        add_run(writable, uuid_of(60), 6)
        exported = [json.loads(line) for line in [*beginning, *lines]]

    assert [run["seq"] for run in of_type(exported, "run")] == [1, 3, 2, 4]
    assert exported[-1] == {"type": "end", "sessions": 3, "runs": 4}


def test_one_session_is_exported_with_its_ancestors(flask: Flask, filled: str, other_url: str) -> None:
    by_id = flask(filled, "export", "--session", FORK)
    by_sdk_id = flask(filled, "export", "--session", uuid_of(2004))

    lines = [json.loads(line) for line in by_id.stdout.splitlines()]
    assert [line["sessionId"] for line in of_type(lines, "session")] == [ROOT, FORK]
    assert by_id.stdout.splitlines()[1:] == by_sdk_id.stdout.splitlines()[1:]
    assert flask(other_url, "import", "-", given=by_id.stdout).returncode == 0
    alone = flask.export(filled, "--session", OTHER)
    assert [line["sessionId"] for line in of_type(alone, "session")] == [OTHER]


def test_an_unknown_session_is_reported_and_nothing_is_written(flask: Flask, filled: str) -> None:
    unknown = flask(filled, "export", "--session", uuid_of(77))
    assert [unknown.returncode, unknown.stdout] == [1, ""]
    assert unknown.stderr == f"There is no session {uuid_of(77)} in this database.\n"


def test_an_export_whose_reader_leaves_ends_quietly(filled: str, environ: dict[str, str]) -> None:
    process = subprocess.Popen(
        [*FLASK, "export"],
        env={**environ, **variables(filled)},
        cwd=ROOT_FOLDER,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    process.wait()


@pytest.mark.parametrize("words", [["export"], ["import", "-"], ["prune", "--session", ROOT]])
def test_an_output_that_cannot_be_written_is_reported_in_one_sentence(
    flask: Flask, filled: str, environ: dict[str, str], words: list[str]
) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*FLASK, *words],
            env={**environ, **variables(filled)},
            cwd=ROOT_FOLDER,
            input=flask(filled, "export").stdout.encode(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert [done.returncode, done.stderr] == [1, b"The output cannot be written: No space left on device.\n"]


def test_an_export_beside_a_running_service_is_a_snapshot(
    flask: Flask, serve: ServeFunction, database_url: str, project: Path
) -> None:
    client = Client(serve(**variables(database_url)).url)
    run = client.start(project, "Hello.")

    lines = flask.export(database_url)

    exported = of_type(lines, "run")[0]
    assert {name: exported[name] for name in exported.keys() & run.keys()} == {
        name: run[name] for name in exported.keys() & run.keys()
    }
    assert [line["message"] for line in of_type(lines, "message")] == client.messages(run["id"])
    beside = flask(database_url, "import", "-", given="\n".join(json.dumps(line) for line in lines))
    assert beside.returncode == 3
    assert "Another CC Manager is at work on this database" in beside.stderr


def test_an_export_of_a_missing_database_does_not_create_it(flask: Flask, tmp_path: Path) -> None:
    missing = flask(f"sqlite:///{tmp_path}/none.sqlite", "export")
    assert [missing.returncode, "There is no database" in missing.stderr] == [3, True]
    assert list(tmp_path.iterdir()) == []


# ---- an import into a database with history


def test_imported_history_comes_before_what_was_there_and_is_paged_through(
    flask: Flask, filled: str, other_url: str, serve: ServeFunction, project: Path
) -> None:
    exported = flask(filled, "export").stdout
    service = serve(**variables(other_url))
    own = Client(service.url).start(project, "I was here first.")
    service.process.terminate()
    service.wait()

    assert flask(other_url, "import", "-", given=exported).returncode == 0

    client = Client(serve(**variables(other_url)).url)
    expected = [own["id"], *(uuid_of(1000 + seq) for seq in (4, 3, 2, 1))]
    assert [run["id"] for run in client.get("/api/runs").json] == expected
    paged, path = [], "/api/runs?limit=1"
    while path:
        page = client.get(path)
        paged += [run["id"] for run in page.json]
        path = page.next or ""
    assert paged == expected
    assert [s["sessionId"] for s in client.get("/api/sessions").json] == [own["sessionId"], FORK, ROOT, OTHER]
    first = client.get("/api/sessions", limit=3)
    assert first.next is not None
    assert [s["sessionId"] for s in client.get(first.next).json] == [OTHER]
    history = client.get(f"/api/sessions/{ROOT}/messages", limit=2)
    assert history.next is not None
    assert (
        history.json + client.get(history.next.replace("limit=2", "limit=100")).json
        == client.get(f"/api/sessions/{ROOT}/messages").json
    )
    session = client.get(f"/api/sessions/{ROOT}").json
    assert [session["runCount"], session["messageCount"], session["costUsd"]] == [2, 5, 0.2]
    assert [session["headRunId"], session["title"]] == [uuid_of(1003), "Docs"]
    for words, found in (("docs", [ROOT]), ("prompt", [FORK, ROOT, OTHER]), ("first", [own["sessionId"]])):
        assert [s["sessionId"] for s in client.get("/api/sessions", q=words).json] == found


def test_later_runs_of_an_imported_session_are_imported_after_it(
    flask: Flask, writable: Database, database_url: str, other_url: str, other: Database
) -> None:
    fill(writable)
    assert flask(other_url, "import", "-", given=flask(database_url, "export").stdout).returncode == 0
    add_run(writable, ROOT, 5, [{"type": "result"}], mode="resume", parentRunId=uuid_of(1003))

    again = flask(other_url, "import", "-", given=flask(database_url, "export").stdout)

    assert "0 sessions, 1 run, 1 message and 0 transcripts; here already: 4 runs" in again.stdout
    assert flask.export(other_url)[1:] == flask.export(database_url)[1:]


def test_a_resume_of_a_run_that_was_continued_another_way_here_becomes_a_fork(
    flask: Flask, writable: Database, database_url: str, other_url: str, other: Database
) -> None:
    fill(writable)
    assert flask(other_url, "import", "-", given=flask(database_url, "export").stdout).returncode == 0
    add_run(writable, ROOT, 5, mode="resume", parentRunId=uuid_of(1003))
    add_run(writable, ROOT, 6, mode="resume", parentRunId=uuid_of(1005))
    with writing(other_url) as own:
        # It has the position that run 5 would get.
        taken: dict[str, Any] = {"id": uuid_of(1999), "sdkSessionId": uuid_of(2999)}
        add_run(own, ROOT, 5, mode="resume", parentRunId=uuid_of(1003), **taken)

    again = flask(other_url, "import", "-", given=flask(database_url, "export").stdout)

    assert again.returncode == 0
    assert "it becomes a fork" in again.stderr
    with other.transaction() as transaction:
        fork, beyond = runs.find(transaction, uuid_of(1005)), runs.find(transaction, uuid_of(1006))
        assert fork is not None
        assert beyond is not None
        session = sessions.find(transaction, fork.session_id)
        assert session is not None
        assert [fork.mode, session.parent_session_id, session.forked_from_run_id] == ["fork", ROOT, uuid_of(1003)]
        assert [beyond.mode, beyond.session_id, session.run_count] == ["resume", session.id, 2]
        root = sessions.find(transaction, ROOT)
        assert root is not None
        assert [root.run_count, root.head_run_id] == [3, uuid_of(1999)]


def test_a_fork_of_a_run_that_became_a_fork_here_descends_from_it(
    flask: Flask, writable: Database, database_url: str, other_url: str
) -> None:
    fill(writable)
    assert flask(other_url, "import", "-", given=flask(database_url, "export").stdout).returncode == 0
    moved = add_run(writable, ROOT, 5, mode="resume", parentRunId=uuid_of(1003))
    add_session(writable, uuid_of(70), parentSessionId=ROOT, forkedFromRunId=moved)
    add_run(writable, uuid_of(70), 6, mode="fork", parentRunId=moved, parentSessionId=ROOT)
    with writing(other_url) as own:
        taken: dict[str, Any] = {"id": uuid_of(1999), "sdkSessionId": uuid_of(2999)}
        add_run(own, ROOT, 5, mode="resume", parentRunId=uuid_of(1003), **taken)

    again = flask(other_url, "import", "-", given=flask(database_url, "export").stdout)

    assert [again.returncode, "2 sessions, 2 runs" in again.stdout] == [0, True]
    lines = flask.export(other_url)
    session_of = {run["runId"]: run["sessionId"] for run in of_type(lines, "run")}
    assert session_of[moved] not in (ROOT, uuid_of(70))
    fork = next(run for run in of_type(lines, "run") if run["runId"] == uuid_of(1006))
    session = next(session for session in of_type(lines, "session") if session["sessionId"] == uuid_of(70))
    assert [fork["sessionId"], fork["parentRunId"], fork["parentSessionId"]] == [uuid_of(70), moved, session_of[moved]]
    assert [session["parentSessionId"], session["forkedFromRunId"]] == [session_of[moved], moved]
    assert "1 run, " not in flask(other_url, "import", "-", given=flask(database_url, "export").stdout).stdout


def test_an_unfinished_run_is_imported_as_interrupted(
    flask: Flask, writable: Database, database_url: str, other_url: str, other: Database
) -> None:
    fill(writable)
    going_on: dict[str, Any] = {
        "status": "running",
        "resultType": None,
        "resultJson": None,
        "costUsd": None,
        "endedAt": None,
    }
    add_run(
        writable,
        OTHER,
        5,
        [{"type": "assistant"}],
        mode="resume",
        parentRunId=uuid_of(1002),
        hasTranscript=0,
        **going_on,
    )
    add_run(writable, OTHER, 6, mode="resume", hasTranscript=0, **{**going_on, "startedAt": None})

    imported = flask(other_url, "import", "-", given=flask(database_url, "export").stdout)

    assert "INTERRUPTED: 2 runs." in imported.stdout
    with other.transaction() as transaction:
        for run_id, count in ((uuid_of(1005), 1), (uuid_of(1006), 0)):
            run = runs.find(transaction, run_id)
            assert run is not None
            assert [run.status, run.error_code, run.message_count] == ["error", "INTERRUPTED", count]
            assert run.ended_at == run.created_at
        session = sessions.find(transaction, OTHER)
        assert session is not None
        assert [session.message_count, session.run_count, session.status] == [2, 3, "idle"]


def test_an_idempotency_key_that_another_run_has_is_dropped(flask: Flask, filled: str, other_url: str) -> None:
    with writing(other_url) as own:
        add_session(own, uuid_of(50))
        add_run(own, uuid_of(50), 50, idempotencyKey="key-1", requestDigest="e" * 32)

    imported = flask(other_url, "import", "-", given=flask(filled, "export").stdout)

    assert imported.returncode == 0
    assert imported.stderr == f"Run {uuid_of(1001)} loses its idempotency key, because another run has it here.\n"
    keys = {run["runId"]: run["idempotencyKey"] for run in of_type(flask.export(other_url), "run")}
    assert [keys[uuid_of(1001)], keys[uuid_of(1050)]] == [None, "key-1"]


# ---- invalid files

HEADER = '{"type":"export","format":"cc-manager","version":1,"lastSeq":1}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is neither an export"),
        (b"\x00\xff\xfe" * 100, "is neither an export"),
        (b'{"type": "session"}\n', "is neither an export"),
        (b"[1, 2]\n", "is neither an export"),
        (b'{"type":"export","format":"cc-manager","version":2,"lastSeq":1}\n', "version 2 and this program knows 1"),
    ],
)
def test_a_file_of_unknown_format_is_refused_and_no_database_is_created(
    flask: Flask, tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    refused = flask(f"sqlite:///{tmp_path}/db.sqlite", "import", str(file))

    assert [refused.returncode, refused.stdout] == [1, ""]
    assert message in refused.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_that_cannot_be_stored_leaves_nothing_behind(flask: Flask, filled: str) -> None:
    exported = flask(filled, "export").stdout
    stranger = exported.replace(uuid_of(1001), uuid_of(5001))

    refused = flask(filled, "import", "-", given=stranger)

    assert refused.returncode == 1
    assert "has the same sdkSessionId" in refused.stderr
    assert flask(filled, "export").stdout.splitlines()[1:] == exported.splitlines()[1:]


def test_a_run_that_does_not_fit_excludes_only_its_descendants(
    flask: Flask, writable: Database, database_url: str, other_url: str
) -> None:
    fill(writable)
    with writing(other_url) as own:
        add_session(own, uuid_of(50))
        add_run(own, uuid_of(50), 50, sdkSessionId=uuid_of(2001))

    done = flask(other_url, "import", "-", given=flask(database_url, "export").stdout)

    assert done.returncode == 1
    assert "Imported 1 session, 1 run, " in done.stdout
    warnings = done.stderr.splitlines()
    assert warnings[0] == (
        f"Run {uuid_of(1001)} cannot be imported: run {uuid_of(1050)}, which is here already, has the same "
        f"sdkSessionId {uuid_of(2001)}."
    )
    assert ["its parent run" in line for line in warnings[1:3]] == [True, True]
    assert warnings[3:] == ["The import is incomplete. Runs that do not fit, for the reasons above: 3."]
    assert {run["runId"] for run in of_type(flask.export(other_url), "run")} == {uuid_of(1002), uuid_of(1050)}


def test_a_missing_path_is_a_usage_error(flask: Flask, tmp_path: Path) -> None:
    assert flask(f"sqlite:///{tmp_path}/db.sqlite", "import", str(tmp_path / "none")).returncode == 2


def test_a_database_of_this_service_must_be_exported_first(flask: Flask, tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite"
    with writing(f"sqlite:///{path}"):
        pass
    refused = flask(f"sqlite:///{tmp_path}/new.sqlite", "import", str(path))
    assert [refused.returncode, "flask export" in refused.stderr] == [1, True]
    assert not os.path.exists(tmp_path / "new.sqlite")
