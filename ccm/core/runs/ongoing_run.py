"""The handle by which other threads stop a run and send it messages."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ccm.core.claude.input_queue import FollowUp, being_started
from ccm.core.claude.outcome import Outcome

if TYPE_CHECKING:
    from ccm.core.claude.execution import Execution


class OngoingRun:
    """A run that has an owner in this process. Accepts a stop before the execution exists. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._execution: Execution | None = None
        # Why the run stops. The first reason counts.
        self._reason: Outcome | None = None

    def attach(self, execution: Execution) -> None:
        """Pass an earlier stop on to the execution, and everything from now on."""
        with self._lock:
            self._execution = execution
            reason = self._reason
        if reason is not None:
            execution.stop(reason)

    def stop(self, reason: Outcome) -> None:
        """Stop the run. It ends with `reason` unless it is over before."""
        with self._lock:
            self._reason = self._reason or reason
            execution = self._execution
        if execution is not None:
            execution.stop(reason)

    def send(self, follow_up: FollowUp) -> None:
        """Send a user's message to the run. `follow_up.taken_in` tells whether it was accepted."""
        with self._lock:
            execution = self._execution
        if execution is not None:
            execution.send(follow_up)
        else:
            follow_up.refuse(being_started())
