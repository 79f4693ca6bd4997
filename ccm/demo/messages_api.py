"""A stand-in for the Messages API, so that the real Claude Code CLI runs whole without a credential.

It listens on loopback, streams the events that the real API streams, and is scripted by the prompt. A prompt without
a directive is answered with a sentence that quotes it. A prompt with directives is a script: each call of the model
takes the next one, in order; the last text stands once the script is used up. A directive is `[[name argument]]`, its
argument plain text or JSON:

| directive | the model |
|---|---|
| `[[text WORDS]]` | answers WORDS |
| `[[tool NAME {INPUT}]]` | calls a tool; several joined by `[[and]]` are called in one message |
| `[[chunks N]]` | streams a text of N small pieces |
| `[[slow N SECONDS]]` | streams N pieces, SECONDS apart |
| `[[huge N]]` | answers one piece of text of N characters |
| `[[json {OBJECT}]]` | gives OBJECT as the structured output that was asked for |
| `[[status CODE]]` | answers with an HTTP error; `[[status CODE N]]` only the first N times |
| `[[hang]]` | sends no byte until the client goes away |
| `[[stall]]` | streams one piece, then nothing more |

Events follow https://docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
STRUCTURED_OUTPUT_TOOL = "StructuredOutput"


@dataclass(frozen=True)
class Directive:
    """One step of a script: what the model does at one call."""

    name: str
    argument: str = ""


def parse_script(prompt: str) -> list[list[Directive]]:
    """The steps of a prompt, one for each call of the model; a step of several directives is one message."""
    steps: list[list[Directive]] = []
    joined = False
    at = prompt.find("[[")
    while at != -1:
        directive, end = _parse_directive(prompt, at + 2)
        if directive.name == "and":
            joined = True
        elif joined and steps:
            steps[-1].append(directive)
            joined = False
        else:
            steps.append([directive])
        at = prompt.find("[[", end)
    return steps


def _parse_directive(prompt: str, start: int) -> tuple[Directive, int]:
    """The directive that begins at `start`; a JSON argument may hold `]]` itself, so it is decoded, not searched."""
    close = prompt.find("]]", start)
    close = len(prompt) if close == -1 else close
    name, _, rest = prompt[start:close].partition(" ")
    brace = prompt.find("{", start)
    if name in ("tool", "json") and start < brace < close:
        try:
            _, end = json.JSONDecoder().raw_decode(prompt, brace)
        except json.JSONDecodeError:
            end = close
        return Directive(name, prompt[start + len(name) : end].strip()), prompt.find("]]", end) + 2
    return Directive(name.strip(), rest.strip()), close + 2


def _prompt_of(content: Any) -> str:
    """The user's words in a message: the last text that is no note of Claude Code's own. Empty for a tool's result.

    The last, because Claude Code joins a turn that failed and the one after it into one message.
    """
    if isinstance(content, str):
        return content
    texts = [block["text"].strip() for block in content if block.get("type") == "text"]
    return next((text for text in reversed(texts) if not text.startswith(("<system-reminder>", "[Image: "))), "")


def current_turn(messages: list[dict[str, Any]]) -> tuple[str, int]:
    """The user's last prompt, and how many answers the model has given to it already."""
    answers = 0
    for message in reversed(messages):
        if message.get("role") == "assistant":
            answers += 1
        elif message.get("role") == "user" and (prompt := _prompt_of(message.get("content", ""))):
            return prompt, answers
    return "", answers


class MessagesAPI:
    """The stand-in as a server of its own thread; a context manager.

    `requests` holds the body of every `POST /v1/messages`, so that a test can see what the model was sent.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.stopping = threading.Event()
        self._failures: dict[str, int] = {}
        self._lock = threading.Lock()
        self._server = _Server((host, port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, name="messages-api", daemon=True)

    @property
    def url(self) -> str:
        """What `ANTHROPIC_BASE_URL` is to be."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def start(self) -> MessagesAPI:
        self._thread.start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MessagesAPI:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def prompts(self, request: dict[str, Any]) -> list[str]:
        """The user's prompts in a recorded request, the oldest first."""
        prompts = [_prompt_of(message["content"]) for message in request["messages"] if message["role"] == "user"]
        return [prompt for prompt in prompts if prompt]

    def record(self, request: dict[str, Any]) -> None:
        with self._lock:
            self.requests.append(request)

    def count_failure(self, prompt: str) -> int:
        """How often this prompt has been failed, this time included."""
        with self._lock:
            self._failures[prompt] = self._failures.get(prompt, 0) + 1
            return self._failures[prompt]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], api: MessagesAPI) -> None:
        super().__init__(address, _Handler)
        self.api = api

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in mid-answer is what `cancel` looks like from here: no trace for that."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the demo prints its own story."""

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
            self.server.api.record(body)
            self._answer(body)
        else:
            self._send_json(404, _error(404, f"the stand-in has no {path}"))

    def _answer(self, body: dict[str, Any]) -> None:
        prompt, answers = current_turn(body["messages"])
        script = parse_script(prompt)
        step = script[answers] if answers < len(script) else [Directive("text", _closing_words(prompt, script))]
        first = step[0]
        if first.name == "status":
            code, _, times = first.argument.partition(" ")
            if not times or self.server.api.count_failure(prompt) <= int(times):
                self._send_json(int(code), _error(int(code), f"the stand-in was told to answer {code}"))
                return
            remaining = script[answers + 1 :]
            step = remaining[0] if remaining else [Directive("text", "It worked after all.")]
        if first.name == "hang":
            self._wait_for_client_to_leave()
            return
        message = _Message(body, step)
        if body.get("stream"):
            self._stream(message)
        else:
            self._send_json(200, message.whole())

    def _stream(self, message: _Message) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in message.events():
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            if message.stalls and event["type"] == "content_block_delta":
                self.wfile.flush()
                self._wait_for_client_to_leave()
                return
            if (
                message.pause
                and event["type"] == "content_block_delta"
                and self.server.api.stopping.wait(message.pause)
            ):
                return
        self.wfile.write(b"0\r\n\r\n")

    def _wait_for_client_to_leave(self) -> None:
        self.connection.settimeout(0.2)
        while not self.server.api.stopping.is_set():
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


def _closing_words(prompt: str, script: list[list[Directive]]) -> str:
    if script:
        return "Done."
    return f"The stand-in for Claude heard: {prompt[:200]}"


class _Message:
    """One answer of the model, as a whole and as the events that stream it."""

    def __init__(self, request: dict[str, Any], step: list[Directive]) -> None:
        self._model = request.get("model", "stand-in")
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._input_tokens = len(json.dumps(request["messages"])) // 4
        self.pause = 0.0
        self.stalls = step[0].name == "stall"
        # A block is its kind, its start, and the pieces that make it up.
        self._blocks: list[tuple[dict[str, Any], list[str]]] = [self._block(directive) for directive in step]

    def _block(self, directive: Directive) -> tuple[dict[str, Any], list[str]]:
        argument = directive.argument
        if directive.name in ("tool", "json"):
            if directive.name == "json":
                name, tool_input = STRUCTURED_OUTPUT_TOOL, argument
            else:
                name, _, tool_input = argument.partition(" ")
            start = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
            return start, [tool_input or "{}"]
        return {"type": "text", "text": ""}, self._pieces(directive)

    def _pieces(self, directive: Directive) -> list[str]:
        argument = directive.argument
        if directive.name == "chunks":
            return [f"{number} " for number in range(int(argument))]
        if directive.name == "slow":
            count, _, seconds = argument.partition(" ")
            self.pause = float(seconds or 0.1)
            return [f"piece {number} " for number in range(int(count))]
        if directive.name == "huge":
            return ["x" * int(argument)]
        if directive.name == "stall":
            return ["And then", " nothing."]
        return [argument or "Done."]

    @property
    def _stop_reason(self) -> str:
        return "tool_use" if any(start["type"] == "tool_use" for start, _ in self._blocks) else "end_turn"

    @property
    def _output_tokens(self) -> int:
        return sum(max(1, len(piece) // 4) for _, pieces in self._blocks for piece in pieces)

    def whole(self) -> dict[str, Any]:
        content = [
            {**start, "text": "".join(pieces)}
            if start["type"] == "text"
            else {**start, "input": json.loads("".join(pieces))}
            for start, pieces in self._blocks
        ]
        return {**self._envelope(), "content": content, "stop_reason": self._stop_reason}

    def _envelope(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": self._input_tokens, "output_tokens": self._output_tokens},
        }

    def events(self) -> Iterator[dict[str, Any]]:
        yield {"type": "message_start", "message": self._envelope()}
        for index, (start, pieces) in enumerate(self._blocks):
            yield {"type": "content_block_start", "index": index, "content_block": start}
            for piece in pieces:
                delta = (
                    {"type": "text_delta", "text": piece}
                    if start["type"] == "text"
                    else {"type": "input_json_delta", "partial_json": piece}
                )
                yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": self._stop_reason, "stop_sequence": None},
            "usage": {"output_tokens": self._output_tokens},
        }
        yield {"type": "message_stop"}
