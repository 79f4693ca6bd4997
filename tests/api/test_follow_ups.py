"""`POST /api/runs/:runId/input`, with a scripted CLI."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ccm.testing.service_process import ServiceProcess
from tests.api.conftest import NOWHERE, folder_of, held, kinds, refused, script
from tests.client import Answer, Client
from tests.conftest import ServeFunction

# The first bytes of a PNG.
IMAGE = {"mediaType": "image/png", "data": "iVBORw0KGgo="}
RACES = 1_000
RUNS_AT_ONCE = 4


@pytest.fixture(scope="module")
def service(serve_all: ServeFunction) -> ServiceProcess:
    return serve_all(CCM_MAX_CONCURRENT_RUNS=RUNS_AT_ONCE, CCM_MAX_MESSAGE_BYTES=2**20)


@pytest.fixture
def client(service: ServiceProcess) -> Client:
    return Client(service.url)


def put(client: Client, run_id: str, prompt: str, **fields: Any) -> Answer:
    return client.post(f"/api/runs/{run_id}/input", {"prompt": prompt, **fields})


def texts(messages: list[dict[str, Any]], kind: str) -> list[str]:
    """Return the texts of messages of a type, without the run's own prompt, which is a script."""
    found = [message["message"]["content"][-1]["text"] for message in messages if message["type"] == kind]
    return [text for text in found if not text.startswith('{"messages": [{"type": "a"')]


def test_an_accepted_message_is_among_the_runs_messages_at_once(client: Client, tmp_path: Path) -> None:
    run = held(client, folder_of(tmp_path))

    answer = put(client, run["id"], "One more thing.", images=[IMAGE])

    assert answer.status == 202
    taken = answer.json
    messages = client.messages(run["id"])
    assert list(taken) == ["runId", "messageUuid", "messageIndex"]
    assert taken["runId"] == run["id"]
    assert messages[taken["messageIndex"]]["uuid"] == taken["messageUuid"]
    source = {"type": "base64", "media_type": "image/png", "data": IMAGE["data"]}
    assert messages[taken["messageIndex"]]["message"] == {
        "role": "user",
        "content": [{"type": "image", "source": source}, {"type": "text", "text": "One more thing."}],
    }
    client.delete(f"/api/runs/{run['id']}")


def test_messages_of_several_clients_keep_their_order(client: Client, tmp_path: Path) -> None:
    run = client.start(folder_of(tmp_path), script(*kinds("a"), seconds=2), wait=0)
    client.wait_for_message(run["id"], "a")

    def talk(name: str) -> None:
        for number in range(5):
            assert put(client, run["id"], f"{name}{number}").status == 202

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(talk, "abcd"))
    assert client.run(run["id"])["status"] == "completed"
    messages = client.messages(run["id"])
    for name in "abcd":
        mine = [text for text in texts(messages, "user") if text.startswith(name)]
        answered = [text for text in texts(messages, "assistant") if text.startswith(f"heard: {name}")]
        assert mine == [f"{name}{number}" for number in range(5)]
        assert answered == [f"heard: {text}" for text in mine]


def test_runs_get_only_their_own_messages(client: Client, tmp_path: Path) -> None:
    runs = [client.start(folder_of(tmp_path, name), script(*kinds("a"), seconds=1), wait=0) for name in "abc"]
    for run in runs:
        client.wait_for_message(run["id"], "a")
    for run in runs:
        assert put(client, run["id"], f"for {run['id']}").status == 202

    for run in runs:
        client.run(run["id"])
        messages = client.messages(run["id"])
        assert texts(messages, "user") == [f"for {run['id']}"]
        assert texts(messages, "assistant") == [f"heard: for {run['id']}"]


def test_a_stream_has_the_message_at_its_position(client: Client, tmp_path: Path) -> None:
    run = client.start(folder_of(tmp_path), script(*kinds("a"), seconds=1), wait=0)
    client.wait_for_message(run["id"], "a")
    put(client, run["id"], "And?")

    stream = client.get(f"/api/runs/{run['id']}/stream").body.decode()
    data = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    assert data[:-1] == client.messages(run["id"])
    assert [message["type"] for message in data[:-1]] == ["a", "user", "user", "result", "assistant", "result"]


# ---- refused requests


def test_an_invalid_body_is_refused_with_the_name_of_the_field(client: Client) -> None:
    address = f"/api/runs/{NOWHERE}/input"
    refused(client.post(address, {}), "prompt")
    refused(client.post(address, {"prompt": " \n"}), "prompt")
    refused(client.post(address, {"prompt": 1}), "prompt")
    refused(client.post(address, {"prompt": "x\0"}), "prompt")
    refused(client.post(address, {"prompt": "x" * 1_000_001}), "prompt")
    refused(client.post(address, {"prompt": "x", "images": [IMAGE] * 21}), "images")
    refused(client.post(address, {"prompt": "x", "images": [{**IMAGE, "data": "%"}]}), "images.0")
    refused(client.post(address, {"prompt": "x", "options": {}}), "options")
    refused(client.post(address, {"prompt": "x"}, wait=1), "wait")
    refused(client.post("/api/runs/a%00b/input", {"prompt": "x"}), "runId")
    refused(client.request("POST", address, b"{}", {"Content-Type": "text/plain"}), None, 415, "UNSUPPORTED_MEDIA_TYPE")
    assert client.get(address).status == 405


def test_an_unknown_run_is_refused(client: Client) -> None:
    refused(put(client, NOWHERE, "x"), None, 404, "RUN_NOT_FOUND")
    refused(put(client, "start", "x"), None, 404, "RUN_NOT_FOUND")


def test_an_ended_run_is_refused_with_advice(client: Client, tmp_path: Path) -> None:
    run = client.start(folder_of(tmp_path), "hello")

    message = refused(put(client, run["id"], "x"), None, 409, "RUN_ALREADY_ENDED")
    assert f"Resume session {run['sessionId']}" in message
    assert client.run(run["id"]) == run


def test_a_waiting_run_is_refused(client: Client, tmp_path: Path) -> None:
    running = [held(client, folder_of(tmp_path, str(n))) for n in range(RUNS_AT_ONCE)]
    waiting = client.start(tmp_path, "hello", wait=0)

    message = refused(put(client, waiting["id"], "x"), None, 409, "RUN_NOT_STARTED")
    assert "startedAt" in message
    for run in [waiting, *running]:
        client.delete(f"/api/runs/{run['id']}")


def test_a_message_that_would_end_the_run_is_refused(client: Client, tmp_path: Path) -> None:
    run = held(client, folder_of(tmp_path))

    message = refused(put(client, run["id"], "é" * 200_000), None, 413, "BODY_TOO_LARGE")
    assert "CCM_MAX_MESSAGE_BYTES" in message
    assert put(client, run["id"], "é" * 100_000).status == 202
    assert client.delete(f"/api/runs/{run['id']}").json["status"] == "cancelled"


@pytest.mark.parametrize("command", ["/clear", " /reset", "/new topic"])
def test_a_command_that_begins_another_conversation_is_refused(client: Client, tmp_path: Path, command: str) -> None:
    run = held(client, folder_of(tmp_path))
    assert "Start a fresh run instead" in refused(put(client, run["id"], command), "prompt")
    assert put(client, run["id"], f"What does {command} do?").status == 202
    client.delete(f"/api/runs/{run['id']}")


def test_a_message_that_cannot_be_stored_is_not_sent(serve_all: ServeFunction, tmp_path: Path) -> None:
    database = tmp_path / "db.sqlite"
    client = Client(serve_all(DATABASE_PATH=database).url)
    run = held(client, folder_of(tmp_path))
    with sqlite3.connect(database, isolation_level=None) as locker:
        locker.execute("BEGIN IMMEDIATE")
        message = refused(put(client, run["id"], "lost"), None, 503, "STORAGE_UNAVAILABLE")
        locker.execute("ROLLBACK")
    locker.close()

    assert message.startswith("Nothing was sent")
    assert put(client, run["id"], "kept").status == 202
    assert texts(client.messages(run["id"]), "user") == ["kept"]
    client.delete(f"/api/runs/{run['id']}")


def test_a_disconnect_loses_no_message(client: Client, tmp_path: Path) -> None:
    # An older Claude Code reports a message only at its turn, so the request waits.
    run = client.start(folder_of(tmp_path), script(*kinds("a"), seconds=1.5, lifecycle=False), wait=0)
    client.wait_for_message(run["id"], "a")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            client.request("POST", f"/api/runs/{run['id']}/input", {"prompt": "I am off."}, timeout=0.2)

    assert put(client, run["id"], "I am not.").status == 202
    assert client.run(run["id"])["status"] == "completed"
    messages = client.messages(run["id"])
    assert texts(messages, "user") == ["I am off."] * 3 + ["I am not."]
    assert texts(messages, "assistant")[-1] == "heard: I am not."


# ---- the end of a turn


@pytest.mark.many_rounds
def test_at_the_end_of_a_turn_a_message_is_either_answered_or_refused(client: Client, tmp_path: Path) -> None:
    """Two clients send messages to each run, at random moments around the ends of its turns, until it has ended."""
    chance = random.Random(11)
    # The length of a turn (seconds), measured so that messages arrive at its end on this machine.
    turn = 0.02

    def talk(run_id: str, name: str, barrier: threading.Barrier) -> tuple[list[str], list[int]]:
        nonlocal turn
        taken: list[str] = []
        statuses: list[int] = []
        barrier.wait()
        while len(statuses) < 10 and 409 not in statuses:
            threading.Event().wait(chance.random() * 0.012)  # hits the end at a random moment
            prompt = script(assistant(f"heard {name}{len(taken)}"), seconds=chance.random() * 2 * turn)
            answer = put(client, run_id, prompt)
            statuses.append(answer.status)
            turn = max(0.001, turn * 0.9) if answer.status == 202 else min(0.5, turn * 1.2)
            if answer.status == 202:
                taken.append(prompt)
            else:
                assert answer.error["code"] in ("RUN_ENDING", "RUN_ALREADY_ENDED")
        return taken, statuses

    def race(_: int) -> list[int]:
        run = client.start(tmp_path, script(*kinds("a"), seconds=turn), wait=0)
        client.wait_for_message(run["id"], "a")
        barrier = threading.Barrier(2)
        with ThreadPoolExecutor(2) as clients:
            results = list(clients.map(lambda name: talk(run["id"], name, barrier), "ab"))
        assert client.run(run["id"])["status"] == "completed"
        messages = client.messages(run["id"])
        assert messages[-1]["type"] == "result"
        for name, (taken, _statuses) in zip("ab", results, strict=True):
            mine = [message for message in messages if f"heard {name}" in json.dumps(message)]
            assert texts(mine, "user") == taken
            assert texts(mine, "assistant") == [f"heard {name}{number}" for number in range(len(taken))]
        return results[0][1] + results[1][1]

    outcomes: list[int] = []
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        while len(outcomes) < RACES:
            for statuses in pool.map(race, range(2 * RUNS_AT_ONCE)):
                outcomes += statuses
    assert min(outcomes.count(status) for status in (202, 409)) > RACES / 10


@pytest.mark.many_rounds
def test_a_concurrent_message_and_cancel_leave_a_consistent_record(client: Client, tmp_path: Path) -> None:
    chance = random.Random(13)

    def race(_: int) -> tuple[int, str]:
        seconds = 0.02 * 4 ** chance.randrange(4)  # on a busy machine only the message to a long turn is in time
        run = client.start(tmp_path, script(*kinds("a"), seconds=seconds), wait=0)
        client.wait_for_message(run["id"], "a")
        with ThreadPoolExecutor(1) as other:
            answer = other.submit(put, client, run["id"], "Well?")
            threading.Event().wait(chance.random() * 2 * seconds)  # hits it at a random moment
            cancelled = client.delete(f"/api/runs/{run['id']}").status == 200
        ended = client.run(run["id"])
        messages = client.messages(run["id"])
        assert ended["status"] == ("cancelled" if cancelled else "completed")
        assert texts(messages, "user") == (["Well?"] if answer.result().status == 202 else [])
        if answer.result().status == 202 and not cancelled:
            assert texts(messages, "assistant") == ["heard: Well?"]
        return answer.result().status, ended["status"]

    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        outcomes = set(pool.map(race, range(150)))
    assert {(202, "cancelled"), (202, "completed")} <= outcomes


def assistant(text: str) -> dict[str, Any]:
    return {"type": "assistant", "message": {"role": "assistant", "content": [{"type": "text", "text": text}]}}
