"""Whether storage takes writes, found out by writing."""

from __future__ import annotations

import logging
import threading
import time

from ccm.core.recorder import Recorder
from ccm.core.write import Write
from ccm.db import heartbeat

log = logging.getLogger(__name__)

# A commit that is as old as that still proves that all is well (seconds).
FRESH_SECONDS = 1.0
# How long a heartbeat may take (seconds).
BEAT_SECONDS = 2.0
SILENCE = "the database does not answer"


class Pulse:
    """An idle service notices a fault of storage only if something is written.

    So a small row is, while somebody asks, once in FRESH_SECONDS at the most; in between it answers from memory.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()
        self._beat: Write[None] | None = None
        self._since = 0.0

    def trouble(self) -> str | None:
        """Why storage takes no writes, in words that anybody may read; None if it does. Takes BEAT_SECONDS at most."""
        recorder = self._recorder
        now = time.monotonic()
        if recorder.trouble is not None:
            return recorder.trouble  # the recorder is trying on by itself
        if now - recorder.last_commit < FRESH_SECONDS:
            return None
        try:
            beat, since = self._beating(now)
            beat.future.result(max(0.0, since + BEAT_SECONDS - now))
        except TimeoutError:
            beat.give_up(TimeoutError())
            silent = recorder.last_commit < now  # or else something was stored meanwhile
            return recorder.trouble or (SILENCE if silent else None)
        except Exception as error:
            log.warning("the heartbeat failed: %s", error)
            return recorder.trouble or "the database refuses to be written"
        return recorder.trouble

    def _beating(self, now: float) -> tuple[Write[None], float]:
        """The heartbeat under way, shared by all who ask."""
        with self._lock:
            if self._beat is None or self._beat.future.done():
                self._beat = self._recorder.submit(heartbeat.beat)
                self._since = now
            return self._beat, self._since
