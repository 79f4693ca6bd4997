"""A client of CC Manager in one file, which needs only Python 3.11 or later. Import it, or copy it.

    client = Client("http://127.0.0.1:3000", token)
    run = client.start("/home/me/project", "Create a README file.")
    for message in client.follow(run["id"]):
        print(message["type"])

A request that fails on its way, or that the service cannot serve at the moment, is repeated. Each start, resume and
fork has an Idempotency-Key, so that repeating it starts no second run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from socket import AF_UNIX, SOCK_STREAM, socket
from ssl import SSLCertVerificationError, SSLContext, create_default_context
from typing import Any, Literal, Required, TypedDict, Unpack
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

log = logging.getLogger(__name__)

# The connection of a stream without a message was made if it lasted so long (seconds).
LASTING = 10.0

JsonObject = dict[str, Any]
# A message of the SDK, unchanged. Each that Claude Code sends has a `type`; the SDK decides on the rest.
Message = dict[str, Any]
FilePath = str | os.PathLike[str]
Body = Mapping[str, Any] | None
Query = Mapping[str, Any]


class RunError(TypedDict):
    code: str
    message: str | None


class Run(TypedDict):
    id: str
    runId: str
    sessionId: str
    sdkSessionId: str
    parentRunId: str | None
    parentSessionId: str | None
    mode: Literal["fresh", "resume", "fork"]
    status: Literal["running", "completed", "error", "cancelled"]
    cwd: str
    prompt: str
    options: JsonObject
    imageCount: int
    timeoutMs: int | None
    approvals: bool
    approvalTimeoutMs: int | None
    webhookUrl: str | None
    resultType: str | None
    result: Message | None
    error: RunError | None
    permissionDenials: list[Any]
    costUsd: float | None
    messageCount: int
    durationMs: int | None
    queuePosition: int | None
    transcriptStored: bool
    createdBy: str | None
    pendingApprovals: int
    createdAt: str
    startedAt: str | None
    endedAt: str | None


class Session(TypedDict):
    sessionId: str
    parentSessionId: str | None
    forkedFromRunId: str | None
    cwd: str
    title: str | None
    metadata: JsonObject
    status: Literal["running", "idle"]
    headRunId: str | None
    runCount: int
    messageCount: int
    costUsd: float
    firstRunAt: str
    lastRunAt: str


class Approval(TypedDict):
    id: str
    approvalId: str
    runId: str
    sessionId: str
    toolName: str
    toolUseId: str | None
    input: JsonObject
    suggestions: list[JsonObject]
    title: str | None
    displayName: str | None
    description: str | None
    blockedPath: str | None
    decisionReason: str | None
    agentId: str | None
    status: Literal["pending", "allowed", "denied", "expired"]
    resolution: Literal["answered", "timed_out", "no_worker", "withdrawn"] | None
    decision: Literal["allow", "deny"] | None
    updatedInput: JsonObject | None
    remember: bool
    message: str | None
    interrupt: bool
    decidedBy: str | None
    createdAt: str
    expiresAt: str
    resolvedAt: str | None


class Answer(TypedDict, total=False):
    """The answer to an approval. `updatedInput` and `remember` go with allow, `message` and `interrupt` with deny."""

    decision: Required[Literal["allow", "deny"]]
    updatedInput: JsonObject | None
    remember: bool
    message: str | None
    interrupt: bool


# Returns the answer to an approval; None leaves it to someone else.
Rule = Callable[[Approval], Answer | None]


class RunFields(TypedDict, total=False):
    images: list[JsonObject]
    options: JsonObject
    timeoutMs: int | None
    approvals: bool
    approvalTimeoutMs: int | None
    webhookUrl: str | None


class StartFields(RunFields, total=False):
    title: str | None
    metadata: JsonObject


class ResumeFields(RunFields, total=False):
    ifBusy: Literal["reject", "enqueue", "interrupt"]


class ForkFields(StartFields, total=False):
    atRunId: str | None
    atMessage: str | None
    cwd: FilePath | None


class APIError(Exception):
    """An error answer.

    Attributes:
        status: the status of HTTP.
        code: the service's code, such as RUN_NOT_FOUND; HTTP_502 and the like if the answer is not the service's.
        message: what is wrong and what to do.
        field: the field of the request at fault, if it is a single one.
        body: the whole answer. With APPROVAL_ALREADY_RESOLVED it has the `approval`.
        temporary: whether the same request may succeed later, and `retry_after` (seconds) when, if the answer says.
    """

    def __init__(self, status: int, error: Mapping[str, str], body: JsonObject, retry_after: float) -> None:
        self.status, self.body, self.retry_after = status, body, retry_after
        self.temporary = status in (429, 502, 503, 504)
        self.code, self.message, self.field = error["code"], error["message"], error.get("field")
        super().__init__(f"{status} {self.code}: {self.message}")


class NoAnswer(ConnectionError):
    """The service cannot be reached, or its answer was cut off. `__cause__` is the reason."""

    retry_after = 0.0

    @property
    def temporary(self) -> bool:
        return not isinstance(self.__cause__, SSLCertVerificationError)


class Client:
    """A client of one service. It has no state, so threads may share it.

    Its methods raise APIError for an error answer, and NoAnswer if there is none, once repeating has not helped. Fields
    and filters have the names of the API.

    Args:
        url: `http://HOST:PORT`, `https://HOST`, either with the path of a proxy, or `unix:/PATH`.
        token: the bearer token, if the service wants one.
        timeout: how long the service may be silent, beyond a `wait` (seconds). A stream is silent for 15 at most.
        retry_for: how long a request is repeated, from its first failure (seconds): 0 never, `math.inf` for ever.
        context: the certificates to trust with https. The default are the system's.
    """

    def __init__(
        self, url: str, token: str = "", timeout: float = 60, retry_for: float = 60, context: SSLContext | None = None
    ) -> None:
        if not re.fullmatch("[!-~]*", token):  # http.client would show it in its error
            raise ValueError("token must be visible ASCII characters without spaces or line breaks")
        self._url, self._timeout, self._retry_for, self._token = url, timeout, retry_for, token
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._prefix, self._connect = _destination(url, context)

    def start(self, cwd: FilePath, prompt: str, wait: float = 0, key: str = "", **fields: Unpack[StartFields]) -> Run:
        """Start a run in a new session.

        Args:
            wait: how long to wait for its end (seconds, 300 at most).
            key: its Idempotency-Key, for a program that repeats the call after its own crash.
        """
        return self._begin("start", {"cwd": cwd, "prompt": prompt, **fields}, wait, key)

    def resume(
        self, session_id: str, prompt: str, wait: float = 0, key: str = "", **fields: Unpack[ResumeFields]
    ) -> Run:
        """Continue a session with another run; `wait` and `key` as for a start."""
        return self._begin("resume", {"sessionId": session_id, "prompt": prompt, **fields}, wait, key)

    def fork(self, session_id: str, prompt: str, wait: float = 0, key: str = "", **fields: Unpack[ForkFields]) -> Run:
        """Branch off a session into a new one; `wait` and `key` as for a start."""
        return self._begin("fork", {"sessionId": session_id, "prompt": prompt, **fields}, wait, key)

    def cancel(self, run_id: str) -> Run:
        """Cancel a run and return it once it has ended."""
        run: Run = self.request("DELETE", f"/api/runs/{quote(run_id, '')}")
        return run

    def get(self, run_id: str, wait: float = 0) -> Run:
        """Return a run, once it has ended or `wait` seconds (300 at most) have passed."""
        run: Run = self.request("GET", f"/api/runs/{quote(run_id, '')}", wait=wait or None)
        return run

    def list(self, **filters: object) -> Iterator[Run]:
        """Yield the runs, newest first, page after page. `limit` is the size of a page."""
        return self._pages("/api/runs", filters)

    def sessions(self, **filters: object) -> Iterator[Session]:
        """Yield the sessions, latest activity first, page after page."""
        return self._pages("/api/sessions", filters)

    def approvals(self, wait: float = 0, **filters: object) -> Iterator[Approval]:
        """Yield the approvals, oldest first. With `wait`, as for a run, those to come too: it never ends."""
        return self._pages("/api/approvals", {**filters, "wait": wait or None})

    def follow(self, run_id: str, rule: Rule | None = None, after: int = -1) -> Generator[Message, None, Run]:
        """Yield the messages of a run as they come, each once and in order, and return the run once it has ended.

        Args:
            rule: answers the run's approvals between the messages. One that it leaves may be shown to it again.
            after: the index of a message to begin after; the first message has the index 0.
        """
        run: Run
        for name, data in self._events(run_id, after):
            if name == "message":
                yield data
            elif name == "approval" and rule and data["status"] == "pending":
                self._apply(rule, data)
            elif name == "end":
                run = data
        return run

    def answer(self, rule: Rule, **filters: object) -> Iterator[Approval]:
        """Answer the pending approvals by a rule, and those to come while this is iterated. Yield each answered one."""
        for approval in self.approvals(wait=30, status="pending", **filters):
            if answered := self._apply(rule, approval):
                yield answered

    def decide(self, approval_id: str, answer: Answer) -> Approval:
        """Answer one approval."""
        try:
            approval: Approval = self.request("POST", f"/api/approvals/{quote(approval_id, '')}", answer)
        except APIError as error:
            # If only the reply to an answer was lost, its repetition is refused and shows that very answer.
            resolved = error.body.get("approval")
            if not resolved or any(resolved.get(name) != value for name, value in answer.items()):
                raise
            approval = resolved
        return approval

    def request(self, method: str, path: str, body: Body = None, repeat: bool = True, **query: Any) -> Any:
        """Send a request that has no method here, and return its JSON. Do not let it repeat an input.

        It is for JSON only: it would read a stream, such as /api/events, to an end that never comes.
        """
        return self._fetch(method, path, query, repeat, body=body)[0]

    def _begin(self, action: str, body: Mapping[str, Any], wait: float, key: str) -> Run:
        headers = {"Idempotency-Key": key or str(uuid.uuid4())}
        run: Run = self._fetch("POST", f"/api/runs/{action}", {"wait": wait or None}, body=body, headers=headers)[0]
        return run

    def _pages(self, path: str, query: Query) -> Iterator[Any]:
        while True:
            begun = time.monotonic()
            items, query = self._fetch("GET", path, query)
            yield from items
            if not query:
                return
            if not items and time.monotonic() < begun + 1:
                time.sleep(1)  # a service that cannot hold another request open answers it at once

    def _apply(self, rule: Rule, approval: Approval) -> Approval | None:
        """Answer an approval by a rule. Return None if the rule leaves it, or if it is not pending any more."""
        answer = rule(approval)
        try:
            return None if answer is None else self.decide(approval["id"], answer)
        except APIError as error:
            if error.code != "APPROVAL_ALREADY_RESOLVED":
                raise
            return None

    def _fetch(self, method: str, path: str, query: Query, repeat: bool = True, **sent: Any) -> tuple[Any, Any]:
        """Return the JSON of an answer, and the query of the next page if there is one."""
        retry = Retry(self._retry_for if repeat else 0)
        while True:
            try:
                with self._send(method, path, "application/json", query, **sent) as response:
                    # Only the query: the address may be a proxy's, and the token is for this one.
                    link = re.search(r'\?([^>]*)>; rel="next"', response.headers.get("Link", ""))
                    return json.loads(response.read()), link and dict(parse_qsl(link[1], keep_blank_values=True))
            except (APIError, NoAnswer) as error:
                retry.pause(error)

    def _events(self, run_id: str, after: int) -> Generator[tuple[str, Any], None, None]:
        """Yield the name and the data of each event of a run, to its end."""
        path, retry = f"/api/runs/{quote(run_id, '')}/stream", Retry(self._retry_for)
        while True:
            lasting = math.inf
            try:
                headers = {"Last-Event-ID": str(after)}
                with self._send("GET", path, "text/event-stream", {}, headers=headers) as response:
                    lasting = time.monotonic() + LASTING
                    for name, event_id, data in _parse(response):
                        content = json.loads(data)
                        if name == "message":
                            if event_id != str(after + 1):
                                raise HTTPException(f"message {event_id} came after message {after}")
                            after += 1
                            retry.failures = 0
                        yield name, content
                        if name == "end":
                            return
                    raise HTTPException("the stream ended before the run")
            except (APIError, NoAnswer) as error:
                retry.failures = 0 if time.monotonic() > lasting else retry.failures
                retry.pause(error)

    @contextmanager
    def _send(
        self, method: str, path: str, media_type: str, query: Query, *, body: Body = None, headers: Any = None
    ) -> Iterator[HTTPResponse]:
        """Send a request once, on its own connection. A connection that breaks in the body raises NoAnswer too."""
        data = None if body is None else json.dumps(body, default=os.fspath).encode()
        headers = {"Accept": media_type, "Content-Type": "application/json", **self._headers, **(headers or {})}
        target = self._prefix + path + _encoded(query)
        connection = self._connect(timeout=self._timeout + float(query.get("wait") or 0))
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # a body is refused unread: the answer says why
                connection.request(method, target, data, headers)
            response = connection.getresponse()
            if response.status >= 300 or response.headers.get_content_type() != media_type:
                raise _error(response, self._token)
            try:
                yield response
            except (ValueError, RecursionError) as error:
                raise HTTPException(f"broken answer: {error}") from error
        except (OSError, HTTPException) as error:
            raise NoAnswer(f"no answer from {self._url}: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()


class Retry:
    """The growing pauses after the failures in a row of one request, for so many seconds from the first one."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._deadline, self.failures = seconds, 0.0, 0

    def pause(self, error: APIError | NoAnswer) -> None:
        """Wait for the next attempt, or raise the error if that would not help or comes too late."""
        if not self.failures:
            self._deadline = time.monotonic() + self._seconds
        # Random, so that clients that failed together do not return together.
        seconds = min(10, 2.0 ** min(self.failures, 5)) * random.uniform(0.5, 1)  # noqa: S311
        seconds += error.retry_after
        if not error.temporary or time.monotonic() + seconds > self._deadline:
            raise error
        self.failures += 1
        log.warning("%s; trying again in %.1f s", error, seconds)
        time.sleep(seconds)


class UnixConnection(HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket(AF_UNIX, SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _destination(url: str, context: SSLContext | None) -> tuple[str, Callable[..., HTTPConnection]]:
    """Return the path of a URL, and what makes a connection to its host, given a `timeout`."""
    if url.startswith("unix:/"):
        return "", partial(UnixConnection, url.removeprefix("unix:"))
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise ValueError("url must be http://HOST:PORT, https://HOST or unix:/PATH")
    host, prefix = parts.hostname, parts.path.rstrip("/")
    if parts.scheme == "http":
        return prefix, partial(HTTPConnection, host, parts.port or 80)
    return prefix, partial(HTTPSConnection, host, parts.port or 443, context=context or create_default_context())


def _encoded(query: Query) -> str:
    """Return a query as the end of a URL. None is left out, but null in `metadata`; true and false are lower case."""
    given = {name: value for name, value in query.items() if value is not None}
    for key, value in (given.pop("metadata", None) or {}).items():
        given[f"metadata.{key}"] = "null" if value is None else value
    texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}
    return "?" + urlencode(texts) if texts else ""


def _error(response: HTTPResponse, token: str) -> APIError:
    """Read an error answer: the service's own, or that of a proxy or of another server, which may repeat the token."""
    text = response.read(1_000_000).decode(errors="replace")
    text = text.replace(token, "***") if token else text
    if response.status < 300 and not text:
        raise HTTPException("cut off in its headers")
    after = response.headers.get("Retry-After", "")
    retry_after = float(after) if after.isdecimal() else 0.0
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        body = json.loads(text)
        return APIError(response.status, body["error"], body, retry_after)
    place = response.headers.get("Location") or response.headers.get_content_type()
    shown = f"{response.reason} {text[:200]}"
    message = f"this is not the service's answer ({place!a}); is the url right? {shown!a}"
    return APIError(response.status, {"code": f"HTTP_{response.status}", "message": message}, {}, retry_after)


def _parse(lines: Iterable[bytes]) -> Iterator[tuple[str, str, bytes]]:
    """Yield the name, the id and the data of each Server-Sent Event, without one that was cut off."""
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.rstrip(b"\r\n").partition(b":")
        if name:
            fields[name] = value.removeprefix(b" ")
        elif not colon:  # an empty line ends an event; a colon begins a comment
            if b"data" in fields:
                yield fields.get(b"event", b"message").decode(), fields.get(b"id", b"").decode(), fields[b"data"]
            fields = {}
