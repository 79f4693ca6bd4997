"""A client's request for a run, and the answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from ccm.models import IdempotencyKey, Image, Run, RunMode


class IfBusy(StrEnum):
    """The effect of a resume while another run of its session has not ended."""

    # Refuse the resume.
    REJECT = "reject"
    # Queue it behind that run.
    ENQUEUE = "enqueue"
    # Cancel that run.
    INTERRUPT = "interrupt"


@dataclass(frozen=True)
class RunRequest:
    """A validated request for a run.

    Args:
        run_fields: further fields to store with the run unchanged, under their names in the API.
        session_fields: the same for the session that the run opens.
    """

    mode: RunMode
    prompt: str
    images: tuple[Image, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    run_fields: Mapping[str, Any] = field(default_factory=dict)
    session_fields: Mapping[str, Any] = field(default_factory=dict)
    if_busy: IfBusy = IfBusy.REJECT
    created_by: str | None = None
    idempotency_key: IdempotencyKey | None = None


class Accepted(NamedTuple):
    """The run created for a request. If `replayed`, an earlier request with the same key created it."""

    run: Run
    replayed: bool
