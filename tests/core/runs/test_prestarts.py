"""Claude Code that is kept ready for the next runs, with the stand-in CLI."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from ccm.core.claude.execution import Execution
from ccm.core.claude.locations import transcript_path
from ccm.core.claude.prestart_key import Ids, Key, spare_key, start_state_of, warm_key
from ccm.core.claude.prestarted import Prestarted
from ccm.core.claude.processes import marked
from ccm.core.claude.reaper import Reaper
from ccm.core.claude.run_context import CLIConfig, RunContext
from ccm.core.policy.ceilings import Ceilings
from ccm.core.runs import prestart_demand, prestarts
from ccm.core.runs.manager import RunManager
from ccm.core.runs.prestarts import Prestarts
from ccm.core.runs.request import Accepted
from ccm.models import Run, RunMode, RunStatus
from ccm.testing.service_process import ServiceProcess
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.programs import marks_in
from tests.waiting import until


class Watched(Reaper):
    """A reaper without a process."""

    def _send(self, line: str) -> None:
        pass

    @property
    def watched(self) -> set[str]:
        return set(self._runs)


class World:
    """What the prestarts depend on; tests change it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Written once: a program that is about to be executed cannot be written.
        self.cli = stand_in_cli(folder)
        self.environ = {"HOME": str(folder), "PATH": os.environ["PATH"]}
        self.reaper = Watched()
        self.states: dict[str | None, Hashable] = {}
        self.free: int | None = None
        self.made: list[Prestarts] = []

    @property
    def config(self) -> CLIConfig:
        return CLIConfig(self.cli, self.environ, "acceptEdits", ("user",), 2**20)

    def make(self, spares: int = 1, warm: int = 0) -> Prestarts:
        kept = Prestarts(
            self.config,
            self.reaper,
            spares=spares,
            warm=warm,
            state=lambda key, _config: self.states.get(key.cwd, "unchanged"),
            memory=lambda: self.free,
        )
        self.made.append(kept)
        kept.start()
        return kept

    def pids(self) -> list[int]:
        """Return the processes of all that wait or are taken."""
        return [pid for run_id in list(self.reaper.watched) for pid in marked(run_id)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(prestarts, "CHECK_INTERVAL", 0.02)
    monkeypatch.setattr(prestarts, "QUIET_INTERVAL", 0.02)
    monkeypatch.setattr(prestarts, "QUIET_TIME", 0.0)
    monkeypatch.setattr(prestarts, "PATIENCE", 0.0)
    world = World(tmp_path)
    yield world
    for kept in world.made:
        kept.close()
        kept.stop()
    assert world.reaper.watched == set()


def run_of(ids: Ids, cwd: str = "/tmp", session: str | None = None, **fields: Any) -> Run:
    row = dict.fromkeys(Run.shape.columns)
    row |= {"id": ids.run_id, "sdkSessionId": ids.sdk_session_id, "sessionId": session or ids.sdk_session_id}
    row |= {
        "cwd": cwd,
        "prompt": "",
        "optionsJson": "{}",
        "approvals": 0,
        "mode": RunMode.FRESH,
        "status": RunStatus.RUNNING,
    }
    return Run.from_row([(row | fields)[name] for name in Run.shape.columns])


def reserved(kept: Prestarts, cwd: str = "/tmp", **options: Any) -> Ids:
    """Return the ids of a spare once there is one."""
    ids = until(lambda: kept.reserve_spare(options, cwd, approvals=False))
    assert ids is not None
    return ids


def taken(world: World, kept: Prestarts, ids: Ids | None, parent: Run | None = None) -> Prestarted | None:
    """Take a process as its run would, and end it."""
    assert ids is not None
    world.reaper.watch(ids.run_id)
    found = kept.take(run_of(ids), parent)
    if found is not None:
        found.end(0)
    world.reaper.release(ids.run_id)
    return found


def test_a_spare_has_the_ids_of_its_run_and_is_replaced(world: World) -> None:
    kept = world.make()

    first = reserved(kept)
    found = taken(world, kept, first)

    assert found is not None
    assert found.ids == first
    assert reserved(kept) != first


def test_a_spare_that_ends_is_replaced(world: World) -> None:
    kept = world.make()
    (pid,) = until(world.pids)

    os.kill(pid, signal.SIGKILL)

    until(lambda: world.pids() not in ([], [pid]))
    assert taken(world, kept, reserved(kept)) is not None


def test_a_cli_that_does_not_know_spares_turns_them_off(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.environ["STAND_IN_CLI_REFUSES"] = "start"
    with caplog.at_level(logging.WARNING):
        kept = world.make()
        until(lambda: [record for record in caplog.records if getattr(record, "event", "") == "spares_off"])

    until(lambda: not world.reaper.watched)
    assert kept.reserve_spare({}, "/tmp", approvals=False) is None


def test_nothing_waits_while_memory_is_short(world: World) -> None:
    kept = world.make(warm=1)
    until(world.pids)

    world.free = prestarts.MIN_MEMORY - 1
    until(lambda: not world.reaper.watched)
    kept.ended(run_of(Ids("r", "s"), hasTranscript=1))
    world.free = prestarts.MIN_MEMORY

    until(lambda: len(world.reaper.watched) == 2)


def test_spares_go_when_no_run_has_wanted_them_and_return_with_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = world.make()
    until(world.pids)

    monkeypatch.setattr(prestart_demand, "IDLE_TIMEOUT", 0.0)
    until(lambda: not world.reaper.watched)
    monkeypatch.setattr(prestart_demand, "IDLE_TIMEOUT", 600.0)

    assert taken(world, kept, reserved(kept)) is not None


def test_a_run_does_not_use_a_spare_that_has_read_what_has_changed(world: World) -> None:
    kept = world.make()
    (pid,) = until(world.pids)
    world.states[None] = "changed"
    ids = reserved(kept)

    assert taken(world, kept, ids) is None
    until(lambda: pid not in marked(ids.run_id))
    assert taken(world, kept, reserved(kept)) is not None, "the next spare has read the change"


def test_a_fault_in_the_comparison_costs_only_the_spare(world: World) -> None:
    kept = world.make()
    ids = reserved(kept)

    def fail(_key: Key, _config: CLIConfig) -> Hashable:
        raise RuntimeError("injected")

    kept._state = fail

    assert taken(world, kept, ids) is None
    until(lambda: not marked(ids.run_id))


def test_a_reserved_spare_is_ended_if_its_run_does_not_start(world: World) -> None:
    kept = world.make()
    ids = reserved(kept)

    kept.release(ids.run_id)

    until(lambda: ids.run_id not in world.reaper.watched)
    assert not marked(ids.run_id)
    assert kept.take(run_of(ids), None) is None


def test_a_run_is_watched_although_the_spare_that_was_reserved_for_it_ends_meanwhile(world: World) -> None:
    kept = world.make()
    ids = reserved(kept)
    (pid,) = marked(ids.run_id)
    os.kill(pid, signal.SIGSTOP)  # it takes its time to end

    kept.release(ids.run_id)  # its run waits in the queue
    world.reaper.watch(ids.run_id)  # and begins
    assert kept.take(run_of(ids), None) is None

    until(lambda: world.reaper._runs[ids.run_id] == 1)
    assert not marked(ids.run_id)
    world.reaper.release(ids.run_id)


def test_a_spare_leaves_nothing_if_its_run_gets_no_event_loop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = world.make()
    ids = reserved(kept)
    world.reaper.watch(ids.run_id)
    found = kept.take(run_of(ids), None)
    assert found is not None
    context = RunContext(ids.run_id, ids.sdk_session_id, "/tmp", "hello", (), {})
    no_loop = Mock(side_effect=OSError("too many open files"))
    monkeypatch.setattr(asyncio, "run", no_loop)

    with pytest.raises(OSError, match="too many open files"):
        Execution(context, world.config, AsyncMock(), prestarted=found).run()

    no_loop.call_args.args[0].close()  # the coroutine
    assert found.process.returncode is not None
    assert not found.directory.exists()
    world.reaper.release(ids.run_id)


@pytest.mark.parametrize(
    ("values", "kept_for_it"),
    [
        ({"startedAt": "2026-01-01T00:00:00.000Z"}, True),
        ({}, False),
        ({"startedAt": "2026-01-01T00:00:00.000Z", "status": RunStatus.ERROR}, False),
    ],
    ids=["started", "waiting", "ended at once"],
)
def test_a_spare_is_kept_only_for_a_run_that_has_started(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], kept_for_it: bool
) -> None:
    prestarts = Mock()
    manager = RunManager(Mock(), Mock(), Mock(), Mock(), prestarts=prestarts, problems=Mock())
    accepted = Accepted(run_of(Ids("r", "s"), **values), replayed=False)
    monkeypatch.setattr(manager, "_accept", Mock(return_value=accepted))

    assert manager._submit({"id": "r"}, Mock(), None) == accepted
    assert prestarts.release.called != kept_for_it


def test_nothing_is_left_after_a_close(world: World) -> None:
    before = {path.name for path in Path("/tmp").glob("ccm-*")}
    kept = world.make(spares=2)
    until(lambda: len(world.pids()) == 2)
    ids = reserved(kept)
    mine = world.reaper.watched | {ids.run_id}

    kept.close()

    assert not [pid for run_id in mine for pid in marked(run_id)]
    assert not world.reaper.watched
    after = {path.name for path in Path("/tmp").glob("ccm-*")} - before
    assert not [name for name in after if any(run_id in name for run_id in mine)]
    assert kept.take(run_of(ids), None) is None


def test_a_close_waits_for_one_that_is_just_being_ended(world: World) -> None:
    kept = world.make()
    ids = reserved(kept)
    (pid,) = marked(ids.run_id)
    os.kill(pid, signal.SIGSTOP)  # it takes its time to end
    kept.release(ids.run_id)
    until(lambda: kept._process_lock.locked() and not kept._unwanted)

    kept.close()

    assert not marked(ids.run_id)
    assert not world.reaper.watched


def test_two_fresh_runs_in_a_row_change_the_options_of_the_spares(world: World) -> None:
    kept = world.make()
    until(world.pids)

    assert kept.reserve_spare({"maxTurns": 3}, "/tmp", approvals=False) is None
    assert taken(world, kept, reserved(kept)) is not None, "one run alone does not change them"

    changed = reserved(kept, maxTurns=3)

    found = taken(world, kept, changed)
    assert found is not None
    assert found.options.max_turns == 3


def test_a_directory_that_refused_a_spare_is_not_tried_again_soon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = world.make()
    ids = reserved(kept, "/srv")
    found = kept.take(run_of(ids, "/srv"), None)
    assert found is not None

    found.settled("project_settings_not_claimable")
    found.end(0)

    other = reserved(kept, "/tmp")
    kept.release(other.run_id)
    until(world.pids)
    assert kept.reserve_spare({}, "/srv", approvals=False) is None
    monkeypatch.setattr(prestart_demand, "REFUSED_TIME", 0.0)
    assert taken(world, kept, reserved(kept, "/srv")) is not None


def test_the_sessions_that_ended_last_are_kept_warm(world: World) -> None:
    kept = world.make(spares=0, warm=2)
    runs = [run_of(Ids(f"r{n}", f"s{n}"), cwd=str(world.folder)) for n in range(3)]
    for run in runs:
        kept.ended(run)
        until(lambda: len(world.reaper.watched) == min(2, runs.index(run) + 1))  # noqa: B023
    until(lambda: {found.key.resume for found in kept._ready} == {"s1", "s2"})

    def reserve(run: Run, **options: Any) -> Ids | None:
        return kept.reserve_warm(run, RunMode.RESUME, options, run.cwd, approvals=False)

    assert reserve(runs[0]) is None
    assert reserve(runs[2], model="other") is None, "other options"
    assert kept.reserve_warm(runs[2], RunMode.RESUME, {}, "/tmp", approvals=False) is None, "another directory"
    assert kept.reserve_warm(runs[2], RunMode.RESUME, {}, runs[2].cwd, approvals=True) is None, "with approvals"
    ids = until(lambda: reserve(runs[2]))
    found = taken(world, kept, ids, parent=runs[2])
    assert found is not None
    assert found.options.resume == "s2"
    assert reserve(runs[2]) is None, "it serves one run"


def test_a_fork_leaves_its_session_warm_and_a_resume_does_not(world: World) -> None:
    kept = world.make(spares=0, warm=1)
    run = run_of(Ids("r", "s"), cwd=str(world.folder))
    kept.ended(run)
    for mode in (RunMode.FORK, RunMode.RESUME):
        ids = until(lambda: kept.reserve_warm(run, mode, {}, run.cwd, approvals=False))  # noqa: B023
        assert taken(world, kept, ids, parent=run) is not None

    assert kept._demand.wanted() == []


def test_a_session_with_another_head_does_not_use_the_warm_one(world: World) -> None:
    kept = world.make(spares=0, warm=1)
    old, new = (run_of(Ids(f"r{n}", f"s{n}"), cwd=str(world.folder), session="S") for n in range(2))
    kept.ended(old)
    ids = until(lambda: kept.reserve_warm(old, RunMode.RESUME, {}, old.cwd, approvals=False))

    assert ids is not None
    assert taken(world, kept, ids, parent=new) is None


@pytest.mark.parametrize(
    "options",
    [
        {"mcpServers": {"a": {"command": "true"}}},
        {"env": {"A": "b"}},
        {"settings": "{}"},
        {"permissionMode": "bypassPermissions"},
        {"systemPrompt": {"type": "preset", "preset": "claude_code", "excludeDynamicSections": True}},
        {"an option that does not exist yet": 1},
    ],
    ids=str,
)
def test_no_spare_serves_options_that_need_a_start(world: World, options: dict[str, Any]) -> None:
    assert spare_key(options, world.config, approvals=False) is None


def test_a_ceiling_is_part_of_the_key(world: World) -> None:
    config = CLIConfig(Path("/c"), {}, "default", (), 2**20, ceilings=Ceilings(max_turns=4))

    key = spare_key({}, config, approvals=False)

    assert key == spare_key({"maxTurns": 9}, config, approvals=False)
    assert key != spare_key({"maxTurns": 3}, config, approvals=False)


def test_the_environment_of_a_run_is_part_of_the_state_of_its_continuation(world: World) -> None:
    transcript = transcript_path(str(world.folder), "s", world.environ)
    transcript.parent.mkdir(parents=True)
    transcript.write_text("{}\n")
    config = world.config

    def state(zone: str) -> Hashable:
        options = {"env": {"TZ": zone}}
        key = warm_key(options, config, approvals=False, resume="s", cwd=str(world.folder))
        assert key is not None
        return start_state_of(key, config)

    west, east = "Etc/GMT+12", "Pacific/Kiritimati"  # 26 hours apart, so their dates differ
    assert state(west) == state(west)
    assert None is not state(west) != state(east)


def test_the_repository_of_an_agent_sees_no_secret_of_the_service(world: World) -> None:
    # git may run programs that the repository's configuration names.
    seen = world.folder / "seen"
    git = world.folder / "git"
    git.write_text(f"#!/bin/sh\nenv >> {seen}\n")
    git.chmod(0o755)
    (world.folder / ".git").mkdir()
    transcript = transcript_path(str(world.folder), "s", world.environ)
    transcript.parent.mkdir(parents=True)
    transcript.write_text("{}\n")
    world.environ |= {"PATH": f"{world.folder}:{os.environ['PATH']}", "CCM_API_TOKEN": "token", "PGPASSWORD": "word"}
    key = warm_key({}, world.config, approvals=False, resume="s", cwd=str(world.folder))
    assert key is not None

    assert start_state_of(key, world.config) is not None

    assert "HOME=" in seen.read_text()
    assert "CCM_API_TOKEN" not in seen.read_text()
    assert "PGPASSWORD" not in seen.read_text()


def test_a_fork_at_a_message_does_not_use_a_continuation_of_the_whole(world: World) -> None:
    kept = world.make(spares=0, warm=1)
    parent = run_of(Ids("r", "s"), cwd=str(world.folder))
    kept.ended(parent)
    ids = until(lambda: kept.reserve_warm(parent, RunMode.FORK, {}, parent.cwd, approvals=False))
    assert ids is not None

    assert kept.take(run_of(ids, forkAtMessage="m", forkAtIndex=3), parent) is None


# ---- with a whole service


def count_spares(service: ServiceProcess) -> int:
    """Return how many spares the service has started."""
    return sum("(spare) was started in advance" in line for line in service.log)


def first_spare(service: ServiceProcess, home: Path) -> str:
    """Return the run id of the service's first spare once it can be used."""
    until(lambda: count_spares(service))
    return until(lambda: marks_in(home))[0]


@pytest.fixture
def quick_spares(serve: ServeFunction, tmp_path: Path) -> Callable[..., Any]:
    def start(**settings: object) -> Any:
        return serve(CCM_CLI_PATH=stand_in_cli(tmp_path), HOME=tmp_path, CCM_SPARE_RUNS=1, **settings)

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_spare_outlives_the_service(
    quick_spares: Callable[..., Any], tmp_path: Path, number: signal.Signals
) -> None:
    service = quick_spares()
    spare = first_spare(service, tmp_path)
    directories = Path(tempfile.gettempdir())
    assert list(directories.glob(f"ccm-{spare}-*"))

    service.process.send_signal(number)
    code = service.wait()

    assert code == (0 if number == signal.SIGTERM else -number)
    until(lambda: not marks_in(tmp_path) and not list(directories.glob(f"ccm-{spare}-*")))


@pytest.mark.parametrize("refused", ["claim", "answer"])
def test_a_refused_run_starts_its_own_claude_code(
    quick_spares: Callable[..., Any], tmp_path: Path, project: Path, refused: str
) -> None:
    service = quick_spares(STAND_IN_CLI_REFUSES=refused)
    client = Client(service.url)
    spare = first_spare(service, tmp_path)

    run = client.start(project, "hello")

    assert run["status"] == "completed"
    assert run["id"] == spare
    assert any("starts its own Claude Code, not the spare one" in line for line in service.log)
    assert spare not in marks_in(tmp_path)


def test_a_cancel_during_the_claim_ends_the_run(
    quick_spares: Callable[..., Any], tmp_path: Path, project: Path
) -> None:
    service = quick_spares(STAND_IN_CLI_REFUSES="answer")
    client = Client(service.url)
    spare = first_spare(service, tmp_path)
    client.start(project, "hello", wait=0)
    until(lambda: client.run(spare, wait=0)["startedAt"])

    client.delete(f"/api/runs/{spare}")

    assert client.run(spare)["status"] == "cancelled"
    until(lambda: spare not in marks_in(tmp_path))


def test_a_run_that_waits_or_is_refused_leaves_no_spare(
    quick_spares: Callable[..., Any], tmp_path: Path, project: Path
) -> None:
    service = quick_spares(CCM_MAX_CONCURRENT_RUNS=1, CCM_MAX_QUEUED_RUNS=1)
    client = Client(service.url)
    holding = client.start(project, '{"hold": true}', wait=0)

    def spares() -> list[str]:
        return [run_id for run_id in marks_in(tmp_path) if run_id != holding["id"]]

    until(spares)
    waiting = client.start(project, "hello", wait=0)
    until(lambda: waiting["id"] not in marks_in(tmp_path))
    for _ in range(3):
        until(spares)
        refused = client.post("/api/runs/start", {"cwd": str(project), "prompt": "hello"})
        assert refused.status == 429

    until(lambda: len(spares()) == 1)
    client.delete(f"/api/runs/{holding['id']}")
    assert client.run(waiting["id"])["status"] == "completed"
