"""A pool of threads, for runs and for webhook deliveries."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial

from ccm.core.problems import Problems

log = logging.getLogger(__name__)

# The pause after a fault in the pool's own code (seconds), so that a persistent fault does not take a whole core.
FAULT_DELAY = 0.1


class WorkerPool:
    """A bounded number of threads, each started when it is first needed.

    They are daemon threads, unlike those of `concurrent.futures`, which the interpreter joins at exit before our code
    can interrupt their runs: Ctrl-C under `flask run` would wait for every agent to finish.

    Args:
        problems: receives faults of the threads themselves.
        name: the prefix of the threads' names.
    """

    def __init__(self, workers: int, problems: Problems, name: str = "run") -> None:
        self._workers = workers
        self._problems = problems
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0

    def submit(self, work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """Call `work` in an idle thread, in a new one, or in the next that becomes idle.

        Only one thread may submit.

        Args:
            failed: called with the exception if `work` raises.

        Raises:
            RuntimeError: a new thread is needed and cannot be started. `work` is not called, now or later.
        """
        if not self._idle.acquire(blocking=False) and self._started < self._workers:
            name = f"{self._name}-{self._started}"
            # Start the thread before queueing the job: a refused job must not run when a thread becomes idle later.
            threading.Thread(target=self._loop, args=(name,), name=name, daemon=True).start()
            self._started += 1
        self._jobs.put(partial(self._run, work, failed))

    def _loop(self, name: str) -> None:
        """Run jobs forever: a thread that ended would reduce the size of the pool."""
        failures = 0
        while True:
            try:
                self._jobs.get()()
                failures = 0
                self._problems.clear(name)
            except BaseException as error:
                failures += 1
                if failures == 1:
                    log.critical(
                        "worker thread %s failed and continues",
                        name,
                        exc_info=error,
                        extra={"event": "worker_thread_failed", "worker": name},
                    )
                else:
                    self._problems.report(name, "a worker thread fails repeatedly", error)
                time.sleep(FAULT_DELAY)

    def _run(self, work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed(error)
        finally:
            self._idle.release()
