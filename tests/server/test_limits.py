"""Limits on clients, with real services: time, size of headers, connections, descriptors."""

from __future__ import annotations

import http.client
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ccm.testing.service_process import APP, ServiceProcess
from tests.api.conftest import connect, held, read_all, script
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.event_source import Stream
from tests.flask_commands import call
from tests.waiting import until

# Starts app.py with short timeouts for slow clients.
IMPATIENT = """
import runpy, sys
from ccm.server import connections
connections.HEADER_TIMEOUT, connections.REQUEST_TIMEOUT = 1.0, 2.0
connections.IDLE_TIMEOUT, connections.POLL_INTERVAL = 1, 0.2
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def impatient(serve: ServeFunction, home: Path) -> Client:
    own = {"PYTHONPATH": APP.parent, "CCM_CLI_PATH": stand_in_cli(home), "CCM_MAX_HELD": 2}
    return Client(serve(sys.executable, "-c", IMPATIENT, **own).url)


def limited(*words: str) -> tuple[str, ...]:
    """Return a command that starts a service under a limit of open files; `words` are arguments of `ulimit`."""
    return ("sh", "-c", f'ulimit {" ".join(words)} && exec "$@"', "sh")


# ---- slow clients


@pytest.mark.parametrize(
    "head",
    [b"GET / HTTP/1.1\r\nX-Slow: ", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n"],
    ids=["headers", "body"],
)
def test_a_client_that_sends_single_bytes_slowly_is_disconnected(impatient: Client, head: bytes) -> None:
    with connect(impatient, head) as connection:
        connection.settimeout(0.1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                connection.sendall(b"x")
                if not connection.recv(1):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it is never disconnected")


def test_a_silent_client_is_disconnected(impatient: Client) -> None:
    with connect(impatient) as silent, connect(impatient, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") as idle:
        assert silent.recv(1) == b""
        assert read_all(idle)[0].startswith(b"HTTP/1.1 200")


def test_slow_clients_hold_no_thread(impatient: Client) -> None:
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(impatient, b"GET / HTTP/1.1\r\nX-Slow: "))
        assert impatient.request("GET", "/health").status == 200


def test_a_client_that_reads_no_answer_frees_its_slot(impatient: Client, project: Path) -> None:
    run = impatient.start(project, script(count=20, pad=2**20))
    request = f"GET /api/runs/{run['id']}/messages HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with connect(impatient, request) as one, connect(impatient, request) as other:
        assert [one.recv(12), other.recv(12)] == [b"HTTP/1.1 200"] * 2
        assert impatient.get(f"/api/runs/{run['id']}/stream").status == 503
        until(lambda: impatient.get(f"/api/runs/{run['id']}/stream").status == 200)


def test_a_client_that_waits_for_a_run_or_a_stream_stays_connected(impatient: Client, project: Path) -> None:
    run = held(impatient, project)
    began = time.monotonic()
    assert impatient.run(run["id"], wait=3)["status"] == "running"
    assert time.monotonic() - began >= 3
    with Stream(impatient, f"/api/runs/{run['id']}/stream") as stream:
        assert stream.take(1)[0].id == "0"
        impatient.run(run["id"], wait=0)
        time.sleep(3)  # longer than the limit for slow clients
        impatient.delete(f"/api/runs/{run['id']}")
        assert [event.type for event in stream][-1] == "end"


def test_large_headers_are_refused(client: Client) -> None:
    answer = client.request("GET", "/", headers={"X-Large": "x" * 70_000})
    assert [answer.status, answer.error["code"]] == [431, "HEADERS_TOO_LARGE"]
    assert client.request("GET", "/", headers={"X-Large": "x" * 60_000}).status == 200


# ---- descriptors


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def at_rest(service: ServiceProcess, seconds: float = 3) -> Iterator[None]:
    """Check after the block that the service neither spins nor floods its log."""
    yield
    lines = len(service.log)
    before = cpu_seconds(service.process.pid)
    time.sleep(seconds)
    assert cpu_seconds(service.process.pid) - before < seconds / 4
    assert len(service.log) - lines < 10, "\n".join(service.log[lines:])


def test_connections_beyond_the_limit_wait_and_runs_still_start(
    serve: ServeFunction, home: Path, project: Path
) -> None:
    service = serve(*limited("-n", "320"), CCM_CLI_PATH=stand_in_cli(home))
    client = Client(service.url)
    assert [line for line in service.log if "the limit of 320 open files leaves 33 connections" in line]
    inside = client.connection()
    inside.connect()
    with ExitStack() as stack, at_rest(service):
        for _ in range(200):
            stack.enter_context(connect(client))
        runs = [start(inside, project, hold=True) for _ in range(8)]
        assert [status for status, _ in runs] == [202] * 8
        for _, run in runs:
            assert ask(inside, "DELETE", f"/api/runs/{run['id']}")[1]["status"] == "cancelled"
    assert client.get("/health").status == 200
    inside.close()


def test_a_service_does_not_start_under_too_low_a_limit(environ: dict[str, str], tmp_path: Path) -> None:
    words = [*limited("-n", "200"), sys.executable, "app.py"]
    result = call(words, environ, PORT=0, DATABASE_PATH=tmp_path / "db.sqlite")

    assert result.returncode == 2
    assert "raise the limit to at least 294" in result.stderr


def test_the_limit_is_raised_for_the_service_but_not_for_its_agents(
    serve: ServeFunction, home: Path, project: Path, tmp_path: Path
) -> None:
    agent = tmp_path / "agent"
    # The service lowers the limit when it has started the program.
    wait = 'until [ "$(ulimit -Sn)" = 400 ]; do :; done'
    agent.write_text(f'#!/bin/sh\n{wait}\necho lowered > {tmp_path}/limit\nexec {stand_in_cli(home)} "$@"\n')
    agent.chmod(0o755)
    service = serve(*limited("-Sn", "400"), CCM_CLI_PATH=agent)

    soft, hard = resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard
    assert Client(service.url).start(project, "hello")["status"] == "completed"
    assert (tmp_path / "limit").read_text() == "lowered\n"


def test_a_start_without_descriptors_is_refused_and_not_stored(serve: ServeFunction, home: Path, project: Path) -> None:
    service = serve(CCM_CLI_PATH=stand_in_cli(home))
    connection = Client(service.url).connection()
    assert ask(connection, "GET", "/api/runs") == (200, [])
    with short_of_descriptors(service, left=4):
        status, body = start(connection, project)
        assert [status, body["error"]["code"]] == [503, "OUT_OF_DESCRIPTORS"]
    assert ask(connection, "GET", "/api/runs") == (200, [])
    assert start(connection, project)[0] == 202
    connection.close()


def test_without_a_descriptor_for_a_connection_the_service_does_not_spin(serve: ServeFunction) -> None:
    service = serve()
    client = Client(service.url)
    assert client.get("/health").status == 200  # the service has now opened all its own files
    with short_of_descriptors(service, left=0), ExitStack() as stack:
        with at_rest(service):
            for _ in range(20):  # some get a free descriptor below the limit
                stack.enter_context(connect(client))
        until(lambda: [line for line in service.log if "cannot accept new connections" in line])
    assert client.get("/health").status == 200
    assert [line for line in service.log if "new connections are accepted again" in line]


def start(connection: http.client.HTTPConnection, cwd: Path, **words: object) -> tuple[int, Any]:
    return ask(connection, "POST", "/api/runs/start", {"cwd": str(cwd), "prompt": script(**words)})


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Send a request on a connection that stays open; return the status and the body of the answer."""
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@contextmanager
def short_of_descriptors(service: ServiceProcess, left: int) -> Iterator[None]:
    """Limit a running service to `left` descriptors above its highest one; free lower ones stay usable."""
    until(lambda: [line for line in service.log if "SDK is imported" in line])  # the import opens files
    pid = service.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1 + left, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
