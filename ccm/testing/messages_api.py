"""A stand-in for the Messages API, with which the real Claude Code CLI runs without a credential.

It listens on loopback and streams the same events as the real API. Directives in the prompt script the model's answers:
script.py parses them, answer.py builds the answers.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

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


class MessagesAPI(ThreadingHTTPServer):
    """The stand-in: an HTTP server on a free port, with its own thread; a context manager.

    Attributes:
        requests: the body of every `POST /v1/messages`, for tests that check the model's input.
        stopping: set when answers in progress are to end.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.stopping = threading.Event()
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, name="messages-api", daemon=True)

    @property
    def url(self) -> str:
        """The value for `ANTHROPIC_BASE_URL`."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback: every cancelled run closes its connection in the middle of an answer."""

    def prompts(self, request: dict[str, Any]) -> list[str]:
        """Return the user's prompts in a recorded request, oldest first."""
        prompts = [prompt_of(message["content"]) for message in request["messages"] if message["role"] == "user"]
        return [prompt for prompt in prompts if prompt]

    def count_failure(self, prompt: str) -> int:
        """Count a failure of this prompt, and return how many there were, including this one."""
        with self._lock:
            self._failures[prompt] += 1
            return self._failures[prompt]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: MessagesAPI

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because the demo prints its own lines."""

    def do_HEAD(self) -> None:
        self._send_json(200, {})

    def do_GET(self) -> None:
        self._send_json(404, _error(404, "the stand-in knows POST /v1/messages only"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        path = self.path.partition("?")[0]
        if path == "/v1/messages/count_tokens":
            self._send_json(200, {"input_tokens": len(json.dumps(body)) // 4})
        elif path == "/v1/messages":
            self.server.requests.append(body)
            self._answer(body)
        else:
            self._send_json(404, _error(404, f"the stand-in has no {path}"))

    def _answer(self, body: dict[str, Any]) -> None:
        prompt, answers = current_turn(body["messages"])
        script = parse_script(prompt)
        closing = "Done." if script else f"The stand-in for Claude heard: {prompt[:200]}"
        step = script[answers] if answers < len(script) else [Directive("text", closing)]
        first = step[0]
        if first.name == "status":
            code, _, times = first.argument.partition(" ")
            if not times or self.server.count_failure(prompt) <= int(times):
                self._send_json(int(code), _error(int(code), f"the stand-in was scripted to answer {code}"))
                return
            remaining = script[answers + 1 :]
            step = remaining[0] if remaining else [Directive("text", "It worked after all.")]
        if first.name == "hang":
            self._wait_for_client_to_leave()
            return
        answer = Answer(body, step)
        if body.get("stream"):
            self._stream(answer)
        else:
            self._send_json(200, answer.whole())

    def _stream(self, answer: Answer) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in answer.events():
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            if answer.stalls and event["type"] == "content_block_delta":
                self.wfile.flush()
                self._wait_for_client_to_leave()
                return
            if answer.pause and event["type"] == "content_block_delta" and self.server.stopping.wait(answer.pause):
                return
        self.wfile.write(b"0\r\n\r\n")

    def _wait_for_client_to_leave(self) -> None:
        self.connection.settimeout(0.2)
        while not self.server.stopping.is_set():
            try:
                if not self.connection.recv(1024):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        self.close_connection = True

    def _send_json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _error(status: int, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": ERROR_TYPES.get(status, "api_error"), "message": message}}
