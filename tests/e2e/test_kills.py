"""Repeated SIGKILLs at random moments: the service loses no data that a client has seen, and leaves no process."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.processes import marked
from ccm.testing.service_process import ServiceProcess
from ccm.timestamps import timestamp
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.event_source import Stream
from tests.postgresql import new_database
from tests.programs import marks_in
from tests.waiting import until

# A short run, a run of many messages, and a run that never ends, whose tool would outlive the service.
PROMPTS = ("hello", json.dumps({"count": 2_000}), json.dumps({"hold": True, "count": 50, "tool": 300}))
WORKERS = 3


class Witness:
    """A client that starts runs, follows them until the service dies, and keeps everything it received."""

    def __init__(self) -> None:
        self.accepted: dict[str, dict[str, Any]] = {}
        self.seen: dict[str, dict[int, Any]] = {}
        self._threads: list[threading.Thread] = []

    def start(self, client: Client, cwd: Path, prompt: str) -> None:
        with contextlib.suppress(OSError, HTTPException):
            answer = client.post("/api/runs/start", {"cwd": str(cwd), "prompt": prompt})
            assert answer.status == 202, answer.body
            run = answer.json
            self.accepted[run["id"]] = run
            thread = threading.Thread(target=self._follow, args=(client, run["id"]))
            self._threads.append(thread)
            thread.start()

    def _follow(self, client: Client, run_id: str) -> None:
        seen = self.seen.setdefault(run_id, {})
        with contextlib.suppress(OSError, HTTPException), Stream(client, f"/api/runs/{run_id}/stream") as stream:
            for event in stream:
                if event.type == "message":
                    seen[int(event.id)] = event.json

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._threads.clear()


@pytest.fixture(
    params=[
        ("sqlite", 3),
        pytest.param(("sqlite", 50), marks=pytest.mark.many_rounds),
        pytest.param(("postgresql", 12), marks=pytest.mark.many_rounds),
    ],
    ids=lambda kind: f"{kind[0]}-{kind[1]}",
)
def kills(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, str], int]:
    """Return the database's variables and the number of kills."""
    kind, number = request.param
    if kind == "sqlite":
        return {}, number
    return {"DATABASE_URL": new_database(request.getfixturevalue("postgresql"))}, number


def test_kills_at_random_moments_lose_no_data_and_leave_no_process(
    serve: ServeFunction, home: Path, tmp_path: Path, project: Path, kills: tuple[dict[str, str], int]
) -> None:
    database, number = kills
    own_home = tmp_path / "home"
    own_home.mkdir()
    chance = random.Random(number)
    witness = Witness()

    def serve_again() -> tuple[ServiceProcess, Client]:
        settings: dict[str, object] = {"CCM_MAX_CONCURRENT_RUNS": WORKERS, "LOG_LEVEL": "info", **database}
        # Claude Code that waits for a run is killed with the rest, while it is being started as well.
        settings |= {"CCM_SPARE_RUNS": 2, "CCM_WARM_SESSIONS": 2, "HOME": own_home}
        service = serve(CCM_CLI_PATH=stand_in_cli(home), **settings)
        return service, Client(service.url)

    def kill(pid: int, delay: float, seen: int | None) -> None:
        """Kill a service after a delay; with `seen`, only after clients have received more messages than that."""
        if seen is not None:
            until(lambda: sum(map(len, list(witness.seen.values()))) > seen)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)

    for round_number in range(number):
        started_at = timestamp()
        service, client = serve_again()
        runs = client.get("/api/runs", limit=1000).json
        running = [run for run in runs if run["status"] == "running" and run["startedAt"] is not None]
        assert [run for run in running if run["startedAt"] < started_at] == []
        assert not any(marked(run["id"]) for run in runs if run["error"])
        seen_before = sum(map(len, witness.seen.values())) if round_number % 2 == 0 else None
        killer = threading.Thread(target=kill, args=(service.process.pid, chance.random() * 0.8, seen_before))
        killer.start()
        for _ in range(4):
            witness.start(client, project, chance.choice(PROMPTS))
        service.wait()
        until(lambda: not marks_in(own_home))
        killer.join()
        witness.join()

    _, client = serve_again()
    _end_all(client, witness)
    assert len(witness.accepted) > number
    assert any(witness.seen.values())
    for run_id in witness.accepted:
        run = client.run(run_id, wait=0)
        messages = client.messages(run_id)
        assert len(messages) == run["messageCount"]
        seen = witness.seen.get(run_id, {})
        assert {index: messages[index] for index in seen} == seen
        if run["status"] == "completed":
            assert messages[-1] == run["result"]
        else:
            assert (run["status"], (run["error"] or {}).get("code")) in (("error", "INTERRUPTED"), ("cancelled", None))


def _end_all(client: Client, witness: Witness) -> None:
    """Wait for all runs to end: queued ones execute, and those that never end are cancelled."""

    def running() -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = client.get("/api/runs", status="running", limit=1000).json
        return runs

    def all_ended() -> bool:
        for run in running():
            if run["startedAt"] is not None and '"hold"' in run["prompt"]:
                client.delete(f"/api/runs/{run['id']}")
        return not running()

    until(all_ended)
    assert {run["id"] for run in client.get("/api/runs", limit=1000).json} >= set(witness.accepted)
    assert not any(marked(run_id) for run_id in witness.accepted)
