"""Webhooks of real services: requests, refusals, signatures, the list of deliveries, and a killed service."""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ccm.testing.service_process import ServiceProcess
from tests.api.conftest import NOWHERE, folder_of, held, refused
from tests.client import Client
from tests.conftest import ServeFunction
from tests.contract import contract
from tests.postgresql import new_database
from tests.programs import can_connect, free_port
from tests.readme import filled_in, samples
from tests.receiver import Receiver, Reply
from tests.waiting import until

KEYS = [b"1" * 24, b"2" * 64]
SECRETS = ["whsec_" + base64.b64encode(key).decode() for key in KEYS]
STARTED, COMPLETED = "run.started", "run.completed"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver
    for received in receiver.received:
        contract().check_webhook(received.body)


@pytest.fixture(scope="module")
def service(serve_all: ServeFunction, receiver: Receiver) -> ServiceProcess:
    """Return a service that signs, and allows webhooks to loopback only."""
    return serve_all(CCM_WEBHOOK_SECRET=" ".join(SECRETS), CCM_WEBHOOK_ALLOW=f"127.0.0.1:{receiver.port},*.example.com")


@pytest.fixture(scope="module")
def api(service: ServiceProcess) -> Client:
    return Client(service.url)


def deliveries(client: Client, run: dict[str, Any], **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"/api/runs/{run['id']}/deliveries", **query).json
    return found


def settled(client: Client, run: dict[str, Any], *statuses: str) -> list[dict[str, Any]]:
    until(lambda: [delivery["status"] for delivery in deliveries(client, run)] == list(statuses))
    return deliveries(client, run)


def test_webhooks_have_signatures_that_receivers_can_verify(api: Client, receiver: Receiver, project: Path) -> None:
    run = api.start(project, "Hello.", webhookUrl=receiver.url + "/a?b=c")
    assert run["webhookUrl"] == receiver.url + "/a?b=c"

    started, completed = receiver.wait_for(2, "/a?b=c")
    for secret in SECRETS:
        assert started.verified(secret)["data"]["run"]["status"] == "running"
        assert completed.verified(secret)["type"] == COMPLETED
    sent = completed.json["data"]["run"]
    assert sent == {name: value for name, value in run.items() if name in sent}
    assert set(run) - set(sent) == {"prompt", "options"}

    first, last = settled(api, run, "delivered", "delivered")
    assert [first["eventType"], last["eventType"]] == [STARTED, COMPLETED]
    assert first["attempts"][0]["statusCode"] == 204
    assert [d["id"] for d in deliveries(api, run, limit=1)] == [first["id"]]
    following = api.get(f"/api/runs/{run['id']}/deliveries", limit=1).next
    assert [d["id"] for d in api.get(following or "").json] == [last["id"]]


def test_a_continuation_does_not_inherit_the_webhook(api: Client, receiver: Receiver, project: Path) -> None:
    first = api.start(project, "Hello.", webhookUrl=receiver.url + "/first")
    silent = api.resume(first["sessionId"], "And?")
    resumed = api.resume(first["sessionId"], "And?", webhookUrl=receiver.url + "/resumed")
    forked = api.fork(first["sessionId"], "Or?", webhookUrl=receiver.url + "/forked")

    assert silent["webhookUrl"] is None
    assert deliveries(api, silent) == []
    for run, path in ((resumed, "/resumed"), (forked, "/forked")):
        assert [received.run_and_type for received in receiver.wait_for(2, path)] == [
            (run["id"], STARTED),
            (run["id"], COMPLETED),
        ]


def test_a_run_that_is_cancelled_in_the_queue_sends_webhooks(
    serve_all: ServeFunction, receiver: Receiver, project: Path
) -> None:
    client = Client(serve_all(CCM_MAX_CONCURRENT_RUNS=1, CCM_WEBHOOK_URL=receiver.url + "/all").url)
    going_on = held(client, project)
    waiting = client.start(project, "Hello.", wait=0, webhookUrl=receiver.url + "/queued")
    client.delete(f"/api/runs/{waiting['id']}")
    client.delete(f"/api/runs/{going_on['id']}")

    [cancelled] = receiver.wait_for(1, "/queued")
    assert cancelled.run_and_type == (waiting["id"], "run.cancelled")
    of_service = [received.run_and_type for received in receiver.wait_for(3, "/all")]
    assert sorted(of_service) == sorted(
        [(going_on["id"], STARTED), (waiting["id"], "run.cancelled"), (going_on["id"], "run.cancelled")]
    )
    settled(client, waiting, "delivered", "delivered")
    assert {(d["target"], d["host"]) for d in deliveries(client, waiting)} == {
        ("run", f"127.0.0.1:{receiver.port}"),
        ("service", None),
    }


@pytest.mark.parametrize(
    "host", ["hooks.example.net", "example.com", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.example.org"]
)
def test_a_host_that_is_not_allowed_is_forbidden(api: Client, project: Path, host: str) -> None:
    answer = api.post("/api/runs/start", {"cwd": str(project), "prompt": "x", "webhookUrl": f"https://{host}/?key=1"})
    message = refused(answer, "webhookUrl", 403, "WEBHOOK_FORBIDDEN")
    assert "CCM_WEBHOOK_ALLOW" in message
    assert "key" not in message


def test_deliveries_of_unknown_runs_and_invalid_queries_are_refused(api: Client, project: Path) -> None:
    refused(api.get(f"/api/runs/{NOWHERE}/deliveries"), None, 404, "RUN_NOT_FOUND")
    run = api.start(project, "Hello.")
    path = f"/api/runs/{run['id']}/deliveries"
    assert api.get(path).json == []
    refused(api.get(path, limit=0), "limit")
    refused(api.get(path, cursor="x"), "cursor")
    refused(api.get(path, status="failed"), "status")
    refused(api.get("/api/runs/%00/deliveries"), "runId")


def test_only_the_host_of_an_address_is_logged(
    api: Client, service: ServiceProcess, receiver: Receiver, project: Path
) -> None:
    run = api.start(project, "Hello.", webhookUrl=receiver.url + "/hidden?hidden=1")
    settled(api, run, "delivered", "delivered")
    until(lambda: [line for line in service.log if run["id"] in line and "run.completed" in line])
    assert not [line for line in service.log if "hidden" in line]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_webhooks_are_sent_after_a_kill_between_commit_and_send(
    request: pytest.FixtureRequest, serve_all: ServeFunction, project: Path, tmp_path: Path, kind: str
) -> None:
    database: dict[str, object] = {"DATABASE_PATH": tmp_path / "db.sqlite"}
    if kind == "postgresql":
        database = {"DATABASE_URL": new_database(request.getfixturevalue("postgresql"))}
    with Receiver(reply=lambda _: Reply() if silent.closing.wait(60) else Reply(500)) as silent:
        service = serve_all(**database)
        client = Client(service.url)
        run = client.start(project, "Hello.", webhookUrl=silent.url)
        [started] = silent.wait_for(1)
        assert run["status"] == "completed"
        # The first is sent without a stored outcome, the second is committed and not sent.
        assert [d["status"] for d in deliveries(client, run)] == ["pending", "pending"]
        service.process.send_signal(signal.SIGKILL)
        service.wait()
        assert [received.run_and_type[1] for received in silent.received] == [STARTED]

        silent.reply = lambda _: Reply()
        client = Client(serve_all(**database).url)
        settled(client, run, "delivered", "delivered")
        assert [received.run_and_type for received in silent.received[1:]] == [
            (run["id"], STARTED),
            (run["id"], COMPLETED),
        ]
        assert silent.received[1].headers["webhook-id"] == started.headers["webhook-id"]


def test_a_stop_sends_the_ends_of_the_runs_that_it_interrupts(
    serve_all: ServeFunction, project: Path, tmp_path: Path
) -> None:
    # A receiver that takes a moment, because an aborted delivery would be sent again after the next start.
    with Receiver(reply=lambda _: Reply(500) if slow.closing.wait(0.3) else Reply()) as slow:
        service = serve_all(DATABASE_PATH=tmp_path / "db.sqlite")
        client = Client(service.url)
        runs = [client.start(project, '{"hold": true}', wait=0, webhookUrl=slow.url) for _ in range(3)]
        slow.wait_for(3)
        service.process.send_signal(signal.SIGTERM)
        assert service.wait() == 0

        ends = slow.received[3:]
        assert sorted(received.run_and_type for received in ends) == sorted((run["id"], "run.failed") for run in runs)
        assert {received.json["data"]["run"]["error"]["code"] for received in ends} == {"INTERRUPTED"}
        client = Client(serve_all(DATABASE_PATH=tmp_path / "db.sqlite").url)
        for run in runs:
            assert [d["status"] for d in deliveries(client, run)] == ["delivered", "delivered"]
        assert len(slow.received) == 6


def test_a_silent_receiver_does_not_delay_a_stop(serve_all: ServeFunction, project: Path) -> None:
    with Receiver(reply=lambda _: Reply() if silent.closing.wait(60) else Reply(500)) as silent:
        service = serve_all()
        Client(service.url).start(project, "Hello.", webhookUrl=silent.url)
        silent.wait_for(1)
        service.process.send_signal(signal.SIGTERM)
        assert service.wait() == 0


def test_a_service_without_a_secret_warns_at_the_start_about_unsigned_webhooks(
    serve_all: ServeFunction, service: ServiceProcess
) -> None:
    unsigned = serve_all(CCM_WEBHOOK_URL="http://127.0.0.1:9/")
    assert [line for line in unsigned.log if "CCM_WEBHOOK_SECRET" in line]
    assert not [line for line in service.log if "CCM_WEBHOOK_SECRET" in line]


def test_the_readmes_receiver_accepts_only_genuine_webhooks(
    serve_all: ServeFunction, tmp_path: Path, receiver: Receiver
) -> None:
    [sample] = [sample for sample in samples("python") if "webhook-signature" in sample]
    known: dict[str, Any] = {}
    exec(compile(sample, "README.md", "exec"), known)
    client = Client(serve_all(CCM_WEBHOOK_SECRET=" ".join(SECRETS)).url)
    client.start(folder_of(tmp_path), "Hello.", webhookUrl=receiver.url + "/sample")
    for received in receiver.wait_for(2, "/sample"):
        genuine = known["genuine"]
        assert genuine(SECRETS[0], received.headers, received.body)
        assert genuine(SECRETS[1], received.headers, received.body)
        assert not genuine(SECRETS[1], received.headers, received.body + b" ")
        assert not genuine("whsec_" + base64.b64encode(b"3" * 24).decode(), received.headers, received.body)
        old = dict(received.headers) | {"webhook-timestamp": "1700000000"}
        assert not genuine(SECRETS[0], old, received.body)
        assert not genuine(SECRETS[0], {}, received.body)


def test_the_readmes_receiver_runs_unchanged(serve_all: ServeFunction, tmp_path: Path) -> None:
    [sample] = [sample for sample in samples("python") if "webhook-signature" in sample]
    port = free_port()
    program = tmp_path / "receiver.py"
    program.write_text(filled_in(sample, {"8000": str(port)}))
    environ = {"CCM_WEBHOOK_SECRET": SECRETS[0]}
    with subprocess.Popen(
        [sys.executable, str(program)], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until(lambda: can_connect(port))
            client = Client(serve_all(CCM_WEBHOOK_SECRET=SECRETS[0]).url)
            stranger = Client(serve_all(CCM_WEBHOOK_SECRET=SECRETS[1]).url)
            address = f"http://127.0.0.1:{port}/"
            unknown = stranger.start(folder_of(tmp_path, "strange"), "Hello.", webhookUrl=address)
            until(lambda: stranger.get(f"/api/runs/{unknown['id']}/deliveries").json[0]["attempts"])
            run = client.start(folder_of(tmp_path), "Hello.", webhookUrl=address)
            assert process.stdout is not None
            lines = [process.stdout.readline().split()[1:] for _ in range(2)]
        finally:
            process.terminate()
    assert lines == [[STARTED, run["id"]], [COMPLETED, run["id"]]]
    refusal, *_ = stranger.get(f"/api/runs/{unknown['id']}/deliveries").json[0]["attempts"]
    assert refusal["statusCode"] == 401
