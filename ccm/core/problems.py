"""Faults that no part of the service could handle: logged once, shown in /health until they are over."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)


class Problems:
    """The faults that persist, each under a key of the part that reports it. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sentences: dict[str, str] = {}

    def report(self, key: str, sentence: str, error: BaseException | None = None) -> None:
        """Remember a fault, and log it unless it is known: a loop that fails would flood the log.

        Args:
            sentence: says what does not work, to anybody: no path, no host, no SQL.
            error: goes into the log with its traceback.
        """
        with self._lock:
            known = key in self._sentences
            self._sentences[key] = sentence
        if not known:
            log.critical("%s (%s)", sentence, key, exc_info=error)

    def clear(self, key: str) -> None:
        """Forget a fault that is over, if it was reported."""
        if self._sentences:  # read without the lock: the parts that work well ask all the time
            with self._lock:
                over = self._sentences.pop(key, None)
            if over is not None:
                log.warning("over: %s (%s)", over, key)

    def sentences(self) -> list[str]:
        """The faults that persist, the oldest first, each sentence once."""
        with self._lock:
            return list(dict.fromkeys(self._sentences.values()))
