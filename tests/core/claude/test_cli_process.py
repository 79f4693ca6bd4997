"""Tests of the process of Claude Code: started in one thread, used in the loop of another."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from anyio import EndOfStream

from ccm.core.claude.cli_process import CLIProcess


def started(directory: Path, *command: str, **changed: object) -> CLIProcess:
    arguments = {"cwd": str(directory), "environ": {}, "stderr": directory / "stderr", "open_files": None}
    return CLIProcess(command, **(arguments | changed))  # type: ignore[arg-type]


def python(directory: Path, code: str) -> CLIProcess:
    return started(directory, sys.executable, "-c", code)


def test_a_process_of_another_thread_is_used_in_this_loop(tmp_path: Path) -> None:
    processes: list[CLIProcess] = []
    thread = threading.Thread(target=lambda: processes.append(started(tmp_path, "cat")))
    thread.start()
    thread.join()

    async def talk() -> tuple[bytes, int]:
        process = processes[0]
        standard_input, output = await process.attach()
        await standard_input.send(b"hello")
        received = await output.receive()
        await standard_input.aclose()
        with pytest.raises(EndOfStream):
            await output.receive()
        code = await process.wait()
        process.close()
        return received, code

    assert asyncio.run(talk()) == (b"hello", 0)


@pytest.mark.parametrize("pidfd", [True, False], ids=["pidfd", "poll"])
def test_the_exit_is_noticed_although_another_process_holds_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pidfd: bool
) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    code = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True); raise SystemExit(3)"

    async def end() -> int:
        process = python(tmp_path, code)
        await process.attach()
        number = await process.wait()
        assert process.output().startswith("pipe:["), "the output is still open"
        process.close()
        return number

    assert asyncio.run(end()) == 3


def test_a_signal_ends_it_and_a_second_one_is_harmless(tmp_path: Path) -> None:
    async def end() -> int:
        process = started(tmp_path, "sleep", "60")
        await process.attach()
        process.send_signal(signal.SIGTERM)
        code = await process.wait()
        process.send_signal(signal.SIGTERM)
        process.close()
        return code

    assert asyncio.run(end()) == -signal.SIGTERM


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    async def use() -> None:
        process = started(tmp_path, "cat")
        standard_input, _ = await process.attach()
        await standard_input.aclose()
        await process.wait()
        process.close()
        await asyncio.sleep(0)  # the loop closes the pipes in its next round

    before = sorted(os.listdir("/proc/self/fd"))
    asyncio.run(use())
    started(tmp_path, "cat").end(60)

    assert sorted(os.listdir("/proc/self/fd")) == before


def test_an_end_kills_a_process_that_does_not_exit_and_its_group(tmp_path: Path) -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '60'], stdout=1); time.sleep(60)"
    process = python(tmp_path, code)

    process.end(0.2)

    assert process.returncode == -signal.SIGKILL


def test_a_program_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        started(tmp_path, str(tmp_path / "missing"))
