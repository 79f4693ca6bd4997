"""Limits concurrent deliveries so that slow hosts cannot occupy every thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set

# Attempts at once, and of these at most to one host, and to one that has given no answer the last time.
THREADS = 16
PER_HOST = 4
PER_SILENT_HOST = 1
# Threads that are not for hosts that gave no answer the last time, however many of these there are.
KEPT = 4


class ConcurrencyLimits:
    """
    Args:
        under_way: the host of each attempt that is under way.
        silent: hosts that gave no answer the last time.
    """

    def __init__(self, under_way: Iterable[str], silent: Set[str]) -> None:
        self._busy = Counter(under_way)
        self._silent = silent

    def begin(self, host: str) -> None:
        """One more is under way."""
        self._busy[host] += 1

    def has(self, host: str) -> bool:
        """Whether one more may be sent to a host now."""
        if host not in self._silent:
            return self.has_any() and self._busy[host] < PER_HOST
        return self._has_for_silent() and self._busy[host] < PER_SILENT_HOST

    def has_any(self) -> bool:
        return self._busy.total() < THREADS

    def full(self) -> Set[str]:
        """Hosts that have their share. Those that gave no answer share one, too."""
        full = {host for host in self._busy if not self.has(host)}
        return full if self._has_for_silent() else full | self._silent

    def _has_for_silent(self) -> bool:
        of_silent = sum(count for host, count in self._busy.items() if host in self._silent)
        return self.has_any() and of_silent < THREADS - KEPT
