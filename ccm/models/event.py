"""An event: a change in the state of a run or an approval."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pydantic import Field

from ccm.models.json_field import JsonObject, JsonText
from ccm.models.run import Run, RunStatus


class EventType(StrEnum):
    # A run was accepted.
    RUN_CREATED = "run.created"
    # A run left the queue.
    RUN_STARTED = "run.started"
    RUN_COMPLETED = "run.completed"
    # A run ended in error.
    RUN_FAILED = "run.failed"
    RUN_CANCELLED = "run.cancelled"
    # Claude Code asks for an approval.
    APPROVAL_REQUESTED = "approval.requested"
    # An approval is no longer pending.
    APPROVAL_RESOLVED = "approval.resolved"


# The type of a run's last event, by the run's final status.
RUN_ENDED = {
    RunStatus.COMPLETED: EventType.RUN_COMPLETED,
    RunStatus.ERROR: EventType.RUN_FAILED,
    RunStatus.CANCELLED: EventType.RUN_CANCELLED,
}


class EventRun(Run):
    """A run as an event shows it: without its longest fields, which the client that started it has."""

    prompt: str = Field(exclude=True)
    options: JsonText[JsonObject] = Field(exclude=True)


@dataclass(frozen=True)
class Event:
    """A change in the state of a run or an approval. `json` is one line of ASCII.

    It has the fields of https://www.standardwebhooks.com: `type`, `timestamp` and `data`.
    """

    id: int
    type: str
    run_id: str
    json: str
