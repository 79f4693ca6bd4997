"""Limits concurrent deliveries so that slow hosts cannot occupy every thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set

# Concurrent attempts: in all, to one host, and to one silent host. A host is silent if it did not answer the last time.
THREADS = 16
PER_HOST = 4
PER_SILENT_HOST = 1
# Threads that silent hosts cannot occupy, however many of them there are.
RESERVED_THREADS = 4


class ConcurrencyLimits:
    """The limits at one moment.

    Args:
        in_flight: the host of each current attempt.
        silent: the hosts that did not answer the last time.
    """

    def __init__(self, in_flight: Iterable[str], silent: Set[str]) -> None:
        self._attempts = Counter(in_flight)
        self._silent = silent

    def add(self, host: str) -> None:
        """Count a new attempt."""
        self._attempts[host] += 1

    def allow(self, host: str) -> bool:
        """Return whether another attempt to a host may begin."""
        if host not in self._silent:
            return self.allow_any() and self._attempts[host] < PER_HOST
        return self._allow_silent() and self._attempts[host] < PER_SILENT_HOST

    def allow_any(self) -> bool:
        """Return whether a thread is free."""
        return self._attempts.total() < THREADS

    def full_hosts(self) -> Set[str]:
        """Return the hosts that have reached a limit; all silent hosts once they have reached their common limit."""
        full = {host for host in self._attempts if not self.allow(host)}
        return full if self._allow_silent() else full | self._silent

    def _allow_silent(self) -> bool:
        to_silent = sum(count for host, count in self._attempts.items() if host in self._silent)
        return self.allow_any() and to_silent < THREADS - RESERVED_THREADS
