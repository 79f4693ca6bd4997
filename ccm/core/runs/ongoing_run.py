"""A run that this process carries out, as others reach it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ccm.core.claude.input_queue import FollowUp, being_started
from ccm.core.claude.outcome import Outcome

if TYPE_CHECKING:
    from ccm.core.claude.execution import Execution


class OngoingRun:
    """Takes what a run is to be told, also before its execution is made. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._execution: Execution | None = None
        # Why it is to stop: the first reason counts.
        self._reason: Outcome | None = None

    def attach(self, execution: Execution) -> None:
        """Hand on what was told before, and from now on."""
        with self._lock:
            self._execution = execution
            reason = self._reason
        if reason is not None:
            execution.stop(reason)

    def stop(self, reason: Outcome) -> None:
        """Have the run stop; `reason` is how it ends, unless it is over by itself before."""
        with self._lock:
            self._reason = self._reason or reason
            execution = self._execution
        if execution is not None:
            execution.stop(reason)

    def send(self, follow_up: FollowUp) -> None:
        """Put a user's message into the run. `follow_up.taken_in` tells whether the run takes it in."""
        with self._lock:
            execution = self._execution
        if execution is not None:
            execution.send(follow_up)
        else:
            follow_up.refuse(being_started())
