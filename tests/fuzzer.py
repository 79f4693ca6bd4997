"""Random requests as bytes, valid and malformed. The same seed makes the same requests."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

METHODS = ["GET", "POST", "PATCH", "DELETE", "HEAD", "PUT", "OPTIONS", "TRACE", "CONNECT", "PRI", "get", ""]
HOSTS = ["localhost"] * 12 + ["127.0.0.1:1", "[::1]:99999", "evil.example", "localhost, localhost", "[::1", "\x00", ""]
TYPES = ["application/json"] * 8 + [
    "text/plain",
    "multipart/form-data; boundary=x",
    "application/json; charset=utf-7",
    ";",
]
TEXTS = [
    "",
    "x",
    "hello",
    "\0",
    "\ud800",
    "\udfff\ud800",
    "\U0001f600",
    "\r\nX-Injected: 1\r\n\r\n",
    "\x1b[2J\u2028\u202e",
    "../../etc/passwd",
    "/proc/self/environ",
    "' OR 1=1; DROP TABLE ccr_runs; --",
    "%s%n{0}{__class__}",
    "$(id)",
    "a" * 5_000,
    "-1",
    "9" * 400,
    "nan",
    "true",
]
# All short: a valid wait holds the connection for its whole time.
WAITS = ["0", "0.01", "-1", "nan", "inf", "1e999", "x", "", "0x1", "\0"]
HEADERS = [
    ("Authorization", ["Bearer x", "Basic !!!", "Bearer " + "x" * 9_000, "\xff"]),
    ("Origin", ["null", "http://localhost", "http://evil.example", ""]),
    ("Sec-Fetch-Site", ["none", "cross-site", "same-origin", "\x01"]),
    ("Content-Encoding", ["gzip", "identity", "br, gzip"]),
    ("Idempotency-Key", ["a", "b", "c", " ", "x" * 300, "\xe9"]),
    ("Last-Event-ID", ["end", "0", "-5", "x:0", "99999999999999999999", "\xff"]),
    ("X-Request-Id", ["x", "a\tb", "\xff\xfe", "y" * 200, "{}"]),
    ("X-Forwarded-For", ["1.2.3.4", "x, y", ""]),
    ("X-Forwarded-Host", ["evil.example"]),
    ("Forwarded", ["for=evil;host=evil.example", "=;,"]),
    ("Expect", ["100-continue", "200-ok"]),
    ("Upgrade", ["websocket", "h2c"]),
    ("Connection", ["keep-alive", "upgrade", "close, close", "x"]),
    ("Range", ["bytes=0-", "bytes=-1,x"]),
    ("If-None-Match", ["*", '"x"', "W/"]),
    ("If-Modified-Since", ["x", "Mon, 99 Xxx 9999"]),
    ("Accept", ["*/*", "text/event-stream", ";q=x"]),
    ("Cookie", ["a=b; c", "=\xff"]),
    ("Content-Length", ["-1", "x", "1e3", "+3", "0x10", "5, 5", "99999999999999999999", ""]),
    ("Transfer-Encoding", ["chunked", "gzip, chunked", "identity", "xchunked", "chunked\x0b", ""]),
    ("Host", ["evil.example", "localhost"]),
    ("X" * 70_000, ["x"]),
    ("Bad Name", ["x"]),
    ("", ["x"]),
    (" Folded", ["x"]),
    ("A_b", ["\x7f", "\x80"]),
    ("A-B", ["\x00"]),
]
# Headers that the service refuses, or that change where a request or a connection ends.
UNSOUND = {
    "Connection",
    "Content-Length",
    "Transfer-Encoding",
    "Expect",
    "X" * 70_000,
    "Bad Name",
    "",
    " Folded",
    "A-B",
}
GARBAGE = [
    b"",
    b"\r\n\r\n",
    b"\n\n\n",
    b"\0" * 100,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /\r\n\r\n",
    b"GET / HTTP/0.9\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"GET  /  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http:// HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\xef\xbb\xbfGET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\nHost: localhost\n\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 5_000 + b"\r\n",
    b'()<>@,;:\\"/[]?={} \t\r\n',
]


@dataclass(frozen=True)
class Conversation:
    """The requests of one connection.

    Args:
        requests: the requests in sending order.
        whole: whether each request is complete and the last one asks to close the connection, so the service must.
    """

    requests: list[bytes]
    whole: bool


class Fuzzer:
    """A generator of random conversations.

    Args:
        bodies: a valid body for each path.
        paths: the paths of reads, and some that do not exist.
    """

    def __init__(self, seed: str, bodies: dict[str, dict[str, Any]], paths: list[str]) -> None:
        self._random = random.Random(seed)
        self._bodies = bodies
        self._paths = paths

    def conversation(self) -> Conversation:
        if self._chance(0.5):
            made = [self._api_request(sound=True) for _ in range(self._random.randrange(10))]
            return Conversation([*made, self._api_request(sound=True, close=True)], whole=True)
        made = [self._any_request() for _ in range(self._random.choice([1, 1, 1, 2, 3]))]
        if self._chance(0.5):
            made[-1] = made[-1][: self._random.randrange(len(made[-1]) + 1)]
        return Conversation(made, whole=False)

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _any_request(self) -> bytes:
        if self._chance(0.1):
            return self._random.choice(GARBAGE) + self._random.randbytes(self._random.choice([0, 0, 10, 1_000]))
        request = self._api_request(sound=False)
        return self._mutated(request) if self._chance(0.3) else request

    def _mutated(self, data: bytes) -> bytes:
        """Change, remove, duplicate or insert some bytes."""
        changed = data
        for _ in range(self._random.choice([1, 1, 3, 20])):
            at = self._random.randrange(len(changed) + 1)
            before, rest = changed[:at], changed[at:]
            changed = self._random.choice(
                [
                    before + self._random.randbytes(1) + rest[1:],
                    before + rest[self._random.choice([1, 2, 50]) :],
                    before + rest[:20] + rest,
                    before + self._random.choice([b"\r\n", b"\0", b"\n", b":", b" "]) + rest,
                ]
            )
        return changed

    def _api_request(self, *, sound: bool, close: bool = False) -> bytes:
        """Make a request to one of the service's paths; a sound one ends where its head says."""
        method, path, body = "POST", self._random.choice(list(self._bodies)), b""
        if "sessions" in path:
            method = "PATCH"
        if self._chance(0.5):
            method, path = self._random.choice(METHODS), self._random.choice(self._paths)
        if method in ("POST", "PATCH", "PUT") or self._chance(0.05):
            body = self._body(self._bodies.get(path, {}))
        headers = [("Host", self._random.choice(HOSTS)), ("Content-Type", self._random.choice(TYPES))]
        for name, values in self._random.sample(HEADERS, self._random.choice([0, 0, 0, 1, 3])):
            if not sound or name not in UNSOUND:
                headers.append((name, self._random.choice(values)))
        if body and self._chance(0.3):
            headers.append(("Transfer-Encoding", "chunked"))
            body = self._chunked(body, broken=not sound and self._chance(0.3))
        elif body or self._chance(0.1):
            lie = 0 if sound or self._chance(0.9) else self._random.choice([-3, 5, 100_000])
            headers.append(("Content-Length", str(max(0, len(body) + lie))))
        if close:
            headers.append(("Connection", "close"))
        if self._chance(0.2):
            self._random.shuffle(headers)
        version = "HTTP/1.1" if sound else self._random.choice(["HTTP/1.1"] * 9 + ["HTTP/1.0"])
        head = "\r\n".join([f"{method} {self._query(path)} {version}", *(f"{n}: {v}" for n, v in headers), "", ""])
        return head.encode("latin-1") + body

    def _query(self, path: str) -> str:
        if self._chance(0.05):
            path += self._random.choice(["/", "//", "/..", "/%2e%2e/", "%00", "%ff", "\xff", "#", ";x=1", "?"])
        if self._chance(0.4):
            names = ["limit", "cursor", "after", "type", "status", "cwd", "q", "history", "token", "%00", "bogus"]
            parts = [
                (self._random.choice(names), self._random.choice(TEXTS)) for _ in range(self._random.choice([1, 2]))
            ]
            if self._chance(0.3):
                parts.append(("wait", self._random.choice(WAITS)))
            path += "?" + "&".join(f"{name}={quote(value, errors='surrogatepass')}" for name, value in parts)
        return path

    def _body(self, right: dict[str, Any]) -> bytes:
        if self._chance(0.1):
            depth = self._random.choice([10, 300, 20_000])
            return self._random.choice(
                [
                    b"[" * depth,
                    b'{"a":' * depth,
                    b"[" * depth + b"]" * depth,
                    b'{"metadata":' * depth + b"1" + b"}" * depth,
                ]
            )
        body: Any = json.loads(json.dumps(right))
        for _ in range(self._random.choice([0, 1, 1, 2, 5])):
            self._change(body)
        text = json.dumps(body, ensure_ascii=self._chance(0.7))
        encoding = self._random.choice(["utf-8"] * 9 + ["utf-16", "utf-7", "cp037"])
        data = text.encode(encoding, "surrogatepass" if encoding in ("utf-8", "utf-16") else "replace")
        if self._chance(0.02):
            data = data.ljust(self._random.choice([2**16, 2**16 + 1, 2**17]))
        return self._mutated(data) if self._chance(0.15) else data

    def _change(self, value: Any) -> None:
        """Change one place within a JSON value."""
        while isinstance(value, dict | list) and value:
            key: Any = (
                self._random.choice(list(value)) if isinstance(value, dict) else self._random.randrange(len(value))
            )
            if isinstance(value[key], dict | list) and value[key] and self._chance(0.6):
                value = value[key]
                continue
            if self._chance(0.2):
                del value[key]
            elif isinstance(value, dict) and self._chance(0.2):
                value[self._random.choice(TEXTS)] = self._value()
            else:
                value[key] = self._value()
            return

    def _value(self) -> Any:
        numbers = [0, -1, 1e308, float("nan"), float("-inf"), 2**63, 2**64, -(10**400), 0.1]
        nested: Any = self._random.choice([None, True, [], {}, [[[[]]]], {"a": {"b": None}}, ["x"] * 200])
        return self._random.choice([nested, self._random.choice(numbers), self._random.choice(TEXTS)])

    def _chunked(self, body: bytes, *, broken: bool) -> bytes:
        parts, at = [], 0
        while at < len(body):
            piece = body[at : at + self._random.choice([1, 10, 1_000, 60_000]) if len(body) < 5_000 else None]
            at += len(piece)
            size = f"{len(piece):x}" + self._random.choice(["", "", ";x=y", ";" + "x" * 100])
            if broken and self._chance(0.5):
                size = self._random.choice(
                    ["-1", "g", "", "0x5", "ffffffffffffffff", f"{len(piece) + 1:x}", "\x00", "5 "]
                )
            parts.append(size.encode() + b"\r\n" + piece + b"\r\n")
        ends = [b"0\r\n\r\n", b"0\r\nX-Trailer: 1\r\n\r\n", b"0\r\n", b"", b"00000\r\n\r\n", b"0\r\n\r\n\r\n"]
        return b"".join(parts) + (self._random.choice(ends) if broken else ends[0])
