"""A client of Server-Sent Events whose parser follows the standard:
https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.client import Client
from tests.contract import Sent, contract


@dataclass(frozen=True)
class Event:
    type: str
    data: str
    id: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Parser:
    """An incremental parser: takes bytes, returns the events that they complete."""

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self.comments: list[str] = []
        self._rest = b""
        self._id = ""
        self._type = ""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[Event]:
        # A line may end with CR, LF or CRLF; a CR at the end of the input may still be followed by LF.
        text = self._rest + received
        held_back = b"\r" if text.endswith(b"\r") else b""
        lines = text.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + held_back
        events = [self._line(line.decode("utf-8")) for line in lines]
        return [event for event in events if event is not None]

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        if line.startswith(":"):
            self.comments.append(line[1:])
            return None
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._type = value
        elif field == "data":
            self._data.append(value)
        elif field == "id" and "\0" not in value:
            self._id = value
        elif field == "retry" and value.isascii() and value.isdigit():
            self.retry = int(value)
        return None

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        data, kind = self._data, self._type
        self._data, self._type = [], ""
        return Event(kind or "message", "\n".join(data), self.last_event_id) if data else None


class Stream:
    """One connection to a stream. A context manager; iterating yields events until the service closes the stream."""

    def __init__(self, client: Client, path: str, last_event_id: str | None = None, timeout: float = 60) -> None:
        self.parser = Parser()
        self._connection = client.connection(timeout)
        headers = {"Accept": "text/event-stream"} | ({} if last_event_id is None else {"Last-Event-ID": last_event_id})
        self._connection.request("GET", path, headers=headers)
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers: Mapping[str, str] = dict(self._response.getheaders())
        self._path = path
        self._events = self._read()
        contract().check(Sent("GET", path), self.status, self.headers, None)

    def __enter__(self) -> Stream:
        if self.status != 200:
            body = self._response.read()
            self.close()
            raise AssertionError(f"{self.status}: {body!r}")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def _read(self) -> Iterator[Event]:
        while received := self.receive(2**16):
            for event in self.parser.feed(received):
                contract().check_event(self._path, event.type, event.id, event.data)
                yield event

    def receive(self, size: int) -> bytes:
        """Return the next bytes as soon as there are any, or no bytes at the end."""
        return self._response.read1(size)

    def take(self, count: int) -> list[Event]:
        """Return the next `count` events; fail if the stream ends before."""
        return [next(self._events) for _ in range(count)]

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def events_of(client: Client, path: str, last_event_id: str | None = None) -> list[Event]:
    """Return all events of a stream that ends."""
    with Stream(client, path, last_event_id) as stream:
        return list(stream)
