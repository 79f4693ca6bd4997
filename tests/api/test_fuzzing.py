"""Requests that no client would make, over a socket: none fails the service, hangs, or leaves anything behind."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ccm.testing.service_process import ServiceProcess
from tests.api.conftest import folder_of, read_all, stack_traces
from tests.client import Client
from tests.conftest import ServeFunction
from tests.e2e.test_runs import PNG
from tests.fuzzer import Conversation, Fuzzer
from tests.waiting import until

SEED = os.environ.get("FUZZ_SEED", "1")
CONNECTIONS = 8
# The time within which each connection has to be answered and closed, on a busy machine too.
SECONDS = 60
STATUS = re.compile(rb"(?:\A|(?<=\n))HTTP/1\.[01] (\d{3}) ")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) [\w.]+: ")


class World:
    """A service, and the bodies and paths that requests can use."""

    def __init__(self, service: ServiceProcess, folder: Path) -> None:
        self.service = service
        self.client = Client(service.url)
        asked = json.dumps({"count": 1, "ask": [{"tool_name": "Bash"}]})
        run = self.client.start(folder, asked, approvals=True, approvalTimeoutMs=1)
        (approval,) = self.client.get(f"/api/runs/{run['id']}/approvals").json
        for _ in range(3):  # side by side, so that each worker has worked once
            self.client.start(folder, "Hello.", wait=0)
        self.settle()
        message = self.client.messages(run["id"], type="assistant")[0]["uuid"]
        common = {
            "prompt": "hello",
            "approvals": True,
            "approvalTimeoutMs": 1_000,
            "images": [{"mediaType": "image/png", "data": PNG}],
            "options": {
                "model": "x",
                "maxTurns": 3,
                "thinking": {"type": "enabled", "budgetTokens": 1},
                "tools": ["Read"],
            },
        }
        session = {"title": "x", "metadata": {"x": [1, {"y": None}]}}
        place, session_id = {"cwd": str(folder)}, {"sessionId": run["sessionId"]}
        self.bodies: dict[str, dict[str, Any]] = {
            "/api/runs/start": common | session | place,
            "/api/runs/resume": common | session_id | {"ifBusy": "enqueue"},
            "/api/runs/fork": common | session | place | session_id | {"atRunId": run["id"], "atMessage": message},
            f"/api/sessions/{run['sessionId']}": session,
            f"/api/approvals/{approval['id']}": {"decision": "deny", "message": "x", "interrupt": True},
        }
        runs, sessions = f"/api/runs/{run['id']}", f"/api/sessions/{run['sessionId']}"
        self.paths = [
            *(
                "/",
                "/health",
                "/api/runs",
                "/api/sessions",
                "/api/runs/x",
                "/api/sessions/\xe9",
                "/nothing",
                "*",
                "x",
                "",
            ),
            *(runs, f"{runs}/messages", f"{runs}/stream", *self.bodies),
            *("/api/approvals", "/api/approvals?status=pending", f"{runs}/approvals"),
            *(sessions, f"{sessions}/messages", f"{sessions}/runs", f"{sessions}/forks"),
        ]

    def settle(self) -> None:
        """Wait until no run is running."""
        until(lambda: not self.client.get("/api/runs", status="running").json, 120)

    def footprint(self) -> dict[str, int]:
        """The service's threads, descriptors and processes; without its pool of connections to the database."""
        process = Path("/proc", str(self.service.process.pid))
        while True:
            try:
                children = [child for task in process.glob("task/*/children") for child in task.read_text().split()]
                links = [os.readlink(link) for link in (process / "fd").iterdir()]
                return {
                    "threads": len(os.listdir(process / "task")),
                    "descriptors": len([link for link in links if ".sqlite" not in link]),
                    "processes": len(children),
                }
            except FileNotFoundError:
                if not process.exists():
                    raise  # the service itself has gone, not a descriptor or thread since it was listed

    def is_as_before(self, before: dict[str, int]) -> bool:
        return all(count <= before[name] for name, count in self.footprint().items())

    def conversations(self, requests: int) -> list[Conversation]:
        made: list[Conversation] = []
        while requests > 0:
            made.append(Fuzzer(f"{SEED}-{len(made)}", self.bodies, self.paths).conversation())
            requests -= len(made[-1].requests)
        return made

    def hold(self, conversation: Conversation) -> bytes:
        """The service's answers to a conversation."""
        with socket.create_connection((self.client.host, self.client.port), timeout=SECONDS) as connection:
            try:
                connection.sendall(b"".join(conversation.requests))
                if not conversation.whole:
                    if len(conversation.requests) % 2:
                        # Closed at once, so that the service gets a reset.
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return b""
                    connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # refused and closed before all was sent; the answers can still be read
            try:
                return b"\r\n\r\n".join(read_all(connection))
            except AssertionError:
                return b""  # closed without an answer


@pytest.fixture(scope="module")
def world(serve_all: ServeFunction, tmp_path_factory: pytest.TempPathFactory) -> World:
    own = {"CCM_MAX_CONCURRENT_RUNS": 2, "CCM_MAX_QUEUED_RUNS": 5, "CCM_MAX_BODY_BYTES": 2**16}
    return World(serve_all(**own), folder_of(tmp_path_factory.mktemp("fuzzing")))


@pytest.mark.parametrize("requests", [2_000, pytest.param(20_000, marks=pytest.mark.many_rounds)])
def test_odd_requests_leave_the_service_as_it_was(world: World, requests: int) -> None:
    before = world.footprint()
    conversations = world.conversations(requests)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        answers = list(pool.map(world.hold, conversations))

    statuses = Counter(status.decode() for answer in answers for status in STATUS.findall(answer))
    failed = [number for number, answer in enumerate(answers) if b"500" in STATUS.findall(answer)]
    assert failed == [], f"of the seed {SEED}"
    assert {"200", "202", "400", "403", "404", "405", "413", "415"} <= set(statuses), "some kinds of answers never came"
    assert stack_traces(world.service) == []
    assert [line for line in world.service.log if not LOG_LINE.match(line) or not line.isprintable()] == []
    world.settle()
    until(lambda: world.is_as_before(before))
    assert world.client.get("/health").json == {"status": "ok"}
    assert world.client.get("/api/runs", limit=1).status == 200
