"""The threads that runs are carried out in, and webhooks are sent from."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from ccm.core.problems import Problems

log = logging.getLogger(__name__)

# The pause after a fault of a thread's own (seconds): one that persists must not take all of a processor.
FAULT_DELAY = 0.1


class Job(NamedTuple):
    """What a thread is to do, and what it is to do if that raises."""

    work: Callable[[], None]
    failed: Callable[[BaseException], None]


class WorkerPool:
    """A bounded number of threads, each started when it is first needed.

    They are daemons, unlike those of `concurrent.futures`: the interpreter joins those when it exits, before anything
    of ours could interrupt their runs, and Ctrl-C under `flask run` would wait for every agent to finish.

    Args:
        problems: told of faults of the threads' own.
        name: what the names of the threads begin with.
    """

    def __init__(self, workers: int, problems: Problems, name: str = "run") -> None:
        self._workers = workers
        self._problems = problems
        self._name = name
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0

    def submit(self, work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """Do `work` in an idle thread, in a new one, or in the next that becomes idle. Called by one thread only.

        Args:
            failed: called instead of what is left of the work, should it raise.

        Raises:
            RuntimeError: a thread is needed and the system gives none; the work is not done, now or later.
        """
        if not self._idle.acquire(blocking=False) and self._started < self._workers:
            name = f"{self._name}-{self._started}"
            # Before the job is queued: a job that its owner believes refused must not run when a thread is free again.
            threading.Thread(target=self._live, args=(name,), name=name, daemon=True).start()
            self._started += 1
        self._jobs.put(Job(work, failed))

    def _live(self, name: str) -> None:
        """The life of a thread: it never ends, for its share of the pool would be lost."""
        failures = 0
        while True:
            try:
                self._next()
                failures = 0
                self._problems.clear(name)
            except BaseException as error:
                failures += 1
                if failures == 1:
                    log.critical("a worker thread has failed, and goes on", exc_info=error)
                else:
                    self._problems.report(name, "a worker thread fails", error)
                time.sleep(FAULT_DELAY)

    def _next(self) -> None:
        job = self._jobs.get()
        try:
            job.work()
        except BaseException as error:
            job.failed(error)
        finally:
            self._idle.release()
