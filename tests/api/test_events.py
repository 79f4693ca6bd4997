"""The feed of all events: the stored ones, then live, each one once, from any position."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import folder_of, held, refused
from tests.client import Client
from tests.conftest import ServeFunction
from tests.event_source import Event, Stream
from tests.postgresql import new_database
from tests.waiting import until

FEED = "/api/events"
LIFE = ["run.created", "run.started", "run.completed"]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def api(request: pytest.FixtureRequest, serve_all: ServeFunction) -> Client:
    """Return a client of a service on each kind of database."""
    if request.param == "sqlite":
        return Client(serve_all(CCM_MAX_CONCURRENT_RUNS=2).url)
    url = new_database(request.getfixturevalue("postgresql"))
    return Client(serve_all(CCM_MAX_CONCURRENT_RUNS=2, DATABASE_URL=url).url)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("events"))


@pytest.fixture(scope="module")
def stored(api: Client, folder: Path) -> list[Event]:
    """Return the events of three runs in the feed."""
    runs = [api.start(folder, f"Number {number}.") for number in range(3)]
    with Stream(api, FEED) as stream:
        events = stream.take(9)
    assert [event.json["data"]["run"]["id"] for event in events] == [run["id"] for run in runs for _ in LIFE]
    return events


def run_and_type(event: Event) -> tuple[str, str]:
    return event.json["data"]["run"]["id"], event.type


def test_events_come_in_order_with_growing_ids(api: Client, stored: list[Event]) -> None:
    assert [event.type for event in stored] == LIFE * 3
    ids = [int(event.id) for event in stored]
    assert ids == sorted(set(ids))
    for event in stored:
        assert set(event.json) == {"type", "timestamp", "data"}
        assert event.json["type"] == event.type
        assert not {"prompt", "options"} & set(event.json["data"]["run"])
    assert stored[2].json["data"]["run"]["result"]["subtype"] == "success"


def test_the_headers_keep_proxies_from_buffering(api: Client, stored: list[Event]) -> None:
    with Stream(api, FEED) as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"
        assert stream.headers["X-Accel-Buffering"] == "no"
        assert "no-store" in stream.headers["Cache-Control"]
        stream.take(1)
        assert stream.parser.retry == 1_000


def test_a_reconnected_stream_continues_exactly_where_it_ended(api: Client, stored: list[Event]) -> None:
    for place, event in enumerate(stored):
        for path, last in ((f"{FEED}?after={event.id}", None), (FEED, event.id), (f"{FEED}?after=now", event.id)):
            with Stream(api, path, last) as stream:
                assert stream.take(len(stored) - place - 1) == stored[place + 1 :]
    with Stream(api, f"{FEED}?after=0") as stream:
        assert stream.take(9) == stored


def test_events_are_sent_at_once_for_waiting_runs_too(api: Client, stored: list[Event], folder: Path) -> None:
    # Before the keep-alive interval, after which the database would be read anyway.
    with Stream(api, f"{FEED}?after=now", timeout=14) as stream:
        running = [held(api, folder) for _ in range(2)]
        waiting = api.start(folder, "Hello.", wait=0)
        assert [run_and_type(event) for event in stream.take(5)] == [
            *((run["id"], kind) for run in running for kind in LIFE[:2]),
            (waiting["id"], LIFE[0]),
        ]
        api.delete(f"/api/runs/{waiting['id']}")
        assert run_and_type(*stream.take(1)) == (waiting["id"], "run.cancelled")
        for run in running:
            api.delete(f"/api/runs/{run['id']}")
        assert {run_and_type(event) for event in stream.take(2)} == {(run["id"], "run.cancelled") for run in running}


def test_a_stream_from_now_misses_nothing_when_it_is_cut_before_the_first_event(
    api: Client, stored: list[Event], folder: Path
) -> None:
    with Stream(api, f"{FEED}?after=now") as stream:
        received = b""
        while b"\n\n" not in received:
            received += stream.receive(2**16)
        assert stream.parser.feed(received) == []
        assert stream.parser.last_event_id
    run = api.start(folder, "Hello.")
    with Stream(api, f"{FEED}?after=now", stream.parser.last_event_id) as again:
        assert [run_and_type(event) for event in again.take(3)] == [(run["id"], kind) for kind in LIFE]


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "end", "1e3", "²", "9" * 17, "0x1", " 1"])
def test_an_invalid_id_is_refused(api: Client, text: str) -> None:
    assert "id of an event" in refused(api.get(FEED, after=text), "after")
    if text.isascii() and text == text.strip():
        refused(api.request("GET", FEED, headers={"Last-Event-ID": text}), "Last-Event-ID")


def test_an_event_that_does_not_exist_yet_is_refused(api: Client, stored: list[Event]) -> None:
    assert "there is no event 999999 yet" in refused(api.get(FEED, after=999_999), "after")
    refused(api.request("GET", FEED, headers={"Last-Event-ID": "999999"}), "Last-Event-ID")
    refused(api.request("GET", FEED, headers={"Last-Event-ID": "now"}), "Last-Event-ID")
    refused(api.get(FEED, wait=1), "wait")


def test_many_clients_get_the_same_events(api: Client, stored: list[Event], folder: Path) -> None:
    streams = [Stream(api, f"{FEED}?after={stored[-1].id}") for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda number: api.start(folder, f"Number {number}."), range(12)))

    def read(stream: Stream) -> list[Event]:
        wanted = {run["id"] for run in runs}
        events: list[Event] = []
        with stream:
            for event in stream:
                events.append(event)
                if event.type == "run.completed":
                    wanted.discard(event.json["data"]["run"]["id"])
                if not wanted:
                    return events
        raise AssertionError("the stream ended")

    with ThreadPoolExecutor(40) as pool:
        read_by_all = list(pool.map(read, streams))
    assert all(events == read_by_all[0] for events in read_by_all)
    for run in runs:
        assert [kind for run_id, kind in map(run_and_type, read_by_all[0]) if run_id == run["id"]] == LIFE


def test_a_stream_takes_a_slot_that_a_disconnect_frees(serve_all: ServeFunction, folder: Path) -> None:
    client = Client(serve_all(CCM_MAX_HELD=1).url)
    with Stream(client, FEED):
        refused(client.get(FEED), None, 503, "SLOTS_TAKEN")
        assert client.start(folder, "Hello.")["id"]

    def is_accepted() -> bool:
        stream = Stream(client, FEED)
        stream.close()
        return stream.status == 200

    until(is_accepted)


def test_a_stopping_service_sends_the_ends_first(serve_all: ServeFunction, folder: Path, tmp_path: Path) -> None:
    service = serve_all(DATABASE_PATH=tmp_path / "db.sqlite")
    client = Client(service.url)
    with Stream(client, FEED) as stream:
        run = held(client, folder)
        stream.take(2)
        service.process.send_signal(signal.SIGTERM)
        [end] = list(stream)
    assert run_and_type(end) == (run["id"], "run.failed")
    assert end.json["data"]["run"]["error"]["code"] == "INTERRUPTED"
    assert service.wait() == 0

    with Stream(Client(serve_all(DATABASE_PATH=tmp_path / "db.sqlite").url), FEED) as again:
        assert [event.type for event in again.take(3)] == ["run.created", "run.started", "run.failed"]


def test_large_events_are_complete(serve_all: ServeFunction, folder: Path) -> None:
    client = Client(serve_all().url)
    large: dict[str, Any] = {"result": {"result": "x" * 700_000}}
    runs = [client.start(folder, json.dumps(large)) for _ in range(3)]
    with Stream(client, FEED) as stream:
        events = stream.take(9)
    assert [len(event.json["data"]["run"]["result"]["result"]) for event in events[2::3]] == [700_000] * 3
    assert [run_and_type(event)[0] for event in events[2::3]] == [run["id"] for run in runs]
