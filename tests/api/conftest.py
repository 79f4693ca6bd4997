"""What the tests of the HTTP API share: services for a whole file of tests, refusals taken apart, raw connections."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ccm.testing.service_process import APP, ServiceProcess
from tests.client import Answer, Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.postgresql import new_database

# Well formed, and of no run and no session.
NOWHERE = "00000000-0000-4000-8000-000000000000"


def write_tokens(file: Path, text: str, mode: int = 0o600) -> None:
    """Write the file that CCM_API_TOKEN_FILE names, whatever the umask."""
    file.write_text(text)
    file.chmod(mode)


@pytest.fixture(scope="module")
def serve_all(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeFunction]:
    """Starts services for all tests of a file, with the stand-in CLI; ends them and reads their logs afterwards."""
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
            service.process.terminate()  # all at once
        for service in services:
            service.wait()  # before the stack's own signal, for a second one ends a service in the middle of its stop
    for service in services:
        assert stack_traces(service) == []


@pytest.fixture(scope="module")
def lite(serve_all: ServeFunction) -> Client:
    """A client of a service on SQLite. Each test has a directory of its own, and so its own runs."""
    return Client(serve_all().url)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def api(request: pytest.FixtureRequest, serve_all: ServeFunction, lite: Client) -> Client:
    """A client of a service on each kind of database."""
    if request.param == "sqlite":
        return lite
    return Client(serve_all(DATABASE_URL=new_database(request.getfixturevalue("postgresql"))).url)


def stack_traces(service: ServiceProcess) -> list[str]:
    """The lines of a service's log that begin one."""
    return [line for line in service.log if "Traceback" in line]


def refused(answer: Answer, field: str | None = None, status: int = 400, code: str = "VALIDATION_ERROR") -> str:
    """The message of a refusal, which has a status, a code and the field at fault."""
    assert answer.status >= 400, f"accepted: {answer.body[:300]!r}"
    assert [answer.status, answer.error["code"], answer.error.get("field")] == [status, code, field], answer.body
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"]
    assert str(APP.parent) not in answer.body.decode()
    return answer.error["message"]


def script(*messages: dict[str, Any], **fields: Any) -> str:
    """A prompt that has the stand-in CLI say these messages before its result."""
    return json.dumps({"messages": messages, **fields})


def kinds(letters: str) -> list[dict[str, Any]]:
    """Messages of the types a, b, c...; `n` is the place of each."""
    return [{"type": letter, "n": number} for number, letter in enumerate(letters)]


def letters(messages: list[dict[str, Any]]) -> str:
    return "".join(message["type"][0] for message in messages)


def held(client: Client, cwd: Path, said: str = "a") -> dict[str, Any]:
    """A run that says something and then goes on until it is cancelled."""
    run = client.start(cwd, script(*kinds(said), hold=True), wait=0)
    client.wait_for_message(run["id"], said[-1])
    return run


def connect(client: Client, *parts: bytes) -> socket.socket:
    """A connection of its own on which bytes have been sent as they are."""
    connection = socket.create_connection((client.host, client.port), timeout=60)
    for part in parts:
        connection.sendall(part)
    return connection


def announced(path: str, *headers: str) -> bytes:
    """The head of a POST of JSON."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


def read_all(connection: socket.socket, said: bytes = b"") -> tuple[bytes, bytes]:
    """Head and body of what the service says until it closes the connection; `said` has been read already."""
    try:
        while received := connection.recv(2**16):
            said += received
    except ConnectionResetError:
        assert said, "the connection was reset before anything was said"
    head, _, body = said.partition(b"\r\n\r\n")
    return head, body


def folder_of(path: Path, name: str = "project") -> Path:
    """A new directory for agents to work in."""
    folder = path / name
    folder.mkdir()
    return folder
