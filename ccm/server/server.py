"""The server itself: errors in JSON, early notice of clients that leave, and a graceful stop.

It uses waitress's private parts, as server/connections.py does; tests/contracts/test_waitress.py names them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from types import FrameType

from flask import Flask
from waitress import wasyncore
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

from ccm import file_limits
from ccm.core.service import Service
from ccm.errors import BadRequest, CCMError, HeadersTooLarge, InternalError, OutOfDisk, TooLarge, UnknownCoding
from ccm.server.connections import LARGE_CHUNK_BYTES, Channel, Parser, open_server, serve

log = logging.getLogger(__name__)

# Threads for requests that are answered at once, in addition to one for each request that may be held open. Without
# them an answer to an approval would queue behind the requests that wait for it.
PLAIN_THREADS = 16
# Connections in addition to one for each thread. An idle one costs a descriptor and no thread.
IDLE_CONNECTIONS = 1000
# Far more than this API's requests have, and more than proxies let through.
MAX_HEADER_BYTES = 2**16
# Bytes of an answer that may be buffered for its client before its thread has to wait. Waitress's default of 16 MiB
# would be gigabytes with hundreds of slow readers, and transfers a long list no faster.
UNSENT_BYTES = 2**18
# The poll event for a client that has closed its end, even if requests of it are still unread. Only Linux has it; other
# systems report broken connections only.
HANGUP_EVENT: int = getattr(select, "POLLRDHUP", select.POLLHUP)
# How many heaps the threads share, and glibc's number of that option (M_ARENA_MAX in malloc.h).
HEAPS = 2
HEAPS_OPTION = -8
# The byte that wakes the main thread when the listener has ended without being stopped. No signal has this number.
LISTENER_FAILED = b"\0"
# Seconds that answers in flight may take when the service stops.
DRAIN_TIMEOUT = 5.0

# The errors that waitress itself answers, by HTTP status.
ERRORS: dict[int, CCMError] = {
    error.status: error
    for error in (
        TooLarge("The body is larger than CCM_MAX_BODY_BYTES allows."),
        HeadersTooLarge("The headers are too large."),
        InternalError("The service failed. Its log says more."),
        UnknownCoding("This transfer coding is not supported."),
        OutOfDisk(
            "The service has no room for temporary files and cannot take so large a body; nothing was stored. Try "
            "again."
        ),
    )
}
OTHER_ERROR = BadRequest("The request is no valid HTTP.")


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]  # waitress has no type hints
    """The answer to a request that waitress refuses before the app sees it, in the API's error format."""

    def execute(self) -> None:
        status, reason = self.request.error.code, self.request.error.reason
        error = ERRORS.get(status, OTHER_ERROR)
        body = json.dumps(error.to_json()).encode() + b"\n"
        self.status = f"{status} {reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Request-Id", uuid.uuid4().hex)]
        if error.retry_after is not None:
            self.response_headers.append(("Retry-After", str(error.retry_after)))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):  # type: ignore[misc]
    wrote_header: bool

    def write(self, data: bytes) -> None:
        """Write a part of the body. The first one is sent with the header, which waitress would send by itself."""
        short = 0 < len(data) < LARGE_CHUNK_BYTES
        begins = self.complete and not self.wrote_header
        if begins and short and self.has_body and self.content_length != 0:
            self.channel.header = self.build_response_header()
            self.wrote_header = True
        super().write(data)

    def finish(self) -> None:
        """Finish the answer. Omit the final chunk of an answer to HEAD: waitress would send it without a body."""
        if not self.wrote_header:
            self.write(b"")
        if self.request.command == "HEAD":
            self.chunked_response = False
        super().finish()


class _Channel(Channel):
    parser_class = Parser
    task_class = _Task
    error_task_class = _JsonErrorTask
    # The header of an answer, until the first part of the body is written.
    header = b""

    def write_soon(self, data: bytes) -> int:
        header, self.header = self.header, b""
        return super().write_soon(header + data if header else data)

    def check_client_disconnected(self) -> bool:
        """Return whether the client has gone.

        Polls the socket too: waitress stops reading once a second request is queued, and then misses the end of input.
        """
        if super().check_client_disconnected():
            return True
        socket = self.socket
        descriptor = -1 if socket is None else socket.fileno()
        if descriptor < 0:  # closed by the listener's thread
            return True
        poll = select.poll()
        poll.register(descriptor, HANGUP_EVENT)
        return bool(poll.poll(0))


class NewestFirst:
    """A condition that wakes the thread that has waited least.

    Its stack is still in the processor's caches, and those of the threads that are rarely needed take no memory.
    `threading.Condition` wakes them in turn.

    Args:
        lock: the lock that callers hold, and that `wait` releases meanwhile.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        # One locked lock for each waiting thread.
        self._waiting: list[threading.Lock] = []

    def wait(self) -> None:
        """Wait until another thread wakes this one."""
        turn = threading.Lock()
        turn.acquire()
        self._waiting.append(turn)
        self._lock.release()
        turn.acquire()
        self._lock.acquire()

    def notify(self) -> None:
        """Wake one thread, if any waits."""
        if self._waiting:
            self._waiting.pop().release()

    def notify_all(self) -> None:
        """Wake all waiting threads."""
        while self._waiting:
            self.notify()


def _dispatcher(threads: int) -> ThreadedTaskDispatcher:
    dispatcher = ThreadedTaskDispatcher()
    dispatcher.queue_cv = NewestFirst(dispatcher.lock)
    dispatcher.set_thread_count(threads)
    return dispatcher


def _share_heaps() -> None:
    """Make the threads share a few heaps, where the C library is glibc.

    It gives them eight per core otherwise, and each keeps the memory of the largest list that it has ever sent.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(HEAPS_OPTION, HEAPS)


class Server:
    """A listening server for an app and its service.

    Args:
        bound: a socket that is bound and does not listen yet.

    Raises:
        BadSetting: the limit of open files is too low for any connections.
    """

    def __init__(self, app: Flask, service: Service, bound: socket.socket) -> None:
        _share_heaps()  # before there are threads
        self._service = service
        settings = service.settings
        threads = settings.max_held + PLAIN_THREADS
        files = file_limits.raise_limit()
        wanted = threads + IDLE_CONNECTIONS
        runs = settings.max_concurrent_runs + settings.spare_runs + settings.warm_sessions
        connections = min(wanted, file_limits.connections_that_fit(files, runs))
        if connections < threads:
            log.warning(
                "the limit of %d open files leaves %d connections, fewer than CCM_MAX_HELD allows to hold open; "
                "raise it (ulimit -n, LimitNOFILE in systemd)",
                files,
                connections,
                extra={"event": "connections_limited"},
            )
        self._server = open_server(
            app,
            bound,
            _Channel,
            dispatcher=_dispatcher(threads),
            connection_limit=connections,
            max_request_header_size=MAX_HEADER_BYTES,
            max_request_body_size=settings.max_body_bytes + 1,  # the first size that waitress refuses
            # Keeps reading while a request is held open, to notice that its client has gone.
            channel_request_lookahead=1,
            outbuf_high_watermark=UNSENT_BYTES,
            outbuf_overflow=sys.maxsize,  # Channel puts large chunks into files, with a way out when the disk is full
            # select() fails on a descriptor above 1023, and every Claude Code process takes some.
            asyncore_use_poll=True,
            ident="cc-manager",
            clear_untrusted_proxy_headers=False,  # api/http/proxy.py does this, including X-Forwarded-Prefix
        )
        self._stop_requested = False

    def run(self, on_ready: Callable[[], None]) -> bool:
        """Serve until SIGTERM or SIGINT, then stop gracefully. A second signal exits at once.

        Also stops when the listener fails, because a supervisor can then restart the service.

        Args:
            on_ready: called once the server accepts connections and handles signals. What it raises is raised here,
                after a graceful stop.

        Returns:
            False if the listener failed, or if runs or writes had to be given up.
        """
        # The kernel may deliver a signal to any thread, but Python's handlers run in the main thread when it next
        # wakes. A byte on this socket, the signal's number, wakes it, whichever thread got the signal.
        waker, wakes = socket.socketpair()
        wakes.settimeout(0)
        signal.set_wakeup_fd(wakes.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._listen, args=(wakes,), name="listener", daemon=True).start()
        try:
            try:
                on_ready()
            except Exception:
                self._shut_down()
                raise
            failed = waker.recv(1) == LISTENER_FAILED
            return self._shut_down() and not failed
        finally:
            signal.set_wakeup_fd(-1)
            waker.close()
            wakes.close()

    def _listen(self, wakes: socket.socket) -> None:
        serve(self._server)
        with contextlib.suppress(OSError):  # the service has stopped in the meantime
            wakes.send(LISTENER_FAILED)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._stop_requested:
            raise SystemExit(128 + number)
        self._stop_requested = True

    def _shut_down(self) -> bool:
        """Stop in four steps. Return False if runs or writes had to be given up.

        1. The runs end. Clients can still connect: new runs get 503, and streams show how the others end.
        2. When the last final state is stored, `?wait=` requests are answered and streams are closed.
        3. The listening socket closes, and the answers in flight are sent.
        4. The database closes, last because those answers may read it.
        """
        log.info("stopping: interrupting the runs and storing their final states", extra={"event": "service_stopping"})
        clean = self._service.end_runs()
        # Not the server's own close(), which also closes the trigger that wakes the loop to send the answers in flight.
        self._server.trigger.pull_trigger(partial(wasyncore.dispatcher.close, self._server))
        deadline = time.monotonic() + DRAIN_TIMEOUT
        dispatcher = self._server.task_dispatcher
        while (dispatcher.active_count or self._unsent_bytes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        dispatcher.shutdown(timeout=1)
        self._service.close()
        log.info("stopped", extra={"event": "service_stopped"})
        return clean

    def _unsent_bytes(self) -> int:
        """Return the number of bytes of all answers that are buffered for their clients."""
        return sum(channel.total_outbufs_len for channel in list(self._server.active_channels.values()))
