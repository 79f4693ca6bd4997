"""Whether storage takes writes, found out by writing."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import wait

from ccm.core.storage.write_task import WriteTask
from ccm.core.storage.writer import Writer
from ccm.db import heartbeat
from ccm.db.driver.database import Database

log = logging.getLogger(__name__)

# A commit that is as old as that still proves that all is well (seconds).
FRESH_INTERVAL = 1.0
# How long the writer may go without an answer of the database while this interpreter is free (seconds).
BEAT_TIMEOUT = 2.0
# How long one asks at the most (seconds): /health answers within 5.
LONGEST_TIMEOUT = 4.0
# The wait for a heartbeat is made of short ones. One that ends late shows that the interpreter is busy.
POLL_INTERVAL = 0.05
LATE_DELAY = 0.05
# After so long without an answer a busy interpreter is no explanation any more (seconds).
SILENCE_TIMEOUT = 20.0
SILENCE = "the database does not answer"


class _Undecided(Exception):
    """The interpreter is too busy to tell, or the writer tells of trouble by itself."""


class StorageHealth:
    """An idle service notices a fault of storage only if something is written.

    So a small row is, while somebody asks, once in FRESH_INTERVAL at the most; in between it answers from memory.

    Hundreds of streams can keep the interpreter so busy that a heartbeat is late though the database answers at once.
    So time counts against the database only while this thread gets the interpreter when it wants it, and while no
    statement of the writer is answered.

    Args:
        database: the writer's.
    """

    def __init__(self, writer: Writer, database: Database) -> None:
        self._writer = writer
        self._database = database
        self._lock = threading.Lock()
        self._beat: WriteTask[None] | None = None
        # When the first heartbeat was asked for that has not been answered; None if the last one was.
        self._unanswered: float | None = None

    def last_error(self) -> str | None:
        """Why storage takes no writes, in words that anybody may read; None if it does. Takes LONGEST_TIMEOUT at most.

        None also if the interpreter is too busy to tell.
        """
        writer = self._writer
        asked = time.monotonic()
        if writer.last_error is not None:
            return writer.last_error  # the writer is trying on by itself
        if asked - writer.last_commit < FRESH_INTERVAL:
            return None
        try:
            self._wait(self._beating(asked), asked)
        except _Undecided:
            return writer.last_error
        except TimeoutError:
            silent = writer.last_commit < asked  # or else something was stored meanwhile
            return writer.last_error or (SILENCE if silent else None)
        except Exception as error:
            log.warning("the heartbeat failed: %s", error)
            return writer.last_error or "the database refuses to be written"
        return writer.last_error

    def _beating(self, now: float) -> WriteTask[None]:
        """The heartbeat under way, shared by all who ask."""
        with self._lock:
            if self._beat is None or self._beat.future.done():
                self._beat = self._writer.submit(heartbeat.beat)
            if self._unanswered is None:
                self._unanswered = now
            return self._beat

    def _wait(self, beat: WriteTask[None], asked: float) -> None:
        """Wait until a heartbeat is stored or the writer tells of trouble, LONGEST_TIMEOUT at the most.

        If it is not stored by then, it is given up, because a service that stops would wait for it. All who share it
        are told the same.

        Raises:
            TimeoutError: the database does not answer.
            _Undecided: there is trouble of the writer's, or it cannot be told.
        """
        patience = BEAT_TIMEOUT
        now = asked
        answered = self._database.last_answer
        # While there is trouble the writer tries on, and each try is answered by a refusal.
        while self._writer.last_error is None and patience > 0 and now - asked < LONGEST_TIMEOUT:
            if wait([beat.future], POLL_INTERVAL).done:
                beat.future.result()
                self._unanswered = None
                return
            before, now = now, time.monotonic()
            if self._database.last_answer != answered:
                answered, patience = self._database.last_answer, BEAT_TIMEOUT
            elif now - before < POLL_INTERVAL + LATE_DELAY:
                patience -= POLL_INTERVAL
        since = max(self._unanswered or asked, answered)
        silent = patience <= 0 or now - since >= SILENCE_TIMEOUT
        reason = TimeoutError() if silent else _Undecided()
        beat.give_up(reason)
        raise reason
