"""A plain HTTP client for the tests, like curl, with parsed answers."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from ccm.testing.connection import connection
from tests.contract import Sent, contract


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, str]:
        """The error object, which every error answer must have."""
        error: dict[str, str] = self.json["error"]
        assert set(error) <= {"code", "message", "field"}
        return error

    @property
    def next(self) -> str | None:
        """The path and query of the next page; None on the last page."""
        match = re.fullmatch(r'<([^>]*)>; rel="next"', self.headers.get("Link", ""))
        if match is None:
            return None
        parts = urlsplit(match[1])
        return f"{parts.path}?{parts.query}"


def prepared(body: Any, headers: Mapping[str, str] | None) -> tuple[bytes | None, dict[str, str]]:
    """Return a body as bytes, encoded as JSON unless it is bytes, and the headers with its media type."""
    sent = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    if body is not None:
        sent.setdefault("Content-Type", "application/json")
    return body, sent


def checked(method: str, path: str, sent: bytes | None, answer: Answer) -> Answer:
    """Check an answer against the description of the API, and return it."""
    contract().check(Sent(method, path, sent), answer.status, answer.headers, answer.body)
    return answer


class Client:
    """A client of one service; each request opens its own connection, as curl does.

    Args:
        url: the service's address as its log shows it: `http://...` or `unix:/path`.
        checks: whether to check each answer against the description of the API, which takes longer than many requests.
    """

    def __init__(self, url: str, checks: bool = True) -> None:
        self.url = url
        self._checks = checks
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 0

    def connection(self, timeout: float = 150) -> http.client.HTTPConnection:
        """Return a new connection, for tests that need more than one answer on it."""
        return connection(self.url, timeout)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 150,
    ) -> Answer:
        connection = self.connection(timeout)
        data, sent = prepared(body, headers)
        try:
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            answer = Answer(response.status, dict(response.getheaders()), response.read())
            return checked(method, path, data, answer) if self._checks else answer
        finally:
            connection.close()

    def get(self, path: str, **query: Any) -> Answer:
        return self.request("GET", path + (f"?{urlencode(query)}" if query else ""))

    def post(self, path: str, body: Any, **query: Any) -> Answer:
        return self.request("POST", path + (f"?{urlencode(query)}" if query else ""), body)

    def patch(self, path: str, body: Any) -> Answer:
        return self.request("PATCH", path, body)

    def delete(self, path: str) -> Answer:
        return self.request("DELETE", path)

    # ---- shortcuts for runs

    def start(self, cwd: Any, prompt: str, wait: float = 60, **fields: Any) -> dict[str, Any]:
        return self._run("start", {"cwd": str(cwd), "prompt": prompt, **fields}, wait)

    def resume(self, session_id: str, prompt: str, wait: float = 60, **fields: Any) -> dict[str, Any]:
        return self._run("resume", {"sessionId": session_id, "prompt": prompt, **fields}, wait)

    def fork(self, session_id: str, prompt: str, wait: float = 60, **fields: Any) -> dict[str, Any]:
        return self._run("fork", {"sessionId": session_id, "prompt": prompt, **fields}, wait)

    def _run(self, kind: str, body: Mapping[str, Any], wait: float) -> dict[str, Any]:
        answer = self.post(f"/api/runs/{kind}", body, **({"wait": wait} if wait else {}))
        assert answer.status in (200, 202), answer.body
        run: dict[str, Any] = answer.json
        return run

    def run(self, run_id: str, wait: float = 60) -> dict[str, Any]:
        """Return a run once it has ended, or its state after `wait` seconds."""
        run: dict[str, Any] = self.get(f"/api/runs/{run_id}", wait=wait).json
        return run

    def messages(self, run_id: str, **query: Any) -> list[dict[str, Any]]:
        answer = self.get(f"/api/runs/{run_id}/messages", **query)
        assert answer.status == 200, answer.body
        messages: list[dict[str, Any]] = answer.json
        return messages

    def wait_for_message(self, run_id: str, *types: str) -> dict[str, Any]:
        """Wait for the first stored message of one of the types and return it."""
        found = self.messages(run_id, type=",".join(types), wait=60, limit=1)
        assert found, f"run {run_id} has no message of type {types}"
        return found[0]
