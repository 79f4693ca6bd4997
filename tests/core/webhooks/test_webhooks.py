"""Webhooks: order, retries, timeouts, limits per host, and signatures."""

from __future__ import annotations

import base64
import errno
import itertools
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import WebhookVerificationError

from ccm.core.storage.notifier import DELIVERIES, Notifier
from ccm.core.storage.writer import Writer
from ccm.core.webhooks.concurrency_limits import RESERVED_THREADS, THREADS
from ccm.core.webhooks.delivery_executor import Addresses, DeliveryExecutor
from ccm.core.webhooks.dispatcher import Dispatcher
from ccm.core.webhooks.outbox import Outbox
from ccm.core.webhooks.post import Answer, NoAnswer, Post
from ccm.core.webhooks.retry import SCHEDULE, DeliveryOutcome, outcome_of
from ccm.db import deliveries, events, runs, sessions
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.timestamps import timestamp
from tests.certificates import write_certificate
from tests.receiver import Received, Receiver, Reply
from tests.waiting import until

SECRET = "whsec_" + base64.b64encode(b"a secret of twenty-eight byte").decode()
KEY = base64.b64decode(SECRET.removeprefix("whsec_"))
IMMEDIATE_RETRIES = (0.01, 0.01, 0.01)
NO_RETRY = (3_600.0,) * 9
STARTED, COMPLETED = "run.started", "run.completed"


class Harness:
    """A writer and an outbox over a database, and one dispatcher after another, as a test starts them."""

    def __init__(self, writable: Database, reader: Database, *, service: str | None = None) -> None:
        self._reader = reader
        self._service = service
        self._seq = 0
        self.notifier = Notifier()
        self.outbox = Outbox(service=service is not None)
        self.writer = Writer(writable, self.notifier, 2**20, lambda _run, _error: None)
        self.writer.start()
        self.dispatcher: Dispatcher

    def write(self, work: Callable[[Transaction], object]) -> None:
        self.writer.write(work)
        self.notifier.notify([DELIVERIES])

    def start(self, **given: Any) -> None:
        addresses = Addresses(self._service, given.pop("allow", ()), given.pop("keys", ()))
        delivery_executor = DeliveryExecutor(self.writer, self._reader, self.outbox, addresses, **given)
        self.dispatcher = Dispatcher(self._reader, self.notifier, delivery_executor)
        self.dispatcher.start()

    def run(self, url: str | None = None, *types: str) -> str:
        """Store a run with a webhook and events of these types. Return its id."""
        self._seq += 1
        now = timestamp()
        run_id = f"run-{self._seq}"
        session: dict[str, Any] = {"id": run_id, "cwd": "/", "metadataJson": "{}", "firstRunAt": now, "lastRunAt": now}
        session["lastRunSeq"] = self._seq
        row = {"id": run_id, "seq": self._seq, "cwd": "/", "sessionId": run_id, "sdkSessionId": run_id, "mode": "fresh"}
        row |= {"status": "running", "prompt": "a prompt", "optionsJson": "{}", "imageCount": 0, "createdAt": now}

        def work(transaction: Transaction) -> None:
            sessions.insert(transaction, session)
            runs.insert(transaction, row | {"webhookUrl": url}, None)
            for event_type in types:
                self.outbox.enqueue(transaction, event_type, runs.get(transaction, run_id))

        self.write(work)
        return run_id

    def enqueue(self, run_id: str, *types: str) -> None:
        def work(transaction: Transaction) -> None:
            for event_type in types:
                self.outbox.enqueue(transaction, event_type, runs.get(transaction, run_id))

        self.write(work)

    def deliveries(self, run_id: str) -> list[dict[str, Any]]:
        with self._reader.transaction() as transaction:
            return [d.to_json() for d in deliveries.page(transaction, run_id, limit=100, after=None)]

    def statuses(self, run_id: str) -> list[str]:
        return [delivery["status"] for delivery in self.deliveries(run_id)]

    def settled(self, run_id: str, *statuses: str) -> list[dict[str, Any]]:
        """Return the deliveries of a run once they have these statuses."""
        until(lambda: self.statuses(run_id) == list(statuses))
        return self.deliveries(run_id)

    def close(self) -> None:
        if hasattr(self, "dispatcher"):
            self.dispatcher.stop(time.monotonic())
        self.writer.stop(time.monotonic() + 10)


@pytest.fixture
def harness(writable: Database, reader: Database) -> Iterator[Harness]:
    harness = Harness(writable, reader)
    yield harness
    harness.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def arrived(receiver: Receiver) -> list[tuple[str, str]]:
    return [received.run_and_type for received in receiver.received]


def in_turn(*replies: Reply) -> Callable[[Received], Reply]:
    """Reply with one after another, and with the last one from then on."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_the_delivered_events_of_a_run_arrive_in_order(harness: Harness, receiver: Receiver) -> None:
    harness.start()
    run_id = harness.run(
        receiver.url + "/hook?key=1", "run.created", STARTED, "approval.requested", "approval.resolved"
    )
    harness.enqueue(run_id, COMPLETED)

    delivered = harness.settled(run_id, "delivered", "delivered", "delivered")
    assert arrived(receiver) == [(run_id, STARTED), (run_id, "approval.requested"), (run_id, COMPLETED)]
    assert {received.path for received in receiver.received} == {"/hook?key=1"}
    assert [d["eventType"] for d in delivered] == [STARTED, "approval.requested", COMPLETED]
    for delivery, received in zip(delivered, receiver.received, strict=True):
        [attempt] = delivery["attempts"]
        assert [attempt["statusCode"], attempt["error"]] == [204, None]
        assert 0 <= attempt["durationMs"] < 15_000
        assert [delivery["nextAttemptAt"], delivery["target"]] == [None, "run"]
        assert delivery["host"] == f"127.0.0.1:{receiver.port}"
        assert delivery["webhookId"] == received.headers["webhook-id"]


def test_a_body_is_thin_and_its_headers_name_the_sender(harness: Harness, receiver: Receiver) -> None:
    harness.start()
    harness.run(receiver.url, STARTED)
    [received] = receiver.wait_for(1)

    assert set(received.json) == {"type", "timestamp", "data"}
    assert received.json["data"]["run"]["status"] == "running"
    assert not {"prompt", "options", "messages"} & set(received.json["data"]["run"])
    assert received.headers["content-type"] == "application/json"
    assert re.fullmatch(r"cc-manager/[\d.]+", received.headers["user-agent"])
    assert received.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert "webhook-signature" not in received.headers


def test_each_secret_signs_so_that_receivers_can_rotate_it(harness: Harness, receiver: Receiver) -> None:
    other = "whsec_" + base64.b64encode(b"b" * 24).decode()
    receiver.reply = in_turn(Reply(500), Reply(200))
    harness.start(keys=(KEY, b"b" * 24), schedule=(1.0,))
    harness.run(receiver.url, STARTED)
    first, second = receiver.wait_for(2)

    for received in (first, second):
        for secret in (SECRET, other):
            assert received.verified(secret)["type"] == STARTED
        with pytest.raises(WebhookVerificationError):
            received.verified("whsec_" + base64.b64encode(b"c" * 24).decode())
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    assert int(first.headers["webhook-timestamp"]) < int(second.headers["webhook-timestamp"])


def test_the_addresses_of_run_and_service_get_the_same_id_and_separate_orders(
    writable: Database, reader: Database, receiver: Receiver
) -> None:
    harness = Harness(writable, reader, service=receiver.url + "/service")
    harness.start()
    run_id = harness.run(receiver.url + "/run", STARTED, COMPLETED)
    silent = harness.run(None, STARTED)

    harness.settled(run_id, *["delivered"] * 4)
    harness.settled(silent, "delivered")
    of_run, of_service = receiver.wait_for(2, "/run"), receiver.wait_for(3, "/service")
    assert [r.run_and_type for r in of_run] == [(run_id, STARTED), (run_id, COMPLETED)]
    assert [r.run_and_type[1] for r in of_service if r.run_and_type[0] == run_id] == [STARTED, COMPLETED]
    ids = {(r.run_and_type[1], r.headers["webhook-id"]) for r in of_run}
    assert ids == {(r.run_and_type[1], r.headers["webhook-id"]) for r in of_service if r.run_and_type[0] == run_id}
    harness.close()


def test_a_receiver_that_was_down_gets_everything_in_order_once_it_is_up(harness: Harness) -> None:
    port = closed_port()
    harness.start(schedule=(0.05,) * 1_000)
    run_id = harness.run(f"http://127.0.0.1:{port}/", STARTED, COMPLETED)
    until(lambda: len(harness.deliveries(run_id)[0]["attempts"]) >= 2)
    assert harness.statuses(run_id) == ["pending", "pending"]
    assert harness.deliveries(run_id)[1]["attempts"] == []

    with Receiver(port) as receiver:
        first, _ = harness.settled(run_id, "delivered", "delivered")
    assert arrived(receiver) == [(run_id, STARTED), (run_id, COMPLETED)]
    assert first["attempts"][0]["error"] == "the connection failed: Connection refused"
    assert first["attempts"][-1]["statusCode"] == 204


def test_a_delivery_is_retried_after_an_error_of_the_receiver(harness: Harness, receiver: Receiver) -> None:
    receiver.reply = in_turn(Reply(500), Reply(200))
    harness.start(schedule=IMMEDIATE_RETRIES)
    run_id = harness.run(receiver.url, STARTED)

    [delivery] = harness.settled(run_id, "delivered")
    assert [(a["statusCode"], a["error"]) for a in delivery["attempts"]] == [
        (500, "the receiver answered 500"),
        (200, None),
    ]


def test_a_delivery_that_was_attempted_since_it_was_read_is_not_sent_early(
    harness: Harness, receiver: Receiver
) -> None:
    receiver.reply = lambda _: Reply(500)
    harness.start(schedule=NO_RETRY)
    run_id = harness.run(receiver.url, STARTED, COMPLETED)
    until(lambda: harness.deliveries(run_id)[0]["attempts"])
    for delivery in harness.deliveries(run_id):
        harness.dispatcher._delivery_executor.deliver(delivery["id"])
    assert arrived(receiver) == [(run_id, STARTED)]


def test_after_the_last_attempt_a_delivery_fails_and_the_next_one_is_sent(harness: Harness, receiver: Receiver) -> None:
    receiver.reply = lambda received: Reply(500 if received.run_and_type[1] == STARTED else 200)
    harness.start(schedule=IMMEDIATE_RETRIES)
    run_id = harness.run(receiver.url, STARTED, COMPLETED)

    failed, _ = harness.settled(run_id, "failed", "delivered")
    assert [len(failed["attempts"]), failed["reason"]] == [4, "no success in 4 attempts"]
    assert arrived(receiver) == [(run_id, STARTED)] * 4 + [(run_id, COMPLETED)]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(harness: Harness, receiver: Receiver, status: int) -> None:
    receiver.reply = lambda _: Reply(status, {"Location": receiver.url + "/elsewhere"})
    harness.start(schedule=())
    run_id = harness.run(receiver.url + "/here", STARTED)

    [delivery] = harness.settled(run_id, "failed")
    assert f"redirects ({status})" in delivery["attempts"][0]["error"]
    assert [received.path for received in receiver.received] == ["/here"]


def test_an_attempt_at_a_slow_receiver_times_out(harness: Harness, receiver: Receiver) -> None:
    receiver.reply = lambda _: Reply() if receiver.closing.wait(30) else Reply(500)
    harness.start(schedule=(), attempt_seconds=0.3)
    run_id = harness.run(receiver.url, STARTED)

    [delivery] = harness.settled(run_id, "failed")
    assert delivery["attempts"][0]["error"] == "no answer within 0.3 s"
    assert 300 <= delivery["attempts"][0]["durationMs"] < 3_000


def test_a_receiver_that_sends_single_bytes_gets_no_more_time(harness: Harness, receiver: Receiver) -> None:
    receiver.reply = lambda _: Reply(drip=True)
    harness.start(schedule=(), attempt_seconds=0.5)
    run_id = harness.run(receiver.url, STARTED)

    [delivery] = harness.settled(run_id, "failed")
    assert delivery["attempts"][0]["error"] == "no answer within 0.5 s"
    assert 500 <= delivery["attempts"][0]["durationMs"] < 3_000


def test_a_long_answer_is_not_read(harness: Harness, receiver: Receiver) -> None:
    receiver.reply = lambda _: Reply(200, body=b"x" * 50_000_000)
    harness.start(attempt_seconds=5)
    run_id = harness.run(receiver.url, STARTED)
    harness.settled(run_id, "delivered")


def test_invalid_answers_and_unknown_hosts_are_reported(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def look_up_here(host: str, *args: Any, **kwargs: Any) -> Any:
        if host == "no-such-host.invalid":  # without asking a name server
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send_nonsense() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"SMTP 220 ready\r\n")

        thread = threading.Thread(target=send_nonsense)
        thread.start()
        harness.start(schedule=())
        odd = harness.run(f"http://127.0.0.1:{server.getsockname()[1]}", STARTED)
        unknown = harness.run("http://no-such-host.invalid/", STARTED)
        label = harness.run(f"http://{'a' * 64}.invalid/", STARTED)
        [delivery] = harness.settled(odd, "failed")
        thread.join()
    assert delivery["attempts"][0]["error"] == "the answer is no HTTP: BadStatusLine"
    for run_id in (unknown, label):
        [delivery] = harness.settled(run_id, "failed")
        assert "host cannot be found" in delivery["attempts"][0]["error"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a self-signed certificate for localhost, and its key."""
    return write_certificate(tmp_path_factory.mktemp("certificate") / "both.pem")


@pytest.mark.parametrize("is_trusted", [True, False])
def test_a_certificate_must_be_trusted(
    harness: Harness, certificate: Path, monkeypatch: pytest.MonkeyPatch, is_trusted: bool
) -> None:
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with Receiver(tls=tls) as receiver:
        harness.start(schedule=())
        right = harness.run(receiver.url + "/hook", STARTED)
        wrong_name = harness.run(receiver.url.replace("localhost", "127.0.0.1"), STARTED)
        if is_trusted:
            harness.settled(right, "delivered")
            assert receiver.received[0].headers["host"] == f"localhost:{receiver.port}"
        for run_id in [wrong_name] if is_trusted else [right, wrong_name]:
            [delivery] = harness.settled(run_id, "failed")
            assert "certificate cannot be trusted" in delivery["attempts"][0]["error"]
        assert len(receiver.received) == int(is_trusted)


def test_a_receiver_that_stalls_the_tls_handshake_gets_no_more_time(harness: Harness) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        harness.start(schedule=(), attempt_seconds=0.3)
        run_id = harness.run(f"https://127.0.0.1:{server.getsockname()[1]}/", STARTED)
        [delivery] = harness.settled(run_id, "failed")
    assert delivery["attempts"][0]["error"] == "no answer within 0.3 s"


def test_a_silent_host_gets_one_attempt_at_a_time_until_it_answers(harness: Harness) -> None:
    came: list[float] = []
    answering = threading.Event()

    def reply(_: Received) -> Reply:
        came.append(time.monotonic())
        answering.wait(60)
        return Reply()

    with Receiver(reply=reply) as receiver:
        harness.start(schedule=(3_600.0,), attempt_seconds=0.5)
        runs = [harness.run(receiver.url, STARTED) for _ in range(12)]
        receiver.wait_for(7)
        for before, after in itertools.pairwise(came[4:7]):
            assert after - before > 0.3, "two concurrent attempts at a silent host"
        answering.set()
        receiver.wait_for(12)
        until(lambda: sum(harness.statuses(run_id) == ["delivered"] for run_id in runs) >= 5)


def test_410_disables_the_address_for_this_run_only(harness: Harness, receiver: Receiver) -> None:
    receiver.reply = lambda received: Reply(410 if received.path == "/gone" else 200)
    harness.start()
    gone = harness.run(receiver.url + "/gone", STARTED, "approval.requested")
    first, second = harness.settled(gone, "disabled", "disabled")
    assert [len(first["attempts"]), len(second["attempts"])] == [1, 0]
    assert first["reason"] == second["reason"] == "the receiver answered 410 (Gone), so it gets no more events"

    harness.enqueue(gone, COMPLETED)
    other = harness.run(receiver.url + "/", STARTED)
    harness.settled(other, "delivered")
    assert harness.statuses(gone) == ["disabled"] * 3
    assert len(receiver.wait_for(1, "/gone")) == len([r for r in receiver.received if r.path == "/gone"])


def test_410_disables_the_services_address_until_the_next_start(
    writable: Database, reader: Database, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.reply = in_turn(Reply(410), Reply(200))
    harness = Harness(writable, reader, service=receiver.url)
    first = harness.run(None, STARTED, COMPLETED)
    harness.start()
    harness.settled(first, "disabled", "disabled")
    second = harness.run(None, STARTED)
    assert harness.statuses(second) == ["disabled"]
    # Logged after the commit that the statuses show.
    (disabled,) = until(lambda: [r for r in caplog.records if "until the next start" in r.message])
    assert disabled.levelname == "ERROR"
    harness.close()

    again = Harness(writable, reader, service=receiver.url)
    again._seq = 2
    again.start()
    third = again.run(None, STARTED)
    again.settled(third, "delivered")
    assert arrived(receiver) == [(first, STARTED), (third, STARTED)]
    again.close()


def test_deliveries_to_an_address_that_is_no_longer_set_are_disabled(
    writable: Database, reader: Database, receiver: Receiver
) -> None:
    before = Harness(writable, reader, service="http://127.0.0.1:9/")
    run_id = before.run(receiver.url, STARTED)
    before.close()
    after = Harness(writable, reader)
    after.start()

    until(lambda: sorted(after.statuses(run_id)) == ["delivered", "disabled"])
    [disabled] = [d for d in after.deliveries(run_id) if d["status"] == "disabled"]
    assert [disabled["target"], disabled["reason"]] == ["service", "CCM_WEBHOOK_URL is not set any more"]
    after.close()


def test_a_host_that_is_no_longer_allowed_gets_nothing(harness: Harness, receiver: Receiver) -> None:
    run_id = harness.run(receiver.url, STARTED, COMPLETED)
    harness.start(allow=("hooks.example.com",))

    first, _ = harness.settled(run_id, "disabled", "disabled")
    assert "CCM_WEBHOOK_ALLOW" in first["reason"]
    assert receiver.received == []


def test_the_allowed_hosts_do_not_restrict_the_services_address(
    writable: Database, reader: Database, receiver: Receiver
) -> None:
    harness = Harness(writable, reader, service=receiver.url)
    harness.start(allow=("hooks.example.com",))
    harness.settled(harness.run(None, STARTED), "delivered")
    harness.close()


def test_a_dead_receiver_with_a_thousand_runs_does_not_delay_another(harness: Harness, receiver: Receiver) -> None:
    with Receiver(reply=lambda _: Reply() if dead.closing.wait(60) else Reply(500)) as dead:
        for _ in range(1_000):
            harness.run(dead.url, STARTED)
        harness.start()
        dead.wait_for(4)
        runs = [harness.run(receiver.url, STARTED, COMPLETED) for _ in range(20)]
        for run_id in runs:
            harness.settled(run_id, "delivered", "delivered")
        assert len(dead.received) == 4, "more attempts than the limit of a host"
        harness.dispatcher.stop(time.monotonic())


def test_many_runs_are_delivered_concurrently_each_in_order_and_once(harness: Harness, receiver: Receiver) -> None:
    harness.start()
    runs = [harness.run(receiver.url, STARTED) for _ in range(50)]
    for run_id in runs:
        harness.enqueue(run_id, "approval.requested", COMPLETED)
    for run_id in runs:
        harness.settled(run_id, *["delivered"] * 3)
        assert [event_type for run, event_type in arrived(receiver) if run == run_id] == [
            STARTED,
            "approval.requested",
            COMPLETED,
        ]


def test_a_stop_sends_until_its_deadline_and_leaves_the_rest_for_the_next_start(
    harness: Harness, receiver: Receiver
) -> None:
    with Receiver(reply=lambda _: Reply() if slow.closing.wait(60) else Reply(500)) as slow:
        harness.start()
        held = harness.run(slow.url, STARTED)
        slow.wait_for(1)
        quick = harness.run(receiver.url, STARTED, COMPLETED)
        harness.dispatcher.stop(time.monotonic() + 1)

        assert harness.statuses(quick) == ["delivered", "delivered"]
        [left] = harness.deliveries(held)
        assert [left["status"], left["attempts"]] == ["pending", []]
        until(lambda: not [t for t in threading.enumerate() if t.name == "webhooks"])

        slow.reply = lambda _: Reply()
        harness.start()
        [delivered] = harness.settled(held, "delivered")
        assert len(delivered["attempts"]) == 1, "an aborted attempt counted as a failure of the receiver"
        harness.dispatcher.stop(time.monotonic() + 5)


def test_after_a_stop_no_thread_reads_the_database(
    harness: Harness, reader: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, reading, go_on = deliveries.find, threading.Event(), threading.Event()
    ended: list[bool] = []

    def slow_find(transaction: Transaction, delivery_id: int) -> Any:
        reading.set()
        go_on.wait(30)
        delivery = find(transaction, delivery_id)
        ended.append(True)
        return delivery

    monkeypatch.setattr(deliveries, "find", slow_find)
    harness.start()
    harness.run(receiver.url, STARTED)
    assert reading.wait(30)
    threading.Timer(0.3, go_on.set).start()
    harness.dispatcher.stop(time.monotonic())
    assert ended == [True], "stop() returned while the database was being read"
    assert receiver.received == []


def test_an_idle_dispatcher_stops_at_once(harness: Harness) -> None:
    harness.start()
    begun = time.monotonic()
    harness.dispatcher.stop(begun + 120)
    harness.dispatcher.stop(begun + 120)
    assert time.monotonic() < begun + 60, "it waited for its deadline"


def test_a_delivery_is_not_resent_while_its_outcome_cannot_be_stored(
    harness: Harness, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ccm.errors import StorageDown

    record_attempt = deliveries.record_attempt
    down = threading.Event()
    down.set()

    def failing(*args: Any, **kwargs: Any) -> None:
        if down.is_set():
            raise StorageDown("away")
        record_attempt(*args, **kwargs)

    monkeypatch.setattr(deliveries, "record_attempt", failing)
    harness.start(schedule=IMMEDIATE_RETRIES)
    run_id = harness.run(receiver.url, STARTED)
    receiver.wait_for(1)
    until(lambda: harness.writer.last_error is not None)
    assert harness.statuses(run_id) == ["pending"]
    down.clear()
    harness.settled(run_id, "delivered")
    assert len(receiver.received) == 1


def test_unsigned_webhooks_cause_one_warning(
    harness: Harness, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    harness.start()
    run_id = harness.run(receiver.url + "/?token=hidden", STARTED, COMPLETED)
    harness.settled(run_id, "delivered", "delivered")
    assert len([r for r in caplog.records if "CCM_WEBHOOK_SECRET" in r.message]) == 1
    assert "hidden" not in caplog.text


def test_a_failed_delivery_is_logged_as_an_error(
    harness: Harness, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.reply = lambda _: Reply(500)
    harness.start(schedule=IMMEDIATE_RETRIES[:1])
    harness.settled(harness.run(receiver.url + "/?token=hidden", STARTED), "failed")
    until(lambda: "given up" in caplog.text)
    levels = [r.levelno for r in caplog.records if "run.started" in r.message]
    assert levels == [logging.WARNING, logging.ERROR]
    assert "hidden" not in caplog.text


def test_the_next_address_is_tried_after_one_that_the_machine_cannot_use(
    harness: Harness, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has no IPv6, and the host has an IPv6 address."""
    no_socket(monkeypatch, errno.EAFNOSUPPORT, {socket.AF_INET6})
    both = [
        (family, socket.SOCK_STREAM, 6, "", (host, receiver.port))
        for family, host in ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1"))
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    harness.start()
    [delivery] = harness.settled(harness.run("http://both.invalid/", STARTED), "delivered")
    assert len(delivery["attempts"]) == 1


def test_an_attempt_without_a_free_socket_counts(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.start(schedule=IMMEDIATE_RETRIES)
    no_socket(monkeypatch, errno.EMFILE, {socket.AF_INET})
    [delivery] = harness.settled(harness.run("http://127.0.0.1:9/", STARTED), "failed")
    assert [a["error"] for a in delivery["attempts"]] == ["the connection failed: Too many open files"] * 4


def no_socket(monkeypatch: pytest.MonkeyPatch, code: int, families: set[socket.AddressFamily]) -> None:
    class Socket(socket.socket):
        def __init__(self, family: int = -1, *args: Any, **kwargs: Any) -> None:
            if family in families:
                raise OSError(code, os.strerror(code))
            super().__init__(family, *args, **kwargs)

    monkeypatch.setattr(socket, "socket", Socket)


def test_an_unexpected_error_counts_as_an_attempt_and_is_logged(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def send(self: Post) -> Answer:
        raise AttributeError("unexpected")

    monkeypatch.setattr(Post, "send", send)
    harness.start(schedule=IMMEDIATE_RETRIES)
    [delivery] = harness.settled(harness.run("http://127.0.0.1:9/", STARTED), "failed")
    assert [a["error"] for a in delivery["attempts"]] == ["a fault of the service: AttributeError"] * 4
    assert "unexpected" in caplog.text


@contextmanager
def answering(replies: Iterable[bytes]) -> Iterator[str]:
    """Yield the address of a receiver that reads a little, sends the replies, and closes the connection."""

    def answer() -> None:
        connection, _ = server.accept()
        with suppress(OSError), connection:
            connection.recv(100)
            for reply in replies:
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        thread.join()


def post(url: str, *, body: bytes = b"{}", seconds: float = 20) -> Answer:
    return Post(url, {}, body, seconds, ssl.create_default_context()).send()


def test_an_answer_before_the_whole_body_is_read_counts() -> None:
    long = b"x" * 50_000_000
    with answering([b"HTTP/1.1 410 Gone\r\nConnection: close\r\n\r\n"]) as url:
        assert post(url, body=long).status == 410
    with answering([]) as url, pytest.raises(NoAnswer, match=r"closed without an answer|connection failed"):
        post(url, body=long)


def no_thread_for(refused: Callable[[threading.Thread], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the start of some threads fail, as at the system's limit.

    Args:
        refused: returns whether the start of a thread fails.
    """
    start = threading.Thread.start

    def try_to_start(thread: threading.Thread) -> None:
        if refused(thread):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", try_to_start)


def test_an_attempt_needs_no_thread_of_its_own(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.current_thread()
    no_thread_for(lambda _: threading.current_thread() is here, monkeypatch)

    assert post(receiver.url).status == 204


def test_a_webhook_is_sent_once_a_thread_can_be_started(
    harness: Harness, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ccm.core.webhooks.dispatcher.FAILURE_RETRY_DELAY", 0.01)
    refused: list[str] = []
    is_short = threading.Event()
    is_short.set()

    def refuse(thread: threading.Thread) -> bool:
        if is_short.is_set() and thread.name.startswith("webhook-"):
            refused.append(thread.name)
            return True
        return False

    no_thread_for(refuse, monkeypatch)
    harness.start()
    first = harness.run(receiver.url, STARTED, COMPLETED)
    until(lambda: len(refused) >= 3)
    is_short.clear()

    harness.settled(first, "delivered", "delivered")
    second = harness.run(receiver.url, STARTED)
    harness.settled(second, "delivered")
    assert arrived(receiver) == [(first, STARTED), (first, COMPLETED), (second, STARTED)]
    assert len([record for record in caplog.records if record.exc_info]) == 1
    until(lambda: not harness.dispatcher._in_flight)


def test_a_receiver_that_reads_a_long_body_slowly_gets_no_more_time(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    done = threading.Event()

    def take_slowly() -> None:
        with suppress(OSError), tls.wrap_socket(server.accept()[0], server_side=True) as connection:
            while connection.recv(2**14) and not done.wait(0.05):
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=take_slowly)
        thread.start()
        url = f"https://localhost:{server.getsockname()[1]}/"
        begun = time.monotonic()
        with pytest.raises(NoAnswer, match="no answer within 1 s"):
            post(url, body=b"x" * 50_000_000, seconds=1)
        took = time.monotonic() - begun
        done.set()
        thread.join()
    assert took < 60, "all of the body takes more than two minutes"


def test_interim_answers_are_skipped() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"
    final = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\n\r\n"
    with answering([b"HTTP/1.1 100 Continue\r\n\r\n" + hints + hints + final]) as url:
        assert post(url) == Answer(503, "7")
    with answering([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n" + final]) as url:
        answer = post(url)
    assert [answer.status, outcome_of(answer, 1, SCHEDULE).status] == [101, "pending"]
    with answering(itertools.repeat(hints)) as url, pytest.raises(NoAnswer, match=r"no answer within 0.3 s"):
        post(url, seconds=0.3)


def test_deliveries_that_were_postponed_while_the_clock_was_ahead_are_sent_after_a_start(
    harness: Harness, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    ahead, tomorrow = harness.run(receiver.url, STARTED, COMPLETED), harness.run(receiver.url, STARTED)

    def put_off(transaction: Transaction) -> None:
        sql = 'UPDATE ccr_deliveries SET "nextAttemptAt" = :at WHERE "runId" = :run AND "nextAttemptAt" IS NOT NULL'
        transaction.execute(sql, run=ahead, at="2099-01-01T00:00:00.000Z")
        transaction.execute(sql, run=tomorrow, at=timestamp(100_000))

    harness.write(put_off)
    harness.start()
    harness.settled(ahead, "delivered", "delivered")
    assert harness.statuses(tomorrow) == ["pending"]
    assert "1 webhooks were postponed while the clock was ahead" in caplog.text


@pytest.mark.parametrize("gone", ["ccm.db.events.find_text", "ccm.db.runs.find"])
def test_a_delivery_that_is_deleted_while_it_is_read_is_not_sent(
    harness: Harness, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """This happens with `flask prune` on PostgreSQL, between two statements."""
    [delivery] = harness.deliveries(harness.run(receiver.url, STARTED))
    monkeypatch.setattr(gone, lambda *_: None)
    delivery_executor = DeliveryExecutor(
        harness.writer, harness._reader, harness.outbox, Addresses(receiver.url + "/service")
    )
    assert delivery_executor.deliver(delivery["id"]) is None
    assert receiver.received == []


def test_pending_deliveries_for_a_thousand_hosts_cost_few_queries(
    harness: Harness, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pending(transaction: Transaction) -> None:
        for number in range(1_000):
            events.insert(transaction, STARTED, runs.get(transaction, run_id))
            host, at = f"h{number}.invalid:80", timestamp(3_600)
            deliveries.insert(transaction, run_id, f"t{number}", f"evt_{number}", host, reason=None, now=at)

    run_id = harness.run()
    harness.write(pending)
    harness.start()
    statements: list[str] = []
    tuples = Transaction.tuples

    def counted(self: Transaction, sql: str, **parameters: Any) -> Any:
        statements.append(sql)
        return tuples(self, sql, **parameters)

    monkeypatch.setattr(Transaction, "tuples", counted)
    harness.run(receiver.url, STARTED)
    receiver.wait_for(1)
    assert len(statements) < 100


def test_silent_hosts_leave_threads_for_others(harness: Harness, receiver: Receiver) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(20)]
        hosts = [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]
        harness.start()
        harness.dispatcher._silent = dict.fromkeys(hosts)
        for host in hosts:
            harness.run(f"http://{host}/", STARTED)
        until(lambda: len(harness.dispatcher._in_flight) == THREADS - RESERVED_THREADS)
        for run_id in [harness.run(receiver.url, STARTED, COMPLETED) for _ in range(10)]:
            harness.settled(run_id, "delivered", "delivered")
        # The thread of the last delivery releases it after its outcome is stored.
        until(lambda: len(harness.dispatcher._in_flight) == THREADS - RESERVED_THREADS)
        harness.dispatcher.stop(time.monotonic())


def test_first_attempts_come_before_retries(
    harness: Harness, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.webhooks.concurrency_limits.PER_HOST", 1)
    first, second = harness.run(receiver.url, STARTED), harness.run(receiver.url, STARTED)
    [delivery] = harness.deliveries(first)
    failed = DeliveryOutcome("pending", "the receiver answered 500", pause=-60)
    with harness._reader.transaction() as transaction:
        stored = deliveries.find(transaction, delivery["id"])
    assert stored is not None
    harness.write(
        lambda transaction: harness.outbox.record_attempt(transaction, stored, [{"error": failed.error}], failed)
    )
    harness.start()
    receiver.wait_for(2)
    assert arrived(receiver) == [(second, STARTED), (first, STARTED)]


def outcome_on(
    status: int, retry_after: str | None = None, attempts: int = 1, schedule: Sequence[float] = SCHEDULE
) -> Any:
    return outcome_of(Answer(status, retry_after), attempts, schedule)


def test_the_schedule_is_that_of_standard_webhooks_with_jitter() -> None:
    standard = [5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600]
    for attempts, pause in enumerate(standard, 1):
        pauses = [outcome_on(500, attempts=attempts).pause for _ in range(50)]
        assert min(pauses) >= pause
        assert max(pauses) <= pause * 1.2
        assert len(set(pauses)) > 1
    assert outcome_on(500, attempts=10).status == "failed"


def test_a_longer_retry_after_is_respected() -> None:
    date = "Wed, 21 Oct 2099 07:28:00 GMT"
    assert outcome_on(503, "100").pause == 100
    assert outcome_on(429, "100").pause == 100
    assert 5 <= outcome_on(503, "1").pause <= 6
    assert outcome_on(503, date).pause == outcome_on(503, "999999999999").pause == 86_400
    for nonsense in (None, "", "soon", "-5", "²", "Wed, 99 Oct 2099"):
        assert 5 <= outcome_on(503, nonsense).pause <= 6
    assert 5 <= outcome_on(500, "100").pause <= 6


@pytest.mark.parametrize(("status", "decided"), [(200, "delivered"), (299, "delivered"), (410, "disabled")])
def test_final_statuses(status: int, decided: str) -> None:
    assert outcome_on(status).status == decided


@pytest.mark.parametrize("status", [304, 400, 401, 404, 429, 500, 599])
def test_other_statuses_are_retried(status: int) -> None:
    assert outcome_on(status).status == "pending"
