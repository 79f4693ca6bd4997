"""Streams of the real Claude Code while it generates text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.client import Client
from tests.event_source import Event, Stream

PARTIAL = {"includePartialMessages": True}


def test_a_stream_that_reconnects_fifty_times_is_complete(client: Client, project: Path) -> None:
    run = client.start(project, "[[slow 150 0.02]]", wait=0, options=PARTIAL)
    chance = random.Random(5)
    events: list[Event] = []
    last = "-1"
    for _ in range(50):
        with Stream(client, f"/api/runs/{run['id']}/stream", last) as stream:
            for _ in range(chance.randrange(1, 4)):
                events += stream.parser.feed(stream.receive(chance.randrange(1, 2_000)))
            last = stream.parser.last_event_id or last
    assert client.run(run["id"], wait=0)["status"] == "running", "the run ended before the last reconnection"
    with Stream(client, f"/api/runs/{run['id']}/stream", last) as stream:
        events += list(stream)

    messages = client.messages(run["id"])
    assert [event.json for event in events[:-1]] == messages
    assert [event.id for event in events] == [*(str(index) for index in range(len(messages))), "end"]
    assert events[-1].json == client.run(run["id"])


@pytest.mark.main_job
def test_text_is_streamed_while_it_is_generated(client: Client, project: Path) -> None:
    run = client.start(project, "[[slow 100 0.05]]", wait=0, options=PARTIAL)
    with Stream(client, f"/api/runs/{run['id']}/stream") as stream:
        pieces = (event.json["event"] for event in stream if event.json["type"] == "stream_event")
        deltas = (piece["delta"]["text"] for piece in pieces if piece["type"] == "content_block_delta")
        text = "".join(next(deltas) for _ in range(3))
        assert client.run(run["id"], wait=0)["status"] == "running"
        assert client.delete(f"/api/runs/{run['id']}").status == 200
        *_, end = stream
    assert text == "piece 0 piece 1 piece 2 "
    assert [end.type, end.json["status"]] == ["end", "cancelled"]
