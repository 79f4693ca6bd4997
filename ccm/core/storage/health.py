"""A health check that finds out whether the database accepts writes, by writing to it."""

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

# A commit younger than this proves that storage works (seconds).
FRESH_INTERVAL = 1.0
# How long the writer may get no answer from the database while the interpreter is free (seconds).
BEAT_TIMEOUT = 2.0
# How long one check may take (seconds). /health answers within 5.
LONGEST_TIMEOUT = 4.0
# A check waits for its heartbeat in short steps (seconds). A step that ends late shows that the interpreter is busy.
POLL_INTERVAL = 0.05
LATE_DELAY = 0.05
# A busy interpreter no longer explains the lack of an answer after this time (seconds).
SILENCE_TIMEOUT = 20.0
SILENCE = "the database does not answer"


class _Undecided(Exception):
    """The interpreter is too busy to tell, or the writer reports the error itself."""


class StorageHealth:
    """The health of storage, also while the service is idle.

    An idle service notices a fault of the database only when it writes. So a check writes a heartbeat row, but at most
    one per FRESH_INTERVAL; in between it answers from memory.

    Hundreds of streams can keep the interpreter so busy that a heartbeat is late although the database answers at once.
    So time counts against the database only while this thread gets the interpreter on time and no statement of the
    writer is answered.

    Args:
        database: the writer's.
    """

    def __init__(self, writer: Writer, database: Database) -> None:
        self._writer = writer
        self._database = database
        self._lock = threading.Lock()
        self._beat: WriteTask[None] | None = None
        # When the first heartbeat without an answer was submitted; None if the last one was answered.
        self._unanswered: float | None = None

    def last_error(self) -> str | None:
        """Return why storage accepts no writes, without secrets or paths, within LONGEST_TIMEOUT.

        None means that writing works, or that the interpreter is too busy to tell.
        """
        writer = self._writer
        started = time.monotonic()
        if writer.last_error is not None:
            return writer.last_error  # the writer retries, and notices recovery by itself
        if started - writer.last_commit < FRESH_INTERVAL:
            return None
        try:
            self._await(self._submit_heartbeat(started), started)
        except _Undecided:
            return writer.last_error
        except TimeoutError:
            silent = writer.last_commit < started  # otherwise something was committed meanwhile
            return writer.last_error or (SILENCE if silent else None)
        except Exception as error:
            log.warning("the heartbeat failed: %s", error, extra={"event": "heartbeat_failed"})
            return writer.last_error or "the database refuses writes"
        return writer.last_error

    def _submit_heartbeat(self, now: float) -> WriteTask[None]:
        """Submit a heartbeat, or return the one in progress: concurrent checks share it."""
        with self._lock:
            if self._beat is None or self._beat.future.done():
                self._beat = self._writer.submit(heartbeat.beat)
            if self._unanswered is None:
                self._unanswered = now
            return self._beat

    def _await(self, beat: WriteTask[None], started: float) -> None:
        """Wait until a heartbeat is stored or the writer reports an error, for LONGEST_TIMEOUT at most.

        A heartbeat that is not stored by then is given up, because a service that stops would wait for it. All checks
        that share it get the same result.

        Raises:
            TimeoutError: the database does not answer.
            _Undecided: the writer reports an error, or the interpreter is too busy to tell.
        """
        remaining = BEAT_TIMEOUT
        now = started
        answered = self._database.last_answer
        # After an error the writer retries, and the database answers each attempt with a refusal: that is no progress.
        while self._writer.last_error is None and remaining > 0 and now - started < LONGEST_TIMEOUT:
            if wait([beat.future], POLL_INTERVAL).done:
                beat.future.result()
                self._unanswered = None
                return
            before, now = now, time.monotonic()
            if self._database.last_answer != answered:
                answered, remaining = self._database.last_answer, BEAT_TIMEOUT
            elif now - before < POLL_INTERVAL + LATE_DELAY:
                remaining -= POLL_INTERVAL
        since = max(self._unanswered or started, answered)
        silent = remaining <= 0 or now - since >= SILENCE_TIMEOUT
        reason = TimeoutError() if silent else _Undecided()
        beat.give_up(reason)
        raise reason
