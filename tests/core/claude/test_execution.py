"""One execution, with a stand-in CLI that each test scripts, and the contract with the SDK's private parts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import ClaudeSDKClient

from ccm.core.claude.execution import Execution
from ccm.core.claude.outcome import Outcome
from ccm.core.claude.processes import end_marked, marked
from ccm.core.claude.run_context import CLIConfig, RunContext
from ccm.core.claude.run_events import first
from ccm.core.claude.termination import Termination
from ccm.core.policy.ceilings import Ceilings
from ccm.models import RunErrorCode, RunStatus
from tests.conftest import stand_in_cli
from tests.waiting import until

SOON = 60.0
# The text of the message that the stand-in sends after its input is closed.
LATE = "a late message"


class Copies:
    """Counts how often the transcript was to be copied."""

    def __init__(self) -> None:
        self.count = 0
        self.enough = threading.Semaphore(0)

    async def copy(self, at_result: bool) -> None:
        self.count += 1
        self.enough.release()


class Run:
    """One execution in a thread of its own, with the messages that it recorded."""

    def __init__(
        self,
        folder: Path,
        script: object,
        environ: dict[str, str] | None = None,
        transcript: Copies | None = None,
        timeout_ms: int | None = None,
        **claude: Any,
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.gate: asyncio.Event | None = None
        # How long it takes to record the late message.
        self.late_seconds = 0.0
        self.run_id = str(uuid.uuid4())
        prompt = script if isinstance(script, str) else json.dumps(script)
        environ = {"PATH": os.environ["PATH"], "HOME": str(folder), **(environ or {})}
        settings: dict[str, Any] = {
            "cli_path": stand_in_cli(folder),
            "environ": environ,
            "permission_mode": "default",
            "setting_sources": (),
            "max_message_bytes": 2**20,
        }
        context = RunContext(
            run_id=self.run_id,
            sdk_session_id=str(uuid.uuid4()),
            cwd=str(folder),
            prompt=prompt,
            images=(),
            options={},
            timeout_ms=timeout_ms,
        )
        self.execution = Execution(context, CLIConfig(**settings | claude), self._record, transcript)
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run)

    async def _record(self, message: dict[str, Any]) -> int:
        self.messages.append(message)
        index = len(self.messages) - 1
        if self.late_seconds and LATE in str(message):
            await asyncio.sleep(self.late_seconds)
        if self.gate is not None:
            await self.gate.wait()
        return index

    def _run(self) -> None:
        self.outcome = self.execution.run()

    def start(self) -> Run:
        self._thread.start()
        return self

    def cancel(self) -> None:
        self.execution.stop(Outcome(RunStatus.CANCELLED))

    def end(self, left: Sequence[str] = ()) -> Outcome:
        """Wait for the end and check which processes remain.

        Args:
            left: the commands of the expected remaining processes; they are ended afterwards.
        """
        if not self._thread.ident:
            self.start()
        self._thread.join(SOON)
        assert self.outcome is not None, "the run has not ended"
        pids = marked(self.run_id)
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").strip() for pid in pids]
        end_marked(self.run_id)
        assert commands == list(left), "other processes remain"
        return self.outcome


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clear variables of this process, because the SDK passes them on."""
    for name in os.environ:
        if name.startswith(("CLAUDE", "ANTHROPIC", "CCM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def is_there(run: Run) -> bool:
    """Whether the CLI of a run is alive."""
    for pid in marked(run.run_id):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            if b"stand_in_cli" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False


def end_of(run: Run) -> tuple[str, str]:
    """Return the status and the error code with which a run ends."""
    outcome = run.end()
    return outcome.status, str(outcome.error_code)


# ---- recorded messages


def test_messages_of_every_kind_are_recorded_as_they_came(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = [
        {"type": "tomorrow's type", "payload": [1, 2.5, None, {"deep": "\ud800\0\U0001f600"}]},
        {"type": "system", "subtype": "unheard of", "big": 12345678901234567890},
        {"no": "type at all"},
        {"type": "assistant", "message": {"role": "assistant", "content": "not even a list"}},
    ]
    run = Run(tmp_path, {"messages": sent})

    assert run.end().status == "completed"
    assert run.messages[:-1] == sent
    assert run.messages[-1]["type"] == "result"


def test_messages_before_the_first_prompt_are_recorded_first(tmp_path: Path) -> None:
    early = tmp_path / "early"
    early.write_text(
        f'#!/bin/sh\nread line\nprintf \'%s\\n\' \'{{"type": "system", "subtype": "hook_started"}}\'\n'
        f'printf "%s\\n" "$line" | sed \'s/.*"request_id": "\\([^"]*\\)".*/'
        '{"type": "control_response", "response": {"subtype": "success", "request_id": "\\1", "response": {}}}/\'\n'
        f'exec {stand_in_cli(tmp_path)} "$@"\n'
    )
    early.chmod(0o755)
    run = Run(tmp_path, {"count": 1}, cli_path=early)

    assert run.end().status == "completed"
    assert [message.get("subtype") or message["type"] for message in run.messages] == [
        "hook_started",
        "assistant",
        "success",
    ]


def test_session_states_are_not_recorded(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1})
    run.end()

    assert [message["type"] for message in run.messages] == ["assistant", "result"]


def test_without_session_states_a_run_ends_with_its_result(tmp_path: Path) -> None:
    assert end_of(Run(tmp_path, {"states": False, "count": 1})) == ("completed", "None")


def test_costs_of_results_add_up_and_the_last_result_is_the_runs(tmp_path: Path) -> None:
    first = {"type": "result", "is_error": False, "model_usage_since_last_result": {"m": {"costUSD": 0.5}}}
    outcome = Run(tmp_path, {"messages": [first], "result": {"result": "The second."}}).end()

    assert outcome.result is not None
    assert outcome.result["result"] == "The second."
    assert outcome.cost_usd == 0.75


def test_is_error_decides_and_not_the_subtype(tmp_path: Path) -> None:
    result = {"is_error": True, "subtype": "success", "api_error_status": 529, "result": "Overloaded."}
    outcome = Run(tmp_path, {"result": result}).end()

    assert (outcome.status, outcome.error_code, outcome.error_message) == ("error", "API_ERROR", "Overloaded.")


# ---- failures


def test_a_crash_is_reported_with_exit_code_and_stderr(tmp_path: Path) -> None:
    outcome = Run(tmp_path, {"count": 1, "stderr": "out of luck", "exit": 7}).end()

    assert (outcome.status, outcome.error_code) == ("error", "CLI_CRASHED")
    assert outcome.error_message == "Claude Code ended with exit code 7.\nout of luck"


def test_an_end_without_a_result_is_a_crash(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "exit": 0})
    assert end_of(run) == ("error", "CLI_CRASHED")
    assert len(run.messages) == 1


def test_a_killed_cli_counts_as_a_crash_and_its_tool_is_ended(tmp_path: Path) -> None:
    run = Run(tmp_path, {"hold": True, "count": 1, "tool": 300}).start()
    until(lambda: run.messages and len(marked(run.run_id)) == 2)
    claude = next(pid for pid in marked(run.run_id) if b"stand_in_cli" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(claude, signal.SIGKILL)

    assert end_of(run) == ("error", "CLI_CRASHED")


def test_a_message_over_the_limit_ends_the_run(tmp_path: Path) -> None:
    outcome = Run(tmp_path, {"count": 1, "pad": 200_000}, max_message_bytes=100_000).end()

    assert (outcome.status, outcome.error_code) == ("error", "MESSAGE_TOO_LARGE")
    assert "CCM_MAX_MESSAGE_BYTES" in str(outcome.error_message)


def test_a_line_that_is_not_json_ends_the_run(tmp_path: Path) -> None:
    assert end_of(Run(tmp_path, {"raw": '{"type": "assist'})) == ("error", "CLI_CRASHED")


def test_noise_between_messages_is_ignored(tmp_path: Path) -> None:
    assert end_of(Run(tmp_path, {"raw": "[SandboxDebug] hello"})) == ("completed", "None")


def test_a_missing_or_non_executable_cli_is_reported(tmp_path: Path) -> None:
    assert end_of(Run(tmp_path, "x", cli_path=tmp_path / "none")) == ("error", "CLI_NOT_FOUND")
    (tmp_path / "text").write_text("no program")
    assert end_of(Run(tmp_path, "x", cli_path=tmp_path / "text")) == ("error", "CLI_NOT_FOUND")


def test_a_second_refusal_of_the_login_ends_the_run(tmp_path: Path) -> None:
    refusal = {"type": "system", "subtype": "api_retry", "error_status": 401}
    outcome = Run(tmp_path, {"messages": [refusal, refusal], "hold": True}).end()

    assert (outcome.status, outcome.error_code) == ("error", "AUTHENTICATION_FAILED")


@pytest.mark.parametrize("good", [{"type": "assistant"}, {"type": "stream_event", "event": {"type": "message_start"}}])
def test_a_login_refreshed_between_two_refusals_does_not_end_the_run(tmp_path: Path, good: dict[str, Any]) -> None:
    refusal = {"type": "system", "subtype": "api_retry", "error_status": 401}
    outcome = Run(tmp_path, {"messages": [refusal, good, refusal, good]}).end()

    assert (outcome.status, outcome.error_code) == ("completed", None)


def test_an_error_message_does_not_reset_the_count_of_refused_logins(tmp_path: Path) -> None:
    refusal = {"type": "system", "subtype": "api_retry", "error_status": 401}
    bad = {"type": "assistant", "error": "authentication_failed"}
    outcome = Run(tmp_path, {"messages": [refusal, bad, refusal], "hold": True}).end()

    assert (outcome.status, outcome.error_code) == ("error", "AUTHENTICATION_FAILED")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Not logged in \N{MIDDLE DOT} Please run /login",
            "Not logged in \N{MIDDLE DOT} Please run /login. Claude Code has",
        ),
        ("Invalid API key.", "Invalid API key. Claude Code has"),
    ],
)
def test_a_refused_login_is_reported_in_sentences(tmp_path: Path, text: str, message: str) -> None:
    result = {"is_error": True, "api_error_status": 401, "result": text}
    outcome = Run(tmp_path, {"result": result}).end()

    assert str(outcome.error_message).startswith(message)


def test_the_transcript_is_copied_after_each_result(tmp_path: Path) -> None:
    copies = Copies()
    Run(tmp_path, {"count": 1}, transcript=copies).start().end()

    assert copies.count == 1


def test_the_transcript_of_a_run_without_a_result_is_copied_from_time_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.claude.execution.FIRST_COPY_DELAY", 0.01)
    monkeypatch.setattr("ccm.core.claude.execution.COPY_INTERVAL", 0.02)
    copies = Copies()
    run = Run(tmp_path, {"hold": True}, transcript=copies).start()
    for _ in range(3):
        assert copies.enough.acquire(timeout=SOON)
    run.cancel()

    assert run.end().status == "cancelled"


def test_an_exit_before_the_first_answer_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.CLOSE_TIMEOUT", 0.2)
    program = tmp_path / "exits"
    program.write_text("#!/bin/sh\nread line\nexit 0\n")
    program.chmod(0o755)

    assert end_of(Run(tmp_path, "x", cli_path=program)) == ("error", "CLI_CRASHED")


# Starts a process without the run's mark that writes to the output once Claude Code has exited.
FLOOD = """#!/bin/sh
(env -i setsid {python} -I -S -c '
import json, os, sys
while os.path.exists("/proc/" + sys.argv[1]): pass
line = json.dumps({{"type": "assistant", "text": "x" * 50000}}) + chr(10)
while True: print(line, end="", flush=True)
' $$ 2>/dev/null &)
exec {stand_in} "$@"
"""


def test_a_process_that_keeps_writing_to_the_output_after_the_exit_does_not_delay_the_end(tmp_path: Path) -> None:
    program = tmp_path / "flooded"
    program.write_text(FLOOD.format(python=sys.executable, stand_in=stand_in_cli(tmp_path)))
    program.chmod(0o755)
    run = Run(tmp_path, "hello", cli_path=program)
    outcome = run.end()

    assert outcome.status == "completed"
    assert sum(len(str(message)) for message in run.messages) < 10 * 2**20


def test_a_fifo_in_place_of_the_stderr_file_does_not_block(tmp_path: Path) -> None:
    program = tmp_path / "fifo"
    program.write_text(
        f'#!/bin/sh\nfile=$(readlink /proc/self/fd/2)\nrm "$file"\nmkfifo "$file"\nexec {stand_in_cli(tmp_path)} "$@"\n'
    )
    program.chmod(0o755)

    assert end_of(Run(tmp_path, "hello", cli_path=program)) == ("completed", "None")


# ---- faults of the run's own tasks


class BrokenError(Exception):
    """An exception that no code handles by its type."""


def broken(*_: object, **__: object) -> None:
    raise BrokenError("broken")


@pytest.mark.parametrize(
    ("owner", "part"),
    [
        *((Termination, part) for part in ("run", "watch_exit", "_free_output")),
        *((Execution, part) for part in ("_keep_time", "_write_input")),
    ],
)
def test_a_failed_task_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type[object], part: str
) -> None:
    monkeypatch.setattr(owner, part, broken)
    run = Run(tmp_path, {"count": 1, "hold": True, "ignore_interrupt": True, "tool": 300}).start()
    if part == "_free_output":
        until(lambda: run.messages)
        run.cancel()
    outcome = run.end()

    assert (outcome.status, outcome.error_code) in (("error", "EXECUTION_ERROR"), ("cancelled", None))


def test_a_failed_disconnect_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disconnect = ClaudeSDKClient.disconnect

    async def disconnect_and_fail(client: ClaudeSDKClient) -> None:
        await disconnect(client)  # otherwise the SDK's streams would stay open
        raise BrokenError

    monkeypatch.setattr(ClaudeSDKClient, "disconnect", disconnect_and_fail)
    outcome = Run(tmp_path, {"count": 1, "server": 300}).end()

    assert outcome.status == "completed"


def test_a_run_ends_with_its_processes_if_the_sdk_does_not_end_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.claude.sdk._Tap.close", lambda _tap: None)
    monkeypatch.setattr("ccm.core.claude.termination.CLOSE_TIMEOUT", 0.05)
    monkeypatch.setattr("ccm.core.claude.termination.TERMINATE_TIMEOUT", 0.05)
    monkeypatch.setattr("ccm.core.claude.termination.SILENT_TIMEOUT", 0.2)
    outcome = Run(tmp_path, {"count": 1}).end()

    assert outcome.status == "completed"


# ---- cancels and stops


def test_a_cancel_before_the_start_cancels_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1})
    run.cancel()

    assert end_of(run) == ("cancelled", "None")


def test_an_interrupt_ends_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True}).start()
    until(lambda: run.messages)
    run.cancel()
    outcome = run.end()

    assert outcome.status == "cancelled"
    assert outcome.result is not None
    assert outcome.result["subtype"] == "error_during_execution"


def test_a_cli_that_ignores_the_interrupt_is_terminated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.INTERRUPT_TIMEOUT", 0.2)
    run = Run(tmp_path, {"count": 1, "hold": True, "ignore_interrupt": True, "tool": 300}).start()
    until(lambda: run.messages)
    run.cancel()

    assert end_of(run) == ("cancelled", "None")


def test_a_cli_that_ignores_the_terminate_too_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.INTERRUPT_TIMEOUT", 0.2)
    monkeypatch.setattr("ccm.core.claude.termination.TERMINATE_TIMEOUT", 0.2)
    stubborn = tmp_path / "stubborn"
    stubborn.write_text(f'#!/bin/sh\ntrap "" TERM\nexec {stand_in_cli(tmp_path)} "$@"\n')
    stubborn.chmod(0o755)
    run = Run(tmp_path, {"count": 1, "hold": True, "ignore_interrupt": True}, cli_path=stubborn).start()
    until(lambda: run.messages)
    run.cancel()

    assert end_of(run) == ("cancelled", "None")


def test_a_cancel_under_back_pressure_ends_the_process(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True, "tool": 300})
    run.gate = asyncio.Event()
    run.start()
    until(lambda: run.messages)
    run.cancel()
    until(lambda: not is_there(run))

    loop = run.execution._loop
    assert loop is not None
    loop.call_soon_threadsafe(run.gate.set)
    assert end_of(run) == ("cancelled", "None")


def test_a_run_ends_with_the_first_reason_to_stop(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True}).start()
    until(lambda: run.messages)
    run.execution.stop(Outcome(RunStatus.ERROR, RunErrorCode.INTERRUPTED, "The service was shut down."))
    run.cancel()
    outcome = run.end()

    assert (outcome.status, outcome.error_code, outcome.error_message) == (
        "error",
        "INTERRUPTED",
        "The service was shut down.",
    )


# ---- remaining processes


def test_background_processes_stay_however_slow_storage_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXIT_DELAY", "CLOSE_TIMEOUT", "TERMINATE_TIMEOUT"):
        monkeypatch.setattr(f"ccm.core.claude.termination.{name}", 0.1)
    seconds = 1.5
    run = Run(tmp_path, {"count": 1, "server": 300, "late": LATE})
    run.late_seconds = seconds
    outcome = run.end(left=["sleep 300"])

    assert outcome.status == "completed"
    assert outcome.duration_ms is not None
    assert outcome.duration_ms > seconds * 1000


def test_only_processes_that_hold_the_output_open_end_with_the_cli(tmp_path: Path) -> None:
    outcome = Run(tmp_path, {"count": 1, "tool": 301, "server": 300}).end(left=["sleep 300"])

    assert outcome.status == "completed"
    assert outcome.duration_ms is not None
    assert outcome.duration_ms < 4_000


def test_a_crash_ends_background_processes_while_storage_is_slow(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "server": 300, "exit": 7})
    run.gate = asyncio.Event()
    run.start()
    until(lambda: run.messages and not marked(run.run_id))

    loop = run.execution._loop
    assert loop is not None
    loop.call_soon_threadsafe(run.gate.set)
    assert end_of(run) == ("error", "CLI_CRASHED")


# ---- time limits


def test_a_run_over_its_time_is_interrupted_and_keeps_its_result(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True}, timeout_ms=3000)
    outcome = run.end()

    assert (outcome.status, outcome.error_code) == ("error", "TIMEOUT")
    assert "longer than 3000 ms, which its request set as timeoutMs" in str(outcome.error_message)
    assert [message["type"] for message in run.messages] == ["assistant", "result"]
    assert outcome.result is not None
    assert (outcome.result["subtype"], outcome.cost_usd) == ("error_during_execution", 0.25)
    assert outcome.duration_ms is not None
    assert outcome.duration_ms >= 2500


@pytest.mark.parametrize("timeout_ms", [None, 60_000])
def test_the_services_time_limit_applies_if_the_request_sets_none_or_a_longer_one(
    tmp_path: Path, timeout_ms: int | None
) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True}, timeout_ms=timeout_ms, ceilings=Ceilings(run_timeout=1))
    outcome = run.end()

    assert (outcome.status, outcome.error_code) == ("error", "TIMEOUT")
    assert "longer than 1 s, which CCM_RUN_TIMEOUT sets" in str(outcome.error_message)


def test_a_run_within_its_time_limit_completes(tmp_path: Path) -> None:
    assert end_of(Run(tmp_path, {"count": 1}, timeout_ms=60_000)) == ("completed", "None")


def time_runs_out_with(run: Run, *events: asyncio.Event) -> Run:
    """Let a run's time run out when one of the events is set."""
    run.execution._clock.run_out = lambda: first(*events)  # type: ignore[method-assign]
    return run


def test_a_run_times_out_while_it_connects(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True}, timeout_ms=1)
    until(lambda: run.execution._clock.left < 0)

    assert end_of(run) == ("error", "TIMEOUT")
    assert run.messages == []


def test_a_cli_that_never_answers_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.TERMINATE_TIMEOUT", 0.2)
    mute = tmp_path / "mute"
    mute.write_text('#!/bin/sh\ntrap "" TERM\nsleep 300 &\nwait\nsleep 300\n')
    mute.chmod(0o755)

    assert end_of(Run(tmp_path, "x", cli_path=mute, timeout_ms=300)) == ("error", "TIMEOUT")


def test_a_cli_that_ignores_everything_is_killed_when_its_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.INTERRUPT_TIMEOUT", 0.2)
    monkeypatch.setattr("ccm.core.claude.termination.TERMINATE_TIMEOUT", 0.2)
    stubborn = tmp_path / "stubborn"
    stubborn.write_text(f'#!/bin/sh\ntrap "" TERM\nexec {stand_in_cli(tmp_path)} "$@"\n')
    stubborn.chmod(0o755)
    script = {"count": 1, "hold": True, "ignore_interrupt": True, "tool": 300}

    assert end_of(Run(tmp_path, script, cli_path=stubborn, timeout_ms=1000)) == ("error", "TIMEOUT")


def test_a_run_times_out_under_back_pressure(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True, "tool": 300}, timeout_ms=3000)
    run.gate = asyncio.Event()
    run.start()
    until(lambda: run.messages)
    until(lambda: not is_there(run))

    loop = run.execution._loop
    assert loop is not None
    loop.call_soon_threadsafe(run.gate.set)
    assert end_of(run) == ("error", "TIMEOUT")


def test_a_cancel_before_the_time_is_up_counts(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True})
    time_runs_out_with(run, run.execution._events.stop).start()
    until(lambda: run.messages)
    run.cancel()

    assert end_of(run) == ("cancelled", "None")


def test_a_cancel_after_the_time_is_up_is_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.INTERRUPT_TIMEOUT", 0.2)
    run = Run(tmp_path, {"count": 1, "hold": True, "ignore_interrupt": True}, timeout_ms=500).start()
    until(run.execution._events.stop.is_set)
    run.cancel()

    assert end_of(run) == ("error", "TIMEOUT")


@pytest.mark.parametrize(
    ("result", "end"),
    [
        ({}, ("completed", "None")),
        ({"is_error": True, "subtype": "error_max_turns"}, ("error", "MAX_TURNS_REACHED")),
    ],
)
def test_a_run_that_is_over_does_not_time_out(tmp_path: Path, result: dict[str, object], end: tuple[str, str]) -> None:
    run = Run(tmp_path, {"count": 1, "result": result})

    assert end_of(time_runs_out_with(run, run.execution._events.over)) == end


def test_a_crash_before_the_time_is_up_is_reported_as_a_crash(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "exit": 7})

    assert end_of(time_runs_out_with(run, run.execution._events.exited, run.execution._events.stream_ended)) == (
        "error",
        "CLI_CRASHED",
    )


# ---- the agent's environment


def test_the_agent_does_not_see_the_services_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"CCM_ALLOWED_ROOTS": "/", "DATABASE_URL": "postgresql://u:p@h/d", "PGPASSWORD": "p", "KEPT": "yes"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    shown = tmp_path / "shown"
    spy = tmp_path / "spy"
    spy.write_text(f'#!/bin/sh\nenv > {shown}\nexec {stand_in_cli(tmp_path)} "$@"\n')
    spy.chmod(0o755)
    run = Run(tmp_path, {"count": 1}, environ=secrets, cli_path=spy)
    assert run.end().status == "completed"

    environ = dict(line.split("=", 1) for line in shown.read_text().splitlines() if "=" in line)
    assert environ["KEPT"] == "yes"
    assert {name for name in environ if name.startswith(("CCM_", "PG", "DATABASE"))} == {"CCM_RUN_ID"}
    assert environ["CCM_RUN_ID"] == run.run_id
    assert not Path(environ["CLAUDE_CODE_TMPDIR"]).exists()


def test_the_cli_runs_in_a_session_of_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True}).start()
    until(lambda: run.messages)
    (claude,) = marked(run.run_id)
    assert os.getsid(claude) == claude
    run.cancel()
    run.end()


# ---- regressions


def test_a_cancel_while_the_cli_never_answers_ends_its_children_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.TERMINATE_TIMEOUT", 0.2)
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nsleep 300 &\nwait\n")  # the child holds the output open
    mute.chmod(0o755)
    run = Run(tmp_path, "x", cli_path=mute).start()
    until(lambda: len(marked(run.run_id)) == 2)
    run.cancel()

    assert end_of(run) == ("cancelled", "None")


def test_binary_data_on_stderr_does_not_hang_the_run(tmp_path: Path) -> None:
    noisy = tmp_path / "noisy"
    noisy.write_text(
        f'#!/bin/sh\nprintf "\\377" >&2\nhead -c 300000 /dev/zero >&2\nexec {stand_in_cli(tmp_path)} "$@"\n'
    )
    noisy.chmod(0o755)

    assert end_of(Run(tmp_path, {"count": 1}, cli_path=noisy)) == ("completed", "None")


@pytest.mark.parametrize("usage", [{"m": None}, {"m": {"costUSD": "free"}}, {"m": {"costUSD": 1e999}}, [1]])
def test_an_invalid_cost_does_not_fail_a_completed_run(tmp_path: Path, usage: object) -> None:
    result = {"model_usage_since_last_result": usage, "total_cost_usd": None}
    outcome = Run(tmp_path, {"result": result}).end()

    assert outcome.status == "completed"
    assert outcome.cost_usd in (None, 0.0)
