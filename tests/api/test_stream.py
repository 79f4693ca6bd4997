"""Streams: what was said is told again, what is said is told at once; from any place, each message once."""

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
    """A run that has said abacaba, and its result: the indexes 0 to 7."""
    return api.start(folder_of(tmp_path_factory.mktemp("ended")), script(*kinds("abacaba")))


def stream_of(run: dict[str, Any]) -> str:
    return f"/api/runs/{run['id']}/stream"


def session_stream_of(run: dict[str, Any]) -> str:
    return f"/api/sessions/{run['sessionId']}/stream"


def ids(events: list[Event]) -> list[str]:
    return [event.id for event in events]


def told(client: Client, run: dict[str, Any], prefix: str = "") -> list[Event]:
    """The events of an ended run, made from what the rest of the API says."""
    messages = client.messages(run["id"])
    end = Event("end", json.dumps(client.run(run["id"])), f"{prefix}end")
    return [
        *(
            Event("message", json.dumps(message, separators=(",", ":")), f"{prefix}{i}")
            for i, message in enumerate(messages)
        ),
        end,
    ]


def alike(events: list[Event]) -> list[tuple[str, str, Any]]:
    return [(event.type, event.id, repr(event.json)) for event in events]


# ---- a run's stream


def test_a_stream_replays_exactly_what_was_said(api: Client, project: Path) -> None:
    run = api.start(project, script(*STRANGE))

    with Stream(api, stream_of(run)) as stream:
        events = list(stream)
    assert alike(events) == alike(told(api, run))
    assert events[0].json == STRANGE[0]
    assert ids(events) == ["0", "1", "2", "3", "end"]
    assert [event.type for event in events] == ["message"] * 4 + ["end"]
    assert events[-1].json == run


def test_a_stream_says_what_it_is_before_anything_has_happened(api: Client, project: Path) -> None:
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


def test_a_stream_tells_what_is_said_as_it_is_said(api: Client, project: Path) -> None:
    run = held(api, project, "ab")

    with Stream(api, stream_of(run)) as stream:
        assert letters([event.json for event in stream.take(2)]) == "ab"
        assert api.run(run["id"], wait=0)["status"] == "running"
        api.delete(f"/api/runs/{run['id']}")
        rest = list(stream)
    assert alike(rest) == alike(told(api, run)[2:])
    assert rest[-1].json["status"] == "cancelled"


def test_the_stream_of_a_run_that_never_began_has_its_end(api: Client, project: Path) -> None:
    first = held(api, project)
    waiting = api.resume(first["sessionId"], "Hello.", wait=0, ifBusy="enqueue")
    with Stream(api, stream_of(waiting)) as stream:
        api.delete(f"/api/runs/{waiting['id']}")
        (end,) = stream
    assert [end.type, end.id, end.json["status"]] == ["end", "end", "cancelled"]
    api.delete(f"/api/runs/{first['id']}")


@pytest.mark.parametrize("last", range(-1, 8))
def test_a_stream_goes_on_after_any_message(api: Client, ended: dict[str, Any], last: int) -> None:
    expected = alike(told(api, ended)[last + 1 :])

    assert alike(events_of(api, stream_of(ended), str(last))) == expected
    assert alike(events_of(api, f"{stream_of(ended)}?after={last}")) == expected
    # A browser comes back to the address that it was given, `after` and all.
    assert alike(events_of(api, f"{stream_of(ended)}?after=3", str(last))) == expected


def test_who_has_had_the_end_is_told_not_to_come_back(api: Client, ended: dict[str, Any]) -> None:
    for path in (stream_of(ended), f"{stream_of(ended)}?after=3"):
        answer = api.request("GET", path, headers={"Last-Event-ID": "end"})
        assert [answer.status, answer.body] == [204, b""]
        assert answer.headers["X-Request-Id"]
        assert "Content-Type" not in answer.headers


UNKNOWN = ["", "x", "8", "9007199254740993", "-2", "1.5", "End", "end ", " 1, 2", f"{NOWHERE}:1", "+1", "\u00b2"]


@pytest.mark.parametrize("last", UNKNOWN)
def test_a_place_that_is_none_is_refused(api: Client, ended: dict[str, Any], last: str) -> None:
    sent = {"Last-Event-ID": last}
    if last.strip() == "end":
        assert api.request("GET", stream_of(ended), headers=sent).status == 204  # blanks around a header do not count
    else:
        refused(api.request("GET", stream_of(ended), headers=sent), "Last-Event-ID")
        refused(api.request("GET", f"{stream_of(ended)}?after=1", headers=sent), "Last-Event-ID")
    refused(api.get(stream_of(ended), after=last), "after")


def test_what_a_run_has_not_come_to_yet_is_refused(api: Client, project: Path) -> None:
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


def test_what_is_nowhere_has_no_stream(api: Client, ended: dict[str, Any]) -> None:
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


def test_a_client_of_http_1_0_is_served_too(api: Client, ended: dict[str, Any]) -> None:
    """As nginx is by default to what is behind it."""
    with connect(api, f"GET {stream_of(ended)} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()) as connection:
        _, body = read_all(connection)
    assert ids(Parser().feed(body)) == [*"01234567", "end"]


# ---- a session's stream


def test_a_sessions_stream_tells_its_runs_one_after_another(api: Client, project: Path) -> None:
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
    assert alike(events) == alike([event for run in runs for event in told(api, run, f"{run['id']}:")])
    # Any of the ids by which a session goes.
    with Stream(api, f"/api/sessions/{third['sdkSessionId']}/stream") as stream:
        assert alike(stream.take(len(events))) == alike(events)


def test_a_sessions_stream_goes_on_after_any_event(api: Client, project: Path) -> None:
    first = api.start(project, script(*kinds("ab")))
    second = api.resume(first["sessionId"], script(*kinds("c")))
    api.fork(first["sessionId"], "This one is another session's.")
    path = session_stream_of(first)
    whole = [event for run in (first, second) for event in told(api, run, f"{run['id']}:")]

    places = [
        (f"{first['id']}:-1", 0),
        (f"{second['id']}:-1", 4),
        *((event.id, i + 1) for i, event in enumerate(whole)),
    ]
    following = api.resume(first["sessionId"], script(*kinds("d")))
    whole += told(api, following, f"{following['id']}:")
    for place, seen in places:
        for address, header in (
            (path, place),
            (f"{path}?after={place}", None),
            (f"{path}?after={first['id']}:0", place),
        ):
            with Stream(api, address, header) as stream:
                assert alike(stream.take(len(whole) - seen)) == alike(whole[seen:])


@pytest.mark.parametrize(
    "last", ["", "x", "5", "end", f"{NOWHERE}", ":1", "{run}", "{run}:", "{run}:-2", "{run}:8", "{run}:x"]
)
def test_a_place_that_is_none_in_a_session_is_refused(api: Client, ended: dict[str, Any], last: str) -> None:
    last = last.format(run=ended["id"])
    refused(api.request("GET", session_stream_of(ended), headers={"Last-Event-ID": last}), "Last-Event-ID")
    refused(api.get(session_stream_of(ended), after=last), "after")


# ---- streams that break


def read_with_cuts(client: Client, path: str, count: int, size: int) -> list[Event]:
    """So many events over connections that break at random, at any byte, and are continued as a browser does it."""
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


def test_a_stream_cut_fifty_times_is_whole(api: Client, project: Path) -> None:
    run = api.start(project, script(*kinds("ab"), count=400, pad=2_000))

    events = read_with_cuts(api, stream_of(run), 404, 10_000)
    assert alike(events) == alike(told(api, run))


def test_the_stream_of_a_session_cut_fifty_times_while_it_goes_on_is_whole(api: Client, project: Path) -> None:
    first = api.start(project, script(*kinds("ab"), count=30, pad=1_500), wait=0)
    body = script(*kinds("cd"), count=30, pad=1_500)
    runs = [first, *(api.resume(first["sessionId"], body, wait=0, ifBusy="enqueue") for _ in range(9))]

    events = read_with_cuts(api, session_stream_of(first), 10 * 34, 4_000)
    assert alike(events) == alike([event for run in runs for event in told(api, run, f"{run['id']}:")])


def test_many_follow_one_run_and_all_are_told_the_same(api: Client, project: Path) -> None:
    first = held(api, project)
    run = api.resume(first["sessionId"], script(*kinds("ab"), count=300), wait=0, ifBusy="enqueue")
    streams = [Stream(api, stream_of(run)) for _ in range(40)]
    with ThreadPoolExecutor(40) as pool:
        followed = [pool.submit(list, stream) for stream in streams]
        api.delete(f"/api/runs/{first['id']}")
        expected = alike(told(api, api.run(run["id"])))
        for each in followed:
            assert alike(each.result()) == expected
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
    assert alike(events) == alike(told(api, run))


# ---- places for what is held open


@pytest.fixture
def one_place(serve_all: ServeFunction, tmp_path: Path) -> Client:
    """A client of a service with one place for requests that are held open."""
    return Client(serve_all(CCM_MAX_HELD=1, DATABASE_PATH=tmp_path / "db.sqlite").url)


def asked(client: Client, path: str) -> socket.socket:
    """A connection on which a stream or a list has been asked for, and of which hardly anything is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects, or it has no effect
    connection.settimeout(30)
    connection.connect((client.host, client.port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return connection


def let_in(client: Client, path: str) -> socket.socket:
    """The same, once its answer has begun: a place is free soon after the last client has left."""
    connections: list[socket.socket] = []

    def is_let_in() -> bool:
        connections.append(asked(client, path))
        if connections[-1].recv(100).startswith(b"HTTP/1.1 200 "):
            return True
        connections[-1].close()
        return False

    until(is_let_in)
    return connections[-1]


def long_run(client: Client, cwd: Path) -> dict[str, Any]:
    """A run of 6 MB, far more than fits on the way to a client that does not read."""
    return client.start(cwd, script(count=6_000, pad=700))


def held_open(run: dict[str, Any], long: dict[str, Any]) -> list[str]:
    return [
        stream_of(run),
        session_stream_of(run),
        stream_of(long),
        session_stream_of(long),
        f"/api/runs/{long['id']}/messages",
        f"/api/sessions/{long['sessionId']}/messages",
    ]


def test_who_finds_no_place_is_sent_away_and_plain_requests_get_through(one_place: Client, project: Path) -> None:
    run, long = held(one_place, project), long_run(one_place, project)
    for path in held_open(run, long):
        with let_in(one_place, path):
            for other in held_open(run, long):
                answer = one_place.get(other)
                assert "CCM_MAX_HELD" in refused(answer, None, 503, "SLOTS_TAKEN")
                assert int(answer.headers["Retry-After"]) > 0
                assert one_place.request("HEAD", other).status == 200
            assert one_place.run(run["id"], wait=60)["status"] == "running"
            assert one_place.messages(long["id"], limit=1000)
            assert one_place.start(project, "Hello.", wait=0)["mode"] == "fresh"
            assert one_place.get("/health").status == 200
            refused(one_place.get(stream_of(run), after=99), "after")
    one_place.delete(f"/api/runs/{run['id']}")


def test_a_client_that_has_gone_frees_its_place_within_two_seconds(one_place: Client, project: Path) -> None:
    """Whether it read or not, and whether there was anything to say or not."""
    run, long = held(one_place, project), long_run(one_place, project)
    for path in held_open(run, long):
        with let_in(one_place, path):
            refused(one_place.get(stream_of(run)), None, 503, "SLOTS_TAKEN")
    let_in(one_place, stream_of(run)).close()
    one_place.delete(f"/api/runs/{run['id']}")


def test_a_client_that_has_gone_frees_its_place_also_when_it_has_asked_for_more(
    one_place: Client, project: Path
) -> None:
    """Behind requests that wait the server does not read on to the end of the connection."""
    run, long = held(one_place, project), long_run(one_place, project)
    waiting = f"/api/runs/{run['id']}?wait=60"
    for path in [waiting, *held_open(run, long)]:
        more = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 20
        with asked(one_place, path) if path == waiting else let_in(one_place, path) as connection:
            connection.sendall(more)
            until(lambda: one_place.get(stream_of(long)).status == 503)
        let_in(one_place, stream_of(long)).close()
    one_place.delete(f"/api/runs/{run['id']}")


def test_a_client_that_goes_before_it_is_answered_frees_its_place(one_place: Client, project: Path) -> None:
    run, long = held(one_place, project), long_run(one_place, project)
    for path in held_open(run, long):
        for _ in range(5):
            asked(one_place, path).close()
        let_in(one_place, stream_of(run)).close()
    one_place.delete(f"/api/runs/{run['id']}")


def test_a_stream_that_has_ended_and_one_that_is_refused_leave_their_place(one_place: Client, project: Path) -> None:
    run = one_place.start(project, script(*kinds("ab")))
    for _ in range(3):
        assert len(events_of(one_place, stream_of(run))) == 4
        refused(one_place.get(stream_of(run), after=99), "after")
        assert one_place.request("GET", stream_of(run), headers={"Last-Event-ID": "end"}).status == 204
        assert one_place.request("HEAD", stream_of(run)).status == 200


def test_plain_requests_get_through_when_all_places_are_taken_by_clients_that_do_not_read(
    serve_all: ServeFunction, tmp_path: Path, project: Path
) -> None:
    client = Client(serve_all(CCM_MAX_HELD=40, DATABASE_PATH=tmp_path / "db.sqlite").url)
    run, long = held(client, project), long_run(client, project)
    paths = [path for path in held_open(run, long) for _ in range(10)][:40]
    connections = [let_in(client, path) for path in paths]
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


def test_a_service_that_stops_tells_every_stream_the_end(
    serve_all: ServeFunction, tmp_path: Path, project: Path
) -> None:
    service = serve_all(DATABASE_PATH=tmp_path / "db.sqlite")
    client = Client(service.url)
    run, long = held(client, project, "ab"), long_run(client, project)
    waiting = client.resume(run["sessionId"], "Hello.", wait=0, ifBusy="enqueue")
    streams = [Stream(client, path) for path in (stream_of(run), session_stream_of(run)) for _ in range(40)]
    others = [Stream(client, path) for path in (stream_of(waiting), session_stream_of(long)) for _ in range(10)]
    unread = [let_in(client, path) for path in held_open(run, long) for _ in range(3)]
    for stream in streams:
        stream.take(2)

    service.process.send_signal(signal.SIGTERM)
    with ThreadPoolExecutor(len(streams) + len(others)) as pool:
        rest = list(pool.map(rest_of, streams))
        for events in pool.map(rest_of, others):
            assert events == [] or [len(events), events[-1].type] == [6_002, "end"]
    for events in rest:
        # What it said when it was interrupted, and the end.
        assert [event.type for event in events] == ["message", "end"]
        assert events[-1].json["error"]["code"] == "INTERRUPTED"
    assert service.wait() == 0
    for connection in unread:
        connection.close()


def test_a_slow_reader_gets_its_answer_whole_when_the_service_stops(
    serve_all: ServeFunction, tmp_path: Path, project: Path
) -> None:
    service = serve_all(DATABASE_PATH=tmp_path / "db.sqlite")
    client = Client(service.url)
    run = client.start(project, script(count=1, pad=16_000_000))
    request = f"GET /api/runs/{run['id']}/messages?limit=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(client, request.encode()) as connection:
        said = connection.recv(100)
        service.process.send_signal(signal.SIGTERM)
        until(lambda: any("stopping" in line for line in service.log))
        while not said.endswith(b"]\n"):
            time.sleep(0.01)  # slower than the service could stop
            received = connection.recv(2**18)
            assert received, f"it ended after {len(said)} bytes"
            said += received
    assert len(said) > 16_000_000
    assert service.wait() == 0
