"""Follow-ups: messages that a user sends to a started run."""

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

# Claude Code's commands that switch to a new conversation with another id.
NEW_CONVERSATION_COMMANDS = ("/clear", "/new", "/reset")


class TakenIn(ResponseModel):
    """A user's message that a run has taken in."""

    run_id: Id = Field(description="The run.")
    message_uuid: str = Field(description="The message's uuid.")
    message_index: Count = Field(description="Its index among the run's messages.")


class Input:
    """Sends users' messages to started runs.

    Args:
        max_message_bytes: the largest message that a run survives.
    """

    def __init__(self, writer: Writer, runner: Runner, max_message_bytes: int) -> None:
        self._writer = writer
        self._runner = runner
        self._max_message_bytes = max_message_bytes

    def put(self, run_id: str, prompt: str, images: Sequence[Image]) -> TakenIn:
        """Send a user's message to a run. Return when Claude Code has accepted it and it is stored as one of the run's
        messages. Each of the two waits takes WRITE_TIMEOUT at most.

        Raises:
            NotFound: RUN_NOT_FOUND.
            Conflict: RUN_ALREADY_ENDED, RUN_ENDING, RUN_NOT_STARTED: the run does not get the message.
            TooLarge: the message would end the run; the run does not get it.
            ValidationError: the message would begin another conversation.
            Unavailable: STORAGE_UNAVAILABLE, SHUTTING_DOWN, NOT_TAKEN_IN: the run does not get the message.
                OUTCOME_UNKNOWN: it may get it.
        """
        run = self._find(run_id)
        _check_command(prompt, run)
        follow_up = FollowUp(user_message(run.sdk_session_id, prompt, images))
        largest = self._max_message_bytes - REPLAY_BYTES
        if follow_up.size > largest:
            raise TooLarge(f"The message has more than {largest} bytes in all; CCM_MAX_MESSAGE_BYTES sets the limit.")
        if not self._runner.send(run.id, follow_up):
            # It had not ended a moment ago. The runner forgets a run when its end is stored.
            raise _ended(run)
        try:
            index = follow_up.taken_in.result(WRITE_TIMEOUT)
            self._writer.submit(partial(_check_stored, run_id=run.id, index=index)).future.result(WRITE_TIMEOUT)
        except (TimeoutError, Unavailable):
            if follow_up.withdraw():
                message = "Claude Code is not reading its input, so the message was not sent. Try again."
                raise NotTakenIn(message) from None
            raise OutcomeUnknown(
                f"Claude Code or the database does not answer, so it is not known whether run {run.id} accepts the "
                f"message. If it does, the message appears among the run's messages with the uuid {follow_up.uuid}; "
                "look there before you send it again."
            ) from None
        return TakenIn(run_id=run.id, message_uuid=follow_up.uuid, message_index=index)

    def _find(self, run_id: str) -> Run:
        """Return the run if it is started. Reads through the writer, so that nothing is sent while storage is down."""
        try:
            return self._writer.submit(partial(_find_started, run_id=run_id)).future.result(WRITE_TIMEOUT)
        except TimeoutError:
            reason = self._writer.last_error or "the database is too slow at the moment"
            raise StorageUnavailable(f"Nothing was sent: {reason}. Try again.") from None


def _find_started(transaction: Transaction, run_id: str) -> Run:
    run = runs.get(transaction, run_id)
    if run.ended:
        raise _ended(run)
    if run.waiting:
        raise RunNotStarted(f"Run {run.id} is waiting for a worker. Send the message again when its startedAt is set.")
    return run


def _ended(run: Run) -> RunAlreadyEnded:
    return RunAlreadyEnded(f"Run {run.id} has already ended. Resume session {run.session_id} with the message instead.")


def _check_stored(transaction: Transaction, run_id: str, index: int) -> None:
    """Check that a message is stored. Its write was queued before this one, so it is stored now or never."""
    if messages.last_index(transaction, run_id) < index:
        raise RunEnding(f"A message of run {run_id} cannot be stored, so the run is ending.")


def _check_command(prompt: str, run: Run) -> None:
    """Refuse a command after which the conversation no longer belongs to the run's session.

    Raises:
        ValidationError: the prompt is such a command.
    """
    command = prompt.split(maxsplit=1)[0]
    if command in NEW_CONVERSATION_COMMANDS and not run.options.value.get("verbatimPrompts"):
        raise ValidationError(
            f"prompt: {command} begins another conversation, which would not be part of this session. Start a fresh "
            "run instead.",
            field="prompt",
        )
