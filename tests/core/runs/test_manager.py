"""Runs under races, with a stand-in CLI that answers at once."""

from __future__ import annotations

import itertools
import json
import os
import random
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ccm.testing.service_process import ServiceProcess
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli


def service(serve: ServeFunction, home: Path, **settings: object) -> ServiceProcess:
    return serve(CCM_CLI_PATH=stand_in_cli(home), **settings)


@pytest.mark.parametrize("rounds", [60, pytest.param(1_000, marks=pytest.mark.many_rounds)])
def test_cancel_racing_completion_has_one_outcome(serve: ServeFunction, home: Path, project: Path, rounds: int) -> None:
    client = Client(service(serve, home, CCM_MAX_CONCURRENT_RUNS=8).url)
    chance = random.Random(7)
    client.start(project, "hello")  # the first run also imports the SDK
    begun = time.monotonic()
    client.start(project, "hello")
    alone = time.monotonic() - begun

    def race(number: int) -> tuple[int, str]:
        run = client.start(project, "hello", wait=0)
        time.sleep(chance.random() * 4 * alone)  # not to synchronise: to meet it at any moment of its life
        answer = client.delete(f"/api/runs/{run['id']}")
        ended = client.run(run["id"])
        assert client.run(run["id"]) == ended
        assert (answer.status, ended["status"]) in ((200, "cancelled"), (409, "completed")), answer.body
        if answer.status == 200:
            assert answer.json == ended
        return answer.status, ended["status"]

    with ThreadPoolExecutor(8) as pool:
        outcomes = set(pool.map(race, range(rounds)))
    assert outcomes == {(200, "cancelled"), (409, "completed")}
    assert client.get("/api/runs", status="running").json == []


def test_many_sessions_of_many_enqueued_runs_keep_their_order(serve: ServeFunction, home: Path, project: Path) -> None:
    client = Client(service(serve, home, CCM_MAX_CONCURRENT_RUNS=3).url)
    firsts = [client.start(project, "hello", wait=0) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(client.resume, first["sessionId"], f"number {n}", 0, ifBusy="enqueue")
            for n in range(5)
            for first in firsts
        ]
        for job in jobs:
            job.result()

    for first in firsts:
        runs = client.get(f"/api/sessions/{first['sessionId']}/runs").json
        runs = [client.run(run["id"]) for run in runs]
        assert [run["status"] for run in runs] == ["completed"] * 6
        assert [run["parentRunId"] for run in runs] == [None, *(run["id"] for run in runs[:-1])]
        for before, after in itertools.pairwise(runs):
            assert before["endedAt"] <= after["startedAt"]


def test_waiting_runs_start_in_the_order_of_their_acceptance(serve: ServeFunction, home: Path, project: Path) -> None:
    client = Client(service(serve, home, CCM_MAX_CONCURRENT_RUNS=1).url)
    runs = [client.start(project, f"number {n}", wait=0) for n in range(10)]

    ended = [client.run(run["id"]) for run in runs]
    assert [run["startedAt"] for run in ended] == sorted(run["startedAt"] for run in ended)


def test_a_fork_of_an_unfinished_run_is_refused(serve: ServeFunction, home: Path, project: Path) -> None:
    client = Client(service(serve, home).url)
    run = client.start(project, json.dumps({"hold": True, "count": 1}), wait=0)
    client.wait_for_message(run["id"], "assistant")

    by_run = client.post("/api/runs/fork", {"sessionId": run["sessionId"], "prompt": "x", "atRunId": run["id"]})
    assert [by_run.status, by_run.error["code"]] == [409, "SESSION_BUSY"]
    by_head = client.post("/api/runs/fork", {"sessionId": run["sessionId"], "prompt": "x"})
    assert [by_head.status, by_head.error["code"]] == [409, "SESSION_NOT_RESUMABLE"]
    client.delete(f"/api/runs/{run['id']}")


def test_an_enqueued_run_whose_parent_left_no_transcript_ends_in_error(
    serve: ServeFunction, home: Path, project: Path
) -> None:
    client = Client(service(serve, home, CCM_MAX_CONCURRENT_RUNS=1).url)
    busy = client.start(project, json.dumps({"hold": True, "count": 1}), wait=0)
    never_begun = client.start(project, "hello", wait=0)
    after = client.resume(never_begun["sessionId"], "and then?", wait=0, ifBusy="enqueue")
    client.delete(f"/api/runs/{never_begun['id']}")
    client.delete(f"/api/runs/{busy['id']}")

    ended = client.run(after["id"])
    assert [ended["status"], ended["error"]["code"]] == ["error", "SESSION_NOT_RESUMABLE"]
    answer = client.post("/api/runs/resume", {"sessionId": after["sessionId"], "prompt": "x"})
    assert [answer.status, answer.error["code"]] == [409, "SESSION_NOT_RESUMABLE"]


def test_images_of_a_waiting_run_survive_a_restart_and_are_deleted_after_the_run(
    serve: ServeFunction, home: Path, project: Path, tmp_path: Path
) -> None:
    from tests.e2e.test_runs import PNG

    first = service(serve, home, CCM_MAX_CONCURRENT_RUNS=1)
    client = Client(first.url)
    client.start(project, json.dumps({"hold": True, "count": 1}), wait=0)
    image = {"mediaType": "image/png", "data": PNG}
    waiting = client.start(project, "what is this?", wait=0, images=[image, image])
    first.process.terminate()
    assert first.wait() == 0

    log = tmp_path / "input.jsonl"
    spy = tmp_path / "spy"
    spy.write_text(f'#!/bin/sh\ntee -a {log} | {stand_in_cli(home)} "$@"\n')
    spy.chmod(0o755)
    client = Client(serve(CCM_CLI_PATH=spy).url)
    ended = client.run(waiting["id"])
    assert [ended["status"], ended["imageCount"]] == ["completed", 2]
    sent = [json.loads(line) for line in log.read_text().splitlines() if '"user"' in line]
    content = next(m["message"]["content"] for m in sent if m["type"] == "user")
    assert [block.get("source", {}).get("data") for block in content] == [PNG, PNG, None]
    with sqlite3.connect(tmp_path / "db.sqlite") as database:
        assert database.execute("SELECT COUNT(*) FROM ccr_run_images").fetchone() == (0,)
    database.close()


# ---- regressions


def test_an_end_with_unstorable_text_is_stored(serve: ServeFunction, home: Path, project: Path) -> None:
    client = Client(service(serve, home).url)
    results: list[dict[str, object]] = [
        {"is_error": True, "result": "bad \ud800 and \0"},
        {"subtype": "\0\ud800"},
        {"subtype": ["no", "text"]},
        {"is_error": True, "errors": [{"no": "text"}]},
    ]
    for result in results:
        run = client.start(project, json.dumps({"result": result}))
        assert run["status"] == ("error" if result.get("is_error") else "completed")
        assert client.resume(run["sessionId"], "and on")["status"] == "completed"


def test_a_message_with_an_unstorable_type_is_recorded(
    serve: ServeFunction, home: Path, project: Path, database_url: str
) -> None:
    server = {"DATABASE_URL": database_url} if database_url.startswith("postgresql") else {}
    client = Client(service(serve, home, **server).url)
    run = client.start(project, json.dumps({"messages": [{"type": "a\0b\ud800"}]}))
    assert run["status"] == "completed"
    assert client.messages(run["id"])[0]["type"] == "a\0b\ud800"


def test_a_run_whose_start_had_an_uncertain_commit_is_executed(home: Path, project: Path, tmp_path: Path) -> None:
    import psycopg

    from ccm.core.runs.request import RunRequest
    from ccm.core.service import Service
    from ccm.models import RunMode
    from ccm.settings.settings import Settings

    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    running = Service(
        Settings(database_path=tmp_path / "u.sqlite", cli_path=stand_in_cli(tmp_path), spare_runs=0), environ
    )
    running.start()
    database = running._writer._database
    commit = database._pool.commit
    lost: list[int] = []

    def commit_and_lose_the_answer() -> None:
        commit()
        if len(lost) < 2:
            lost.append(1)
            raise psycopg.OperationalError("lost in COMMIT")

    database.is_sqlite = False  # so that it passes for a server whose answer can be lost
    database._pool.commit = commit_and_lose_the_answer  # type: ignore[method-assign]
    try:
        run = running.runs.start(RunRequest(mode=RunMode.FRESH, prompt="hello"), str(project)).run
        ended = running.notifier.wait(
            run.id,
            30,
            lambda: next(iter([r for r in [running.queries.run(run.id)] if r.ended]), None),
            lambda: False,
        )
        assert lost
        assert ended is not None
        assert ended.status == "completed"
    finally:
        running.close()


def test_a_successful_run_ends_in_error_if_a_message_cannot_be_stored(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ccm.core.runs.request import RunRequest
    from ccm.core.service import Service
    from ccm.models import RunMode
    from ccm.settings.settings import Settings

    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    running = Service(
        Settings(database_path=tmp_path / "r.sqlite", cli_path=stand_in_cli(tmp_path), spare_runs=0), environ
    )
    running.start()
    # No driver can bind this text, so storage refuses the message.
    monkeypatch.setattr("ccm.core.runs.preparation.storable", lambda text: text)
    try:
        prompt = json.dumps({"messages": [{"type": "\ud800"}]})
        run = running.runs.start(RunRequest(mode=RunMode.FRESH, prompt=prompt), str(project)).run
        ended = running.notifier.wait(
            run.id,
            30,
            lambda: next(iter([r for r in [running.queries.run(run.id)] if r.ended]), None),
            lambda: False,
        )
        assert ended is not None
        assert (ended.status, ended.error_code, ended.message_count) == ("error", "EXECUTION_ERROR", 0)
    finally:
        running.close()
