"""What outlives a service that is killed is ended by the process beside it."""

from __future__ import annotations

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
from tests.waiting import until

ROOT = Path(__file__).parents[3]
HOLDER = "import sys; sys.path.insert(0, sys.argv[1]); from ccm.core.claude.reaper import Reaper; reaper = Reaper()\n"


@pytest.fixture
def run_ids() -> Iterator[list[str]]:
    """Two runs, each with a process that nobody else would end."""
    ids = [str(uuid.uuid4()) for _ in range(2)]
    processes = [subprocess.Popen(["sleep", "300"], env={RUN_MARK: run_id}, start_new_session=True) for run_id in ids]
    yield ids
    for process in processes:
        process.kill()
        process.wait()


def test_when_the_service_is_killed_what_is_left_of_its_runs_is_ended(run_ids: list[str]) -> None:
    over, going_on = run_ids
    code = f"{HOLDER}reaper.watch({over!r}); reaper.watch({going_on!r}); reaper.release({over!r})\n"
    code += "print('told', flush=True); sys.stdin.read()"
    service = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    assert service.stdout.readline() == "told\n"

    service.kill()
    service.communicate()

    until(lambda: not _alive(going_on))
    assert _alive(over)  # it ended by itself, and what it has left may stay


def test_a_reaper_that_was_killed_is_replaced(run_ids: list[str]) -> None:
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


def test_a_reaper_that_stands_still_holds_up_nobody_and_is_replaced(run_ids: list[str]) -> None:
    reaper = Reaper()
    reaper.watch(run_ids[0])
    first = reaper._process
    assert first is not None
    os.kill(first.pid, signal.SIGSTOP)
    for _ in range(10_000):  # more than its pipe takes
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


def test_it_ends_with_the_service_where_nothing_is_left() -> None:
    reaper = Reaper()
    run_id = str(uuid.uuid4())
    reaper.watch(run_id)
    process = reaper._process
    reaper.release(run_id)
    reaper.stop()
    reaper.stop()

    assert process is not None
    assert process.returncode == 0


def _alive(run_id: str) -> bool:
    """Whether a process of a run goes on; one that is dead and not yet waited for has no environment."""
    return bool(marked(run_id))
