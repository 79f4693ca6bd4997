"""Webhooks: in order, again and again, without end for nobody, and so that a receiver knows who calls."""

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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from standardwebhooks import WebhookVerificationError

from ccm.core.storage.notifier import EVENTS, Notifier
from ccm.core.storage.writer import Writer
from ccm.core.webhooks.concurrency_limits import KEPT, THREADS
from ccm.core.webhooks.delivery_executor import Addresses, DeliveryExecutor
from ccm.core.webhooks.dispatcher import Dispatcher
from ccm.core.webhooks.outbox import Outbox
from ccm.core.webhooks.post import Answer, NoAnswer, Post
from ccm.core.webhooks.retry import SCHEDULE, RetryDecision, decide
from ccm.db import deliveries, events, runs, sessions
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.models import Run
from ccm.timestamps import timestamp
from tests.receiver import Received, Receiver, Reply
from tests.waiting import until

SECRET = "whsec_" + base64.b64encode(b"a secret of twenty-eight byte").decode()
KEY = base64.b64decode(SECRET.removeprefix("whsec_"))
AT_ONCE = (0.01, 0.01, 0.01)
NEVER_AGAIN = (3_600.0,) * 9
STARTED, COMPLETED = "run.started", "run.completed"


class World:
    """A writer and an outbox over a database, and as many senders, one after another, as a test starts."""

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
        self.notifier.notify([EVENTS])

    def start(self, **given: Any) -> None:
        addresses = Addresses(self._service, given.pop("allow", ()), given.pop("keys", ()))
        delivery_executor = DeliveryExecutor(self.writer, self._reader, self.outbox, addresses, **given)
        self.dispatcher = Dispatcher(self._reader, self.notifier, delivery_executor)
        self.dispatcher.start()

    def run(self, url: str | None = None, *told: str) -> str:
        """A run with a webhook, to which this has happened."""
        self._seq += 1
        now = timestamp()
        run_id = f"run-{self._seq}"
        session = {"id": run_id, "cwd": "/", "metadataJson": "{}", "firstRunAt": now, "lastRunAt": now, "lastRunSeq": 1}
        row = {"id": run_id, "seq": self._seq, "cwd": "/", "sessionId": run_id, "sdkSessionId": run_id, "mode": "fresh"}
        row |= {"status": "running", "prompt": "a prompt", "optionsJson": "{}", "imageCount": 0, "createdAt": now}

        def work(transaction: Transaction) -> None:
            sessions.insert(transaction, session)
            runs.insert(transaction, row | {"webhookUrl": url}, None)
            for what in told:
                self.outbox.enqueue(transaction, what, found(transaction, run_id))

        self.write(work)
        return run_id

    def tell(self, run_id: str, *told: str) -> None:
        def work(transaction: Transaction) -> None:
            for what in told:
                self.outbox.enqueue(transaction, what, found(transaction, run_id))

        self.write(work)

    def deliveries(self, run_id: str) -> list[dict[str, Any]]:
        with self._reader.transaction() as transaction:
            return [d.to_json() for d in deliveries.page(transaction, run_id, limit=100, after=None)]

    def statuses(self, run_id: str) -> list[str]:
        return [delivery["status"] for delivery in self.deliveries(run_id)]

    def settled(self, run_id: str, *statuses: str) -> list[dict[str, Any]]:
        """The deliveries of a run once they have come to this."""
        until(lambda: self.statuses(run_id) == list(statuses))
        return self.deliveries(run_id)

    def close(self) -> None:
        if hasattr(self, "dispatcher"):
            self.dispatcher.stop(time.monotonic())
        self.writer.stop(time.monotonic() + 10)


def found(transaction: Transaction, run_id: str) -> Run:
    run = runs.find(transaction, run_id)
    assert run is not None
    return run


@pytest.fixture
def world(writable: Database, reader: Database) -> Iterator[World]:
    world = World(writable, reader)
    yield world
    world.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def told(receiver: Receiver) -> list[tuple[str, str]]:
    return [received.told for received in receiver.received]


def in_turn(*replies: Reply) -> Callable[[Received], Reply]:
    """These replies one after another, and the last one for ever."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_a_run_is_told_in_order_and_only_of_what_is_delivered(world: World, receiver: Receiver) -> None:
    world.start()
    run_id = world.run(receiver.url + "/hook?key=1", "run.created", STARTED, "approval.requested", "approval.resolved")
    world.tell(run_id, COMPLETED)

    delivered = world.settled(run_id, "delivered", "delivered", "delivered")
    assert told(receiver) == [(run_id, STARTED), (run_id, "approval.requested"), (run_id, COMPLETED)]
    assert {received.path for received in receiver.received} == {"/hook?key=1"}
    assert [d["eventType"] for d in delivered] == [STARTED, "approval.requested", COMPLETED]
    for delivery, received in zip(delivered, receiver.received, strict=True):
        [attempt] = delivery["attempts"]
        assert [attempt["statusCode"], attempt["error"]] == [204, None]
        assert 0 <= attempt["durationMs"] < 15_000
        assert [delivery["nextAttemptAt"], delivery["target"]] == [None, "run"]
        assert delivery["host"] == f"127.0.0.1:{receiver.port}"
        assert delivery["webhookId"] == received.headers["webhook-id"]


def test_a_body_is_thin_and_its_headers_say_who_calls(world: World, receiver: Receiver) -> None:
    world.start()
    world.run(receiver.url, STARTED)
    [received] = receiver.wait_for(1)

    assert set(received.json) == {"type", "timestamp", "data"}
    assert received.json["data"]["run"]["status"] == "running"
    assert not {"prompt", "options", "messages"} & set(received.json["data"]["run"])
    assert received.headers["content-type"] == "application/json"
    assert re.fullmatch(r"cc-manager/[\d.]+", received.headers["user-agent"])
    assert received.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert "webhook-signature" not in received.headers


def test_each_secret_signs_so_that_receivers_can_change_to_the_next(world: World, receiver: Receiver) -> None:
    other = "whsec_" + base64.b64encode(b"b" * 24).decode()
    receiver.reply = in_turn(Reply(500), Reply(200))
    world.start(keys=(KEY, b"b" * 24), schedule=(1.0,))
    world.run(receiver.url, STARTED)
    first, second = receiver.wait_for(2)

    for received in (first, second):
        for secret in (SECRET, other):
            assert received.verified(secret)["type"] == STARTED
        with pytest.raises(WebhookVerificationError):
            received.verified("whsec_" + base64.b64encode(b"c" * 24).decode())
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    assert int(first.headers["webhook-timestamp"]) < int(second.headers["webhook-timestamp"])


def test_the_addresses_of_run_and_service_get_one_id_and_each_its_own_order(
    writable: Database, reader: Database, receiver: Receiver
) -> None:
    world = World(writable, reader, service=receiver.url + "/service")
    world.start()
    run_id = world.run(receiver.url + "/run", STARTED, COMPLETED)
    silent = world.run(None, STARTED)

    world.settled(run_id, *["delivered"] * 4)
    world.settled(silent, "delivered")
    of_run, of_service = receiver.wait_for(2, "/run"), receiver.wait_for(3, "/service")
    assert [r.told for r in of_run] == [(run_id, STARTED), (run_id, COMPLETED)]
    assert [r.told[1] for r in of_service if r.told[0] == run_id] == [STARTED, COMPLETED]
    ids = {(r.told[1], r.headers["webhook-id"]) for r in of_run}
    assert ids == {(r.told[1], r.headers["webhook-id"]) for r in of_service if r.told[0] == run_id}
    world.close()


def test_a_receiver_that_was_down_gets_all_in_order_once_it_is_up(world: World) -> None:
    port = closed_port()
    world.start(schedule=(0.05,) * 1_000)
    run_id = world.run(f"http://127.0.0.1:{port}/", STARTED, COMPLETED)
    until(lambda: len(world.deliveries(run_id)[0]["attempts"]) >= 2)
    assert world.statuses(run_id) == ["pending", "pending"]
    assert world.deliveries(run_id)[1]["attempts"] == []

    with Receiver(port) as receiver:
        first, _ = world.settled(run_id, "delivered", "delivered")
    assert told(receiver) == [(run_id, STARTED), (run_id, COMPLETED)]
    assert first["attempts"][0]["error"] == "the connection failed: Connection refused"
    assert first["attempts"][-1]["statusCode"] == 204


def test_after_an_error_of_the_receiver_it_is_sent_again(world: World, receiver: Receiver) -> None:
    receiver.reply = in_turn(Reply(500), Reply(200))
    world.start(schedule=AT_ONCE)
    run_id = world.run(receiver.url, STARTED)

    [delivery] = world.settled(run_id, "delivered")
    assert [(a["statusCode"], a["error"]) for a in delivery["attempts"]] == [
        (500, "the receiver answered 500"),
        (200, None),
    ]


def test_what_was_found_before_its_outcome_was_stored_is_not_sent_before_its_time(
    world: World, receiver: Receiver
) -> None:
    receiver.reply = lambda _: Reply(500)
    world.start(schedule=NEVER_AGAIN)
    run_id = world.run(receiver.url, STARTED, COMPLETED)
    until(lambda: world.deliveries(run_id)[0]["attempts"])
    for delivery in world.deliveries(run_id):
        world.dispatcher._delivery_executor.deliver(delivery["id"])
    assert told(receiver) == [(run_id, STARTED)]


def test_after_the_last_attempt_it_is_given_up_and_the_next_one_has_its_turn(world: World, receiver: Receiver) -> None:
    receiver.reply = lambda received: Reply(500 if received.told[1] == STARTED else 200)
    world.start(schedule=AT_ONCE)
    run_id = world.run(receiver.url, STARTED, COMPLETED)

    failed, _ = world.settled(run_id, "failed", "delivered")
    assert [len(failed["attempts"]), failed["reason"]] == [4, "no success in 4 attempts"]
    assert told(receiver) == [(run_id, STARTED)] * 4 + [(run_id, COMPLETED)]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(world: World, receiver: Receiver, status: int) -> None:
    receiver.reply = lambda _: Reply(status, {"Location": receiver.url + "/elsewhere"})
    world.start(schedule=())
    run_id = world.run(receiver.url + "/here", STARTED)

    [delivery] = world.settled(run_id, "failed")
    assert f"redirects ({status})" in delivery["attempts"][0]["error"]
    assert [received.path for received in receiver.received] == ["/here"]


def test_a_receiver_that_takes_too_long_is_left(world: World, receiver: Receiver) -> None:
    receiver.reply = lambda _: Reply() if receiver.closing.wait(30) else Reply(500)
    world.start(schedule=(), attempt_seconds=0.3)
    run_id = world.run(receiver.url, STARTED)

    [delivery] = world.settled(run_id, "failed")
    assert delivery["attempts"][0]["error"] == "no answer within 0.3 s"
    assert 300 <= delivery["attempts"][0]["durationMs"] < 3_000


def test_a_receiver_that_drips_its_answer_gets_no_more_time(world: World, receiver: Receiver) -> None:
    receiver.reply = lambda _: Reply(drip=True)
    world.start(schedule=(), attempt_seconds=0.5)
    run_id = world.run(receiver.url, STARTED)

    [delivery] = world.settled(run_id, "failed")
    assert delivery["attempts"][0]["error"] == "no answer within 0.5 s"
    assert 500 <= delivery["attempts"][0]["durationMs"] < 3_000


def test_a_long_answer_is_not_read(world: World, receiver: Receiver) -> None:
    receiver.reply = lambda _: Reply(200, body=b"x" * 50_000_000)
    world.start(attempt_seconds=5)
    run_id = world.run(receiver.url, STARTED)
    world.settled(run_id, "delivered")


def test_what_is_no_http_and_a_host_that_is_none_are_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def look_up_here(host: str, *args: Any, **kwargs: Any) -> Any:
        if host == "no-such-host.invalid":  # without asking a name server
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def say_nonsense() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"SMTP 220 ready\r\n")

        thread = threading.Thread(target=say_nonsense)
        thread.start()
        world.start(schedule=())
        odd = world.run(f"http://127.0.0.1:{server.getsockname()[1]}", STARTED)
        unknown = world.run("http://no-such-host.invalid/", STARTED)
        label = world.run(f"http://{'a' * 64}.invalid/", STARTED)
        [delivery] = world.settled(odd, "failed")
        thread.join()
    assert delivery["attempts"][0]["error"] == "the answer is no HTTP: BadStatusLine"
    for run_id in (unknown, label):
        [delivery] = world.settled(run_id, "failed")
        assert "host cannot be found" in delivery["attempts"][0]["error"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that nobody has signed, and its key, in one file."""
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return path


@pytest.mark.parametrize("is_trusted", [True, False])
def test_a_certificate_must_be_trusted(
    world: World, certificate: Path, monkeypatch: pytest.MonkeyPatch, is_trusted: bool
) -> None:
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with Receiver(tls=tls) as receiver:
        world.start(schedule=())
        right = world.run(receiver.url + "/hook", STARTED)
        wrong_name = world.run(receiver.url.replace("localhost", "127.0.0.1"), STARTED)
        if is_trusted:
            world.settled(right, "delivered")
            assert receiver.received[0].headers["host"] == f"localhost:{receiver.port}"
        for run_id in [wrong_name] if is_trusted else [right, wrong_name]:
            [delivery] = world.settled(run_id, "failed")
            assert "certificate cannot be trusted" in delivery["attempts"][0]["error"]
        assert len(receiver.received) == int(is_trusted)


def test_a_receiver_that_says_nothing_when_tls_begins_gets_no_more_time(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        world.start(schedule=(), attempt_seconds=0.3)
        run_id = world.run(f"https://127.0.0.1:{server.getsockname()[1]}/", STARTED)
        [delivery] = world.settled(run_id, "failed")
    assert delivery["attempts"][0]["error"] == "no answer within 0.3 s"


def test_a_host_that_gives_no_answer_is_asked_by_one_at_a_time_until_it_does(world: World) -> None:
    came: list[float] = []
    answering = threading.Event()

    def reply(_: Received) -> Reply:
        came.append(time.monotonic())
        answering.wait(60)
        return Reply()

    with Receiver(reply=reply) as receiver:
        world.start(schedule=(3_600.0,), attempt_seconds=0.5)
        runs = [world.run(receiver.url, STARTED) for _ in range(12)]
        receiver.wait_for(7)
        for before, after in itertools.pairwise(came[4:7]):
            assert after - before > 0.3, "two at once ask a host that gives no answer"
        answering.set()
        receiver.wait_for(12)
        until(lambda: sum(world.statuses(run_id) == ["delivered"] for run_id in runs) >= 5)


def test_410_ends_it_for_this_run_alone(world: World, receiver: Receiver) -> None:
    receiver.reply = lambda received: Reply(410 if received.path == "/gone" else 200)
    world.start()
    gone = world.run(receiver.url + "/gone", STARTED, "approval.requested")
    first, second = world.settled(gone, "disabled", "disabled")
    assert [len(first["attempts"]), len(second["attempts"])] == [1, 0]
    assert first["reason"] == second["reason"] == "the receiver answered 410: it wants no more"

    world.tell(gone, COMPLETED)
    other = world.run(receiver.url + "/", STARTED)
    world.settled(other, "delivered")
    assert world.statuses(gone) == ["disabled"] * 3
    assert len(receiver.wait_for(1, "/gone")) == len([r for r in receiver.received if r.path == "/gone"])


def test_410_of_the_services_address_holds_until_the_next_start(
    writable: Database, reader: Database, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.reply = in_turn(Reply(410), Reply(200))
    world = World(writable, reader, service=receiver.url)
    first = world.run(None, STARTED, COMPLETED)
    world.start()
    world.settled(first, "disabled", "disabled")
    second = world.run(None, STARTED)
    assert world.statuses(second) == ["disabled"]
    assert [r.levelname for r in caplog.records if "until the next start" in r.message] == ["ERROR"]
    world.close()

    again = World(writable, reader, service=receiver.url)
    again._seq = 2
    again.start()
    third = again.run(None, STARTED)
    again.settled(third, "delivered")
    assert told(receiver) == [(first, STARTED), (third, STARTED)]
    again.close()


def test_what_was_for_an_address_that_is_not_set_any_more_is_disabled(
    writable: Database, reader: Database, receiver: Receiver
) -> None:
    before = World(writable, reader, service="http://127.0.0.1:9/")
    run_id = before.run(receiver.url, STARTED)
    before.close()
    after = World(writable, reader)
    after.start()

    until(lambda: sorted(after.statuses(run_id)) == ["delivered", "disabled"])
    [disabled] = [d for d in after.deliveries(run_id) if d["status"] == "disabled"]
    assert [disabled["target"], disabled["reason"]] == ["service", "CCM_WEBHOOK_URL is not set any more"]
    after.close()


def test_a_host_that_is_not_allowed_any_more_is_not_called(world: World, receiver: Receiver) -> None:
    run_id = world.run(receiver.url, STARTED, COMPLETED)
    world.start(allow=("hooks.example.com",))

    first, _ = world.settled(run_id, "disabled", "disabled")
    assert "CCM_WEBHOOK_ALLOW" in first["reason"]
    assert receiver.received == []


def test_the_services_address_is_free_of_the_allowed_hosts(
    writable: Database, reader: Database, receiver: Receiver
) -> None:
    world = World(writable, reader, service=receiver.url)
    world.start(allow=("hooks.example.com",))
    world.settled(world.run(None, STARTED), "delivered")
    world.close()


def test_a_dead_receiver_with_a_thousand_runs_does_not_hold_up_another(world: World, receiver: Receiver) -> None:
    with Receiver(reply=lambda _: Reply() if dead.closing.wait(60) else Reply(500)) as dead:
        for _ in range(1_000):
            world.run(dead.url, STARTED)
        world.start()
        dead.wait_for(4)
        runs = [world.run(receiver.url, STARTED, COMPLETED) for _ in range(20)]
        for run_id in runs:
            world.settled(run_id, "delivered", "delivered")
        assert len(dead.received) == 4, "more than its share was under way"
        world.dispatcher.stop(time.monotonic())


def test_many_runs_are_told_side_by_side_each_in_order_and_once(world: World, receiver: Receiver) -> None:
    world.start()
    runs = [world.run(receiver.url, STARTED) for _ in range(50)]
    for run_id in runs:
        world.tell(run_id, "approval.requested", COMPLETED)
    for run_id in runs:
        world.settled(run_id, *["delivered"] * 3)
        assert [what for run, what in told(receiver) if run == run_id] == [STARTED, "approval.requested", COMPLETED]


def test_a_stop_sends_what_is_quick_and_leaves_the_rest_for_the_next_start(world: World, receiver: Receiver) -> None:
    with Receiver(reply=lambda _: Reply() if slow.closing.wait(60) else Reply(500)) as slow:
        world.start()
        held = world.run(slow.url, STARTED)
        slow.wait_for(1)
        quick = world.run(receiver.url, STARTED, COMPLETED)
        world.dispatcher.stop(time.monotonic() + 1)

        assert world.statuses(quick) == ["delivered", "delivered"]
        [left] = world.deliveries(held)
        assert [left["status"], left["attempts"]] == ["pending", []]
        until(lambda: not [t for t in threading.enumerate() if t.name == "webhooks"])

        slow.reply = lambda _: Reply()
        world.start()
        [delivered] = world.settled(held, "delivered")
        assert len(delivered["attempts"]) == 1, "what was cut counts as the receiver's failure"
        world.dispatcher.stop(time.monotonic() + 5)


def test_after_a_stop_nobody_reads_the_database_any_more(
    world: World, reader: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, reading, go_on = deliveries.find, threading.Event(), threading.Event()
    ended: list[bool] = []

    def slow_find(transaction: Transaction, delivery_id: int) -> Any:
        reading.set()
        go_on.wait(30)
        found = find(transaction, delivery_id)
        ended.append(True)
        return found

    monkeypatch.setattr(deliveries, "find", slow_find)
    world.start()
    world.run(receiver.url, STARTED)
    assert reading.wait(30)
    threading.Timer(0.3, go_on.set).start()
    world.dispatcher.stop(time.monotonic())
    assert ended == [True], "the database may be closed now, and was being read"
    assert receiver.received == []


def test_a_stop_of_an_idle_sender_takes_no_time(world: World) -> None:
    world.start()
    begun = time.monotonic()
    world.dispatcher.stop(begun + 120)
    world.dispatcher.stop(begun + 120)
    assert time.monotonic() < begun + 60, "it waits for its deadline"


def test_what_a_fault_of_storage_keeps_from_being_stored_is_not_sent_again_meanwhile(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
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
    world.start(schedule=AT_ONCE)
    run_id = world.run(receiver.url, STARTED)
    receiver.wait_for(1)
    until(lambda: world.writer.last_error is not None)
    assert world.statuses(run_id) == ["pending"]
    down.clear()
    world.settled(run_id, "delivered")
    assert len(receiver.received) == 1


def test_unsigned_webhooks_are_warned_of_once(
    world: World, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    world.start()
    run_id = world.run(receiver.url + "/?token=hidden", STARTED, COMPLETED)
    world.settled(run_id, "delivered", "delivered")
    assert len([r for r in caplog.records if "CCM_WEBHOOK_SECRET" in r.message]) == 1
    assert "hidden" not in caplog.text


def test_the_log_tells_of_what_is_given_up(world: World, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.reply = lambda _: Reply(500)
    world.start(schedule=AT_ONCE[:1])
    world.settled(world.run(receiver.url + "/?token=hidden", STARTED), "failed")
    until(lambda: "given up" in caplog.text)
    levels = [r.levelno for r in caplog.records if "run.started" in r.message]
    assert levels == [logging.WARNING, logging.ERROR]
    assert "hidden" not in caplog.text


def test_an_address_that_this_machine_cannot_use_does_not_keep_the_next_from_being_tried(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without IPv6, and a host that has it."""
    no_socket(monkeypatch, errno.EAFNOSUPPORT, {socket.AF_INET6})
    both = [
        (family, socket.SOCK_STREAM, 6, "", (host, receiver.port))
        for family, host in ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1"))
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    world.start()
    [delivery] = world.settled(world.run("http://both.invalid/", STARTED), "delivered")
    assert len(delivery["attempts"]) == 1


def test_without_a_socket_to_be_had_the_attempt_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.start(schedule=AT_ONCE)
    no_socket(monkeypatch, errno.EMFILE, {socket.AF_INET})
    [delivery] = world.settled(world.run("http://127.0.0.1:9/", STARTED), "failed")
    assert [a["error"] for a in delivery["attempts"]] == ["the connection failed: Too many open files"] * 4


def no_socket(monkeypatch: pytest.MonkeyPatch, code: int, families: set[socket.AddressFamily]) -> None:
    class Socket(socket.socket):
        def __init__(self, family: int = -1, *args: Any, **kwargs: Any) -> None:
            if family in families:
                raise OSError(code, os.strerror(code))
            super().__init__(family, *args, **kwargs)

    monkeypatch.setattr(socket, "socket", Socket)


def test_a_fault_of_the_service_counts_as_an_attempt_and_is_logged(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def send(self: Post) -> Answer:
        raise AttributeError("nobody thought of it")

    monkeypatch.setattr(Post, "send", send)
    world.start(schedule=AT_ONCE)
    [delivery] = world.settled(world.run("http://127.0.0.1:9/", STARTED), "failed")
    assert [a["error"] for a in delivery["attempts"]] == ["a fault of the service: AttributeError"] * 4
    assert "nobody thought of it" in caplog.text


@contextmanager
def answering(replies: Iterable[bytes]) -> Iterator[str]:
    """The address of a receiver that reads a little, says this, and hangs up."""

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


def sent(url: str, *, body: bytes = b"{}", seconds: float = 20) -> Answer:
    return Post(url, {}, body, seconds, ssl.create_default_context()).send()


def test_who_answers_before_all_is_read_is_heard() -> None:
    long = b"x" * 50_000_000
    with answering([b"HTTP/1.1 410 Gone\r\nConnection: close\r\n\r\n"]) as url:
        assert sent(url, body=long).status == 410
    with answering([]) as url, pytest.raises(NoAnswer, match=r"closed without an answer|connection failed"):
        sent(url, body=long)


def no_thread_for(refused: Callable[[threading.Thread], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads for which `refused` says so cannot be started, as where the system's limit is reached."""
    start = threading.Thread.start

    def try_to_start(thread: threading.Thread) -> None:
        if refused(thread):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", try_to_start)


def test_an_attempt_needs_no_thread_of_its_own(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.current_thread()
    no_thread_for(lambda _: threading.current_thread() is here, monkeypatch)

    assert sent(receiver.url).status == 204


def test_without_a_thread_to_be_had_a_webhook_is_sent_once_there_is_one(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ccm.core.webhooks.dispatcher.FAULT_SLEEP", 0.01, raising=False)
    refused: list[str] = []
    is_short = threading.Event()
    is_short.set()

    def refuse(thread: threading.Thread) -> bool:
        if is_short.is_set() and thread.name.startswith("webhook-"):
            refused.append(thread.name)
            return True
        return False

    no_thread_for(refuse, monkeypatch)
    world.start()
    first = world.run(receiver.url, STARTED, COMPLETED)
    until(lambda: len(refused) >= 3)
    is_short.clear()

    world.settled(first, "delivered", "delivered")
    second = world.run(receiver.url, STARTED)
    world.settled(second, "delivered")
    assert told(receiver) == [(first, STARTED), (first, COMPLETED), (second, STARTED)]
    assert len([record for record in caplog.records if record.exc_info]) == 1
    until(lambda: not world.dispatcher._handed)


def test_a_receiver_that_takes_a_long_body_slowly_gets_no_more_time(
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
            sent(url, body=b"x" * 50_000_000, seconds=1)
        took = time.monotonic() - begun
        done.set()
        thread.join()
    assert took < 60, "all of the body takes more than two minutes"


def test_what_only_announces_the_answer_is_not_taken_for_it() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"
    final = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\n\r\n"
    with answering([b"HTTP/1.1 100 Continue\r\n\r\n" + hints + hints + final]) as url:
        assert sent(url) == Answer(503, "7")
    with answering([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n" + final]) as url:
        answer = sent(url)
    assert [answer.status, decide(answer, 1, SCHEDULE).status] == [101, "pending"]
    with answering(itertools.repeat(hints)) as url, pytest.raises(NoAnswer, match=r"no answer within 0.3 s"):
        sent(url, seconds=0.3)


def test_what_was_put_off_while_the_clock_was_ahead_is_sent_after_a_start(
    world: World, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    ahead, tomorrow = world.run(receiver.url, STARTED, COMPLETED), world.run(receiver.url, STARTED)

    def put_off(transaction: Transaction) -> None:
        sql = 'UPDATE ccr_deliveries SET "nextAttemptAt" = :at WHERE "runId" = :run AND "nextAttemptAt" IS NOT NULL'
        transaction.execute(sql, run=ahead, at="2099-01-01T00:00:00.000Z")
        transaction.execute(sql, run=tomorrow, at=timestamp(100_000))

    world.write(put_off)
    world.start()
    world.settled(ahead, "delivered", "delivered")
    assert world.statuses(tomorrow) == ["pending"]
    assert "1 webhooks were put off while the clock was ahead" in caplog.text


@pytest.mark.parametrize("gone", ["ccm.db.events.find_text", "ccm.db.runs.find"])
def test_what_is_deleted_while_it_is_read_is_not_sent_to_anybody(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """`flask prune` beside the service, on PostgreSQL, between two statements."""
    [delivery] = world.deliveries(world.run(receiver.url, STARTED))
    monkeypatch.setattr(gone, lambda *_: None)
    delivery_executor = DeliveryExecutor(
        world.writer, world._reader, world.outbox, Addresses(receiver.url + "/service")
    )
    assert delivery_executor.deliver(delivery["id"]) is None
    assert receiver.received == []


def test_what_is_pending_for_a_thousand_hosts_is_not_gone_through_for_each_that_is_sent(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pending(transaction: Transaction) -> None:
        for number in range(1_000):
            events.insert(transaction, STARTED, found(transaction, run_id))
            host, at = f"h{number}.invalid:80", timestamp(3_600)
            deliveries.insert(transaction, run_id, f"t{number}", f"evt_{number}", host, reason=None, now=at)

    run_id = world.run()
    world.write(pending)
    world.start()
    statements: list[str] = []
    tuples = Transaction.tuples

    def counted(self: Transaction, sql: str, **parameters: Any) -> Any:
        statements.append(sql)
        return tuples(self, sql, **parameters)

    monkeypatch.setattr(Transaction, "tuples", counted)
    world.run(receiver.url, STARTED)
    receiver.wait_for(1)
    assert len(statements) < 100


def test_hosts_that_give_no_answer_leave_threads_for_others(world: World, receiver: Receiver) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(20)]
        hosts = [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]
        world.start()
        world.dispatcher._silent = dict.fromkeys(hosts)
        for host in hosts:
            world.run(f"http://{host}/", STARTED)
        until(lambda: len(world.dispatcher._handed) == THREADS - KEPT)
        for run_id in [world.run(receiver.url, STARTED, COMPLETED) for _ in range(10)]:
            world.settled(run_id, "delivered", "delivered")
        assert len(world.dispatcher._handed) == THREADS - KEPT
        world.dispatcher.stop(time.monotonic())


def test_what_has_failed_before_waits_behind_what_has_not(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.webhooks.concurrency_limits.PER_HOST", 1)
    first, second = world.run(receiver.url, STARTED), world.run(receiver.url, STARTED)
    [delivery] = world.deliveries(first)
    failed = RetryDecision("pending", "the receiver answered 500", pause=-60)
    with world._reader.transaction() as transaction:
        stored = deliveries.find(transaction, delivery["id"])
    assert stored is not None
    world.write(lambda transaction: world.outbox.tried(transaction, stored, [{"error": failed.error}], failed))
    world.start()
    receiver.wait_for(2)
    assert told(receiver) == [(second, STARTED), (first, STARTED)]


def judged(status: int, retry_after: str | None = None, attempts: int = 1, schedule: Sequence[float] = SCHEDULE) -> Any:
    return decide(Answer(status, retry_after), attempts, schedule)


def test_the_schedule_is_that_of_the_standard_with_some_jitter() -> None:
    standard = [5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600]
    for attempts, pause in enumerate(standard, 1):
        pauses = [judged(500, attempts=attempts).pause for _ in range(50)]
        assert min(pauses) >= pause
        assert max(pauses) <= pause * 1.2
        assert len(set(pauses)) > 1
    assert judged(500, attempts=10).status == "failed"


def test_retry_after_is_heeded_where_it_asks_for_more() -> None:
    date = "Wed, 21 Oct 2099 07:28:00 GMT"
    assert judged(503, "100").pause == 100
    assert judged(429, "100").pause == 100
    assert 5 <= judged(503, "1").pause <= 6
    assert judged(503, date).pause == judged(503, "999999999999").pause == 86_400
    for nonsense in (None, "", "soon", "-5", "²", "Wed, 99 Oct 2099"):
        assert 5 <= judged(503, nonsense).pause <= 6
    assert 5 <= judged(500, "100").pause <= 6


@pytest.mark.parametrize(("status", "what"), [(200, "delivered"), (299, "delivered"), (410, "disabled")])
def test_what_a_status_means(status: int, what: str) -> None:
    assert judged(status).status == what


@pytest.mark.parametrize("status", [304, 400, 401, 404, 429, 500, 599])
def test_any_other_status_is_tried_again(status: int) -> None:
    assert judged(status).status == "pending"
