"""A run's input: its prompt, the messages that clients send to it later, and the state of these in Claude Code.

Claude Code puts a later message into a queue of its own and reports its state under its uuid: with messages of type
`command_lifecycle` (`queued`, `started`, `completed`, ...), and by replaying the message when the model gets it. Older
versions only replay it. The message is recorded at the first of these reports, so every recorded message was accepted.
Later reports change its state and are not recorded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from ccm.core.claude.run_events import RunEvents
from ccm.core.run_log import RunLog
from ccm.errors import CCMError, NotTakenIn, RunEnding, RunNotStarted, TooLarge
from ccm.json_text import to_json_text

COMPLETED = "completed"
# The states of a message that is in the queue or in a turn. Every other state is final.
ACCEPTED = ("queued", "started")
WITHDRAWN = "withdrawn"
# An upper bound of what Claude Code adds to a message when it replays it (bytes).
REPLAY_BYTES = 4096


class FollowUp:
    """One message of a client, from its request to its final state.

    Attributes:
        taken_in: its index among the run's messages once Claude Code has accepted it and the writer has it; raises the
            reason if it is refused.
        size: bytes.
        recorded: whether it was handed to the writer.
        replayed: whether the model got it.
        end: its final state, or None before that.
    """

    def __init__(self, message: dict[str, Any]) -> None:
        self.uuid: str = message["uuid"]
        self.message = message
        self.size = len(to_json_text(message))
        self.taken_in: Future[int] = Future()
        self.recorded = False
        self.replayed = False
        self.end: str | None = None
        self._lock = threading.Lock()
        self._written = False

    def begin_writing(self) -> bool:
        """Mark the message as written, so that it can no longer be withdrawn. Returns False if it was withdrawn."""
        with self._lock:
            self._written = self.end is None
            return self._written

    def withdraw(self) -> bool:
        """Drop the message. Returns False if it may have been written already. From any thread."""
        with self._lock:
            if not self._written:
                self.end = WITHDRAWN
                self.message = {}
            return not self._written

    def refuse(self, error: CCMError) -> None:
        """Refuse the message unless it was accepted before."""
        if not self.taken_in.done():
            self.taken_in.set_exception(error)


class InputQueue:
    """The input of one run: its prompt and its follow-ups. For its own loop only.

    Args:
        prompt: the run's first message.
        record: stores a message and returns its index; may wait.
        events: those of the run.
        max_message_bytes: the largest message that the run survives.
        log: the run's log.
    """

    def __init__(
        self,
        prompt: dict[str, Any],
        record: Callable[[dict[str, Any]], Awaitable[int]],
        events: RunEvents,
        max_message_bytes: int,
        log: RunLog,
    ) -> None:
        self._log = log
        self._events = events
        self._largest = max_message_bytes - REPLAY_BYTES
        self._prompt = prompt
        self._prompt_recorded = False
        self._record = record
        self._unwritten: asyncio.Queue[FollowUp] = asyncio.Queue()
        self._known: dict[str, FollowUp] = {}

    @property
    def in_flight(self) -> bool:
        """Whether a follow-up is queued or unanswered. A run that ended now would lose it."""
        return any(follow_up.end is None for follow_up in self._known.values())

    @property
    def unanswered(self) -> bool:
        """Whether Claude Code accepted a follow-up and did not complete it."""
        return any(follow_up.recorded and follow_up.end != COMPLETED for follow_up in self._known.values())

    @property
    def size(self) -> int:
        """The size of the follow-ups in flight (bytes)."""
        return sum(follow_up.size for follow_up in self._known.values() if follow_up.end is None)

    def admit(self, follow_up: FollowUp) -> None:
        """Queue a message for Claude Code, or refuse it.

        The check and the insertion are one step of the loop, so the run cannot end in between. A queued message is in
        flight until Claude Code accepts it or it is refused at the end of the run.
        """
        try:
            if self._events.ending:
                follow_up.refuse(run_ending())
            elif self.size + follow_up.size > self._largest:
                # Claude Code replays messages that share a turn as one, and a message over the limit ends the run.
                message = (
                    f"The message and those that are not answered yet have more than {self._largest} bytes in all; "
                    "CCM_MAX_MESSAGE_BYTES sets the limit. Send it when they are answered."
                )
                follow_up.refuse(TooLarge(message))
            else:
                self._unwritten.put_nowait(follow_up)
                self._known[follow_up.uuid] = follow_up
        except Exception:
            self._log.exception("cannot queue a message", event="follow_up_failed")
            message = "A fault prevented the message from being sent; the service's log has the reason. Try again."
            follow_up.refuse(NotTakenIn(message))

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the prompt, then the follow-ups in the order of their admission, until the run ends."""
        yield self._prompt
        while True:
            follow_up = await self._unwritten.get()
            if not follow_up.begin_writing():
                del self._known[follow_up.uuid]
            elif self._events.ending:
                return
            else:
                yield follow_up.message

    async def handle(self, message: dict[str, Any]) -> bool:
        """Update the state of the follow-up that a message of Claude Code's is about.

        Returns:
            Whether the message was handled and must not be recorded.
        """
        kind = message.get("type")
        if kind == "result":
            for follow_up in self._known.values():
                # Its turn has ended. A Claude Code that reports states does so besides the result.
                if follow_up.replayed and follow_up.end is None:
                    follow_up.end = COMPLETED
            return False
        named = message.get({"command_lifecycle": "command_uuid", "user": "uuid"}.get(str(kind), ""))
        if named == self._prompt["uuid"]:
            recorded, self._prompt_recorded = self._prompt_recorded, True
            return recorded
        known = self._known.get(named) if isinstance(named, str) else None
        if known is None:
            return False
        state = message.get("state") if kind == "command_lifecycle" else None
        if not known.recorded and (kind == "user" or state in (*ACCEPTED, COMPLETED)):
            # Accepted from now on, although the record, and with it the client, may have to wait for storage.
            known.recorded = True
            if not self._prompt_recorded:
                # Claude Code replays the prompt only after the model has answered, but it must be recorded first.
                self._prompt_recorded = True
                await self._record(self._prompt)
            index = await self._record(known.message)
            known.message = {}  # free the memory of its images
            if not known.taken_in.done():
                known.taken_in.set_result(index)
        if kind == "user":
            known.replayed = True
        elif state not in ACCEPTED:
            known.end = str(state)
            known.refuse(RunEnding(f"Claude Code did not accept the message: it is {state!r}."))
        return True

    def close(self) -> None:
        """Refuse every follow-up that was not accepted, because the run is over."""
        for follow_up in self._known.values():
            follow_up.refuse(run_ending())


def run_ending() -> RunEnding:
    return RunEnding("The run is ending and takes no more messages. Resume its session instead.")


def being_started() -> RunNotStarted:
    return RunNotStarted("The run is just being started; send the message again in a moment.")
