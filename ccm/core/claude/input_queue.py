"""The messages that clients send to a started run, and their state in Claude Code.

Claude Code puts such a message into a queue of its own and reports its state under its uuid: with messages of type
`command_lifecycle` (`queued`, `started`, `completed`, ...), and by replaying the message when the model gets it. Older
versions only replay it. The message is recorded at the first of these reports, so every recorded message was accepted.
Later reports change its state and are not recorded.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from ccm.errors import CCMError, RunEnding, RunNotStarted
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
        self.uuid = str(uuid.uuid4())
        self.message = {**message, "uuid": self.uuid}
        self.size = len(to_json_text(self.message))
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
    """The follow-ups of one run. For its own loop only.

    Args:
        prompt: the run's first message, with a uuid.
        record: stores a message and returns its index; may wait.
    """

    def __init__(self, prompt: dict[str, Any], record: Callable[[dict[str, Any]], Awaitable[int]]) -> None:
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

    def add(self, follow_up: FollowUp) -> None:
        """Queue a follow-up. It is in flight from now on."""
        self._unwritten.put_nowait(follow_up)
        self._known[follow_up.uuid] = follow_up

    async def next(self) -> dict[str, Any]:
        """Return the next message to write, in the order of `add`. Waits for one."""
        while True:
            follow_up = await self._unwritten.get()
            if follow_up.begin_writing():
                return follow_up.message
            del self._known[follow_up.uuid]

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

    def refuse(self, error: CCMError) -> None:
        """Refuse every follow-up that was not accepted, because the run is over."""
        for follow_up in self._known.values():
            follow_up.refuse(error)


def being_started() -> RunNotStarted:
    return RunNotStarted("The run is just being started; send the message again in a moment.")
