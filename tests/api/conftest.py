"""Shared by the tests of the HTTP API: services for a whole test file, checks of error answers, raw connections."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from ccm.testing.service_process import APP, ServiceProcess
from tests.client import Answer, Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.postgresql import new_database

# A valid id without a run or session.
NOWHERE = "00000000-0000-4000-8000-000000000000"


def write_tokens(file: Path, text: str, mode: int = 0o600) -> None:
    """Write the file for CCM_API_TOKEN_FILE with an exact mode, independent of the umask."""
    file.write_text(text)
    file.chmod(mode)


@pytest.fixture(scope="module")
def serve_all(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeFunction]:
    """Return a function that starts a service with the stand-in CLI for a whole test file; then stop and check them."""
    folder = tmp_path_factory.mktemp("services")
    own = {"HOME": str(folder), "CCM_CLI_PATH": str(stand_in_cli(folder)), "LOG_LEVEL": "debug"}
    services: list[ServiceProcess] = []
    with ExitStack() as stack:

        def start(**settings: object) -> ServiceProcess:
            database = {"DATABASE_PATH": str(folder / f"db-{len(services)}.sqlite")}
            given = {name: str(value) for name, value in settings.items()}
            services.append(stack.enter_context(ServiceProcess(environ | own | database | given)))
            return services[-1]

        yield start
        for service in services:
            service.process.terminate()  # all in parallel
        for service in services:
            service.wait()  # before the exit stack's own signal, because a second signal interrupts the shutdown
    for service in services:
        assert stack_traces(service) == []


@pytest.fixture(scope="module")
def lite(serve_all: ServeFunction) -> Client:
    """Start a service on SQLite; return its client. Each test uses its own directory, and thus its own runs."""
    return Client(serve_all().url)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def api(request: pytest.FixtureRequest, serve_all: ServeFunction, lite: Client) -> Client:
    """Return a client of a service on each kind of database."""
    if request.param == "sqlite":
        return lite
    return Client(serve_all(DATABASE_URL=new_database(request.getfixturevalue("postgresql"))).url)


def stack_traces(service: ServiceProcess) -> list[str]:
    """Return the log lines that begin a stack trace."""
    return [line for line in service.log if "Traceback" in line]


def refused(answer: Answer, field: str | None = None, status: int = 400, code: str = "VALIDATION_ERROR") -> str:
    """Check the status, code and field of an error answer; return its message."""
    assert answer.status >= 400, f"accepted: {answer.body[:300]!r}"
    assert [answer.status, answer.error["code"], answer.error.get("field")] == [status, code, field], answer.body
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"]
    assert str(APP.parent) not in answer.body.decode()
    return answer.error["message"]


def script(*messages: dict[str, Any], **fields: Any) -> str:
    """Return a prompt that makes the stand-in CLI write these messages before its result."""
    return json.dumps({"messages": messages, **fields})


def ids(answer: Answer, name: str = "id") -> list[str]:
    assert answer.status == 200, answer.body
    return [item[name] for item in answer.json]


def pages(client: Client, path: str | None) -> list[list[dict[str, Any]]]:
    """Return all pages of a list by its Link headers."""
    found: list[list[dict[str, Any]]] = []
    while path is not None:
        answer = client.get(path)
        assert answer.status == 200, answer.body
        found.append(answer.json)
        path = answer.next
        assert len(found) < 1000
    return found


def link(answer: Answer) -> dict[str, str]:
    """Return the query of the next page."""
    assert answer.next is not None, "there is no Link"
    return {name: value for name, (value,) in parse_qs(urlsplit(answer.next).query, strict_parsing=True).items()}


def ids_of(items: list[dict[str, Any]], name: str = "id") -> list[str]:
    return [item[name] for item in items]


def kinds(letters: str) -> list[dict[str, Any]]:
    """Return one message for each letter, with the letter as its type and its index in `n`."""
    return [{"type": letter, "n": number} for number, letter in enumerate(letters)]


def letters(messages: list[dict[str, Any]]) -> str:
    return "".join(message["type"][0] for message in messages)


def held(client: Client, cwd: Path, types: str = "a") -> dict[str, Any]:
    """Start a run that writes messages of the given types and then holds; return it after the last message."""
    run = client.start(cwd, script(*kinds(types), hold=True), wait=0)
    client.wait_for_message(run["id"], types[-1])
    return run


def connect(client: Client, *parts: bytes) -> socket.socket:
    """Open a connection, send the bytes unchanged and return it."""
    connection = socket.create_connection((client.host, client.port), timeout=60)
    for part in parts:
        connection.sendall(part)
    return connection


def post_head(path: str, *headers: str) -> bytes:
    """Return the head of a POST request with a JSON body."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


def read_all(connection: socket.socket, answer: bytes = b"") -> tuple[bytes, bytes]:
    """Read until the service closes the connection; return head and body. `answer` holds the bytes already read."""
    try:
        while received := connection.recv(2**16):
            answer += received
    except ConnectionResetError:
        assert answer, "the connection was reset before any byte of the answer"
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def folder_of(path: Path, name: str = "project") -> Path:
    """Create a directory for agents to work in."""
    folder = path / name
    folder.mkdir()
    return folder


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Sets the umask for a block, and for the processes that it starts."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
