"""Follow-ups: what a user says to a run while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import Field

from ccm.core.claude.input_queue import REPLAY_BYTES, FollowUp
from ccm.core.claude.run_context import user_message
from ccm.core.runs.runner import Runner
from ccm.core.storage.writer import WRITE_TIMEOUT, Writer
from ccm.db import messages, runs
from ccm.db.driver.transaction import Transaction
from ccm.errors import (
    NotTakenIn,
    OutcomeUnknown,
    RunAlreadyEnded,
    RunEnding,
    RunNotStarted,
    StorageUnavailable,
    TooLarge,
    Unavailable,
    ValidationError,
)
from ccm.models import Image, Run
from ccm.models.fields import Count, Id
from ccm.models.stored import ResponseModel

# Claude Code's commands that go on in another conversation, under another id.
OTHER_CONVERSATION = ("/clear", "/new", "/reset")


class TakenIn(ResponseModel):
    """A user's message that a run has taken in."""

    run_id: Id = Field(description="The run.")
    message_uuid: str = Field(description="The message's uuid.")
    message_index: Count = Field(description="Its index among the run's messages.")


class Input:
    """Puts messages into runs.

    Args:
        max_message_bytes: the largest message that a run survives.
    """

    def __init__(self, writer: Writer, runner: Runner, max_message_bytes: int) -> None:
        self._writer = writer
        self._runner = runner
        self._max_message_bytes = max_message_bytes

    def put(self, run_id: str, prompt: str, images: Sequence[Image]) -> TakenIn:
        """Put a user's message into a run, and wait until Claude Code has taken it in and it is committed as one of the
        run's messages; each for PATIENCE at the most.

        Raises:
            RunNotFound: there is no such run.
            RunAlreadyEnded, RunEnding, RunNotStarted: the run does not get it.
            TooLarge: the run would end by it; it does not get it.
            ValidationError: it would begin another conversation.
            StorageUnavailable, ShuttingDown, NotTakenIn: the run does not get it.
            OutcomeUnknown: it may.
        """
        run = self._find(run_id)
        _check_command(prompt, run)
        follow_up = FollowUp(user_message(run.sdk_session_id, prompt, images))
        largest = self._max_message_bytes - REPLAY_BYTES
        if follow_up.size > largest:
            raise TooLarge(f"The message has more than {largest} bytes in all; CCM_MAX_MESSAGE_BYTES sets the limit.")
        if not self._runner.send(run.id, follow_up):
            # It was there a moment ago, and leaves the runner when its end is stored.
            raise _ended(run)
        try:
            index = follow_up.taken_in.result(WRITE_TIMEOUT)
            self._writer.submit(partial(_committed, run_id=run.id, index=index)).future.result(WRITE_TIMEOUT)
        except (TimeoutError, Unavailable):
            if follow_up.withdraw():
                told = "Claude Code reads nothing at the moment, and the message was not sent. Try again."
                raise NotTakenIn(told) from None
            raise OutcomeUnknown(
                f"Claude Code or the database does not answer, and it is not known whether run {run.id} takes the "
                f"message in. If it does, it will be among the run's messages with the uuid {follow_up.uuid}; look "
                "there before you send it again."
            ) from None
        return TakenIn(run_id=run.id, message_uuid=follow_up.uuid, message_index=index)

    def _find(self, run_id: str) -> Run:
        """The run, if it goes on. By way of the writer: what cannot be recorded at present is not sent at all."""
        try:
            return self._writer.submit(partial(_going_on, run_id=run_id)).future.result(WRITE_TIMEOUT)
        except TimeoutError:
            reason = self._writer.last_error or "the database is too slow at the moment"
            raise StorageUnavailable(f"Nothing was sent: {reason}. Try again.") from None


def _going_on(transaction: Transaction, run_id: str) -> Run:
    run = runs.get(transaction, run_id)
    if run.ended:
        raise _ended(run)
    if run.waiting:
        raise RunNotStarted(f"Run {run.id} waits for a worker; send the message again when its startedAt is set.")
    return run


def _ended(run: Run) -> RunAlreadyEnded:
    return RunAlreadyEnded(f"Run {run.id} has already ended. Resume session {run.session_id} with the message instead.")


def _committed(transaction: Transaction, run_id: str, index: int) -> None:
    """In the queue behind the message, so it is written by now, or never will be."""
    if messages.last_index(transaction, run_id) < index:
        raise RunEnding(f"A message of run {run_id} cannot be stored, and so it is ending.")


def _check_command(prompt: str, run: Run) -> None:
    """
    Raises:
        ValidationError: it is a command after which nothing belongs to the run's session any more.
    """
    command = prompt.split(maxsplit=1)[0]
    if command in OTHER_CONVERSATION and not run.options.value.get("verbatimPrompts"):
        raise ValidationError(
            f"prompt: {command} begins another conversation, and what is said in it would be lost to this session. "
            "Start a fresh run instead.",
            field="prompt",
        )
