"""Keeps Claude Code ready for the next runs: spares for fresh runs, and warm continuations of sessions.

A start of Claude Code takes half a second of a core, which a client otherwise waits for. What is kept ready follows
from the requests: the options of the last fresh runs, and the sessions whose runs ended last. A run that cannot use
what is ready, or is refused by it, starts its own Claude Code; only the time tells the difference.

A prestarted Claude Code has the ids of a run to come. A request takes the ids (`reserve`), and the run that is
accepted with them takes the process (`take`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ccm.core.claude.machine import ProcessorTime, available_memory
from ccm.core.claude.prestart_key import Ids, Key, new_ids, spare_key, warm_key
from ccm.core.claude.reaper import Reaper
from ccm.core.claude.run_context import CLIConfig
from ccm.core.claude.run_directory import read_stderr
from ccm.core.claude.start_state import denies_tools
from ccm.core.run_log import RunLog
from ccm.models import Run, RunMode

if TYPE_CHECKING:
    from ccm.core.claude.prestarted import Prestarted

log = logging.getLogger(__name__)

# How long Claude Code is kept ready after the last request that it could serve (seconds).
IDLE_TIMEOUT = 600.0
# How often the ready ones are checked (seconds).
CHECK_INTERVAL = 2.0
# Claude Code is started when no run was started for this time and a core is idle, or at the latest after the patience,
# because other programs may keep the cores busy for ever (seconds).
QUIET_TIME = 1.0
PATIENCE = 5.0
QUIET_INTERVAL = 0.25
IDLE_CORES = 0.8
# Nothing is kept ready while less memory is available (bytes).
MIN_MEMORY = 512 * 2**20
# How long an unused Claude Code may take to end (seconds).
END_TIMEOUT = 2.0
# After so many spares in a row that ended by themselves or could not be started, no more are started.
MAX_FAILURES = 3
# How long fresh runs in a directory whose settings refuse spares start without one (seconds), and for how many.
REFUSED_TIME = 600.0
# What Claude Code's refusals have in common that the directory's settings cause.
REFUSAL = "not_claimable"
MAX_REFUSED = 1_000


class Prestarts:
    """The Claude Codes that wait for a run. Thread-safe.

    Args:
        reaper: ends them if the service is killed.
        spares: how many fresh runs are prepared for.
        warm: how many sessions are prepared for; those whose runs ended last.
        state: returns the state of what Claude Code reads at its start. None if it is unknown; then nothing is started
            in advance.
        memory: returns the available memory (bytes).

    Attributes:
        outcomes: how many requests were served by what, and why others were not.
    """

    def __init__(
        self,
        cli_config: CLIConfig,
        reaper: Reaper,
        *,
        spares: int,
        warm: int,
        state: Callable[[Key], Hashable],
        memory: Callable[[], int | None] = available_memory,
    ) -> None:
        self._cli_config = cli_config
        self._reaper = reaper
        self._spares = spares
        self._warm = warm
        self._state = state
        self._memory = memory
        self._processors = ProcessorTime()
        self._lock = threading.Lock()
        # Held during a start.
        self._starting = threading.Lock()
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._keep_ready, name="prestarts", daemon=True)
        self._ready: list[Prestarted] = []
        self._reserved: dict[str, Prestarted] = {}
        # To be ended.
        self._unwanted: list[Prestarted] = []
        # What shall be ready: the key of the spares, and those of sessions, each with the time of its last use.
        self._spare: tuple[Key, float] | None = None
        self._sessions: OrderedDict[str, tuple[Key, float]] = OrderedDict()
        # The key of the last fresh run: two runs in a row change the spares' key.
        self._last_key: Key | None = None
        self._refused: OrderedDict[str, float] = OrderedDict()
        self._failures = 0
        self._last_start = 0.0
        self.outcomes: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to keep Claude Code ready, at first for a run without options."""
        if self._spares:
            key = spare_key({}, self._cli_config, approvals=False)
            self._spare = None if key is None else (key, time.monotonic())
        if self._spares or self._warm:
            self._thread.start()

    def close(self) -> None:
        """End what waits, and keep nothing ready any more. Idempotent."""
        self._closed.set()
        if self._starting.acquire(timeout=END_TIMEOUT):  # one that is just being started is ended too
            self._starting.release()
        with self._lock:
            self._unwanted += (*self._ready, *self._reserved.values())
            self._ready.clear()
            self._reserved.clear()
        self._end_unwanted()

    def stop(self) -> None:
        """End the thread, once the runs have ended: with it the kernel ends what it has started. Idempotent."""
        self._stopping = True
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(2 * END_TIMEOUT)

    # ---- for the threads of requests

    def reserve_spare(self, options: Mapping[str, Any], cwd: str, *, approvals: bool) -> Ids | None:
        """Return the ids of a spare for a fresh run; None if the run has to start its own Claude Code."""
        if not self._spares:
            return None
        key = spare_key(options, self._cli_config, approvals=approvals)
        denies = denies_tools(cwd, self._cli_config.environ)
        with self._lock:
            refused = time.monotonic() - self._refused.get(cwd, -REFUSED_TIME) < REFUSED_TIME
            if key is None or refused or denies:
                self._note_miss("spare", "its options, or the settings of its directory, need a start")
                return None
            if self._spare is None or key in (self._spare[0], self._last_key):
                self._spare = (key, time.monotonic())
            self._last_key = key
            return self._reserve(key, "spare")

    def reserve_warm(
        self, parent: Run, mode: RunMode, options: Mapping[str, Any], cwd: str, *, approvals: bool
    ) -> Ids | None:
        """Return the ids of a warm continuation of a run, for a resume or a fork; None if there is none."""
        if not self._warm:
            return None
        key = warm_key(options, self._cli_config, approvals=approvals, resume=parent.sdk_session_id, cwd=cwd)
        with self._lock:
            if key is None:
                self._note_miss("warm", "its options need a start")
                return None
            ids = self._reserve(key, "warm")
            if ids is not None and mode == RunMode.RESUME:
                self._sessions.pop(parent.session_id, None)  # until this run has ended
            return ids

    def _reserve(self, key: Key, kind: str) -> Ids | None:
        self._last_start = time.monotonic()
        self._changed.set()
        found = next((prestarted for prestarted in self._ready if prestarted.key == key), None)
        if found is None:
            self._note_miss(kind, "none with its options is ready")
            return None
        self._failures = 0
        self._ready.remove(found)
        self._reserved[found.ids.run_id] = found
        return found.ids

    def _note_miss(self, kind: str, reason: str) -> None:
        """Note why a run starts its own Claude Code. The caller holds the lock."""
        self.outcomes[f"{kind}: {reason}"] += 1
        log.debug("a run starts its own Claude Code (no %s one): %s", kind, reason, extra={"event": "prestart_missed"})

    def release(self, run_id: str) -> None:
        """End the reserved Claude Code of a run that does not start now, if there is one."""
        with self._lock:
            found = self._reserved.pop(run_id, None)
            if found is not None:
                self._unwanted.append(found)
                self._changed.set()

    # ---- for the threads of runs

    def take(self, run: Run, parent: Run | None) -> Prestarted | None:
        """Return the Claude Code that is reserved for a run which starts now; None if the run has to start its own.

        The reaper watches the run already.
        """
        with self._lock:
            self._last_start = time.monotonic()
            found = self._reserved.pop(run.id, None)
        if found is None:
            return None
        why = None
        if found.process.returncode is not None:
            why = "it has ended"
        elif found.key.resume != (None if parent is None else parent.sdk_session_id):
            why = "the session has another head"
        elif not self._is_current(found):
            why = "what it has read has changed"
        if why is None:
            self._reaper.release(run.id)  # the run's own watch remains
            return replace(found, settled=partial(self._settle, run, found))
        self._note_outcome(run, found, why)
        with self._lock:
            self._unwanted.append(found)
            self._changed.set()
        return None

    def _is_current(self, prestarted: Prestarted) -> bool:
        try:
            return self._state(prestarted.key) == prestarted.state
        except Exception:
            log.exception("cannot tell the state of what Claude Code reads", extra={"event": "start_state_failed"})
            return False  # a fault in this must not cost the run

    def _settle(self, run: Run, prestarted: Prestarted, failure: str | None) -> None:
        """Note whether a Claude Code that was taken serves its run."""
        with self._lock:
            if failure is None:
                self._failures = 0
            elif REFUSAL in failure:
                self._refused[run.cwd] = time.monotonic()
                while len(self._refused) > MAX_REFUSED:
                    self._refused.popitem(last=False)
        self._note_outcome(run, prestarted, failure)

    def _note_outcome(self, run: Run, prestarted: Prestarted, failure: str | None) -> None:
        kind = "spare" if prestarted.key.resume is None else "warm"
        with self._lock:
            self.outcomes[f"{kind}: {'used' if failure is None else 'not usable'}"] += 1
        run_log = RunLog(log, run.id)
        if failure is None:
            waited = time.monotonic() - prestarted.started_at
            run_log.info("uses a Claude Code (%s) that waited for %.0f s", kind, waited, event="prestarted_used")
        else:
            run_log.info("starts its own Claude Code, not the %s one: %s", kind, failure, event="prestarted_refused")

    def ended(self, run: Run) -> None:
        """Prepare the continuation of a run whose end is stored."""
        if self._warm:
            key = warm_key(
                run.options.value, self._cli_config, approvals=run.approvals, resume=run.sdk_session_id, cwd=run.cwd
            )
            with self._lock:
                self._sessions.pop(run.session_id, None)
                if key is not None:
                    self._sessions[run.session_id] = (key, time.monotonic())
                while len(self._sessions) > self._warm:
                    self._sessions.popitem(last=False)
            self._changed.set()

    # ---- in the own thread, with which the kernel ends what it has started

    def _keep_ready(self) -> None:
        lacking_since: float | None = None
        while not self._stopping:
            pause = CHECK_INTERVAL
            try:
                lacking = self._reconcile()
                lacking_since = None if lacking is None else lacking_since or time.monotonic()
                if lacking is not None and lacking_since is not None:
                    pause = QUIET_INTERVAL
                    if self._is_quiet(lacking_since):
                        self._start(lacking)
            except Exception:
                log.exception("cannot keep Claude Code ready", extra={"event": "prestarts_failed"})
                pause = CHECK_INTERVAL
            self._changed.wait(pause)
            self._changed.clear()

    def _reconcile(self) -> Key | None:
        """End what has ended or is not wanted any more. Return the key of the next one to start, if one is lacking."""
        memory = self._memory()
        is_short = memory is not None and memory < MIN_MEMORY
        now = time.monotonic()
        failed: list[Prestarted] = []
        with self._lock:
            if self._spare is not None and now - self._spare[1] > IDLE_TIMEOUT:
                self._spare = None
            for session, (_, used) in list(self._sessions.items()):
                if now - used > IDLE_TIMEOUT:
                    del self._sessions[session]
            wanted = [] if self._spare is None else [self._spare[0]] * self._spares
            wanted += [key for key, _ in reversed(self._sessions.values())]
            if is_short or self._closed.is_set():
                wanted = []
            for prestarted in list(self._ready):
                code = prestarted.process.returncode
                if code is None and prestarted.key in wanted:
                    wanted.remove(prestarted.key)
                    continue
                if code is not None:
                    failed.append(prestarted)
                self._ready.remove(prestarted)
                self._unwanted.append(prestarted)
        for prestarted in failed:
            stderr = read_stderr(prestarted.directory)
            self._note_failure(prestarted.key, f"exit code {prestarted.process.returncode} {stderr}".rstrip())
        self._end_unwanted()
        if self._failures >= MAX_FAILURES:
            wanted = [key for key in wanted if key.resume is not None]
        return wanted[0] if wanted else None

    def _note_failure(self, key: Key, reason: str) -> None:
        """Note that one has ended by itself or cannot be started."""
        if key.resume is not None:
            self._forget(key)
            log.info("a Claude Code that waited for a session has ended: %s", reason, extra={"event": "warm_failed"})
            return
        self._failures += 1
        log.info("a spare Claude Code has ended: %s", reason, extra={"event": "spare_failed"})
        if self._failures == MAX_FAILURES:
            log.warning(
                "%d spare Claude Codes in a row have ended (%s); no more are started until the service is restarted. "
                "CCM_SPARE_RUNS=0 says the same without the attempts",
                MAX_FAILURES,
                reason,
                extra={"event": "spares_off"},
            )

    def _forget(self, key: Key) -> None:
        """Keep nothing ready for a key until a request or the end of a run wants it again."""
        with self._lock:
            if self._spare is not None and self._spare[0] == key:
                self._spare = None
            for session in [session for session, (wanted, _) in self._sessions.items() if wanted == key]:
                del self._sessions[session]

    def _is_quiet(self, lacking_since: float) -> bool:
        idle, now = self._processors.idle_cores(), time.monotonic()
        settled = now - self._last_start > QUIET_TIME
        return settled and (idle is None or idle >= IDLE_CORES or now - max(lacking_since, self._last_start) > PATIENCE)

    def _start(self, key: Key) -> None:
        # Imported here because the SDK takes longer to import than the rest of the service's start.
        from ccm.core.claude.prestarted import prestart  # noqa: PLC0415

        state = self._state(key)
        if state is None:
            self._forget(key)
            return
        ids = new_ids()
        with self._starting:
            if self._closed.is_set():
                return
            self._reaper.watch(ids.run_id)
            try:
                prestarted = prestart(ids, key, self._cli_config, state)
            except Exception as error:
                self._reaper.release(ids.run_id)
                # Perhaps there is no memory or descriptor left: the next request tries again.
                self._forget(key)
                log.warning("cannot start a Claude Code in advance: %s", error, extra={"event": "prestart_failed"})
                return
            with self._lock:
                self._ready.append(prestarted)
        kind = "spare" if key.resume is None else "warm"
        log.debug("a Claude Code (%s) was started in advance", kind, extra={"event": "prestarted", "kind": kind})
        if self._closed.is_set():
            self.close()  # which has not waited for it

    def _end_unwanted(self) -> None:
        with self._lock:
            unwanted, self._unwanted = self._unwanted, []
        for prestarted in unwanted:
            prestarted.process.close_pipes()  # of all first, because together they take no longer to end than one
        deadline = time.monotonic() + END_TIMEOUT
        for prestarted in unwanted:
            with suppress(OSError):  # a reaper that has ended cannot be replaced, and none of the others may stay
                prestarted.end(max(0.0, deadline - time.monotonic()))
                self._reaper.release(prestarted.ids.run_id)
