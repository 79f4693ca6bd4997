"""The messages that clients put into a run while it goes on, and what Claude Code says of each.

Claude Code takes such a message into a queue of its own and tells under its uuid what becomes of it: in messages of the
type `command_lifecycle` (`queued`, `started`, `completed`, ...), and with the message itself, replayed when the model
gets it. An older one only replays. It is recorded when the first of these comes, so its row says that the run has taken
it in; what is said of it afterwards is acted on and no part of the record.
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
# The states of a message that is in the queue, or in a turn; every other one is its last.
TAKEN_IN = ("queued", "started")
WITHDRAWN = "withdrawn"
# What Claude Code adds to a message when it replays it, and more (bytes).
REPLAY_BYTES = 4096


class FollowUp:
    """One message, from a client's request to its end. Its `taken_in` gives its index among the run's messages, once
    the writer has it, or raises why the run does not take it in.
    """

    def __init__(self, message: dict[str, Any]) -> None:
        self.uuid = str(uuid.uuid4())
        self.message = {**message, "uuid": self.uuid}
        self.size = len(to_json_text(self.message))
        self.taken_in: Future[int] = Future()
        self.recorded = False
        self.replayed = False
        # The last state that it was in; None while it has a turn before it.
        self.end: str | None = None
        self._lock = threading.Lock()
        self._written = False

    def begin_writing(self) -> bool:
        """Whether it is to be written; False if its client has withdrawn it."""
        with self._lock:
            self._written = self.end is None
            return self._written

    def withdraw(self) -> bool:
        """Have it never written, and forget what it says. False if that is too late. From any thread."""
        with self._lock:
            if not self._written:
                self.end = WITHDRAWN
                self.message = {}
            return not self._written

    def refuse(self, error: CCMError) -> None:
        """It is not taken in; nothing if it was before."""
        if not self.taken_in.done():
            self.taken_in.set_exception(error)


class InputQueue:
    """Those of one run. For its own loop only.

    Args:
        prompt: the message that the run begins with, with a uuid.
        record: puts a message among the run's own and gives its index; may wait.
    """

    def __init__(self, prompt: dict[str, Any], record: Callable[[dict[str, Any]], Awaitable[int]]) -> None:
        self._prompt = prompt
        self._prompt_recorded = False
        self._record = record
        self._unwritten: asyncio.Queue[FollowUp] = asyncio.Queue()
        self._known: dict[str, FollowUp] = {}

    @property
    def in_flight(self) -> bool:
        """Whether Claude Code has one before it, or is about to get one: a run that ended now would lose it."""
        return any(follow_up.end is None for follow_up in self._known.values())

    @property
    def unanswered(self) -> bool:
        """Whether one was taken in whose turn has not ended well."""
        return any(follow_up.recorded and follow_up.end != COMPLETED for follow_up in self._known.values())

    @property
    def size(self) -> int:
        """Bytes of those that are in flight."""
        return sum(follow_up.size for follow_up in self._known.values() if follow_up.end is None)

    def add(self, follow_up: FollowUp) -> None:
        """Have it written; from now on it is in flight."""
        self._unwritten.put_nowait(follow_up)
        self._known[follow_up.uuid] = follow_up

    async def next(self) -> dict[str, Any]:
        """The next message to write, in the order in which they were added."""
        while True:
            follow_up = await self._unwritten.get()
            if follow_up.begin_writing():
                return follow_up.message
            del self._known[follow_up.uuid]

    async def heed(self, message: dict[str, Any]) -> bool:
        """Act on what Claude Code says; False if it is not of one of these messages."""
        kind = message.get("type")
        if kind == "result":
            for follow_up in self._known.values():
                # The turn that it was in has ended. A Claude Code that knows more of it says so beside the result.
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
        if not known.recorded and (kind == "user" or state in (*TAKEN_IN, COMPLETED)):
            # Taken in it is from now on; the record may have to wait for storage, and with it the client.
            known.recorded = True
            if not self._prompt_recorded:
                # Claude Code replays it only when the model has answered; what follows it is not to stand before it.
                self._prompt_recorded = True
                await self._record(self._prompt)
            index = await self._record(known.message)
            known.message = {}  # with all its images
            if not known.taken_in.done():
                known.taken_in.set_result(index)
        if kind == "user":
            known.replayed = True
        elif state not in TAKEN_IN:
            known.end = str(state)
            known.refuse(RunEnding(f"Claude Code has not taken the message in: it is {state!r}."))
        return True

    def refuse(self, error: CCMError) -> None:
        """The run is over: what it has not taken in it never will."""
        for follow_up in self._known.values():
            follow_up.refuse(error)


def being_started() -> RunNotStarted:
    return RunNotStarted("The run is just being started; send the message again in a moment.")
