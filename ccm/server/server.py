"""The production server: waitress, made to answer errors in JSON, to notice clients that leave, and to stop gently.

It reaches into waitress, as server/connections.py does, and tests/contracts/test_waitress.py names all of that.
"""

from __future__ import annotations

import contextlib
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
from types import FrameType

from flask import Flask
from waitress import wasyncore
from waitress.task import ErrorTask, WSGITask

from ccm import file_limits
from ccm.core.service import Service
from ccm.server.connections import Channel, Parser, open_server, serve

log = logging.getLogger(__name__)

# Threads for requests that are answered at once, beside one for each held place.
PLAIN_THREADS = 16
# An idle connection costs a descriptor and no thread.
IDLE_CONNECTIONS = 1000
# Far more than a request of ours has, and than proxies let through.
HEADER_BYTES = 2**16
# Bytes that an answer may be ahead of its client before its thread is made to wait. By default they are 16 MiB, which
# hundreds of slow readers would make gigabytes of; and a long list is read no faster with them.
AHEAD_BYTES = 2**18
# That the client has closed its end, whatever of its requests is still unread. Linux tells; others tell a broken
# connection only.
HUNG_UP: int = getattr(select, "POLLRDHUP", select.POLLHUP)
# Seconds that requests in flight get when the service stops.
DRAIN_TIMEOUT = 5.0

CODES = {
    413: "BODY_TOO_LARGE",
    431: "HEADERS_TOO_LARGE",
    500: "INTERNAL_ERROR",
    501: "NOT_IMPLEMENTED",
    503: "OUT_OF_DISK",
}
MESSAGES = {
    413: "The body is larger than CCM_MAX_BODY_BYTES allows.",
    431: "The headers are too large.",
    500: "The service failed. Its log says more.",
    501: "This transfer coding is not supported.",
    503: "The service has no room for temporary files and cannot take so large a body; nothing was stored. Try again.",
}
RETRY_AFTER = "5"


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]  # waitress has no type hints
    """What waitress refuses before the app sees it, in the API's error format."""

    def execute(self) -> None:
        error = self.request.error
        code = CODES.get(error.code, "BAD_REQUEST")
        message = MESSAGES.get(error.code, "The request is no valid HTTP.")
        body = json.dumps({"error": {"code": code, "message": message}}).encode() + b"\n"
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.response_headers.append(("X-Request-Id", uuid.uuid4().hex))
        if error.code == 503:
            self.response_headers.append(("Retry-After", RETRY_AFTER))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):  # type: ignore[misc]
    def finish(self) -> None:
        """Without the chunk that ends a streamed body where there is no body: waitress sends it after HEAD too."""
        if not self.wrote_header:
            self.write(b"")
        if self.request.command == "HEAD":
            self.chunked_response = False
        super().finish()


class _Channel(Channel):
    parser_class = Parser
    task_class = _Task
    error_task_class = _JsonErrorTask

    def check_client_disconnected(self) -> bool:
        """Asks the socket too: once a second request waits, waitress reads no further, and not as far as the end."""
        return super().check_client_disconnected() or _hung_up(self.socket)


def _hung_up(connection: socket.socket) -> bool:
    descriptor = connection.fileno()
    if descriptor < 0:  # the listener's thread has closed it
        return True
    poll = select.poll()
    poll.register(descriptor, HUNG_UP)
    return bool(poll.poll(0))


class Server:
    """One listening server over an app and its service.

    Args:
        bound: the socket, bound and not listening yet.

    Raises:
        BadSetting: the limit of open files is too low.
    """

    def __init__(self, app: Flask, service: Service, bound: socket.socket) -> None:
        self._service = service
        settings = service.settings
        threads = settings.max_held + PLAIN_THREADS
        files = file_limits.raise_limit()
        wanted = threads + IDLE_CONNECTIONS
        room = min(wanted, file_limits.connections_that_fit(files, settings.max_concurrent_runs))
        if room < threads:
            log.warning(
                "%d open files leave room for %d connections, fewer than CCM_MAX_HELD could hold; "
                "raise the limit (ulimit -n, LimitNOFILE in systemd)",
                files,
                room,
            )
        self._server = open_server(
            app,
            bound,
            _Channel,
            threads,
            connection_limit=room,
            max_request_header_size=HEADER_BYTES,
            max_request_body_size=settings.max_body_bytes + 1,  # the first size that it refuses
            # Notices that a client has gone while its request is held.
            channel_request_lookahead=1,
            outbuf_high_watermark=AHEAD_BYTES,
            outbuf_overflow=sys.maxsize,  # the channel itself puts large answers into files
            # select() dies of a descriptor over 1023, and every Claude Code takes some.
            asyncore_use_poll=True,
            ident="cc-manager",
            clear_untrusted_proxy_headers=False,  # api/http/proxy.py does, and knows X-Forwarded-Prefix too
        )
        self._asked_to_stop = False
        # Whether the listener ended by itself.
        self._deaf = False

    def run(self, on_ready: Callable[[], None]) -> bool:
        """Serve until SIGTERM or SIGINT, then stop gently; a second signal ends at once. False if not all went well.

        A service that nobody can connect to any more stops too, and not well: whoever supervises it starts it again.

        Args:
            on_ready: called once it serves and heeds signals. What it raises is raised here, after a gentle stop.
        """
        # The kernel may hand a signal to any thread, and Python's handlers run in the main one when it next wakes: a
        # byte on this socket wakes it, wherever the signal went.
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
            waker.recv(1)
            deaf = self._deaf
            return self._shut_down() and not deaf
        finally:
            signal.set_wakeup_fd(-1)
            waker.close()
            wakes.close()

    def _listen(self, wakes: socket.socket) -> None:
        serve(self._server)
        self._deaf = True
        with contextlib.suppress(OSError):  # the service has stopped meanwhile
            wakes.send(b"\0")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise SystemExit(128 + number)
        self._asked_to_stop = True

    def _shut_down(self) -> bool:
        """The runs end first, and meanwhile new ones get 503 and watchers see the end; with the last end stored, waits
        are answered and streams closed. Then nobody new is let in, what is under way is sent to its end, and at last
        the database is closed that it reads.
        """
        log.info("stopping: the runs are interrupted and their ends stored")
        clean = self._service.end_runs()
        self._server.trigger.pull_trigger(self._stop_listening)
        deadline = time.monotonic() + DRAIN_TIMEOUT
        dispatcher = self._server.task_dispatcher
        while (dispatcher.active_count or self._unsent_bytes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        dispatcher.shutdown(timeout=1)
        self._service.close()
        log.info("stopped")
        return clean

    def _unsent_bytes(self) -> int:
        """Bytes of answers that are made and that their clients have not taken yet."""
        return sum(channel.total_outbufs_len for channel in list(self._server.active_channels.values()))

    def _stop_listening(self) -> None:
        # Not the server's own close(): that ends the trigger too, through which answers under way are sent.
        wasyncore.dispatcher.close(self._server)
