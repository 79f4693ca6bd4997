"""The threads that runs are carried out in, and webhooks are sent from."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ccm.core.problems import Problems


class WorkerPool:
    """A bounded number of threads, each started when it is first needed.

    They are daemons, unlike those of `concurrent.futures`: the interpreter joins those when it exits, before anything
    of ours could interrupt their runs, and Ctrl-C under `flask run` would wait for every agent to finish.

    Args:
        problems: told of a job that raises.
        name: what the names of the threads begin with.
    """

    def __init__(self, workers: int, problems: Problems, name: str = "run") -> None:
        self._workers = workers
        self._problems = problems
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` in an idle thread, in a new one, or in the next that becomes idle. Called by one thread only.

        Raises:
            RuntimeError: a thread is needed and the system gives none; the job is not run, now or later.
        """
        if not self._idle.acquire(blocking=False) and self._started < self._workers:
            # Before the job is queued: a job that its owner believes refused must not run when a thread is free again.
            threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
            self._started += 1
        self._jobs.put(job)

    def _work(self) -> None:
        key = threading.current_thread().name
        while True:
            job = self._jobs.get()
            try:
                job()
                self._problems.clear(key)
            except BaseException as error:
                # Jobs handle their own faults. A thread that ended here would take its share of the pool with it.
                self._problems.report(key, "a job of a worker thread failed", error)
            self._idle.release()
