"""What a client asks for when it starts, resumes or forks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from ccm.models import IdempotencyKey, Image, Run, RunMode


class IfBusy(StrEnum):
    """What a resume does while a run of its session has not ended."""

    # It is refused.
    REJECT = "reject"
    # It waits behind that run.
    ENQUEUE = "enqueue"
    # It cancels that run.
    INTERRUPT = "interrupt"


@dataclass(frozen=True)
class RunRequest:
    """What a client asked for, checked.

    Args:
        stored: what else is stored with the run as it was given, under the names that the API has for it.
        described: the same for the session that it opens.
    """

    mode: RunMode
    prompt: str
    images: tuple[Image, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stored: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    described: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    if_busy: IfBusy = IfBusy.REJECT
    created_by: str | None = None
    idempotency_key: IdempotencyKey | None = None


class Accepted(NamedTuple):
    """The run that a request has made, or, where it is `replayed`, that an earlier one with the same key had made."""

    run: Run
    replayed: bool
