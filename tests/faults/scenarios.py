"""The ways of a run that are walked. Each has what is prepared without a fault, and the part that meets one."""

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
    """
    Args:
        phase: which part of a run's life meets the fault. A call that is reached in two phases is walked in both, for
            the first time that it is reached is another one; within a phase it is walked in the first scenario only.
        template: what the service finds.
        stops: whether the trigger ends the service itself.
        starts: whether the trigger starts it.
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
    # Nobody listens on that port: the webhooks of its events are stored, and come to nothing.
    stage.start_run(json.dumps({"count": 3}), webhookUrl="http://127.0.0.1:9/")


def _resume(stage: Stage) -> None:
    with stage.probes.hidden():
        head = stage.runs()[0]
        session = stage.service.queries.session(head.session_id)
    request = RunRequest(mode=RunMode.RESUME, prompt="and on")
    accepted = stage.ask(lambda: stage.service.runs.resume(request, session, head), "resume")
    if accepted is not None:
        stage.watch(accepted.run)


def _leave_a_stump(stage: Stage) -> None:
    for whole in (stage.base / "ended" / "home").rglob("*.jsonl"):
        stump = stage.home / whole.relative_to(stage.base / "ended" / "home")
        stump.parent.mkdir(parents=True)
        stump.write_bytes(whole.read_bytes().splitlines(keepends=True)[0])


def _fork(stage: Stage) -> None:
    with stage.probes.hidden():
        session = stage.service.queries.session(stage.runs()[0].session_id)
        point = stage.service.queries.fork_point(session.id, None, None)
    request = RunRequest(mode=RunMode.FORK, prompt="another way")
    accepted = stage.ask(lambda: stage.service.runs.fork(request, session, point, None), "fork")
    if accepted is not None:
        stage.watch(accepted.run)


def _hold(stage: Stage) -> None:
    run = stage.start_run(HOLD)
    assert run is not None
    assert stage.has_message(run.id)


def _cancel(stage: Stage) -> None:
    for run in _holding(stage):
        done = stage.ask(partial(stage.service.runs.cancel, run.id), "cancel", 3)
        if done is None and not stage.until(partial(stage.has_ended, run.id), 1.0):
            # A client that is refused each time has its run go on, and rightly so.
            stage.gave_up = True


def _holding(stage: Stage) -> list[Run]:
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


def _be_asked(stage: Stage) -> None:
    stage.start_run(ASK, approvals=True)
    assert stage.until(lambda: _pending(stage))


def _work_a_little(stage: Stage) -> None:
    run = stage.start_run(json.dumps({"count": 1, "seconds": 0.4}))
    assert run is not None
    assert stage.has_message(run.id)


def _follow_up(stage: Stage) -> None:
    run = stage.runs()[0]
    stage.ask(lambda: stage.service.input.put(run.id, "and this", ()), "follow-up", 2)


def _queue(stage: Stage) -> None:
    _hold(stage)
    for _ in range(2):
        stage.start_run("hello")


def _time_out(stage: Stage) -> None:
    stage.start_run(HOLD, timeoutMs=150)


def _stop(stage: Stage) -> None:
    stage.stop()


def _recover(stage: Stage) -> None:
    stage.recover()


SCENARIOS = (
    Scenario("fresh", "begin", _fresh),
    Scenario("resume", "begin", _resume, template="ended"),
    Scenario("fork", "begin", _fork, _leave_a_stump, template="ended"),
    Scenario("cancel", "end", _cancel, _queue),
    Scenario("crash", "begin", _crash),
    Scenario("answer", "begin", _answer, workers=2),
    Scenario("cancel-asking", "end", _cancel, _be_asked, workers=2),
    Scenario("follow-up", "begin", _follow_up, _work_a_little),
    Scenario("time-limit", "begin", _time_out),
    Scenario("shutdown", "stop", _stop, _hold, stops=True),
    Scenario("recovery", "start", _recover, template="killed", starts=True),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
