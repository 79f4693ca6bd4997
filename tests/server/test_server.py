"""The thread that listens: whatever happens in it, clients can connect, or the service ends and says so."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waitress import wasyncore

from ccm.server import connections
from ccm.server.connections import Channel, open_server, serve
from ccm.testing.service_process import APP, ServiceProcess

# Starts the service as app.py does. When somebody opens the pipe $BREAK, the socket that it listens on breaks.
BREAKABLE = """
import os, socket, sys, threading
import app, ccm.server

def open_server(app, bound, *args, open_server=ccm.server.open_server, **settings):
    def wait():
        open(os.environ["BREAK"]).close()
        bound.shutdown(socket.SHUT_RDWR)
    threading.Thread(target=wait, daemon=True).start()
    return open_server(app, bound, *args, **settings)

ccm.server.open_server = open_server
sys.exit(app.main())
"""


class Listening:
    """A server of waitress over a small app, with the thread that serves it."""

    def __init__(self) -> None:
        self.bound = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.bound.getsockname()[1]
        self.server = open_server(self._app, self.bound, Channel, 2, asyncore_use_poll=True)
        self.thread = threading.Thread(target=serve, args=(self.server,), daemon=True)

    @staticmethod
    def _app(_environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    def ask(self) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read()
        finally:
            connection.close()

    def close(self) -> None:
        """Close all, in the loop if that runs: it ends with its last socket."""
        if self.thread.is_alive():
            self.server.trigger.pull_trigger(lambda: wasyncore.close_all(self.server._map))
            self.thread.join(30)
        wasyncore.close_all(self.server._map)
        self.server.task_dispatcher.shutdown(timeout=30)


@pytest.fixture
def subscribe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    monkeypatch.setattr(connections, "ACCEPT_DELAY", 0.05)
    listening = Listening()
    yield listening
    listening.close()


def test_a_fault_of_the_loop_is_logged_once_and_clients_are_answered(
    listening: Listening, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = iter(range(3))

    def look_through(now: float) -> None:
        for _ in faults:
            listening.server.next_channel_cleanup = 0  # again in the next round
            raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(listening.server, "maintenance", look_through)
    listening.thread.start()

    assert listening.ask() == b"ok"
    assert next(faults, None) is None
    assert [record.message for record in caplog.records if record.exc_info] == [
        "a round of the listener failed, the next one follows"
    ]


def test_a_fault_with_one_new_connection_does_not_close_the_listening_socket(
    listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Channel):
        def __init__(self, _server: Any, connection: socket.socket, *_args: Any, **_named: Any) -> None:
            listening.server.channel_class = Channel
            connection.close()  # the interpreter would, but caplog keeps the trace and so the connection
            raise MemoryError

    listening.server.channel_class = Failing
    listening.thread.start()

    with pytest.raises((OSError, http.client.HTTPException)):
        listening.ask()
    assert listening.ask() == b"ok"
    assert listening.ask() == b"ok"
    assert [record.message for record in caplog.records if record.exc_info] == [
        "a new connection could not be taken in"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says that a listening socket was shut down")
def test_a_loop_whose_socket_is_broken_ends(listening: Listening, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="ccm")
    listening.thread.start()
    assert listening.ask() == b"ok"

    listening.bound.shutdown(socket.SHUT_RDWR)
    listening.thread.join(30)

    assert not listening.thread.is_alive()
    assert caplog.messages == ["nobody can connect any more: the listening socket is closed"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says that a listening socket was shut down")
def test_a_service_that_nobody_can_connect_to_ends_and_says_so(environ: dict[str, str], tmp_path: Path) -> None:
    pipe = tmp_path / "break"
    os.mkfifo(pipe)
    own = {"DATABASE_PATH": str(tmp_path / "db.sqlite"), "BREAK": str(pipe), "PYTHONPATH": str(APP.parent)}
    with ServiceProcess(environ | own, through=(sys.executable, "-c", BREAKABLE)) as service:
        pipe.write_text("")
        code = service.process.wait(60)
    assert code == 1
    assert [line for line in service.log if "ERROR" in line and "nobody can connect any more" in line]
    assert service.log[-1].endswith("stopped")
