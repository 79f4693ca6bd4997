"""Keeps Claude Code ready for the next runs: spares for fresh runs, and warm continuations of sessions.

A start of Claude Code takes half a second of a core, which a client otherwise waits for. What is kept ready follows
from the requests (prestart_demand.py). A run that cannot use what is ready, or is refused by it, starts its own Claude
Code; only the time tells the difference.

A prestarted Claude Code has the ids of a run to come. A request takes the ids (`reserve`), and the run that is
accepted with them takes the process (`take`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ccm.core.claude.machine import ProcessorTime, available_memory
from ccm.core.claude.prestart_key import Ids, Key, new_ids, spare_key, start_state_of, warm_key
from ccm.core.claude.reaper import Reaper
from ccm.core.claude.run_context import CLIConfig
from ccm.core.claude.run_directory import read_stderr
from ccm.core.run_log import RunLog
from ccm.core.runs.prestart_demand import MAX_FAILURES, PrestartDemand
from ccm.models import Run, RunMode

if TYPE_CHECKING:
    from ccm.core.claude.prestarted import Prestarted

log = logging.getLogger(__name__)

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
# What those of Claude Code's refusals have in common that the directory's settings cause.
REFUSAL = "not_claimable"


class Prestarts:
    """The Claude Codes that wait for a run. Thread-safe.

    Args:
        reaper: ends them if the service is killed.
        spares: how many fresh runs are prepared for.
        warm: how many sessions are prepared for; those whose runs ended last.
        state: returns the state of what a Claude Code with this key reads at its start. None if it is unknown; then
            nothing is started in advance.
        memory: returns the available memory (bytes).
    """

    def __init__(
        self,
        cli_config: CLIConfig,
        reaper: Reaper,
        *,
        spares: int,
        warm: int,
        state: Callable[[Key, CLIConfig], Hashable] = start_state_of,
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
        # Held while processes are started or ended.
        self._process_lock = threading.Lock()
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._keep_ready, name="prestarts", daemon=True)
        self._demand = PrestartDemand(spares, warm, spare_key({}, cli_config, approvals=False) if spares else None)
        self._ready: list[Prestarted] = []
        self._reserved: dict[str, Prestarted] = {}
        # To be ended.
        self._unwanted: list[Prestarted] = []
        self._last_start = 0.0

    def start(self) -> None:
        """Begin to keep Claude Code ready, at first for a run without options."""
        if self._spares or self._warm:
            self._thread.start()

    def close(self) -> None:
        """End what waits, and keep nothing ready any more. Idempotent."""
        self._closed.set()
        # One that is just being started or ended has ended too when this returns, unless that takes too long.
        acquired = self._process_lock.acquire(timeout=2 * END_TIMEOUT)
        try:
            with self._lock:
                self._unwanted += (*self._ready, *self._reserved.values())
                self._ready.clear()
                self._reserved.clear()
            self._end_unwanted()
        finally:
            if acquired:
                self._process_lock.release()

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
        key = spare_key(options, self._cli_config, approvals=approvals, cwd=cwd)
        with self._lock:
            if key is None or self._demand.is_refused(cwd):
                _log_miss("spare", "its options, or the settings of its directory, need a start")
                return None
            self._demand.note_fresh(key)
            return self._reserve(key)

    def reserve_warm(
        self, parent: Run, mode: RunMode, options: Mapping[str, Any], cwd: str, *, approvals: bool
    ) -> Ids | None:
        """Return the ids of a warm continuation of a run, for a resume or a fork; None if there is none."""
        if not self._warm:
            return None
        key = warm_key(options, self._cli_config, approvals=approvals, resume=parent.sdk_session_id, cwd=cwd)
        if key is None:
            _log_miss("warm", "its options need a start")
            return None
        with self._lock:
            ids = self._reserve(key)
            if ids is not None and mode == RunMode.RESUME:
                self._demand.drop(parent.session_id)
            return ids

    def _reserve(self, key: Key) -> Ids | None:
        self._last_start = time.monotonic()
        self._changed.set()
        found = next((prestarted for prestarted in self._ready if prestarted.key == key), None)
        if found is None:
            _log_miss(key.kind, "none with its options is ready")
            return None
        self._ready.remove(found)
        self._reserved[found.ids.run_id] = found
        return found.ids

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
        why = self._unusable(found, run, parent)
        if why is None:
            self._reaper.release(run.id)  # the run's own watch remains
            return replace(found, settled=partial(self._settle, run, found))
        _log_refusal(found.key.kind, run, why)
        with self._lock:
            self._unwanted.append(found)
            self._changed.set()
        return None

    def _unusable(self, prestarted: Prestarted, run: Run, parent: Run | None) -> str | None:
        """Return why a Claude Code cannot serve the run that has its ids, or None."""
        if prestarted.process.returncode is not None:
            return "it has ended"
        if prestarted.key.resume != (None if parent is None else parent.sdk_session_id):
            return "the session has another head"
        if run.fork_at_message is not None:
            return "the run continues only a part of the transcript"
        try:
            is_current = self._state(prestarted.key, self._cli_config) == prestarted.state
        except Exception:
            # A fault in this must not cost the run.
            log.exception("cannot tell the state of what Claude Code reads", extra={"event": "start_state_failed"})
            is_current = False
        return None if is_current else "what it has read has changed"

    def _settle(self, run: Run, prestarted: Prestarted, failure: str | None) -> None:
        """Note whether a Claude Code that was taken serves its run."""
        with self._lock:
            if failure is None:
                self._demand.note_success()
            elif REFUSAL in failure:
                self._demand.note_refusal(run.cwd)
        if failure is not None:
            _log_refusal(prestarted.key.kind, run, failure)
            return
        waited = time.monotonic() - prestarted.started_at
        RunLog(log, run.id).info(
            "uses a Claude Code (%s) that waited for %.0f s", prestarted.key.kind, waited, event="prestarted_used"
        )

    def ended(self, run: Run) -> None:
        """Prepare the continuation of a run whose end is stored."""
        if self._warm:
            key = warm_key(
                run.options.value, self._cli_config, approvals=run.approvals, resume=run.sdk_session_id, cwd=run.cwd
            )
            with self._lock:
                self._demand.note_ended(run.session_id, key)
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
        with self._lock:
            for prestarted in [waiting for waiting in self._ready if waiting.process.returncode is not None]:
                self._ready.remove(prestarted)
                self._unwanted.append(prestarted)
                self._note_failure(prestarted)
            wanted = [] if is_short or self._closed.is_set() else self._demand.wanted()
            for prestarted in list(self._ready):
                if prestarted.key in wanted:
                    wanted.remove(prestarted.key)
                else:
                    self._ready.remove(prestarted)
                    self._unwanted.append(prestarted)
        with self._process_lock:
            self._end_unwanted()
        return wanted[0] if wanted else None

    def _note_failure(self, prestarted: Prestarted) -> None:
        """Note that one has ended by itself while it waited. The caller holds the lock."""
        reason = f"exit code {prestarted.process.returncode} {read_stderr(prestarted.directory)}".rstrip()
        kind = prestarted.key.kind
        log.info("a Claude Code (%s) that waited has ended: %s", kind, reason, extra={"event": "prestarted_ended"})
        if prestarted.key.resume is not None:
            self._demand.forget(prestarted.key)
        elif self._demand.note_spare_ended():
            log.warning(
                "%d spare Claude Codes in a row have ended (%s); no more are started until the service is restarted. "
                "CCM_SPARE_RUNS=0 says the same without the attempts",
                MAX_FAILURES,
                reason,
                extra={"event": "spares_off"},
            )

    def _is_quiet(self, lacking_since: float) -> bool:
        idle, now = self._processors.idle_cores(), time.monotonic()
        settled = now - self._last_start > QUIET_TIME
        return settled and (idle is None or idle >= IDLE_CORES or now - max(lacking_since, self._last_start) > PATIENCE)

    def _start(self, key: Key) -> None:
        # Imported here because the SDK takes longer to import than the rest of the service's start.
        from ccm.core.claude.prestarted import prestart  # noqa: PLC0415

        state = self._state(key, self._cli_config)
        if state is None:
            with self._lock:
                self._demand.forget(key)
            return
        ids = new_ids()
        with self._process_lock:
            if self._closed.is_set():
                return
            self._reaper.watch(ids.run_id)
            try:
                prestarted = prestart(ids, key, self._cli_config, state)
            except Exception as error:
                self._reaper.release(ids.run_id)
                with self._lock:
                    # Perhaps there is no memory or descriptor left: the next request tries again.
                    self._demand.forget(key)
                log.warning("cannot start a Claude Code in advance: %s", error, extra={"event": "prestart_failed"})
                return
            with self._lock:
                self._ready.append(prestarted)
        log.debug("a Claude Code (%s) was started in advance", key.kind, extra={"event": "prestarted"})
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


def _log_miss(kind: str, reason: str) -> None:
    """Log why a request gets the ids of no prestarted Claude Code."""
    log.debug("a run starts its own Claude Code (no %s one): %s", kind, reason, extra={"event": "prestart_missed"})


def _log_refusal(kind: str, run: Run, reason: str) -> None:
    """Log why a run cannot use the Claude Code that has its ids."""
    RunLog(log, run.id).info("starts its own Claude Code, not the %s one: %s", kind, reason, event="prestarted_refused")
