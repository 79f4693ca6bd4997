"""Whether storage takes writes, found out by writing."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import wait

from ccm.core.recorder import Recorder
from ccm.core.write import Write
from ccm.db import heartbeat
from ccm.db.database import Database

log = logging.getLogger(__name__)

# A commit that is as old as that still proves that all is well (seconds).
FRESH_SECONDS = 1.0
# How long the writer may go without an answer of the database while this interpreter is free (seconds).
BEAT_SECONDS = 2.0
# How long one asks at the most (seconds): /health answers within 5.
LONGEST_SECONDS = 4.0
# The wait for a heartbeat is made of short ones. One that ends late shows that the interpreter is busy.
LOOK_SECONDS = 0.05
LATE_SECONDS = 0.05
# After so long without an answer a busy interpreter is no explanation any more (seconds).
SILENCE_SECONDS = 20.0
SILENCE = "the database does not answer"


class _Undecided(Exception):
    """The interpreter is too busy to tell, or the recorder tells of trouble by itself."""


class Pulse:
    """An idle service notices a fault of storage only if something is written.

    So a small row is, while somebody asks, once in FRESH_SECONDS at the most; in between it answers from memory.

    Hundreds of streams can keep the interpreter so busy that a heartbeat is late though the database answers at once.
    So time counts against the database only while this thread gets the interpreter when it wants it, and while no
    statement of the writer is answered.

    Args:
        database: the recorder's.
    """

    def __init__(self, recorder: Recorder, database: Database) -> None:
        self._recorder = recorder
        self._database = database
        self._lock = threading.Lock()
        self._beat: Write[None] | None = None
        # When the first heartbeat was asked for that has not been answered; None if the last one was.
        self._unanswered: float | None = None

    def trouble(self) -> str | None:
        """Why storage takes no writes, in words that anybody may read; None if it does. Takes LONGEST_SECONDS at most.

        None also if the interpreter is too busy to tell.
        """
        recorder = self._recorder
        asked = time.monotonic()
        if recorder.trouble is not None:
            return recorder.trouble  # the recorder is trying on by itself
        if asked - recorder.last_commit < FRESH_SECONDS:
            return None
        try:
            self._wait(self._beating(asked), asked)
        except _Undecided:
            return recorder.trouble
        except TimeoutError:
            silent = recorder.last_commit < asked  # or else something was stored meanwhile
            return recorder.trouble or (SILENCE if silent else None)
        except Exception as error:
            log.warning("the heartbeat failed: %s", error)
            return recorder.trouble or "the database refuses to be written"
        return recorder.trouble

    def _beating(self, now: float) -> Write[None]:
        """The heartbeat under way, shared by all who ask."""
        with self._lock:
            if self._beat is None or self._beat.future.done():
                self._beat = self._recorder.submit(heartbeat.beat)
            if self._unanswered is None:
                self._unanswered = now
            return self._beat

    def _wait(self, beat: Write[None], asked: float) -> None:
        """Wait until a heartbeat is stored or the recorder tells of trouble, LONGEST_SECONDS at the most.

        If it is not stored by then, it is given up, because a service that stops would wait for it. All who share it
        are told the same.

        Raises:
            TimeoutError: the database does not answer.
            _Undecided: there is trouble of the recorder's, or it cannot be told.
        """
        patience = BEAT_SECONDS
        now = asked
        answered = self._database.last_answer
        # While there is trouble the recorder tries on, and each try is answered by a refusal.
        while self._recorder.trouble is None and patience > 0 and now - asked < LONGEST_SECONDS:
            if wait([beat.future], LOOK_SECONDS).done:
                beat.future.result()
                self._unanswered = None
                return
            before, now = now, time.monotonic()
            if self._database.last_answer != answered:
                answered, patience = self._database.last_answer, BEAT_SECONDS
            elif now - before < LOOK_SECONDS + LATE_SECONDS:
                patience -= LOOK_SECONDS
        since = max(self._unanswered or asked, answered)
        silent = patience <= 0 or now - since >= SILENCE_SECONDS
        reason = TimeoutError() if silent else _Undecided()
        beat.give_up(reason)
        raise reason
