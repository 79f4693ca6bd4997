"""Which Claude Codes shall be ready for the next runs, as the requests so far suggest."""

from __future__ import annotations

import time
from collections import OrderedDict

from ccm.core.claude.prestart_key import Key

# How long one is kept ready after the last request that it could serve (seconds).
IDLE_TIMEOUT = 600.0
# After so many spares in a row that ended by themselves, no more are wanted.
MAX_FAILURES = 3
# How long fresh runs in a directory whose settings refuse spares start without one (seconds), and for how many.
REFUSED_TIME = 600.0
MAX_REFUSED = 1_000


class PrestartDemand:
    """What shall be ready: spares like the last fresh runs, and a continuation of each session whose run ended last.

    Not thread-safe.

    Args:
        spares: how many fresh runs are prepared for.
        warm: how many sessions are prepared for.
        first: the key of the spares before there was any run; None for no spares until then.
    """

    def __init__(self, spares: int, warm: int, first: Key | None) -> None:
        self._spares = spares
        self._warm = warm
        # The key of the spares, and those of sessions, each with the time of its last use.
        self._spare = None if first is None else (first, time.monotonic())
        self._sessions: OrderedDict[str, tuple[Key, float]] = OrderedDict()
        # The key of the last fresh run: two runs in a row change the spares' key.
        self._last_key: Key | None = None
        # When directories refused a spare, the oldest first.
        self._refused: OrderedDict[str, float] = OrderedDict()
        self._failures = 0

    def note_fresh(self, key: Key) -> None:
        """Note a fresh run that a spare with this key can serve."""
        if self._spare is None or key in (self._spare[0], self._last_key):
            self._spare = (key, time.monotonic())
        self._last_key = key

    def note_ended(self, session_id: str, key: Key | None) -> None:
        """Note the end of a session's run, and the key of its continuation; None if it cannot be prepared."""
        self.drop(session_id)
        if key is not None:
            self._sessions[session_id] = (key, time.monotonic())
        while len(self._sessions) > self._warm:
            self._sessions.popitem(last=False)

    def drop(self, session_id: str) -> None:
        """Prepare for no continuation of a session until its next run has ended."""
        self._sessions.pop(session_id, None)

    def forget(self, key: Key) -> None:
        """Keep nothing ready for a key until a request or the end of a run wants it again."""
        if self._spare is not None and self._spare[0] == key:
            self._spare = None
        for session_id in [session_id for session_id, (wanted, _) in self._sessions.items() if wanted == key]:
            del self._sessions[session_id]

    def note_refusal(self, cwd: str) -> None:
        """Note that the settings of a directory refuse spares."""
        self._refused.pop(cwd, None)
        self._refused[cwd] = time.monotonic()
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def is_refused(self, cwd: str) -> bool:
        """Return whether a directory has refused a spare not long ago."""
        return time.monotonic() - self._refused.get(cwd, -REFUSED_TIME) < REFUSED_TIME

    def note_success(self) -> None:
        """Note that one has served its run."""
        self._failures = 0

    def note_spare_ended(self) -> bool:
        """Note that a spare has ended by itself. Return whether that was one too many."""
        self._failures += 1
        return self._failures == MAX_FAILURES

    def wanted(self) -> list[Key]:
        """Return the keys of all that shall be ready, the most urgent first."""
        now = time.monotonic()
        if self._spare is not None and now - self._spare[1] > IDLE_TIMEOUT:
            self._spare = None
        for session_id, (_, used) in list(self._sessions.items()):
            if now - used > IDLE_TIMEOUT:
                del self._sessions[session_id]
        spares = [] if self._spare is None or self._failures >= MAX_FAILURES else [self._spare[0]] * self._spares
        return spares + [key for key, _ in reversed(self._sessions.values())]
