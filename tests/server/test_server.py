"""The listener's thread: after a failure in it clients can still connect, or the service logs the cause and stops."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waitress import wasyncore

from ccm.server import connections, server
from ccm.server.connections import Channel, open_server, serve
from ccm.testing.service_process import APP, ServiceProcess
from tests.waiting import until

# Starts the service as app.py does. Opening the pipe $BREAK breaks its listening socket.
BREAKABLE = """
import os, socket, sys, threading
import app
from ccm.server import server

def open_server(app, bound, *args, open_server=server.open_server, **settings):
    def wait():
        open(os.environ["BREAK"]).close()
        bound.shutdown(socket.SHUT_RDWR)
    threading.Thread(target=wait, daemon=True).start()
    return open_server(app, bound, *args, **settings)

server.open_server = open_server
sys.exit(app.main())
"""


class Listening:
    """A waitress server for a small app, with the thread that runs its loop."""

    def __init__(self) -> None:
        self.bound = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.bound.getsockname()[1]
        self.server = open_server(self._app, self.bound, Channel, threads=2, asyncore_use_poll=True)
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
        """Close all sockets, within the loop if it runs, because it ends with its last socket."""
        if self.thread.is_alive():
            # An earlier wake-up may run this, and close the trigger, before it is pulled.
            with contextlib.suppress(OSError):
                self.server.trigger.pull_trigger(lambda: wasyncore.close_all(self.server._map))
            self.thread.join(30)
        wasyncore.close_all(self.server._map)
        self.server.task_dispatcher.shutdown(timeout=30)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    monkeypatch.setattr(connections, "ACCEPT_DELAY", 0.05)
    listening = Listening()
    yield listening
    listening.close()


def test_the_header_and_the_first_part_of_the_body_are_sent_together(listening: Listening) -> None:
    sent: list[bytes] = []

    class Recording(server._Channel):
        def send(self, data: bytes, *args: Any, **named: Any) -> int:
            sent.append(bytes(data))
            return int(super().send(data, *args, **named))

    listening.server.channel_class = Recording
    listening.thread.start()

    assert listening.ask() == b"ok"
    (answer,) = sent
    assert answer.endswith(b"\r\n\r\nok")


def test_the_thread_that_has_waited_least_is_woken() -> None:
    lock = threading.Lock()
    condition = server.NewestFirst(lock)
    woken: queue.Queue[int] = queue.Queue()

    def wait(number: int) -> None:
        with lock:
            condition.wait()
            woken.put(number)

    threads = [threading.Thread(target=wait, args=(number,), daemon=True) for number in range(3)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        until(lambda waiting=number: len(condition._waiting) == waiting)  # type: ignore[misc]
    with lock:
        condition.notify()
    assert woken.get(timeout=60) == 2
    with lock:
        condition.notify_all()
        condition.notify()  # nobody waits
    assert {woken.get(timeout=60), woken.get(timeout=60)} == {0, 1}


def test_a_failing_loop_is_logged_once_and_restarted(
    listening: Listening, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter(range(3))

    def fail(now: float) -> None:
        for _ in failures:
            listening.server.next_channel_cleanup = 0  # again in the next round
            raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(listening.server, "maintenance", fail)
    listening.thread.start()

    assert listening.ask() == b"ok"
    assert next(failures, None) is None
    assert [record.message for record in caplog.records if record.exc_info] == [
        "the listener's loop failed and is restarted"
    ]


def test_a_failing_new_connection_does_not_close_the_listening_socket(
    listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Channel):
        def __init__(self, _server: Any, connection: socket.socket, *_args: Any, **_named: Any) -> None:
            listening.server.channel_class = Channel
            connection.close()  # caplog keeps the traceback and with it the connection
            raise MemoryError

    listening.server.channel_class = Failing
    listening.thread.start()

    with pytest.raises((OSError, http.client.HTTPException)):
        listening.ask()
    assert listening.ask() == b"ok"
    assert listening.ask() == b"ok"
    assert [record.message for record in caplog.records if record.exc_info] == [
        "a new connection failed and was dropped"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports a listening socket that was shut down")
def test_the_loop_ends_when_its_listening_socket_breaks(listening: Listening, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="ccm")
    listening.thread.start()
    assert listening.ask() == b"ok"

    listening.bound.shutdown(socket.SHUT_RDWR)
    listening.thread.join(30)

    assert not listening.thread.is_alive()
    assert caplog.messages == ["the listening socket is closed: no client can connect"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports a listening socket that was shut down")
def test_a_service_whose_listening_socket_breaks_logs_it_and_exits(environ: dict[str, str], tmp_path: Path) -> None:
    pipe = tmp_path / "break"
    os.mkfifo(pipe)
    own = {"DATABASE_PATH": str(tmp_path / "db.sqlite"), "BREAK": str(pipe), "PYTHONPATH": str(APP.parent)}
    with ServiceProcess(environ | own, through=(sys.executable, "-c", BREAKABLE)) as service:
        pipe.write_text("")
        code = service.process.wait(60)
    assert code == 1
    assert [line for line in service.log if "ERROR" in line and "the listening socket is closed" in line]
    assert service.log[-1].endswith("stopped")
