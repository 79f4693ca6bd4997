"""A stand-in for the Messages API, with which the real Claude Code CLI runs without a credential.

It listens on loopback and streams the same events as the real API. Directives in the prompt script the model's answers:
script.py parses them, answer.py builds the answers.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn, Self

from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from ccm.testing.answer import Answer
from ccm.testing.script import Directive, current_turn, parse_script, prompt_of

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
# The names of the stand-in. A web page can make a name of its own stand for 127.0.0.1.
NAMES = ("127.0.0.1", "localhost")
MAX_BODY_BYTES = 2**26


class MessagesAPI:
    """The stand-in: an HTTP server with its own threads; a context manager.

    Args:
        port: 0 takes a free one.
        keep_requests: whether `requests` grows. It would fill the memory of a stand-in that runs for long.

    Attributes:
        requests: the body of every `POST /v1/messages`, for tests that check the model's input.

    Raises:
        OSError: the port cannot be used.
    """

    def __init__(self, port: int = 0, *, keep_requests: bool = True) -> None:
        self.requests: list[dict[str, Any]] = []
        self._keep_requests = keep_requests
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()
        # Set when answers in progress are to end.
        self._stopping = threading.Event()
        application = Request.application(self._respond)
        self._server = make_server("127.0.0.1", port, application, threaded=True, request_handler=_SilentHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="messages-api", daemon=True)

    @property
    def url(self) -> str:
        """The value for `ANTHROPIC_BASE_URL`."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._thread.join()

    def prompts(self, request: dict[str, Any]) -> list[str]:
        """Return the user's prompts in a recorded request, oldest first."""
        prompts = [prompt_of(message["content"]) for message in request["messages"] if message["role"] == "user"]
        return [prompt for prompt in prompts if prompt]

    def _respond(self, request: Request) -> Response:
        name = request.host.rpartition(":")[0] or request.host
        if "Origin" in request.headers or name not in NAMES:
            return _error(403, "the stand-in is for programs on this host, not for web pages")
        if (request.content_length or 0) > MAX_BODY_BYTES:
            return _error(413, f"a request has at most {MAX_BODY_BYTES} bytes")
        if request.method == "HEAD":
            return Response()
        if request.method == "POST" and request.path == "/v1/messages/count_tokens":
            return _json_response({"input_tokens": len(request.data) // 4})
        if request.method == "POST" and request.path == "/v1/messages":
            try:
                body = json.loads(request.data)
                if self._keep_requests:
                    self.requests.append(body)
                return self._answer(body, request.environ["werkzeug.socket"])
            except ValueError as error:
                return _error(400, f"the stand-in cannot follow this request: {error}")
        return _error(404, f"the stand-in has no {request.method} {request.path}")

    def _answer(self, body: dict[str, Any], connection: socket.socket) -> Response:
        prompt, answers = current_turn(body["messages"])
        script = parse_script(prompt)
        closing = "Done." if script else f"The stand-in for Claude heard: {prompt[:200]}"
        step = script[answers] if answers < len(script) else [Directive("text", closing)]
        first = step[0]
        if first.name == "status":
            code, _, times = first.argument.partition(" ")
            if not times or self._count_failure(prompt) <= int(times):
                return _error(int(code), f"the stand-in was scripted to answer {code}")
            remaining = script[answers + 1 :]
            step = remaining[0] if remaining else [Directive("text", "It worked after all.")]
        if first.name == "hang":
            self._wait_for_client_to_leave(connection)
        answer = Answer(body, step)
        if body.get("stream"):
            return Response(self._stream(answer, connection), mimetype="text/event-stream")
        return _json_response(answer.whole())

    def _count_failure(self, prompt: str) -> int:
        """Count a failure of this prompt, and return how many there were, including this one."""
        with self._lock:
            self._failures[prompt] += 1
            return self._failures[prompt]

    def _stream(self, answer: Answer, connection: socket.socket) -> Iterator[str]:
        for event in answer.events():
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
            if event["type"] == "content_block_delta":
                if answer.stalls:
                    self._wait_for_client_to_leave(connection)
                if answer.pause and self._stopping.wait(answer.pause):
                    return

    def _wait_for_client_to_leave(self, connection: socket.socket) -> NoReturn:
        """Send nothing more on a connection.

        Raises:
            ConnectionError: the client has left, or the stand-in stops. Werkzeug then closes the connection.
        """
        connection.settimeout(0.2)
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1024):
                    break
        raise ConnectionAbortedError


class _SilentHandler(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Log nothing, because the demo prints its own lines."""


def _json_response(body: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(body), status, mimetype="application/json")


def _error(status: int, message: str) -> Response:
    error = {"type": ERROR_TYPES.get(status, "api_error"), "message": message}
    return _json_response({"type": "error", "error": error}, status)
