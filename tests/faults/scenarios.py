"""The scenarios that are walked: each prepares a stage without a fault, then runs a trigger that meets one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ccm.core.runs.request import RunRequest
from ccm.models import Answer, Approval, Run, RunMode
from tests.faults.stage import Stage

HOLD = json.dumps({"count": 1, "hold": True, "tool": 1000})
ASK = json.dumps({"ask": [{"tool_name": "Bash", "input": {"command": "rm -r /"}}]})


@dataclass(frozen=True)
class Scenario:
    """A part of a run's life that meets a fault.

    Args:
        phase: the part of a run's life. A call is walked once in each phase, in the first of its scenarios that reaches
            the call.
        template: the database that the service starts with.
        stops: whether the trigger stops the service.
        starts: whether the trigger starts the service.
    """

    name: str
    phase: str
    trigger: Callable[[Stage], None]
    prepare: Callable[[Stage], None] = lambda _stage: None
    template: str = "empty"
    workers: int = 1
    stops: bool = False
    starts: bool = False


def _fresh(stage: Stage) -> None:
    # No program listens on that port: the webhooks are stored, and their delivery fails.
    stage.start_run(json.dumps({"count": 3}), webhookUrl="http://127.0.0.1:9/")


def _resume(stage: Stage) -> None:
    with stage.probes.hidden():
        head = stage.runs()[0]
        session = stage.service.queries.session(head.session_id)
    request = RunRequest(mode=RunMode.RESUME, prompt="continue")
    accepted = stage.ask(lambda: stage.service.runs.resume(request, session, head), "resume")
    if accepted is not None:
        stage.watch(accepted.run)


def _truncate_transcripts(stage: Stage) -> None:
    for whole in (stage.base / "ended" / "home").rglob("*.jsonl"):
        truncated = stage.home / whole.relative_to(stage.base / "ended" / "home")
        truncated.parent.mkdir(parents=True)
        truncated.write_bytes(whole.read_bytes().splitlines(keepends=True)[0])


def _fork(stage: Stage) -> None:
    with stage.probes.hidden():
        session = stage.service.queries.session(stage.runs()[0].session_id)
        point = stage.service.queries.fork_point(session.id, None, None)
    request = RunRequest(mode=RunMode.FORK, prompt="another way")
    accepted = stage.ask(lambda: stage.service.runs.fork(request, session, point, None), "fork")
    if accepted is not None:
        stage.watch(accepted.run)


def _start_held_run(stage: Stage) -> None:
    run = stage.start_run(HOLD)
    assert run is not None
    assert stage.has_message(run.id)


def _cancel(stage: Stage) -> None:
    for run in _started_runs(stage):
        done = stage.ask(partial(stage.service.runs.cancel, run.id), "cancel", 3)
        if done is None and not stage.until(partial(stage.has_ended, run.id), 1.0):
            # If every cancel is refused, the run rightly continues.
            stage.cancel_refused = True


def _started_runs(stage: Stage) -> list[Run]:
    return [run for run in stage.runs() if not run.ended and run.started_at is not None]


def _crash(stage: Stage) -> None:
    stage.start_run(json.dumps({"count": 1, "tool": 1000, "stderr": "Oh dear.", "exit": 3}))


def _answer(stage: Stage) -> None:
    run = stage.start_run(ASK, approvals=True)
    if run is None:
        return
    stage.until(lambda: _pending(stage) or stage.service.queries.run(run.id).ended)
    with stage.probes.hidden():
        pending = _pending(stage)
    for approval in pending:
        done = stage.ask(partial(stage.service.approvals.answer, approval.id, Answer(allow=True), None), "answer", 3)
        if done is None and not stage.run(run.id).ended:
            _cancel(stage)


def _pending(stage: Stage) -> list[Approval]:
    return stage.service.queries.approvals({"status": "pending"}, limit=10, after=None)


def _start_asking_run(stage: Stage) -> None:
    stage.start_run(ASK, approvals=True)
    assert stage.until(lambda: _pending(stage))


def _start_short_run(stage: Stage) -> None:
    run = stage.start_run(json.dumps({"count": 1, "seconds": 1.0}))
    assert run is not None
    assert stage.has_message(run.id)


def _follow_up(stage: Stage) -> None:
    run = stage.runs()[0]
    stage.ask(lambda: stage.service.input.put(run.id, "and this", ()), "follow-up", 2)


def _queue(stage: Stage) -> None:
    _start_held_run(stage)
    for _ in range(2):
        stage.start_run("hello")


def _time_out(stage: Stage) -> None:
    # Long enough that Claude Code has started by then on a busy machine too: else the run ends in another way.
    stage.start_run(HOLD, timeoutMs=2000)


def _stop(stage: Stage) -> None:
    stage.stop()


def _recover(stage: Stage) -> None:
    stage.recover()


SCENARIOS = (
    Scenario("fresh", "begin", _fresh),
    Scenario("resume", "begin", _resume, template="ended"),
    Scenario("fork", "begin", _fork, _truncate_transcripts, template="ended"),
    Scenario("cancel", "end", _cancel, _queue),
    Scenario("crash", "begin", _crash),
    Scenario("answer", "begin", _answer, workers=2),
    Scenario("cancel-asking", "end", _cancel, _start_asking_run, workers=2),
    Scenario("follow-up", "begin", _follow_up, _start_short_run),
    Scenario("time-limit", "begin", _time_out),
    Scenario("shutdown", "stop", _stop, _start_held_run, stops=True),
    Scenario("recovery", "start", _recover, template="killed", starts=True),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
