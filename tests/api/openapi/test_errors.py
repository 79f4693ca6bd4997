"""Every error that the description names for an operation is one that the operation gives."""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Semaphore
from typing import Any

import pytest

from app import create_app
from ccm.api.http.extensions import HELD_SLOTS
from ccm.core.policy.ceilings import Ceilings
from ccm.core.service import Service
from ccm.core.storage.write_task import WriteTask
from ccm.db.driver.transaction import Transaction
from ccm.errors import DatabaseRefused, StorageDown
from ccm.settings.settings import Settings
from tests.api.conftest import NOWHERE, connect, held, read_all, script
from tests.api.in_process import InProcessClient, InProcessService
from tests.client import Answer, Client, checked
from tests.contract import Reached, contract
from tests.storage_faults import locked

TOKEN = "a-token-for-the-tests"
JSON = "application/json"
KEY = {"Idempotency-Key": "the-key", "Content-Type": JSON}
# Errors that cannot be provoked here. The server gives this one before it knows the operation, and it takes a full
# disk: tests/e2e/test_temporary_files.py has it.
ELSEWHERE = {"OUT_OF_DISK"}
BODIES: dict[str, dict[str, Any]] = {
    "startRun": {"cwd": "/tmp", "prompt": "x"},
    "resumeRun": {"sessionId": NOWHERE, "prompt": "x"},
    "forkRun": {"sessionId": NOWHERE, "prompt": "x"},
    "sendInput": {"prompt": "x"},
    "updateSession": {"title": "x"},
    "answerApproval": {"decision": "allow"},
}
STARTS = ("startRun", "resumeRun", "forkRun")


@dataclasses.dataclass(frozen=True)
class Call:
    """A request for an operation, with ids of nothing."""

    operation: str
    method: str
    path: str
    body: dict[str, Any] | None

    def to(self, client: Client, query: str = "", headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        """Send the request with further fields in its body."""
        body = None if self.body is None else {**self.body, **fields}
        return client.request(self.method, self.path + query, body, headers)


def calls() -> dict[str, Call]:
    found = {}
    for path, operations in contract().document["paths"].items():
        for method, described in operations.items():
            name = described["operationId"]
            for parameter in ("runId", "sessionId", "approvalId"):
                path = path.replace(f"{{{parameter}}}", NOWHERE)  # noqa: PLW2901
            found[name] = Call(name, method.upper(), path, BODIES.get(name))
    return found


CALLS = calls()
DOCUMENTED = sorted(
    error for operation in contract().operations() for error in operation.errors() if error.code not in ELSEWHERE
)


class World:
    """A service in this process, with a session of one ended run."""

    def __init__(self, service: InProcessService, folder: Path) -> None:
        self.client = service.client
        app: Any = service.client.app
        self.service: Service = app.extensions["ccm"]
        self.slots: Semaphore = app.extensions[HELD_SLOTS]
        self.folder = folder
        self.run = self.client.start(folder, "hello")

    def start(self, operation: str, query: str = "", headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        """Send a start, resume or fork that would be accepted, with further fields."""
        own = {"cwd": str(self.folder)} if operation == "startRun" else {"sessionId": self.run["sessionId"]}
        return CALLS[operation].to(self.client, query, headers, **own, **fields)

    def held(self, **fields: Any) -> dict[str, Any]:
        """Start a run that holds."""
        folder = self.folder / f"{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        return held(self.client, folder) if not fields else self.client.start(folder, script(**fields), wait=0)


@pytest.fixture(scope="module")
def serve_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., World]]:
    with ExitStack() as stack:

        def serve(**settings: object) -> World:
            folder = tmp_path_factory.mktemp("service")
            project = folder / "project"
            project.mkdir()
            return World(stack.enter_context(InProcessService(folder, **settings)), project)

        yield serve


@pytest.fixture(scope="module")
def world(serve_world: Callable[..., World]) -> World:
    return serve_world()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service that demands a token, and takes small bodies only."""
    with InProcessService(tmp_path_factory.mktemp("guarded"), CCM_API_TOKEN=TOKEN) as service:
        yield service.client


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service that takes small bodies only."""
    with InProcessService(tmp_path_factory.mktemp("small"), CCM_MAX_BODY_BYTES=1024) as service:
        yield service.client


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service that has stopped."""
    with InProcessService(tmp_path_factory.mktemp("closed")) as service:
        app: Any = service.client.app
        app.extensions["ccm"].close()
        yield service.client


@pytest.fixture(scope="module")
def full(serve_world: Callable[..., World]) -> World:
    """A service whose only worker is busy, and where no run may wait."""
    world = serve_world(CCM_MAX_CONCURRENT_RUNS=1, CCM_MAX_QUEUED_RUNS=0)
    world.held()
    return world


def failing(call: Call, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Answer:
    """Send a request to a service whose start fails, as it may under `flask run`."""
    # The other services of this process would find its stack trace in their logs.
    monkeypatch.setattr(logging.getLogger("ccm.api.http.responses"), "disabled", True)
    app = create_app(Settings())
    service: Service = app.extensions["ccm"]
    atexit.unregister(service.close)

    def start() -> None:
        raise error

    service.start = start  # type: ignore[method-assign]
    return call.to(InProcessClient(app))


Provoke = Callable[[Call, pytest.FixtureRequest, pytest.MonkeyPatch], Answer]


def world_of(request: pytest.FixtureRequest) -> World:
    world: World = request.getfixturevalue("world")
    return world


def client_of(request: pytest.FixtureRequest, name: str = "world") -> Client:
    found: Any = request.getfixturevalue(name)
    client: Client = found.client if isinstance(found, World) else found
    return client


# ---- errors that any operation may give


def no_slot(call: Call, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Answer:
    world = world_of(request)
    monkeypatch.setattr("ccm.api.http.message_lists.SHORT_CHUNKS", -1)  # every list of messages counts as long
    taken = 0
    while world.slots.acquire(blocking=False):
        taken += 1
    path = call.path.replace("/runs/" + NOWHERE, "/runs/" + world.run["id"])
    path = path.replace("/sessions/" + NOWHERE, "/sessions/" + world.run["sessionId"])
    try:
        return world.client.request(call.method, path)
    finally:
        world.slots.release(taken)


def storage_down(call: Call, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Answer:
    world = world_of(request)
    if call.method == "GET":

        def transaction() -> None:
            raise StorageDown("it is on fire")

        monkeypatch.setattr(world.service.queries.database, "transaction", transaction)
        return call.to(world.client, "?after=now" if call.operation == "streamEvents" else "")
    monkeypatch.setattr("ccm.core.storage.writer.WRITE_TIMEOUT", 0.1)
    monkeypatch.setattr("ccm.core.runs.input.WRITE_TIMEOUT", 0.1)
    with locked(world.service.settings.url):
        return write(call, world)


def outcome_unknown(call: Call, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Answer:
    world = world_of(request)  # before the patches, under which it could not start
    answered = threading.Event()
    monkeypatch.setattr("ccm.core.storage.writer.OUTCOME_TIMEOUT", 0.1)

    def run(_: WriteTask[Any], __: Transaction) -> None:
        answered.wait(60)
        raise StorageDown("it answers too late")

    monkeypatch.setattr("ccm.core.storage.write_task.WriteTask.run", run)
    try:
        return patiently(monkeypatch, "ccm.core.storage.writer.WRITE_TIMEOUT", lambda: write(call, world))
    finally:
        answered.set()


def patiently(monkeypatch: pytest.MonkeyPatch, timeout: str, send: Callable[[], Answer]) -> Answer:
    """Send a request with a short timeout for its write, and with longer ones while the writer has not begun with it.

    Args:
        timeout: the place of the timeout.
    """
    for seconds in (0.2, 1, 5, 25):
        monkeypatch.setattr(timeout, seconds)
        answer = send()
        if answer.error["code"] != "STORAGE_UNAVAILABLE":
            break
    return answer


def write(call: Call, world: World) -> Answer:
    """Send a request that writes, and that would be accepted if it is a start, a resume or a fork."""
    return world.start(call.operation) if call.operation in STARTS else call.to(world.client)


ANY: dict[str, Provoke] = {
    "VALIDATION_ERROR": lambda call, request, _: call.to(client_of(request), "?token=x"),
    "HOST_FORBIDDEN": lambda call, request, _: call.to(client_of(request), headers={"Host": "evil.example"}),
    "ORIGIN_FORBIDDEN": lambda call, request, _: call.to(client_of(request), headers={"Origin": "http://evil.example"}),
    "UNAUTHORIZED": lambda call, request, _: call.to(client_of(request, "guarded")),
    "UNSUPPORTED_MEDIA_TYPE": lambda call, request, _: call.to(
        client_of(request), headers={"Content-Type": "text/plain"}
    ),
    "BODY_TOO_LARGE": lambda call, request, _: call.to(client_of(request, "small"), prompt="x" * 2_000),
    "NOT_STARTED": lambda call, _, monkeypatch: failing(call, monkeypatch, DatabaseRefused("it is locked")),
    "INTERNAL_ERROR": lambda call, _, monkeypatch: failing(call, monkeypatch, RuntimeError("a bug")),
    "UNHEALTHY": lambda call, request, _: call.to(client_of(request, "closed")),
    "SHUTTING_DOWN": lambda call, request, _: call.to(
        client_of(request, "closed"), "?after=now" if call.operation == "streamEvents" else ""
    ),
    "RUN_NOT_FOUND": lambda call, request, _: call.to(
        client_of(request), f"?runId={NOWHERE}" if call.operation == "listApprovals" else ""
    ),
    "SESSION_NOT_FOUND": lambda call, request, _: call.to(
        client_of(request), f"?sessionId={NOWHERE}" if call.operation in ("listApprovals", "listRuns") else ""
    ),
    "APPROVAL_NOT_FOUND": lambda call, request, _: call.to(client_of(request)),
    "SLOTS_TAKEN": no_slot,
    "STORAGE_UNAVAILABLE": storage_down,
    "OUTCOME_UNKNOWN": outcome_unknown,
}


# ---- errors of the server, which answers before it knows the operation


def raw(head: str) -> Callable[[Call, pytest.FixtureRequest], Answer]:
    """Return a function that sends a malformed request, with METHOD and PATH replaced, to a service as a process."""

    def send(call: Call, request: pytest.FixtureRequest) -> Answer:
        client: Client = request.getfixturevalue("lite")
        text = head.replace("METHOD", call.method).replace("PATH", call.path)
        with connect(client, text.encode()) as connection:
            received, body = read_all(connection)
        status, *lines = received.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return checked(call.method, call.path, None, Answer(int(status.split()[1]), headers, body))

    return send


SERVER = {
    "BAD_REQUEST": raw("METHOD PATH HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n"),
    "HEADERS_TOO_LARGE": raw(f"METHOD PATH HTTP/1.1\r\nHost: localhost\r\nX: {'x' * 70_000}\r\n\r\n"),
    "NOT_IMPLEMENTED": raw("METHOD PATH HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n"),
}


# ---- errors of single operations


def policy(name: str, **fields: Any) -> Callable[[Call, World, pytest.MonkeyPatch], Answer]:
    """Return a function that sends a start, resume or fork under a setting that forbids it."""
    changes: dict[str, Any] = {
        "roots": {"allowed_roots": (Path("/nowhere"),)},
        "hosts": {"webhook_allow": ("hooks.example.com",)},
        "": {},
    }

    def send(call: Call, world: World, monkeypatch: pytest.MonkeyPatch) -> Answer:
        monkeypatch.setattr(world.service, "settings", dataclasses.replace(world.service.settings, **changes[name]))
        monkeypatch.setattr(world.service, "ceilings", Ceilings(run_timeout=1))
        return world.start(call.operation, **fields)

    return send


def key_reused(call: Call, world: World, _: pytest.MonkeyPatch) -> Answer:
    key = {**KEY, "Idempotency-Key": call.operation}
    assert world.start(call.operation, "?wait=60", key).status == 200
    return world.start(call.operation, headers=key, timeoutMs=1)


def busy(call: Call, world: World, _: pytest.MonkeyPatch) -> Answer:
    run = world.held()
    fields = {"atRunId": run["id"]} if call.operation == "forkRun" else {}
    try:
        return call.to(world.client, sessionId=run["sessionId"], **fields)
    finally:
        world.client.delete(f"/api/runs/{run['id']}")


def not_resumable(call: Call, world: World, _: pytest.MonkeyPatch) -> Answer:
    gone = world.folder / call.operation
    gone.mkdir()
    run = world.client.start(gone, "hello")
    gone.rmdir()
    return call.to(world.client, sessionId=run["sessionId"])


def no_descriptors(call: Call, world: World, monkeypatch: pytest.MonkeyPatch) -> Answer:
    monkeypatch.setattr("ccm.file_limits.limit", lambda: 1)
    return world.start(call.operation)


def no_run_in_session(call: Call, world: World, _: pytest.MonkeyPatch) -> Answer:
    return world.start(call.operation, atRunId=NOWHERE)


def ended(call: Call, world: World, _: pytest.MonkeyPatch) -> Answer:
    return world.client.request(call.method, call.path.replace(NOWHERE, world.run["id"]), call.body)


def still_ending(call: Call, world: World, monkeypatch: pytest.MonkeyPatch) -> Answer:
    monkeypatch.setattr("ccm.api.runs.CANCEL_TIMEOUT", 0.0)
    run = world.held(messages=[{"type": "a"}], hold=True, ignore_interrupt=True)
    world.client.wait_for_message(run["id"], "a")
    answer = world.client.delete(f"/api/runs/{run['id']}")
    if call.operation == "sendInput":
        answer = world.client.request(call.method, call.path.replace(NOWHERE, run["id"]), call.body)
    world.client.run(run["id"])
    return answer


def not_started(call: Call, world: World, _: pytest.MonkeyPatch) -> Answer:
    run = world.held()
    waiting = world.client.resume(run["sessionId"], "x", wait=0, ifBusy="enqueue")
    try:
        return world.client.request(call.method, call.path.replace(NOWHERE, waiting["id"]), call.body)
    finally:
        for each in (waiting, run):
            world.client.delete(f"/api/runs/{each['id']}")


def deaf(*prompts: str) -> Callable[[Call, World, pytest.MonkeyPatch], Answer]:
    """Return a function that sends messages to a run that reads nothing, and returns the answer to the last one."""

    def send(call: Call, world: World, monkeypatch: pytest.MonkeyPatch) -> Answer:
        monkeypatch.setattr("ccm.core.claude.termination.INTERRUPT_TIMEOUT", 0.3)
        run = world.held(messages=[{"type": "a"}], hold=True, deaf=True)
        world.client.wait_for_message(run["id"], "a")
        path = call.path.replace(NOWHERE, run["id"])
        for prompt in prompts:
            put = partial(world.client.request, call.method, path, {"prompt": prompt})
            answer = patiently(monkeypatch, "ccm.core.runs.input.WRITE_TIMEOUT", put)
        world.client.delete(f"/api/runs/{run['id']}")
        return answer

    return send


def resolved(call: Call, world: World, _: pytest.MonkeyPatch) -> Answer:
    prompt = script(ask=[{"tool_name": "Bash", "input": {"command": "ls"}}])
    run = world.client.start(world.folder, prompt, wait=0, approvals=True)
    [approval] = world.client.get("/api/approvals", runId=run["id"], wait=60).json
    path = call.path.replace(NOWHERE, approval["id"])
    assert world.client.request(call.method, path, call.body).status == 200
    return world.client.request(call.method, path, call.body)


Special = Callable[[Call, World, pytest.MonkeyPatch], Answer]
SPECIAL: dict[tuple[str, str], Special] = {
    **{(name, "OPTION_FORBIDDEN"): policy("", options={"env": {}}) for name in STARTS},
    **{(name, "CWD_FORBIDDEN"): policy("roots") for name in STARTS},
    **{(name, "TIMEOUT_FORBIDDEN"): policy("", timeoutMs=5_000) for name in STARTS},
    **{(name, "WEBHOOK_FORBIDDEN"): policy("hosts", webhookUrl="http://evil.example/") for name in STARTS},
    **{(name, "IDEMPOTENCY_KEY_REUSED"): key_reused for name in STARTS},
    **{(name, "OUT_OF_DESCRIPTORS"): no_descriptors for name in STARTS},
    **{(name, "SESSION_BUSY"): busy for name in ("resumeRun", "forkRun")},
    **{(name, "SESSION_NOT_RESUMABLE"): not_resumable for name in ("resumeRun", "forkRun")},
    ("forkRun", "RUN_NOT_FOUND"): no_run_in_session,
    ("cancelRun", "RUN_ALREADY_ENDED"): ended,
    ("sendInput", "RUN_ALREADY_ENDED"): ended,
    ("cancelRun", "STILL_ENDING"): still_ending,
    ("sendInput", "RUN_ENDING"): still_ending,
    ("sendInput", "RUN_NOT_STARTED"): not_started,
    ("sendInput", "OUTCOME_UNKNOWN"): deaf("x"),
    ("sendInput", "NOT_TAKEN_IN"): deaf("x" * 500_000, "x"),
    ("answerApproval", "APPROVAL_ALREADY_RESOLVED"): resolved,
}
FULL = ("QUEUE_FULL", "APPROVALS_FORBIDDEN")


@pytest.mark.parametrize("error", DOCUMENTED, ids=[f"{error.operation} {error.code}" for error in DOCUMENTED])
def test_each_documented_error_is_given(
    error: Reached, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CALLS[error.operation]
    special = SPECIAL.get((error.operation, error.code))
    if special is not None:
        answer = special(call, world_of(request), monkeypatch)
    elif error.code in FULL:
        full: World = request.getfixturevalue("full")
        answer = full.start(call.operation, approvals=error.code == "APPROVALS_FORBIDDEN")
    elif error.code in SERVER:
        answer = SERVER[error.code](call, request)
    else:
        answer = ANY[error.code](call, request, monkeypatch)

    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (error.status, error.code), answer.body
