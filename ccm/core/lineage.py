"""The runs that form a session, the runs that it continues, and the places where a fork can branch off."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ccm.db import messages, runs, sessions
from ccm.db.driver.transaction import Transaction
from ccm.errors import RunNotFound, SessionNotResumable, ValidationError
from ccm.models import Run, RunStatus, Session


@dataclass(frozen=True)
class Segment:
    """The messages of one run with an index after `after` and up to `through`."""

    run_id: str
    after: int
    through: int


@dataclass(frozen=True)
class ForkPoint:
    """The place where a fork branches off: a message of a run, or the end of the run."""

    run: Run
    message: str | None = None
    index: int | None = None


def session_segments(transaction: Transaction, session: Session, *, with_ancestors: bool) -> list[Segment]:
    """Return a segment for each run of a session, in order, up to the first that has not ended.

    Runs queued behind that one are left out: a reader that continues after them would miss its later messages.

    Args:
        with_ancestors: put the runs that the session continues in front, each up to the point of continuation.
    """
    own = runs.links(transaction, session.id)
    segments: list[Segment] = []
    for link in own:
        segments.append(Segment(link.id, -1, link.message_count - 1))
        if link.status == RunStatus.RUNNING:
            break
    child = own[0] if own and with_ancestors else None
    while child is not None and child.parent_run_id is not None:
        parent = runs.get_link(transaction, child.parent_run_id)
        end = parent.message_count - 1 if child.fork_at_index is None else child.fork_at_index
        segments.insert(0, Segment(parent.id, -1, end))
        child = parent
    return segments


def find_fork_point(
    transaction: Transaction, session_id: str, at_run_id: str | None, at_message: str | None
) -> ForkPoint:
    """Return the place where a fork of a session branches off: its head, or the given run or message.

    Raises:
        SessionNotFound, RunNotFound: there is no such session, or no such run in it.
        SessionNotResumable: the session has no run to fork from yet.
        ValidationError: the message cannot be forked from; names one that can.
    """
    session = sessions.get(transaction, session_id)
    if at_run_id is not None:
        run = runs.find(transaction, at_run_id)
        if run is None or run.session_id != session.id:
            raise RunNotFound(
                f"Session {session.id} has no run {at_run_id}. GET /api/sessions/{session.id}/runs lists them."
            )
        if at_message is None:
            return ForkPoint(run)
        return _message_in(transaction, [Segment(run.id, -1, run.message_count - 1)], at_message)
    if at_message is not None:
        return _message_in(transaction, session_segments(transaction, session, with_ancestors=True), at_message)
    if session.head_run_id is None:
        raise SessionNotResumable(f"Session {session.id} has no ended run with a transcript yet that could be forked.")
    return ForkPoint(runs.get(transaction, session.head_run_id))


def _message_in(transaction: Transaction, segments: Sequence[Segment], uuid: str) -> ForkPoint:
    """Return the fork point at a message.

    Raises:
        ValidationError: no segment has an assistant message of the main thread with that uuid.
    """
    for segment in reversed(segments):
        for index, text in messages.holding(transaction, segment.run_id, uuid):
            message = json.loads(text)
            if message.get("uuid") != uuid or index > segment.through:
                continue
            if _is_main_assistant(message):
                return ForkPoint(runs.get(transaction, segment.run_id), uuid, index)
            raise ValidationError(
                f"atMessage: message {uuid} is of type {message.get('type')!r}; take an assistant message of the main "
                f"thread{_suggest_nearest(transaction, segment, index)}.",
                field="atMessage",
            )
    raise ValidationError(
        f"atMessage: there is no message {uuid} in this history; take the uuid of an assistant message of it.",
        field="atMessage",
    )


def _is_main_assistant(message: Mapping[str, object]) -> bool:
    return message.get("type") == "assistant" and message.get("parent_tool_use_id") is None


def _suggest_nearest(transaction: Transaction, segment: Segment, index: int) -> str:
    """Return the end of an error message that names a nearby message to fork from; empty if there is none."""
    for text in messages.texts_before(transaction, segment.run_id, index, "assistant", 5):
        message = json.loads(text)
        if _is_main_assistant(message) and "uuid" in message:
            return f", such as {message['uuid']} before it"
    return ""
