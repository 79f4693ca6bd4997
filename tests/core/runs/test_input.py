"""Messages put into one execution while it goes on, with a CLI that behaves just as a test has it behave."""

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
from tests.core.claude.test_execution import Run, _clean_environment, is_there, tell  # noqa: F401
from tests.waiting import until

# How long the first turn of a run may take until a test has it end.
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


def begun(folder: Path, said: dict[str, Any], **settings: Any) -> Run:
    """A run whose first turn has said one message and goes on."""
    run = Run(folder, {"count": 1, **said}, **settings).start()
    until(lambda: run.messages)
    return run


def record(run: Run) -> list[str]:
    """What a run has recorded: its results, what the agent said, and the texts of the messages that were put in.

    Its prompt is left out, which stands before the first of these.
    """
    told = []
    for message in run.messages:
        if message.get("uuid") == run.execution._prompt["uuid"]:
            continue
        content = (message.get("message") or {}).get("content") or [{}]
        told.append({"result": "RESULT", "user": content[-1].get("text")}.get(message["type"], message["type"]))
    return told


# ---- what is taken in


def test_what_comes_during_a_turn_is_answered_after_it(tmp_path: Path) -> None:
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
def test_the_turn_of_a_message_may_take_as_long_as_any(
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


def test_what_a_turn_takes_up_is_recorded_once_and_has_no_result_of_its_own(tmp_path: Path) -> None:
    run = begun(tmp_path, {"seconds": 0.5, "merges": True})
    index(send(run, "And that."))

    assert run.end().status == "completed"
    assert record(run) == ["assistant", "And that.", "RESULT"]


def test_messages_are_taken_in_in_the_order_in_which_they_were_sent(tmp_path: Path) -> None:
    run = begun(tmp_path, {"seconds": 0.5})
    follow_ups = [send(run, f"number {n}") for n in range(20)]

    assert [index(follow_up) for follow_up in follow_ups] == list(range(2, 22))
    run.end()
    texts = [message["message"]["content"][0]["text"] for message in run.messages if message["type"] == "assistant"]
    assert texts[1:] == [f"heard: number {n}" for n in range(20)]


def test_a_message_for_a_run_that_still_connects_comes_after_its_prompt(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "seconds": 0.5})
    run.start()
    until(lambda: run.execution._loop)
    follow_up = send(run, "me too")

    index(follow_up)
    assert run.end().status == "completed"
    assert record(run)[-2:] == ["assistant", "RESULT"]
    assert record(run).count("RESULT") == 2


def test_costs_of_all_turns_count_together(tmp_path: Path) -> None:
    run = begun(tmp_path, {"seconds": 0.3})
    index(send(run, "more"))

    assert run.end().cost_usd == 0.5


def test_a_turn_after_one_that_failed_decides(tmp_path: Path) -> None:
    run = begun(tmp_path, {"seconds": 0.3, "result": {"is_error": True, "subtype": "error_max_turns"}})
    index(send(run, "Go on, then."))

    assert tell(run) == ("completed", "None")


# ---- an older Claude Code


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_one_that_tells_nothing_of_its_queue_takes_a_message_in_when_it_replays_it(
    tmp_path: Path, states: bool, merges: bool
) -> None:
    run = begun(tmp_path, {"seconds": 0.3, "merges": merges, "lifecycle": False, "states": states})
    index(send(run, "later"))

    assert run.end().status == "completed"
    after = ["later", "RESULT"] if merges else ["RESULT", "later", "assistant", "RESULT"]
    assert record(run) == ["assistant", *after]


@pytest.mark.parametrize("states", [False, True])
def test_one_that_says_nothing_at_all_of_a_message_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: bool
) -> None:
    monkeypatch.setattr("ccm.core.claude.execution.SETTLE_TIMEOUT", 0.3)
    monkeypatch.setattr("ccm.core.claude.termination.CLOSE_TIMEOUT", 0.3)
    run = begun(tmp_path, {"deaf": True, "states": states, "seconds": 0.3})
    follow_up = send(run, "Do you hear me?")

    assert tell(run) == ("completed", "None")
    assert refusal(follow_up) == "RUN_ENDING"
    assert record(run) == ["assistant", "RESULT"]


def test_a_message_that_is_not_read_neither_blocks_the_loop_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.claude.execution.SETTLE_TIMEOUT", 0.3)
    monkeypatch.setattr("ccm.core.claude.termination.CLOSE_TIMEOUT", 0.3)
    run = begun(tmp_path, {"deaf": True, "seconds": 0.3})
    follow_ups = [send(run, "x" * 300_000) for _ in range(3)]  # more than any pipe holds

    assert tell(run) == ("completed", "None")
    assert {refusal(follow_up) for follow_up in follow_ups} == {"RUN_ENDING"}


def test_a_cancel_ends_a_run_whose_input_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.INTERRUPT_TIMEOUT", 0.3)
    run = begun(tmp_path, {"deaf": True, "seconds": LONG})
    follow_up = send(run, "x" * 1_000_000)
    run.execution.cancel()

    assert tell(run) == ("cancelled", "None")
    assert refusal(follow_up) == "RUN_ENDING"


def test_a_message_that_its_client_gives_up_is_not_written_unless_it_was(tmp_path: Path) -> None:
    run = begun(tmp_path, {"deaf": True, "seconds": LONG})
    # The first is more than any pipe holds, so the second is not even begun.
    first, second = send(run, "x" * 500_000), send(run, "and this")
    until(lambda: first._written)

    assert [first.withdraw(), second.withdraw()] == [False, True]
    assert second.message == {}
    assert run.execution._follow_ups.size == first.size
    run.execution.cancel()
    assert tell(run) == ("cancelled", "None")


def test_messages_that_together_would_end_the_run_are_refused_before(tmp_path: Path) -> None:
    run = begun(tmp_path, {"hold": True})
    follow_ups = [send(run, "x" * 400_000) for _ in range(3)]

    assert [index(follow_up) for follow_up in follow_ups[:2]] == [2, 3]
    with pytest.raises(TooLarge, match="together with those that have not been answered"):
        index(follow_ups[2])
    run.execution.cancel()
    assert tell(run) == ("cancelled", "None")


# ---- what is not


def test_a_run_that_has_not_begun_takes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1})
    assert refusal(send(run, "early")) == "RUN_NOT_STARTED"
    assert run.end().status == "completed"


def test_a_run_that_is_over_takes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1})
    run.end()

    assert refusal(send(run, "late")) == "RUN_ENDING"
    assert record(run) == ["assistant", "RESULT"]


def test_a_run_that_was_told_to_stop_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.claude.termination.INTERRUPT_TIMEOUT", 0.3)
    run = begun(tmp_path, {"hold": True, "ignore_interrupt": True})
    run.execution.cancel()
    follow_up = send(run, "wait")

    assert refusal(follow_up) == "RUN_ENDING"
    assert run.end().status == "cancelled"
    assert record(run) == ["assistant"]


def test_a_crash_refuses_what_was_not_taken_in(tmp_path: Path) -> None:
    run = begun(tmp_path, {"lifecycle": False, "seconds": LONG})
    follow_up = send(run, "hello?")
    for pid in marked(run.run_id):
        os.kill(pid, signal.SIGKILL)

    assert tell(run) == ("error", "CLI_CRASHED")
    assert refusal(follow_up) == "RUN_ENDING"


# ---- and what becomes of it when the run is stopped


def test_a_cancel_drops_what_is_in_the_queue_and_its_record_stays(tmp_path: Path) -> None:
    run = begun(tmp_path, {"hold": True})
    for n in range(2):
        index(send(run, f"number {n}"))
    run.execution.cancel()
    outcome = run.end()

    assert outcome.status == "cancelled"
    assert outcome.result is not None
    assert outcome.result["subtype"] == "error_during_execution"
    assert record(run) == ["assistant", "number 0", "number 1", "RESULT"]


def test_a_cancel_counts_where_the_turn_ended_well_with_a_message_still_in_the_queue(tmp_path: Path) -> None:
    run = begun(tmp_path, {"hold": True, "finishes": True})
    index(send(run, "never answered"))
    run.execution.cancel()
    outcome = run.end()

    assert outcome.status == "cancelled"
    assert outcome.result is not None
    assert outcome.result["subtype"] == "success"


def test_a_cancel_comes_too_late_where_the_turn_ended_well_and_all_was_answered(tmp_path: Path) -> None:
    run = begun(tmp_path, {"hold": True, "finishes": True})
    run.execution.cancel()

    assert tell(run) == ("completed", "None")


def test_under_back_pressure_a_message_waits_and_a_cancel_still_gets_through(tmp_path: Path) -> None:
    run = Run(tmp_path, {"count": 1, "hold": True})
    run.gate = asyncio.Event()
    run.start()
    until(lambda: run.messages)
    follow_up = send(run, "Is it stored?")
    run.execution.cancel()
    until(lambda: not is_there(run))

    loop = run.execution._loop
    assert loop is not None
    loop.call_soon_threadsafe(run.gate.set)
    assert tell(run) == ("cancelled", "None")
    assert ("Is it stored?" in record(run)) == (follow_up.taken_in.exception() is None)
