"""Faults that no part of the service could handle: logged once, and shown in /health until they are over."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)


class Problems:
    """The faults that persist, each under a key of the part that reports it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sentences: dict[str, str] = {}

    def report(self, key: str, sentence: str, error: BaseException | None = None) -> None:
        """Remember a fault, and log it unless it is known already: a loop that fails would flood the log.

        Args:
            sentence: says what does not work, without a path, a host or SQL, because /health shows it.
            error: is logged with its traceback.
        """
        with self._lock:
            known = key in self._sentences
            self._sentences[key] = sentence
        if not known:
            log.critical("%s (%s)", sentence, key, exc_info=error, extra={"event": "problem_reported", "problem": key})

    def clear(self, key: str) -> None:
        """Forget a fault that is over, if it was reported."""
        if self._sentences:  # read without the lock, because healthy parts call this all the time
            with self._lock:
                over = self._sentences.pop(key, None)
            if over is not None:
                log.warning("over: %s (%s)", over, key, extra={"event": "problem_cleared", "problem": key})

    def sentences(self) -> list[str]:
        """Return the faults that persist, the oldest first, each sentence once."""
        with self._lock:
            return list(dict.fromkeys(self._sentences.values()))
