"""`Idempotency-Key`: a repeated request gets the run that it made, even if the state has changed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.client import Answer, Client
from tests.conftest import ServeFunction, stand_in_cli

HOLD = json.dumps({"hold": True, "count": 1})


def send(client: Client, kind: str, body: object, key: str, query: str = "") -> Answer:
    return client.request("POST", f"/api/runs/{kind}{query}", body, {"Idempotency-Key": key})


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def served(serve: ServeFunction, home: Path, database_url: str) -> Callable[..., Client]:
    """Return a function that starts a service on each kind of database, with the stand-in CLI."""
    own = {"DATABASE_URL": database_url} if database_url.startswith("postgresql") else {}
    return lambda **settings: Client(serve(CCM_CLI_PATH=stand_in_cli(home), **own, **settings).url)


def test_the_same_request_gets_the_same_run(served: Callable[..., Client], project: Path, key: str) -> None:
    client = served()
    body = {"cwd": str(project), "prompt": "hello", "metadata": {"a": 1, "b": [2]}}
    first = send(client, "start", body, key)
    ended = client.run(first.json["id"])

    # The same body in another order, with other whitespace, and with another query.
    other = json.dumps(dict(reversed(body.items())), indent=3).encode()
    again = [send(client, "start", body, key), send(client, "start", other, key, "?wait=30")]

    assert [first.status, "Idempotent-Replayed" in first.headers] == [202, False]
    for answer in again:
        assert [answer.status, answer.headers["Idempotent-Replayed"]] == [200, "true"]
        assert answer.json == ended
        assert answer.headers["Location"] == first.headers["Location"]
    assert len(client.get("/api/runs").json) == 1


def test_a_key_of_another_request_is_refused(served: Callable[..., Client], project: Path, key: str) -> None:
    client = served()
    body = {"cwd": str(project), "prompt": "hello"}
    run = send(client, "start", body, key, "?wait=30").json

    for kind, other in (
        ("start", {**body, "prompt": "hello!"}),
        ("start", {**body, "title": None}),
        ("start", {**body, "timeoutMs": 60_000}),
        ("resume", {"sessionId": run["sessionId"], "prompt": "hello"}),
        ("fork", {"sessionId": run["sessionId"], "prompt": "hello"}),
    ):
        answer = send(client, kind, other, key)
        assert [answer.status, answer.error["code"]] == [422, "IDEMPOTENCY_KEY_REUSED"]
        assert run["id"] in answer.error["message"]
    assert len(client.get("/api/runs").json) == 1


@pytest.mark.parametrize("key", ["", "   ", "x" * 256])
def test_a_blank_or_too_long_key_is_refused(client: Client, project: Path, key: str) -> None:
    before = len(client.get("/api/runs").json)
    answer = send(client, "start", {"cwd": str(project), "prompt": "hello"}, key)

    assert [answer.status, answer.error["code"], answer.error["field"]] == [400, "VALIDATION_ERROR", "Idempotency-Key"]
    assert len(client.get("/api/runs").json) == before


@pytest.mark.parametrize("key", ["x" * 255, "\xe9\xff", "'; DROP TABLE ccr_runs; --", "%s :name"])
def test_a_key_can_be_any_text(served: Callable[..., Client], project: Path, key: str) -> None:
    client = served()
    body = {"cwd": str(project), "prompt": "hello"}

    assert len({send(client, "start", body, key).json["id"] for _ in range(3)}) == 1


def test_a_repeated_resume_gets_its_own_run_and_not_a_busy_session(
    served: Callable[..., Client], project: Path, key: str
) -> None:
    client = served()
    session = client.start(project, "hello")["sessionId"]
    for number, if_busy in enumerate(("reject", "enqueue", "interrupt")):
        body = {"sessionId": session, "prompt": HOLD, "ifBusy": if_busy}
        first = send(client, "resume", body, f"{key}-{number}").json
        client.wait_for_message(first["id"], "assistant")

        again = send(client, "resume", body, f"{key}-{number}")

        assert [again.status, again.json["id"], again.json["status"]] == [202, first["id"], "running"]
        client.delete(f"/api/runs/{first['id']}")


def test_a_repeated_request_gets_its_run_even_if_it_would_be_refused_now(
    served: Callable[..., Client], tmp_path: Path, key: str
) -> None:
    client = served(CCM_MAX_CONCURRENT_RUNS=1, CCM_MAX_QUEUED_RUNS=0)
    folder = tmp_path / "soon-gone"
    folder.mkdir()
    body = {"cwd": str(folder), "prompt": HOLD}
    first = send(client, "start", body, key).json
    client.wait_for_message(first["id"], "assistant")
    folder.rmdir()

    assert send(client, "start", body, key).json["id"] == first["id"]
    client.delete(f"/api/runs/{first['id']}")


def test_a_refused_request_leaves_its_key_free(served: Callable[..., Client], tmp_path: Path, key: str) -> None:
    client = served()
    folder = tmp_path / "not-yet"
    body = {"cwd": str(folder), "prompt": "hello"}
    assert send(client, "start", body, key).status == 400
    folder.mkdir()

    answer = send(client, "start", body, key)
    assert [answer.status, "Idempotent-Replayed" in answer.headers] == [202, False]


def test_a_hundred_concurrent_duplicates_make_one_run(served: Callable[..., Client], project: Path, key: str) -> None:
    client = served()
    body = {"cwd": str(project), "prompt": "hello"}
    barrier = threading.Barrier(20)

    def duplicates(_: int) -> list[Answer]:
        barrier.wait()
        return [send(client, "start", body, key) for _ in range(5)]

    with ThreadPoolExecutor(20) as pool:
        answers = [answer for some in pool.map(duplicates, range(20)) for answer in some]

    assert {answer.status for answer in answers} <= {200, 202}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert ["Idempotent-Replayed" in answer.headers for answer in answers].count(False) == 1
    assert len(client.get("/api/runs").json) == len(client.get("/api/sessions").json) == 1


@pytest.mark.many_rounds
def test_a_client_that_retries_while_the_service_is_killed_gets_one_run(
    serve: ServeFunction, home: Path, project: Path
) -> None:
    """The service is killed repeatedly while it handles the request, and the client sends it again each time."""
    chance = random.Random(11)
    bodies: list[dict[str, Any]] = [{"cwd": str(project), "prompt": f"number {n}"} for n in range(8)]
    answered: list[str] = []
    for body in bodies:
        service = serve(CCM_CLI_PATH=stand_in_cli(home))
        client = Client(service.url)
        killer = threading.Timer(chance.random() * 0.03, os.kill, (service.process.pid, signal.SIGKILL))
        killer.start()
        with contextlib.suppress(OSError, HTTPException):  # killed before it could answer
            send(client, "start", body, body["prompt"])
        service.wait()
    client = Client(serve(CCM_CLI_PATH=stand_in_cli(home)).url)
    for body in bodies:
        answered += [send(client, "start", body, body["prompt"]).json["id"] for _ in range(2)]

    assert [answered[n] for n in range(0, 16, 2)] == [answered[n] for n in range(1, 16, 2)]
    runs = client.get("/api/runs").json
    assert sorted(run["prompt"] for run in runs) == sorted(body["prompt"] for body in bodies)
    assert {client.run(run["id"])["status"] for run in runs} <= {"completed", "error"}
