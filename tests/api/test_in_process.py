"""A request in process reaches the app exactly as waitress hands it over, so a test in process proves the same."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from waitress.server import create_server

from tests.api.conftest import connect, folder_of, read_all
from tests.api.in_process import InProcessClient, InProcessService, environ_of
from tests.client import Answer, Client
from tests.contract import Contract

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

# What differs between a socket and none: the ports, and the server's own name.
OF_THE_SOCKET = {"REMOTE_PORT", "SERVER_PORT", "SERVER_NAME", "SERVER_SOFTWARE"}


def echo(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """An app that answers with the environ and the body of its request."""
    seen: dict[str, Any] = {name: value for name, value in environ.items() if isinstance(value, str | tuple | bool)}
    seen["body"] = environ["wsgi.input"].read().decode("latin-1")
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(seen).encode()]


@pytest.fixture(autouse=True)
def without_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check no answer against the description of the API, because the echo app is not the service."""
    monkeypatch.setattr(Contract, "check", lambda *_: None)


def environ_in(answer: Answer) -> dict[str, Any]:
    return {name: value for name, value in answer.json.items() if name not in OF_THE_SOCKET}


@pytest.fixture(scope="module")
def served() -> Iterator[Client]:
    """A client of the echo app under waitress, which keeps `X-Forwarded-*` as the service's server does."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = create_server(echo, sockets=[bound], threads=1, clear_untrusted_proxy_headers=False)
        thread = threading.Thread(target=server.run, name="echo", daemon=True)
        thread.start()
        yield Client(f"http://127.0.0.1:{bound.getsockname()[1]}")
        server.trigger.pull_trigger(server.close)
        thread.join(60)
        server.task_dispatcher.shutdown()


@pytest.fixture(scope="module")
def called() -> InProcessClient:
    """A client of the echo app without a server."""
    return InProcessClient(echo)


REQUESTS: list[tuple[str, str, Any, dict[str, str]]] = [  # method, target, body, headers
    ("GET", "/", None, {}),
    ("HEAD", "/api/runs", None, {"host": "evil.example"}),
    ("GET", "/api/runs/x%00%ff%2Fy?limit=1&q=%00?&cursor=", None, {}),
    ("GET", "//two//slashes/../x?", None, {"X-Forwarded-For": "1.2.3.4, 5.6.7.8"}),
    ("GET", "no/slash", None, {}),
    ("GET", "/%2F/x", None, {}),
    ("DELETE", "/api/runs/x", None, {"Authorization": "Bearer \xe9\xff"}),
    ("POST", "/api/runs/start", {"prompt": "\u00e9"}, {}),
    ("POST", "/api/runs/start", b"{}", {"content-type": "text/plain", "Origin": ""}),
    ("POST", "/nothing", None, {"Content-Type": "text/plain"}),
    ("PATCH", "/x", None, {}),
    ("PUT", "/x", None, {}),
    ("OPTIONS", "/x", b"", {"X-Request-Id": " a\tb "}),
]


@pytest.mark.parametrize("request_parts", REQUESTS, ids=str)
def test_a_clients_request_reaches_the_app_as_over_a_socket(
    served: Client, called: InProcessClient, request_parts: tuple[str, str, Any, dict[str, str]]
) -> None:
    method, target, body, headers = request_parts
    sent = {"Host": "localhost"} if "host" not in headers else {}
    here = called.request(method, target, body, sent | headers)
    there = served.request(method, target, body, sent | headers)

    if method == "HEAD":
        assert here.status == there.status == 200
    else:
        assert environ_in(here) == environ_in(there)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Host", "")],
        [("Host", "localhost"), ("Host", "evil.example")],
        [("Host", "\xe9"), ("Host", "local host"), ("HOST", "")],
        [("X-A", "1"), ("Origin", "null"), ("x-a", "\t2 ")],
        [("Content-Type", "a/b"), ("Content-Type", "c/d")],
    ],
    ids=str,
)
def test_headers_reach_the_app_as_over_a_socket(
    served: Client, called: InProcessClient, headers: list[tuple[str, str]]
) -> None:
    lines = ["GET /?x HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "Connection: close", "", ""]
    with connect(served, "\r\n".join(lines).encode("latin-1")) as connection:
        head, body = read_all(connection)
    assert head.startswith(b"HTTP/1.1 200 ")

    here = called.send("GET", "/?x", [*headers, ("Connection", "close")])
    assert environ_in(here) == environ_in(Answer(200, {}, body))


@pytest.mark.parametrize(
    ("target", "header"),
    [
        ("http://localhost/", ("A", "x")),
        ("", ("A", "x")),
        ("/a b", ("A", "x")),
        ("/a#b", ("A", "x")),
        ("/", ("A", "a\x00b")),
        ("/", ("A", "a\r\nb: c")),
        ("/", ("A", "\u2028")),
        ("/", ("A_b", "x")),
        ("/", ("Bad Name", "x")),
    ],
)
def test_a_request_that_waitress_refuses_or_changes_needs_a_socket(target: str, header: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="needs a socket"):
        environ_of("GET", target, [header])


def test_a_service_in_process_runs_claude_code_and_lets_its_database_go(tmp_path: Path) -> None:
    project = folder_of(tmp_path)
    with InProcessService(tmp_path) as service:
        run = service.client.start(project, "Hello.")
        assert [run["status"], len(service.client.messages(run["id"]))] == ["completed", run["messageCount"]]
        assert any("POST /api/runs/start 200" in line for line in service.log)
    with InProcessService(tmp_path) as service:
        assert service.client.run(run["id"]) == run
