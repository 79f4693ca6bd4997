"""The body of every event shows the run and the approval as they were, whatever has happened to them since.

The feed and the webhooks are compared byte for byte with bodies that are made at the very moment of each event.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import run_wsgi_app

from ccm.core.webhooks.outbox import DELIVERED_EVENTS
from ccm.db import events
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.json_text import to_json_text
from ccm.models import EventType, Run
from tests.api.conftest import folder_of, held, script
from tests.api.in_process import InProcessClient, InProcessService, environ_of
from tests.core.archive.history import add_bun_run, fill, make_bun, uuid_of, writing
from tests.flask_commands import Flask, variables
from tests.receiver import Receiver

FRAME = re.compile(rb"event: (\S+)\nid: (\d+)\ndata: (.*)\n\n")
BASH = {"tool_name": "Bash", "input": {"command": "make", "odd": "\ud800\0\n\x7f"}, "description": "make"}

Bodies = dict[int, str]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Bodies:
    """Return the bodies of all events of this process, by their ids, made when each event is inserted."""
    bodies: Bodies = {}
    insert = events.insert

    def recorded(transaction: Transaction, type: str, run: Run, approval: Mapping[str, Any] | None = None) -> None:
        insert(transaction, type, run, approval)
        event_id, at = transaction.tuples('SELECT id, "createdAt" FROM ccr_events ORDER BY id DESC LIMIT 1')[0]
        shown = {name: value for name, value in run.to_json().items() if name not in ("prompt", "options")}
        data = {"run": shown} if approval is None else {"approval": approval, "run": shown}
        bodies[event_id] = to_json_text({"type": type, "timestamp": at, "data": data})

    monkeypatch.setattr("ccm.db.events.insert", recorded)
    return bodies


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def feed(service: InProcessService, last: int) -> Bodies:
    """Return the bodies in the feed, through the event with id `last`."""
    client = service.client
    environ = environ_of("GET", "/api/events", [("Host", f"{client.host}:{client.port}")])
    chunks, _, _ = run_wsgi_app(client.app, environ)
    bodies: Bodies = {}
    for chunk in chunks:
        bodies |= {int(event_id): text.decode("ascii") for _, event_id, text in FRAME.findall(chunk)}
        if last in bodies:
            break
    chunks.close()  # type: ignore[attr-defined]
    return bodies


def pending(client: InProcessClient, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pending approval of a run."""
    (approval,) = client.get("/api/approvals?status=pending&wait=30").json
    assert approval["runId"] == run["id"]
    return dict(approval)


def make_history(client: InProcessClient, folder: Path) -> str:
    """Make a run for each way in which it can begin, ask and end. Return the id of the first session."""
    first = client.start(folder, "Hello.", timeoutMs=60_000)
    session = first["sessionId"]
    client.resume(session, script({"type": "assistant", "text": "x" * 2**17}, result={"result": "y" * 2**17}))
    client.fork(session, "Hello.", atRunId=first["id"])
    assert client.start(folder, script(exit=3))["status"] == "error"
    result = {"subtype": "error_max_turns", "is_error": True, "permission_denials": [BASH], "odd": "\ud800\0"}
    assert client.resume(session, script(result=result))["status"] == "error"

    running = [held(client, folder) for _ in range(2)]
    waiting = [client.start(folder, "Hello.", wait=0), client.resume(session, "Hello.", wait=0)]
    for run in (*waiting, *running):
        client.delete(f"/api/runs/{run['id']}")
        assert client.run(run["id"])["status"] == "cancelled"

    for decision in ({"decision": "allow", "updatedInput": {"content": "z" * 2**17}}, {"decision": "deny"}, None):
        run = client.start(folder, script(ask=[BASH]), wait=0, approvals=True)
        approval = pending(client, run)
        # At least one worker of the two stays free, so this one is denied without being asked.
        other = client.start(folder, script(ask=[BASH]), approvals=True)
        assert [each["resolution"] for each in client.get(f"/api/runs/{other['id']}/approvals").json] == ["no_worker"]
        if decision is None:
            client.delete(f"/api/runs/{run['id']}")
        else:
            assert client.post(f"/api/approvals/{approval['id']}", decision).status == 200
        client.run(run["id"])
    return str(session)


def test_bodies_are_true_to_the_moment(
    made: Bodies, receiver: Receiver, database_url: str, tmp_path: Path, home: Path
) -> None:
    settings = variables(database_url) | {"CCM_WEBHOOK_URL": receiver.url, "CCM_MAX_CONCURRENT_RUNS": 2}
    with InProcessService(folder_of(tmp_path, "first"), **settings) as service:
        session = make_history(service.client, folder_of(tmp_path))
        last = max(made)

        assert feed(service, last) == made
        assert {json.loads(body)["type"] for body in made.values()} == set(EventType)
        delivered = sorted(body for body in made.values() if json.loads(body)["type"] in DELIVERED_EVENTS)
        assert sorted(sent.body.decode("ascii") for sent in receiver.wait_for(len(delivered))) == delivered

    prune_and_import(Flask(home), database_url, tmp_path, session)

    with InProcessService(folder_of(tmp_path, "second"), **settings) as service:
        service.client.start(tmp_path, "Hello.")
        assert max(made) == last + 3
        kept = {event_id: body for event_id, body in made.items() if f'"{session}"' not in body}
        assert feed(service, max(made)) == kept
    with closing(Database(database_url)) as reader, reader.transaction() as transaction:
        assert {event_id: events.find_text(transaction, event_id) for event_id in kept} == kept


def prune_and_import(flask: Flask, url: str, folder: Path, session: str) -> None:
    """Delete the tree of a session, and import an export and a database of the original service."""
    with writing(f"sqlite:///{folder}/other.sqlite") as other:
        fill(other)
    exported, bun = folder / "export.jsonl", folder / "bun.sqlite"
    exported.write_text(flask(f"sqlite:///{folder}/other.sqlite", "export").stdout)
    make_bun(bun)
    add_bun_run(bun, "r1", uuid_of(60))
    for words in (("prune", "--session", session), ("import", str(exported)), ("import", str(bun))):
        done = flask(url, *words)
        assert done.returncode == 0, done
