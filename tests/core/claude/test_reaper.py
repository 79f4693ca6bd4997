"""The reaper ends the processes that outlive a killed service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ccm.core.claude.processes import RUN_MARK, marked
from ccm.core.claude.reaper import Reaper
from tests.client import Client
from tests.conftest import ProgramFunction, ServeFunction, stand_in_cli
from tests.waiting import until

ROOT = Path(__file__).parents[3]
HOLDER = "import sys; sys.path.insert(0, sys.argv[1]); from ccm.core.claude.reaper import Reaper; reaper = Reaper()\n"


@pytest.fixture
def run_ids() -> Iterator[list[str]]:
    """Yield the ids of two runs, each with a process that only the reaper would end."""
    ids = [str(uuid.uuid4()) for _ in range(2)]
    processes = [subprocess.Popen(["sleep", "300"], env={RUN_MARK: run_id}, start_new_session=True) for run_id in ids]
    yield ids
    for process in processes:
        process.kill()
        process.wait()


def test_the_processes_of_runs_end_when_the_service_is_killed(run_ids: list[str]) -> None:
    released, watched = run_ids
    code = f"{HOLDER}reaper.watch({released!r}); reaper.watch({watched!r}); reaper.release({released!r})\n"
    code += "print('ready', flush=True); sys.stdin.read()"
    service = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    assert service.stdout.readline() == "ready\n"

    service.kill()
    service.communicate()

    until(lambda: not _alive(watched))
    assert _alive(released)  # its run was released, so its process may stay


def test_a_run_that_is_watched_twice_is_watched_until_both_release_it(run_ids: list[str]) -> None:
    reaper = Reaper()
    for run_id in run_ids:
        reaper.watch(run_id)
        reaper.watch(run_id)
        reaper.release(run_id)
    reaper.release(run_ids[0])
    process = reaper._process
    assert process is not None

    reaper.stop()

    until(lambda: not _alive(run_ids[1]))
    assert _alive(run_ids[0])
    assert process.wait() == 0


def test_a_killed_reaper_is_replaced(run_ids: list[str]) -> None:
    reaper = Reaper()
    reaper.watch(run_ids[0])
    first = reaper._process
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    first.wait()

    reaper.watch(run_ids[1])
    second = reaper._process
    assert second is not None
    reaper.stop()

    until(lambda: not any(_alive(run_id) for run_id in run_ids))
    assert second.wait() == 0
    for process in (first, second):
        assert process.stdin is not None
        process.stdin.close()


def test_a_stopped_reaper_blocks_nothing_and_is_replaced(run_ids: list[str]) -> None:
    reaper = Reaper()
    reaper.watch(run_ids[0])
    first = reaper._process
    assert first is not None
    os.kill(first.pid, signal.SIGSTOP)
    for _ in range(10_000):  # more than its pipe holds
        reaper.release("another")
    second = reaper._process
    assert second is not None
    assert second.pid != first.pid
    assert first.returncode == -signal.SIGKILL
    os.kill(second.pid, signal.SIGSTOP)
    reaper.release(run_ids[0])

    reaper.stop()

    assert second.returncode == -signal.SIGKILL
    for process in (first, second):
        assert process.stdin is not None
        process.stdin.close()


def test_an_idle_reaper_ends_with_the_service() -> None:
    reaper = Reaper()
    run_id = str(uuid.uuid4())
    reaper.watch(run_id)
    process = reaper._process
    reaper.release(run_id)
    reaper.stop()
    reaper.stop()

    assert process is not None
    assert process.returncode == 0


def test_the_kernel_ends_claude_code_when_the_reaper_is_killed_with_the_service(
    serve: ServeFunction, home: Path, project: Path, program: ProgramFunction
) -> None:
    program("setpriv", "util-linux")
    service = serve(CCM_CLI_PATH=stand_in_cli(home))
    client = Client(service.url)
    run = client.start(project, json.dumps({"count": 1, "deaf": True, "seconds": 300}), wait=0)
    client.wait_for_message(run["id"], "assistant")
    tasks = Path(f"/proc/{service.process.pid}/task").glob("*/children")
    children = {int(pid) for task in tasks for pid in task.read_text().split()}
    agents = set(marked(run["id"]))
    assert children & agents, "Claude Code is not a child of the service"
    reapers = children - agents
    assert reapers

    for pid in (*reapers, service.process.pid):
        os.kill(pid, signal.SIGKILL)

    until(lambda: not _alive(run["id"]))


def _alive(run_id: str) -> bool:
    """Whether a process of a run is alive. A zombie does not count: it has no environment."""
    return bool(marked(run_id))
