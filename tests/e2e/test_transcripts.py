"""Sessions of the real Claude Code survive the loss of their transcripts on the host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.locations import transcript_path
from ccm.core.claude.processes import marked
from ccm.core.runs.request import RunRequest
from ccm.core.service import Service
from ccm.db import transcripts
from ccm.errors import StorageRejected
from ccm.models import Run, RunMode
from ccm.settings.settings import Settings
from ccm.testing.messages_api import MessagesAPI
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.e2e.test_runs import prompts_sent
from tests.waiting import until

BASH = {"allowedTools": ["Bash"]}
SLEEP = '[[tool Bash {"command": "perl -e \'sleep 300\'"}]]'
SUBAGENT = '[[tool Agent {"description": "x", "prompt": "say [[text hello]]", "subagent_type": "general-purpose"}]]'
LOCAL_ONLY = "api-request"


def local(home: Path, run: dict[str, Any]) -> Path:
    """Return the path of Claude Code's transcript of a run."""
    return transcript_path(run["cwd"], run["sdkSessionId"], {"HOME": str(home)})


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if not line["type"].startswith(LOCAL_ONLY)]


@pytest.fixture
def host(tmp_path: Path, serve: ServeFunction) -> Callable[[str], tuple[Client, Path]]:
    """Return a function that starts a service as on another host: with a HOME per name and one shared database."""

    def start(name: str, **settings: object) -> tuple[Client, Path]:
        home = tmp_path / name
        home.mkdir(exist_ok=True)
        return Client(serve(HOME=home, **settings).url), home

    return start


Host = Callable[..., tuple[Client, Path]]


def test_a_runs_transcript_is_stored_whole(host: Host, project: Path) -> None:
    client, home = host("here")
    first = client.start(project, '[[tool Bash {"command": "echo hi"}]]', options=BASH)
    second = client.resume(first["sessionId"], "And then?")
    away, elsewhere = local(home, second), home / "moved"
    original = lines(away)
    away.rename(elsewhere)

    fork = client.fork(first["sessionId"], "Back again.", atRunId=second["id"])

    assert [run["transcriptStored"] for run in (first, second, fork)] == [True] * 3
    assert fork["status"] == "completed"
    assert lines(away) == original
    assert stat.S_IMODE(away.stat().st_mode) == 0o600


@pytest.mark.main_job
def test_a_session_can_be_continued_after_its_transcripts_were_deleted(
    host: Host, project: Path, messages_api: MessagesAPI
) -> None:
    client, home = host("here")
    first = client.start(project, "Remember the number 4711.")
    shutil.rmtree(home / ".claude" / "projects")

    second = client.resume(first["sessionId"], "Which number was it, after the clean-up?")

    assert second["status"] == "completed"
    assert prompts_sent(messages_api, "after the clean-up?") == [
        "Remember the number 4711.",
        "Which number was it, after the clean-up?",
    ]
    assert local(home, second).is_file()


def test_a_session_can_be_continued_on_another_host(
    serve: ServeFunction, project: Path, tmp_path: Path, messages_api: MessagesAPI, database_url: str
) -> None:
    own = {"DATABASE_URL": database_url} if database_url.startswith("postgresql") else {}
    homes = [tmp_path / "here", tmp_path / "there"]
    for home in homes:
        home.mkdir()
    prompt = f"{database_url[-8:]} says the fork on the other host."
    with serve(HOME=homes[0], **own) as service:
        client = Client(service.url)
        first = client.start(project, "Hello from here.")
        second = client.resume(first["sessionId"], "Still here.")
    other = tmp_path / "other-project"
    other.mkdir()

    client = Client(serve(HOME=homes[1], **own).url)
    third = client.resume(first["sessionId"], "Now there.")
    fork = client.fork(first["sessionId"], prompt, cwd=str(other), atRunId=second["id"])

    assert [run["status"] for run in (third, fork)] == ["completed"] * 2
    assert prompts_sent(messages_api, prompt) == ["Hello from here.", "Still here.", prompt]
    assert [local(homes[1], run).is_file() for run in (third, fork)] == [True, True]


def test_a_fork_restores_a_deleted_transcript_in_another_directory(
    host: Host, project: Path, tmp_path: Path, messages_api: MessagesAPI
) -> None:
    client, home = host("here")
    first = client.start(project, "In the first directory.")
    shutil.rmtree(home / ".claude" / "projects")
    shutil.rmtree(project)
    other = tmp_path / "other"
    other.mkdir()

    answer = client.post("/api/runs/resume", {"sessionId": first["sessionId"], "prompt": "x"})
    assert [answer.status, answer.error["code"]] == [409, "SESSION_NOT_RESUMABLE"]
    assert str(project) in answer.error["message"]
    fork = client.fork(first["sessionId"], "In the second directory.", cwd=str(other))
    assert fork["status"] == "completed"
    assert prompts_sent(messages_api, "In the second directory.")[0] == "In the first directory."


def test_transcripts_of_subagents_are_stored_and_restored(host: Host, project: Path) -> None:
    client, home = host("here")
    run = client.start(project, f"{SUBAGENT} [[text It said hello.]]", options={"allowedTools": ["Agent"]})
    assert [run["status"], run["transcriptStored"]] == ["completed", True]
    folder = local(home, run).with_suffix("")
    before = {file.relative_to(folder): lines(file) for file in folder.rglob("agent-*.jsonl")}
    metadata = {file.relative_to(folder): json.loads(file.read_text()) for file in folder.rglob("*.meta.json")}
    assert before
    assert metadata
    shutil.rmtree(home / ".claude" / "projects")

    assert client.resume(run["sessionId"], "Thanks.")["status"] == "completed"

    assert {file.relative_to(folder): lines(file) for file in folder.rglob("agent-*.jsonl")} == before
    back = {file.relative_to(folder): json.loads(file.read_text()) for file in folder.rglob("*.meta.json")}
    assert back == metadata


def test_a_cancelled_run_can_be_continued_after_its_transcript_was_deleted(host: Host, project: Path) -> None:
    client, home = host("here")
    run = client.start(project, '[[tool Bash {"command": "perl -e \'sleep 300\'"}]]', wait=0, options=BASH)
    until(lambda: client.messages(run["id"], type="assistant"))
    cancelled = client.delete(f"/api/runs/{run['id']}").json
    shutil.rmtree(home / ".claude" / "projects")

    assert cancelled["transcriptStored"] is True
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"


def test_the_next_service_stores_the_transcript_of_a_killed_services_run(
    serve: ServeFunction, project: Path, tmp_path: Path
) -> None:
    home = tmp_path / "here"
    home.mkdir()
    service = serve(HOME=home)
    client = Client(service.url)
    run = client.start(project, '[[tool Bash {"command": "perl -e \'sleep 300\'"}]]', wait=0, options=BASH)
    until(lambda: client.messages(run["id"], type="assistant"))
    os.kill(service.process.pid, signal.SIGKILL)
    service.wait()
    until(lambda: not marked(run["id"]))

    client = Client(serve(HOME=home).url)
    interrupted = client.run(run["id"])
    shutil.rmtree(home / ".claude" / "projects")

    assert [interrupted["error"]["code"], interrupted["transcriptStored"]] == ["INTERRUPTED", True]
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"


def test_an_interrupted_run_can_be_continued_on_another_host(
    serve: ServeFunction, project: Path, tmp_path: Path, messages_api: MessagesAPI
) -> None:
    homes = [tmp_path / "here", tmp_path / "there"]
    for home in homes:
        home.mkdir()
    service = serve(HOME=homes[0])
    client = Client(service.url)
    run = client.start(project, f"Cut off here. {SLEEP}", wait=0, options=BASH)
    until(lambda: client.messages(run["id"], type="assistant"))
    until(lambda: "tool_use" in str(stored_lines(tmp_path, run)))
    os.kill(service.process.pid, signal.SIGKILL)
    service.wait()
    until(lambda: not marked(run["id"]))

    client = Client(serve(HOME=homes[1]).url)
    assert client.resume(run["sessionId"], "Gone on there.")["status"] == "completed"
    assert prompts_sent(messages_api, "Gone on there.")[0].startswith("Cut off here.")


def stored_lines(folder: Path, run: dict[str, Any]) -> list[str]:
    """Return the lines of a run's stored transcript."""
    with sqlite3.connect(folder / "db.sqlite") as database:
        rows = database.execute(
            'SELECT x.text FROM ccr_transcripts t JOIN ccr_transcript_entries e ON e."transcriptId" = t.id '
            'JOIN ccr_transcript_texts x ON x.digest = e.digest WHERE t."sdkSessionId" = ?',
            [run["sdkSessionId"]],
        ).fetchall()
    database.close()
    return [text for (text,) in rows]


def test_a_run_whose_transcript_was_deleted_meanwhile_is_continued_with_all_of_it(
    host: Host, project: Path, tmp_path: Path, messages_api: MessagesAPI
) -> None:
    client, home = host("here")
    gate = tmp_path / "gate"
    wait = json.dumps({"command": f"perl -e 'sleep 1 until -e \"{gate}\"'"})
    run = client.start(project, f"Deleted meanwhile. [[tool Bash {wait}]] [[text Done.]]", wait=0, options=BASH)
    until(lambda: "tool_use" in str(stored_lines(tmp_path, run)))
    shutil.rmtree(home / ".claude" / "projects")
    gate.touch()
    ended = client.run(run["id"])

    assert [ended["status"], ended["transcriptStored"]] == ["completed", True]
    assert client.resume(run["sessionId"], "What was it before?")["status"] == "completed"
    assert prompts_sent(messages_api, "What was it before?")[0].startswith("Deleted meanwhile.")


@pytest.mark.parametrize("name", ["caf\u00e9", "cafe\u0301", "\U0001f600 smile", "x" * 180, "a.b_c d"])
def test_transcripts_are_restored_for_any_directory_name(
    host: Host, tmp_path: Path, messages_api: MessagesAPI, name: str
) -> None:
    client, home = host("here")
    folder = tmp_path / name / name[:80]
    folder.mkdir(parents=True)
    first = client.start(folder, "First of all.")
    shutil.rmtree(home / ".claude" / "projects")

    assert client.resume(first["sessionId"], f"In {name}")["status"] == "completed"
    assert prompts_sent(messages_api, f"In {name}")[0] == "First of all."
    assert len(list(home.glob(f".claude/projects/*/{first['sdkSessionId']}.jsonl"))) == 1


def test_a_session_without_any_transcript_cannot_be_continued(host: Host, project: Path, tmp_path: Path) -> None:
    client, home = host("here")
    run = client.start(project, "Hello.")
    local(home, run).unlink()
    with sqlite3.connect(tmp_path / "db.sqlite") as database:
        database.execute('UPDATE ccr_runs SET "transcriptStored" = 0')
    database.close()

    for kind in ("resume", "fork"):
        answer = client.post(f"/api/runs/{kind}", {"sessionId": run["sessionId"], "prompt": "x"})
        assert [answer.status, answer.error["code"]] == [409, "SESSION_NOT_RESUMABLE"]
        assert run["id"] in answer.error["message"]


def test_a_resume_stores_little_of_the_copied_transcript(host: Host, project: Path, tmp_path: Path) -> None:
    client, home = host("here")
    run = client.start(project, "[[text one]]")

    def stored() -> int:
        with sqlite3.connect(tmp_path / "db.sqlite") as database:
            (size,) = database.execute("SELECT SUM(LENGTH(text)) FROM ccr_transcript_texts").fetchone()
        database.close()
        return int(size)

    first = stored()
    for number in range(4):
        run = client.resume(run["sessionId"], f"[[text {number}]]")

    copied = sum(len(json.dumps(line)) for line in lines(local(home, run)))
    assert copied > 20_000  # in the file of each of the four runs
    assert (stored() - first) / 4 < copied / 2


# ---- faults


def test_a_transcript_that_cannot_be_stored_fails_no_run(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StorageRejected("the table is full of eels")

    for name in ("append", "extend"):
        monkeypatch.setattr(transcripts, name, refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    running = Service(
        Settings(database_path=tmp_path / "m.sqlite", cli_path=stand_in_cli(tmp_path), spare_runs=0), environ
    )
    running.start()

    def end(run: Run) -> Run:
        found = running.notifier.wait(
            run.id, 30, lambda: next((r for r in [running.queries.run(run.id)] if r.ended), None), lambda: False
        )
        assert found is not None
        return found

    try:
        first = end(running.runs.start(RunRequest(mode=RunMode.FRESH, prompt="hello"), str(project)).run)
        session = running.queries.session(first.session_id)
        # The file on this host is enough.
        second = end(running.runs.resume(RunRequest(mode=RunMode.RESUME, prompt="on"), session, first).run)
        for ended in (first, second):
            assert (ended.status, ended.transcript_stored, ended.has_transcript) == ("completed", 0, 1)
        assert "transcript is not stored: StorageRejected: the table is full of eels" in caplog.text
    finally:
        running.close()
