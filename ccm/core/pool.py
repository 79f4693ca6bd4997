"""The threads that runs are made in, and webhooks are sent from."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class WorkerPool:
    """So many threads at the most, each started when it is first needed.

    They are daemons, unlike those of `concurrent.futures`: the interpreter joins those when it exits, before anything
    of ours could interrupt their runs, and Ctrl-C under `flask run` would wait for every agent to finish.

    Args:
        name: what the names of the threads begin with.
    """

    def __init__(self, workers: int, name: str = "run") -> None:
        self._workers = workers
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Have `job` done by a thread that is free, or the next one to be. Called by one thread only.

        Args:
            job: must not raise.
        """
        self._jobs.put(job)
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._workers:
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            job()
            self._idle.release()
