"""Streams: recorded messages, then live ones, each one once, from any position."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import NOWHERE, connect, folder_of, held, kinds, letters, read_all, refused, script
from tests.client import Client
from tests.conftest import ProgramFunction, ServeFunction
from tests.event_source import Event, Parser, Stream, events_of
from tests.waiting import until

CUTS = 50
STRANGE: list[dict[str, Any]] = [
    {"type": "assistant", "text": "one\ntwo\r\nthree\rfour\x00 \u2028\x85\ud800 \U0001f600"},
    {"type": "event: end\n\ndata: {}\n\n", "id": "end"},
    {"type": "user", "text": "x" * 700_000},
]


@pytest.fixture(scope="module")
def ended(api: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return an ended run with the messages abacaba and a result: the indexes 0 to 7."""
    return api.start(folder_of(tmp_path_factory.mktemp("ended")), script(*kinds("abacaba")))


def stream_of(run: dict[str, Any]) -> str:
    return f"/api/runs/{run['id']}/stream"


def session_stream_of(run: dict[str, Any]) -> str:
    return f"/api/sessions/{run['sessionId']}/stream"


def ids(events: list[Event]) -> list[str]:
    return [event.id for event in events]


def expected_events(client: Client, run: dict[str, Any], prefix: str = "") -> list[Event]:
    """Return the events of an ended run, built from the rest of the API."""
    messages = client.messages(run["id"])
    end = Event("end", json.dumps(client.run(run["id"])), f"{prefix}end")
    return [
        *(
            Event("message", json.dumps(message, separators=(",", ":")), f"{prefix}{i}")
            for i, message in enumerate(messages)
        ),
        end,
    ]


def comparable(events: list[Event]) -> list[tuple[str, str, Any]]:
    return [(event.type, event.id, repr(event.json)) for event in events]


# ---- a run's stream


def test_a_stream_replays_the_recorded_messages(api: Client, project: Path) -> None:
    run = api.start(project, script(*STRANGE))

    with Stream(api, stream_of(run)) as stream:
        events = list(stream)
    assert comparable(events) == comparable(expected_events(api, run))
    assert events[0].json == STRANGE[0]
    assert ids(events) == ["0", "1", "2", "3", "end"]
    assert [event.type for event in events] == ["message"] * 4 + ["end"]
    assert events[-1].json == run


def test_a_stream_sends_its_headers_before_the_first_event(api: Client, project: Path) -> None:
    first = held(api, project)
    waiting = api.resume(first["sessionId"], "Hello.", wait=0, ifBusy="enqueue")

    with Stream(api, stream_of(waiting)) as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"
        assert stream.headers["X-Accel-Buffering"] == "no"
        assert {"no-cache", "no-store"} <= set(stream.headers["Cache-Control"].split(", "))
        assert stream.headers["X-Request-Id"]
        assert stream.parser.feed(stream.receive(2**16)) == []
        assert stream.parser.comments
        assert stream.parser.retry == 1000
        assert api.run(waiting["id"], wait=0)["startedAt"] is None
        api.delete(f"/api/runs/{first['id']}")
        assert ids(list(stream)) == ["0", "1", "end"]


def test_a_stream_sends_messages_live(api: Client, project: Path) -> None:
    run = held(api, project, "ab")

    with Stream(api, stream_of(run)) as stream:
        assert letters([event.json for event in stream.take(2)]) == "ab"
        assert api.run(run["id"], wait=0)["status"] == "running"
        api.delete(f"/api/runs/{run['id']}")
        rest = list(stream)
    assert comparable(rest) == comparable(expected_events(api, run)[2:])
    assert rest[-1].json["status"] == "cancelled"


def test_the_stream_of_a_run_that_never_started_has_its_end(api: Client, project: Path) -> None:
    first = held(api, project)
    waiting = api.resume(first["sessionId"], "Hello.", wait=0, ifBusy="enqueue")
    with Stream(api, stream_of(waiting)) as stream:
        api.delete(f"/api/runs/{waiting['id']}")
        (end,) = stream
    assert [end.type, end.id, end.json["status"]] == ["end", "end", "cancelled"]
    api.delete(f"/api/runs/{first['id']}")


@pytest.mark.parametrize("last", range(-1, 8))
def test_a_stream_continues_after_any_message(api: Client, ended: dict[str, Any], last: int) -> None:
    expected = comparable(expected_events(api, ended)[last + 1 :])

    assert comparable(events_of(api, stream_of(ended), str(last))) == expected
    assert comparable(events_of(api, f"{stream_of(ended)}?after={last}")) == expected
    # A browser reconnects to the original URL, including its `after`.
    assert comparable(events_of(api, f"{stream_of(ended)}?after=3", str(last))) == expected


def test_a_client_that_has_received_the_end_gets_204(api: Client, ended: dict[str, Any]) -> None:
    for path in (stream_of(ended), f"{stream_of(ended)}?after=3"):
        answer = api.request("GET", path, headers={"Last-Event-ID": "end"})
        assert [answer.status, answer.body] == [204, b""]
        assert answer.headers["X-Request-Id"]
        assert "Content-Type" not in answer.headers


UNKNOWN = ["", "x", "8", "9007199254740993", "-2", "1.5", "End", "end ", " 1, 2", f"{NOWHERE}:1", "+1", "\u00b2"]


@pytest.mark.parametrize("last", UNKNOWN)
def test_an_invalid_position_is_refused(api: Client, ended: dict[str, Any], last: str) -> None:
    sent = {"Last-Event-ID": last}
    if last.strip() == "end":
        assert api.request("GET", stream_of(ended), headers=sent).status == 204  # whitespace around a header is ignored
    else:
        refused(api.request("GET", stream_of(ended), headers=sent), "Last-Event-ID")
        refused(api.request("GET", f"{stream_of(ended)}?after=1", headers=sent), "Last-Event-ID")
    refused(api.get(stream_of(ended), after=last), "after")


def test_a_position_that_a_run_has_not_reached_is_refused(api: Client, project: Path) -> None:
    run = held(api, project, "ab")
    other = f"{run['id']}:end"
    for last in ("2", "end"):
        refused(api.request("GET", stream_of(run), headers={"Last-Event-ID": last}), "Last-Event-ID")
        refused(api.get(stream_of(run), after=last), "after")
    for last in (f"{run['id']}:2", other):
        refused(api.request("GET", session_stream_of(run), headers={"Last-Event-ID": last}), "Last-Event-ID")
        refused(api.get(session_stream_of(run), after=last), "after")
    api.delete(f"/api/runs/{run['id']}")
    refused(api.get(stream_of(run), after="end"), "after")
    assert api.request("GET", stream_of(run), headers={"Last-Event-ID": "end"}).status == 204


def test_unknown_runs_and_sessions_have_no_stream(api: Client, ended: dict[str, Any]) -> None:
    refused(api.get(f"/api/runs/{NOWHERE}/stream"), None, 404, "RUN_NOT_FOUND")
    refused(api.get(f"/api/sessions/{NOWHERE}/stream"), None, 404, "SESSION_NOT_FOUND")
    other = api.fork(ended["sessionId"], "Hello.")
    for run_id in (NOWHERE, other["id"]):
        for place in ("-1", "0", "end"):
            refused(api.get(session_stream_of(ended), after=f"{run_id}:{place}"), "after")


def test_head_is_answered_at_once_and_has_no_body(api: Client, project: Path) -> None:
    run = held(api, project)
    for path in (stream_of(run), session_stream_of(run)):
        with Stream(api, path) as stream:
            headers = stream.headers
        with connect(api, f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) as connection:
            head, body = read_all(connection)
        assert body == b""
        assert head.startswith(b"HTTP/1.1 200 ")
        answer = api.request("HEAD", path)
        changing = ("Date", "X-Request-Id")
        assert {n: v for n, v in answer.headers.items() if n not in changing} == {
            n: v for n, v in headers.items() if n not in changing
        }
    api.delete(f"/api/runs/{run['id']}")


def test_an_http_1_0_client_is_served(api: Client, ended: dict[str, Any]) -> None:
    """By default nginx uses HTTP/1.0 for its upstreams."""
    with connect(api, f"GET {stream_of(ended)} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()) as connection:
        _, body = read_all(connection)
    assert ids(Parser().feed(body)) == [*"01234567", "end"]


# ---- a session's stream


def test_a_sessions_stream_has_its_runs_one_after_another(api: Client, project: Path) -> None:
    first = held(api, project, "ab")
    cancelled = api.resume(first["sessionId"], "Never.", wait=0, ifBusy="enqueue")
    second = api.resume(first["sessionId"], script(*kinds("cd")), wait=0, ifBusy="enqueue")
    with Stream(api, session_stream_of(first)) as stream:
        events = stream.take(2)
        api.delete(f"/api/runs/{cancelled['id']}")
        api.delete(f"/api/runs/{first['id']}")
        events += stream.take(2 + 1 + 4)
        assert api.get(f"/api/sessions/{first['sessionId']}").json["status"] == "idle"
        third = api.resume(first["sessionId"], script(*kinds("e")))
        events += stream.take(3)
    runs = [first, cancelled, second, third]
    assert comparable(events) == comparable(
        [event for run in runs for event in expected_events(api, run, f"{run['id']}:")]
    )
    # Any of the ids of a session.
    with Stream(api, f"/api/sessions/{third['sdkSessionId']}/stream") as stream:
        assert comparable(stream.take(len(events))) == comparable(events)


def test_a_sessions_stream_continues_after_any_event(api: Client, project: Path) -> None:
    first = api.start(project, script(*kinds("ab")))
    second = api.resume(first["sessionId"], script(*kinds("c")))
    api.fork(first["sessionId"], "This one is another session's.")
    path = session_stream_of(first)
    whole = [event for run in (first, second) for event in expected_events(api, run, f"{run['id']}:")]

    places = [
        (f"{first['id']}:-1", 0),
        (f"{second['id']}:-1", 4),
        *((event.id, i + 1) for i, event in enumerate(whole)),
    ]
    following = api.resume(first["sessionId"], script(*kinds("d")))
    whole += expected_events(api, following, f"{following['id']}:")
    for place, seen in places:
        for address, header in (
            (path, place),
            (f"{path}?after={place}", None),
            (f"{path}?after={first['id']}:0", place),
        ):
            with Stream(api, address, header) as stream:
                assert comparable(stream.take(len(whole) - seen)) == comparable(whole[seen:])


@pytest.mark.parametrize(
    "last", ["", "x", "5", "end", f"{NOWHERE}", ":1", "{run}", "{run}:", "{run}:-2", "{run}:8", "{run}:x"]
)
def test_an_invalid_position_in_a_session_is_refused(api: Client, ended: dict[str, Any], last: str) -> None:
    last = last.format(run=ended["id"])
    refused(api.request("GET", session_stream_of(ended), headers={"Last-Event-ID": last}), "Last-Event-ID")
    refused(api.get(session_stream_of(ended), after=last), "after")


# ---- streams that break


def read_with_cuts(client: Client, path: str, count: int, size: int) -> list[Event]:
    """Return `count` events over connections that break at random bytes, and are resumed as by a browser."""
    chance = random.Random(17)
    events: list[Event] = []
    last: str | None = None
    for _ in range(CUTS):
        with Stream(client, path, last) as stream:
            for _ in range(chance.randrange(1, 6)):
                events += stream.parser.feed(stream.receive(chance.randrange(1, size)))
            last = stream.parser.last_event_id or last
    assert len(events) < count, "there was nothing left to cut"
    with Stream(client, path, last) as stream:
        return events + stream.take(count - len(events))


def test_a_stream_that_breaks_fifty_times_is_complete(api: Client, project: Path) -> None:
    run = api.start(project, script(*kinds("ab"), count=400, pad=2_000))

    events = read_with_cuts(api, stream_of(run), 404, 10_000)
    assert comparable(events) == comparable(expected_events(api, run))


def test_a_live_session_stream_that_breaks_fifty_times_is_complete(api: Client, project: Path) -> None:
    first = api.start(project, script(*kinds("ab"), count=30, pad=1_500), wait=0)
    body = script(*kinds("cd"), count=30, pad=1_500)
    runs = [first, *(api.resume(first["sessionId"], body, wait=0, ifBusy="enqueue") for _ in range(9))]

    events = read_with_cuts(api, session_stream_of(first), 10 * 34, 4_000)
    assert comparable(events) == comparable(
        [event for run in runs for event in expected_events(api, run, f"{run['id']}:")]
    )


def test_many_clients_of_one_run_get_the_same_events(api: Client, project: Path) -> None:
    first = held(api, project)
    run = api.resume(first["sessionId"], script(*kinds("ab"), count=300), wait=0, ifBusy="enqueue")
    streams = [Stream(api, stream_of(run)) for _ in range(40)]
    with ThreadPoolExecutor(40) as pool:
        followed = [pool.submit(list, stream) for stream in streams]
        api.delete(f"/api/runs/{first['id']}")
        expected = comparable(expected_events(api, api.run(run["id"])))
        for each in followed:
            assert comparable(each.result()) == expected
    for stream in streams:
        stream.close()


def test_curl_follows_a_run(api: Client, program: ProgramFunction, project: Path) -> None:
    run = held(api, project, "ab")
    curl = subprocess.Popen([program("curl", "curl"), "-sN", f"{api.url}{stream_of(run)}"], stdout=subprocess.PIPE)
    assert curl.stdout is not None
    parser = Parser()
    events: list[Event] = []
    while len(events) < 2:
        events += parser.feed(curl.stdout.readline())
    assert api.run(run["id"], wait=0)["status"] == "running"
    api.delete(f"/api/runs/{run['id']}")
    events += parser.feed(curl.communicate(timeout=30)[0])

    assert curl.returncode == 0
    assert comparable(events) == comparable(expected_events(api, run))


# ---- slots for held requests


@pytest.fixture
def one_slot(serve_all: ServeFunction, tmp_path: Path) -> Client:
    """Return a client of a service with one slot for held requests."""
    return Client(serve_all(CCM_MAX_HELD=1, DATABASE_PATH=tmp_path / "db.sqlite").url)


def open_request(client: Client, path: str) -> socket.socket:
    """Return a connection with a request for a stream or a list, of which hardly anything is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before the connect, or it has no effect
    connection.settimeout(30)
    connection.connect((client.host, client.port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return connection


def open_accepted(client: Client, path: str) -> socket.socket:
    """Return such a connection once its response has begun, because the last client's slot may take a moment."""
    connections: list[socket.socket] = []

    def is_accepted() -> bool:
        connections.append(open_request(client, path))
        if connections[-1].recv(100).startswith(b"HTTP/1.1 200 "):
            return True
        connections[-1].close()
        return False

    until(is_accepted)
    return connections[-1]


def long_run(client: Client, cwd: Path) -> dict[str, Any]:
    """Return a run with 6 MB, far more than the buffers between the service and a client that does not read."""
    return client.start(cwd, script(count=6_000, pad=700))


def held_paths(run: dict[str, Any], long: dict[str, Any]) -> list[str]:
    return [
        stream_of(run),
        session_stream_of(run),
        stream_of(long),
        session_stream_of(long),
        f"/api/runs/{long['id']}/messages",
        f"/api/sessions/{long['sessionId']}/messages",
    ]


def test_a_stream_without_a_free_slot_is_refused_and_other_requests_get_through(
    one_slot: Client, project: Path
) -> None:
    run, long = held(one_slot, project), long_run(one_slot, project)
    for path in held_paths(run, long):
        with open_accepted(one_slot, path):
            for other in held_paths(run, long):
                answer = one_slot.get(other)
                assert "CCM_MAX_HELD" in refused(answer, None, 503, "SLOTS_TAKEN")
                assert int(answer.headers["Retry-After"]) > 0
                assert one_slot.request("HEAD", other).status == 200
            assert one_slot.run(run["id"], wait=60)["status"] == "running"
            assert one_slot.messages(long["id"], limit=1000)
            assert one_slot.start(project, "Hello.", wait=0)["mode"] == "fresh"
            assert one_slot.get("/health").status == 200
            refused(one_slot.get(stream_of(run), after=99), "after")
    one_slot.delete(f"/api/runs/{run['id']}")


def test_a_disconnect_frees_the_slot_within_two_seconds(one_slot: Client, project: Path) -> None:
    """Whether it reads or not, and whether there are events or not."""
    run, long = held(one_slot, project), long_run(one_slot, project)
    for path in held_paths(run, long):
        with open_accepted(one_slot, path):
            refused(one_slot.get(stream_of(run)), None, 503, "SLOTS_TAKEN")
    open_accepted(one_slot, stream_of(run)).close()
    one_slot.delete(f"/api/runs/{run['id']}")


def test_a_disconnect_frees_the_slot_of_a_client_with_further_requests(one_slot: Client, project: Path) -> None:
    """The server does not read past waiting requests to the end of the connection."""
    run, long = held(one_slot, project), long_run(one_slot, project)
    waiting = f"/api/runs/{run['id']}?wait=60"
    for path in [waiting, *held_paths(run, long)]:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with open_request(one_slot, path) if path == waiting else open_accepted(one_slot, path) as connection:
            connection.sendall(request * 20)
            # The question itself takes the slot for a moment, and a wait that finds it taken is answered at once.
            until(
                lambda sent=request, to=connection: (  # type: ignore[misc]
                    one_slot.get(stream_of(long)).status == 503 or to.sendall(sent)
                )
            )
        open_accepted(one_slot, stream_of(long)).close()
    one_slot.delete(f"/api/runs/{run['id']}")


def test_a_disconnect_before_the_response_frees_the_slot(one_slot: Client, project: Path) -> None:
    run, long = held(one_slot, project), long_run(one_slot, project)
    for path in held_paths(run, long):
        for _ in range(5):
            open_request(one_slot, path).close()
        open_accepted(one_slot, stream_of(run)).close()
    one_slot.delete(f"/api/runs/{run['id']}")


def test_ended_and_refused_streams_free_their_slot(one_slot: Client, project: Path) -> None:
    run = one_slot.start(project, script(*kinds("ab")))
    for _ in range(3):
        assert len(events_of(one_slot, stream_of(run))) == 4
        refused(one_slot.get(stream_of(run), after=99), "after")
        assert one_slot.request("GET", stream_of(run), headers={"Last-Event-ID": "end"}).status == 204
        assert one_slot.request("HEAD", stream_of(run)).status == 200


def test_other_requests_get_through_while_stalled_clients_hold_all_slots(
    serve_all: ServeFunction, tmp_path: Path, project: Path
) -> None:
    client = Client(serve_all(CCM_MAX_HELD=40, DATABASE_PATH=tmp_path / "db.sqlite").url)
    run, long = held(client, project), long_run(client, project)
    paths = [path for path in held_paths(run, long) for _ in range(10)][:40]
    connections = [open_accepted(client, path) for path in paths]
    refused(client.get(stream_of(run)), None, 503, "SLOTS_TAKEN")

    with ThreadPoolExecutor(30) as pool:
        answers = [pool.submit(client.get, "/api/runs") for _ in range(60)]
        assert all(answer.result().status == 200 for answer in answers)
    assert client.start(project, "Hello.", wait=0)["mode"] == "fresh"
    for connection in connections:
        connection.close()
    client.delete(f"/api/runs/{run['id']}")


# ---- the end of the service


def rest_of(stream: Stream) -> list[Event]:
    events = list(stream)
    stream.close()
    return events


def test_a_stopping_service_sends_the_end_to_every_stream(
    serve_all: ServeFunction, tmp_path: Path, project: Path
) -> None:
    service = serve_all(DATABASE_PATH=tmp_path / "db.sqlite")
    client = Client(service.url)
    run, long = held(client, project, "ab"), long_run(client, project)
    waiting = client.resume(run["sessionId"], "Hello.", wait=0, ifBusy="enqueue")
    streams = [Stream(client, path) for path in (stream_of(run), session_stream_of(run)) for _ in range(40)]
    others = [Stream(client, path) for path in (stream_of(waiting), session_stream_of(long)) for _ in range(10)]
    unread = [open_accepted(client, path) for path in held_paths(run, long) for _ in range(3)]
    for stream in streams:
        stream.take(2)

    service.process.send_signal(signal.SIGTERM)
    with ThreadPoolExecutor(len(streams) + len(others)) as pool:
        rest = list(pool.map(rest_of, streams))
        for events in pool.map(rest_of, others):
            assert events == [] or [len(events), events[-1].type] == [6_002, "end"]
    for events in rest:
        # The message after the interrupt, and the end.
        assert [event.type for event in events] == ["message", "end"]
        assert events[-1].json["error"]["code"] == "INTERRUPTED"
    assert service.wait() == 0
    for connection in unread:
        connection.close()


def test_a_slow_reader_gets_a_complete_response_when_the_service_stops(
    serve_all: ServeFunction, tmp_path: Path, project: Path
) -> None:
    service = serve_all(DATABASE_PATH=tmp_path / "db.sqlite")
    client = Client(service.url)
    run = client.start(project, script(count=1, pad=16_000_000))
    request = f"GET /api/runs/{run['id']}/messages?limit=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(client, request.encode()) as connection:
        body = connection.recv(100)
        service.process.send_signal(signal.SIGTERM)
        until(lambda: any("stopping" in line for line in service.log))
        while not body.endswith(b"]\n"):
            time.sleep(0.01)  # slower than the stop of the service
            received = connection.recv(2**18)
            assert received, f"it ended after {len(body)} bytes"
            body += received
    assert len(body) > 16_000_000
    assert service.wait() == 0
