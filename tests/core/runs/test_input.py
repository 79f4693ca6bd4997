"""Follow-ups of one execution, with a stand-in CLI that each test scripts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.input_queue import FollowUp
from ccm.core.claude.processes import marked
from ccm.core.claude.run_context import user_message
from ccm.errors import Conflict, TooLarge
from tests.core.claude.test_execution import Run, _clean_environment, end_of, is_there  # noqa: F401
from tests.waiting import until

# The duration of a first turn that a test ends itself (seconds).
LONG = 300


def send(run: Run, text: object) -> FollowUp:
    prompt = text if isinstance(text, str) else json.dumps(text)
    follow_up = FollowUp(user_message("a session", prompt, ()))
    run.execution.send(follow_up)
    return follow_up


def index(follow_up: FollowUp) -> int:
    return follow_up.taken_in.result(30)


def refusal(follow_up: FollowUp) -> str:
    error = follow_up.taken_in.exception(30)
    assert isinstance(error, Conflict), error
    return error.code


def begun(folder: Path, script: dict[str, Any], **settings: Any) -> Run:
    """Return a run in its first turn, which has one message so far."""
    run = Run(folder, {"count": 1, **script}, **settings).start()
    until(lambda: run.messages)
    return run


def record(run: Run) -> list[str]:
    """Return the recorded results and agent messages by type, and the follow-ups by text, without the prompt."""
    recorded = []
    for message in run.messages:
        if message.get("uuid") == run.execution._prompt["uuid"]:
            continue
        content = (message.get("message") or {}).get("content") or [{}]
        recorded.append({"result": "RESULT", "user": content[-1].get("text")}.get(message["type"], message["type"]))
    return recorded


# ---- accepted messages


def test_a_message_during_a_turn_is_answered_after_it(tmp_path: Path) -> None:
    run = begun(tmp_path, {"seconds": 0.5})
    follow_up = send(run, "And then?")

    assert index(follow_up) == 2
    assert run.end().status == "completed"
    assert record(run) == ["assistant", "And then?", "RESULT", "assistant", "RESULT"]
    assert run.messages[1] == run.execution._prompt
    assert run.messages[2] == {
        "type": "user",
        "message": {"role": "user", "content": [{"type": "text", "text": "And then?"}]},
        "parent_tool_use_id": None,
        "session_id": "a session",
        "uuid": follow_up.uuid,
    }


@pytest.mark.parametrize("states", [False, True])
def test_the_turn_of_a_follow_up_has_no_shorter_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: bool
) -> None:
    monkeypatch.setattr("ccm.core.claude.execution.SETTLE_TIMEOUT", 0.1)
    monkeypatch.setattr("ccm.core.claude.termination.CLOSE_TIMEOUT", 0.1)
    monkeypatch.setattr("ccm.core.claude.termination.TERMINATE_TIMEOUT", 0.1)
    run = begun(tmp_path, {"seconds": 0.3, "states": states})
    index(send(run, {"seconds": 1.5, "count": 2}))

    assert run.end().status == "completed"
    assert [message["type"] for message in run.messages] == [
        "assistant",
        "user",
        "user",
        "result",
        "assistant",
        "assistant",
        "result",
    ]


def test_a_message_merged_into_a_turn_is_recorded_once_and_has_no_result_of_its_own(tmp_path: Path) -> None:
    run = begun(tmp_path, {"seconds": 0.5, "merges": True})
    index(send(run, "And that."))

    assert run.end().status == "completed"
    assert record(run) == ["assistant", "And that.", "RESULT"]


def test_messages_are_accepted_in_the_order_in_which_they_were_sent(tmp_path: Path) -> None:
    run = begun(tmp_path, {"seconds": 0.5})
    follow_ups = [send(run, f"number {n}") for n in range(20)]

    assert [index(follow_up) for follow_up in follow_ups] == list(range(2, 22))
    run.end()
    texts = [message["message"]["content"][0]["text"] for message in run.messages if message["type"] == "assistant"]
    assert texts[1:] == [f"heard: number {n}" for n in range(20)]


def test_a_message_to_a_connecting_run_comes_after_its_prompt(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "seconds": 0.5})
    run.start()
    until(lambda: run.execution._loop)
    follow_up = send(run, "me too")

    index(follow_up)
    assert run.end().status == "completed"
    assert record(run)[-2:] == ["assistant", "RESULT"]
    assert record(run).count("RESULT") == 2


def test_the_cost_of_a_run_is_the_sum_over_its_turns(tmp_path: Path) -> None:
    run = begun(tmp_path, {"seconds": 0.3})
    index(send(run, "more"))

    assert run.end().cost_usd == 0.5


def test_the_last_turn_decides_how_the_run_ended(tmp_path: Path) -> None:
    run = begun(tmp_path, {"seconds": 0.3, "result": {"is_error": True, "subtype": "error_max_turns"}})
    index(send(run, "Go on, then."))

    assert end_of(run) == ("completed", "None")


# ---- an older Claude Code


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_without_queue_reports_a_replay_accepts_a_message(tmp_path: Path, states: bool, merges: bool) -> None:
    run = begun(tmp_path, {"seconds": 0.3, "merges": merges, "lifecycle": False, "states": states})
    index(send(run, "later"))

    assert run.end().status == "completed"
    after = ["later", "RESULT"] if merges else ["RESULT", "later", "assistant", "RESULT"]
    assert record(run) == ["assistant", *after]


@pytest.mark.parametrize("states", [False, True])
def test_a_message_without_any_report_does_not_delay_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: bool
) -> None:
    monkeypatch.setattr("ccm.core.claude.execution.SETTLE_TIMEOUT", 0.3)
    monkeypatch.setattr("ccm.core.claude.termination.CLOSE_TIMEOUT", 0.3)
    run = begun(tmp_path, {"deaf": True, "states": states, "seconds": 0.3})
    follow_up = send(run, "Do you hear me?")

    assert end_of(run) == ("completed", "None")
    assert refusal(follow_up) == "RUN_ENDING"
    assert record(run) == ["assistant", "RESULT"]


def test_an_unread_message_blocks_neither_the_loop_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.execution.SETTLE_TIMEOUT", 0.3)
    monkeypatch.setattr("ccm.core.claude.termination.CLOSE_TIMEOUT", 0.3)
    run = begun(tmp_path, {"deaf": True, "seconds": 0.3})
    follow_ups = [send(run, "x" * 300_000) for _ in range(3)]  # more than a pipe holds

    assert end_of(run) == ("completed", "None")
    assert {refusal(follow_up) for follow_up in follow_ups} == {"RUN_ENDING"}


def test_a_cancel_ends_a_run_that_does_not_read_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.INTERRUPT_TIMEOUT", 0.3)
    run = begun(tmp_path, {"deaf": True, "seconds": LONG})
    follow_up = send(run, "x" * 1_000_000)
    run.cancel()

    assert end_of(run) == ("cancelled", "None")
    assert refusal(follow_up) == "RUN_ENDING"


def test_a_withdrawn_message_is_dropped_unless_it_was_written(tmp_path: Path) -> None:
    run = begun(tmp_path, {"deaf": True, "seconds": LONG})
    # The first is more than a pipe holds, so the writing of the second does not begin.
    first, second = send(run, "x" * 500_000), send(run, "and this")
    until(lambda: first._written)

    assert [first.withdraw(), second.withdraw()] == [False, True]
    assert second.message == {}
    assert run.execution._follow_ups.size == first.size
    run.cancel()
    assert end_of(run) == ("cancelled", "None")


def test_messages_that_together_exceed_the_limit_are_refused(tmp_path: Path) -> None:
    run = begun(tmp_path, {"hold": True})
    follow_ups = [send(run, "x" * 400_000) for _ in range(3)]

    assert [index(follow_up) for follow_up in follow_ups[:2]] == [2, 3]
    with pytest.raises(TooLarge, match="those that are not answered yet"):
        index(follow_ups[2])
    run.cancel()
    assert end_of(run) == ("cancelled", "None")


# ---- refused messages


def test_a_run_that_has_not_begun_refuses_messages(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1})
    assert refusal(send(run, "early")) == "RUN_NOT_STARTED"
    assert run.end().status == "completed"


def test_a_run_that_is_over_refuses_messages(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1})
    run.end()

    assert refusal(send(run, "late")) == "RUN_ENDING"
    assert record(run) == ["assistant", "RESULT"]


def test_a_stopping_run_refuses_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.INTERRUPT_TIMEOUT", 0.3)
    run = begun(tmp_path, {"hold": True, "ignore_interrupt": True})
    run.cancel()
    follow_up = send(run, "wait")

    assert refusal(follow_up) == "RUN_ENDING"
    assert run.end().status == "cancelled"
    assert record(run) == ["assistant"]


def test_a_crash_refuses_messages_that_were_not_accepted(tmp_path: Path) -> None:
    run = begun(tmp_path, {"lifecycle": False, "seconds": LONG})
    follow_up = send(run, "hello?")
    for pid in marked(run.run_id):
        os.kill(pid, signal.SIGKILL)

    assert end_of(run) == ("error", "CLI_CRASHED")
    assert refusal(follow_up) == "RUN_ENDING"


# ---- messages of a run that is stopped


def test_a_cancel_drops_queued_messages_but_not_their_record(tmp_path: Path) -> None:
    run = begun(tmp_path, {"hold": True})
    for n in range(2):
        index(send(run, f"number {n}"))
    run.cancel()
    outcome = run.end()

    assert outcome.status == "cancelled"
    assert outcome.result is not None
    assert outcome.result["subtype"] == "error_during_execution"
    assert record(run) == ["assistant", "number 0", "number 1", "RESULT"]


def test_a_cancel_counts_if_the_turn_succeeded_but_a_message_is_queued(tmp_path: Path) -> None:
    run = begun(tmp_path, {"hold": True, "finishes": True})
    index(send(run, "never answered"))
    run.cancel()
    outcome = run.end()

    assert outcome.status == "cancelled"
    assert outcome.result is not None
    assert outcome.result["subtype"] == "success"


def test_a_cancel_is_too_late_if_the_turn_succeeded_and_nothing_is_queued(tmp_path: Path) -> None:
    run = begun(tmp_path, {"hold": True, "finishes": True})
    run.cancel()

    assert end_of(run) == ("completed", "None")


def test_under_back_pressure_a_message_waits_and_a_cancel_works(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True})
    run.gate = asyncio.Event()
    run.start()
    until(lambda: run.messages)
    follow_up = send(run, "Is it stored?")
    run.cancel()
    until(lambda: not is_there(run))

    loop = run.execution._loop
    assert loop is not None
    loop.call_soon_threadsafe(run.gate.set)
    assert end_of(run) == ("cancelled", "None")
    assert ("Is it stored?" in record(run)) == (follow_up.taken_in.exception() is None)
