"""The stage of a scenario: a service in this process with the stand-in CLI, and the checks of its invariants.

The checks bypass the probes. All knowledge of the service's internals is in this module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from ccm.core.claude.processes import marked
from ccm.core.runs.request import Accepted, RunRequest
from ccm.core.service import Service
from ccm.core.storage.notifier import end_of
from ccm.models import Run, RunMode
from ccm.settings.settings import Settings
from tests.faults.probes import Injected, Probes

T = TypeVar("T")

# The name of the thread that writes to the database.
WRITER_THREAD = "writer"
# The beginning of the names of the threads that execute runs.
RUN_THREADS = "run"
# Shorter timeouts for the service (seconds), wherever in `ccm.core` they are defined, so that faults are over sooner.
SHORTER = {
    "INTERRUPT_TIMEOUT": 1.0,
    "CLOSE_TIMEOUT": 1.0,
    "TERMINATE_TIMEOUT": 2.0,
    "SILENT_TIMEOUT": 1.0,
    "SEND_TIMEOUT": 0.5,
    "RELY_INTERVAL": 1.0,
    "WRITE_TIMEOUT": 3.0,
    "OUTCOME_TIMEOUT": 3.0,
}
POLL_INTERVAL = 0.004


def shorten_timeouts(bound: float) -> None:
    """Shorten the service's timeouts.

    Args:
        bound: the seconds after which the test considers a call hung; the service's time to stop must be shorter.
    """
    shorter = SHORTER | dict.fromkeys(("STOP_TIMEOUT",), bound * 0.6)
    for name, module in list(sys.modules.items()):
        if name.startswith("ccm.core."):
            for constant, seconds in shorter.items():
                if hasattr(module, constant):
                    setattr(module, constant, min(seconds, getattr(module, constant)))


class Call(Generic[T]):
    """A call in a thread of its own, so that the test notices if it hangs."""

    def __init__(self, function: Callable[[], T], name: str) -> None:
        self.value: T | None = None
        self.error: Exception | None = None
        self.trace = ""
        self._function = function
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.value = self._function()
        except Exception as error:
            self.error = error
            self.trace = _short_trace(error)

    def ends(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


def _short_trace(error: BaseException) -> str:
    """Return the last frames of the project's code on one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}ccm{os.sep}" in f.filename]
    where = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-4:])
    return f"{type(error).__name__}: {error} ({where})"


class Stage:
    """A service on which a scenario runs, with its clients and the violations found.

    Args:
        base: the directory that all stages share, with the project, the program and the templates.
        folder: an empty directory for this stage.
        bound: the time after which a call counts as hung (seconds).
    """

    def __init__(self, base: Path, folder: Path, probes: Probes, bound: float) -> None:
        self.base, self.folder, self.probes, self.bound = base, folder, probes, bound
        # How long to wait for the ends of runs (seconds).
        self.end_timeout = bound
        self.home = folder / "home"
        self.database = folder / "db.sqlite"
        self.workers = 1
        self.service: Service
        self.violations: list[tuple[str, str]] = []
        # The refused requests, with their exceptions.
        self.refused: list[str] = []
        # Whether a lasting fault prevents the clients from ending the runs.
        self.cancel_refused = False
        # The exception of a start that met the fault.
        self.start_refused: str | None = None
        self._waiters: dict[str, Call[Run | None]] = {}
        self._clients: list[Call[Run | None]] = []
        self._clients_left = False
        self.home.mkdir(exist_ok=True)

    @property
    def project(self) -> str:
        return os.path.realpath(self.base / "project")

    def use(self, template: str) -> None:
        """Start from a copy of the database that a service left."""
        content = (self.base / template / "db.sqlite").read_bytes()
        self.database.write_bytes(content)
        for run_id in self.stored_runs():
            # New ids, or the processes of another stage would carry the same mark. Keep the order of the ids.
            content = content.replace(run_id.encode(), (run_id[:-12] + uuid.uuid4().hex[-12:]).encode())
        self.database.write_bytes(content)

    def open(self) -> Service:
        """Create a service on the stage's database without starting it."""
        settings = Settings(
            database_path=self.database,
            cli_path=self.base / "claude",
            max_concurrent_runs=self.workers,
            spare_runs=0,
        )
        # Of this process, because the SDK passes its variables on to Claude Code, whose transcripts are read.
        os.environ["HOME"] = str(self.home)
        self.service = Service(settings, {"PATH": os.environ["PATH"], "HOME": str(self.home)})
        return self.service

    def start(self) -> Service:
        self.open().start()
        return self.service

    # ---- clients

    def ask(self, request: Callable[[], T], what: str, tries: int = 1) -> T | None:
        """Send a client's request; return None if each try is refused. A fault raised once refuses only one try."""
        for _ in range(tries):
            call = Call(request, f"client: {what}")
            if not call.ends(self.bound):
                self.add_violation("I1", f"the request hangs: {what}\n{stacks()}")
                return None
            if call.error is None:
                return call.value
            self.refused.append(f"{what}: {call.trace}")
            if not isinstance(call.error, Injected) and tries == 1:
                break
        return None

    def start_run(self, prompt: str, **fields: Any) -> Run | None:
        request = RunRequest(mode=RunMode.FRESH, prompt=prompt, run_fields=fields)
        accepted: Accepted | None = self.ask(lambda: self.service.runs.start(request, self.project), "start")
        return None if accepted is None else self.watch(accepted.run)

    def watch(self, run: Run) -> Run:
        """Start a client that waits for a run's end."""

        def wait() -> Run | None:
            with self.probes.hidden():
                return self.service.notifier.wait(
                    end_of(run.id), 600, lambda: self._ended(run.id), lambda: self._clients_left
                )

        self._waiters[run.id] = Call(wait, "client: waits for a run")
        self._clients.append(self._waiters[run.id])
        return run

    def _ended(self, run_id: str) -> Run | None:
        run = self.service.queries.run(run_id)
        return run if run.ended else None

    # ---- checks

    def add_violation(self, invariant: str, what: str) -> None:
        self.violations.append((invariant, what))

    def until(self, condition: Callable[[], object], seconds: float | None = None) -> bool:
        deadline = time.monotonic() + (self.bound if seconds is None else seconds)
        with self.probes.hidden():
            while not condition():
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL_INTERVAL)
        return True

    def runs(self) -> list[Run]:
        with self.probes.hidden():
            return self.service.queries.runs({}, limit=100, after=None)

    def run(self, run_id: str) -> Run:
        with self.probes.hidden():
            return self.service.queries.run(run_id)

    def has_ended(self, run_id: str) -> bool:
        return self.run(run_id).ended

    def has_message(self, run_id: str) -> bool:
        return self.until(lambda: self.service.queries.next_part(run_id, (-1,)) is not None)

    def check_ended(self) -> None:
        """Check I1: each stored run ends; and I7: its waiting clients are notified."""

        def have_ended() -> bool:
            for waiter in self._waiters.values():
                waiter.ends(0.02)  # returns as soon as the run's end wakes it, which saves polling the database
            return all(run.ended for run in self.service.queries.runs({}, limit=100, after=None))

        if not self.until(have_ended, self.end_timeout):
            left = [f"{run.mode} run, started {run.started_at}" for run in self.runs() if not run.ended]
            self.add_violation("I1", f"still running after {self.end_timeout:.0f} s: {'; '.join(left)}")
        ended = {run.id for run in self.runs() if run.ended}
        for run_id, waiter in list(self._waiters.items()):
            if run_id in ended:
                self._check_waiter(waiter)
                del self._waiters[run_id]

    def _check_waiter(self, waiter: Call[Run | None]) -> None:
        if not waiter.ends(min(5.0, self.bound)):
            self.add_violation("I7", "the end is stored, but a waiting client is not woken")
        elif waiter.error is not None:
            self.add_violation("I7", f"the wait failed: {waiter.trace}")
        elif waiter.value is None:
            self.add_violation("I7", "the wait returned without the ended run")

    def recover(self) -> None:
        """Start a service on the database of a killed one."""
        call = Call(self.service.start, "start()")
        if not call.ends(self.bound):
            self.add_violation("I1", f"start() hangs\n{stacks()}")
        elif call.error is not None:
            self.start_refused = call.trace

    def check_service_works(self) -> None:
        """Check I2: after the fault each worker takes a run, which completes."""
        holding = [self.start_run('{"hold": true, "count": 1}') for _ in range(self.workers - 1)]
        if any(run is None or not self.has_message(run.id) for run in holding):
            self.add_violation("I2", f"a held run did not start: {self.refused[-1:]}")
        self._check_completes("I2")
        for run in holding:
            if run is not None:
                self.ask(partial(self.service.runs.cancel, run.id), "cancel")
        if holding:
            self.check_ended()

    def _check_completes(self, invariant: str) -> None:
        run = self.start_run("hello")
        if run is None:
            self.add_violation(invariant, f"a new run is refused: {self.refused[-1]}")
        elif not (self._waiters[run.id].ends(self.bound) or self.until(lambda: self._ended(run.id), 1.0)):
            self.add_violation(invariant, f"a new run does not end: started {self.run(run.id).started_at}")
        elif (ended := self.run(run.id)).status != "completed":
            self.add_violation(invariant, f"a new run is {ended.status}: {ended.error_code}: {ended.error_message}")
        else:
            self._check_waiter(self._waiters.pop(run.id))

    def check_writer_lives(self) -> None:
        if not any(thread.name == WRITER_THREAD and thread.is_alive() for thread in threading.enumerate()):
            self.add_violation("I6", "the writer's thread has ended")

    def check_no_process_left(self) -> None:
        """Check I3: no process of an ended run is left. A run that could not be ended yet keeps its processes."""
        ended = [run.id for run in self.runs() if run.ended]
        if not self.until(lambda: not any(marked(run_id) for run_id in ended), min(5.0, self.bound)):
            self.add_violation("I3", f"processes left: {self.commands(ended)}")

    def commands(self, run_ids: list[str]) -> list[str]:
        found = []
        with self.probes.hidden():
            for pid in [pid for run_id in run_ids for pid in marked(run_id)]:
                with contextlib.suppress(OSError):
                    found.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").strip())
        return found

    def stop(self) -> None:
        """Check I4: the service stops its runs and itself in time and without an error, as for exit code 0."""
        self._bounded("I4", "end_runs()", self.service.end_runs, expect=True)
        # As in the server, pending reads finish before the database is closed.
        for waiter in self._waiters.values():
            if not waiter.ends(min(5.0, self.bound)):
                self.add_violation("I7", "the service has stopped, but a waiting client is not woken")
        self._waiters.clear()
        self.close()

    def close(self) -> None:
        # Wait also for clients that were not woken, because SQLite crashes if it is closed during a read.
        self._clients_left = True
        for client in self._clients:
            client.ends(2.0)
        self._bounded("I4", "close()", self.service.close)

    def _bounded(self, invariant: str, what: str, function: Callable[[], object], expect: object = None) -> bool:
        call = Call(function, what)
        if not call.ends(self.bound):
            self.add_violation(invariant, f"{what} hangs\n{stacks()}")
        elif call.error is not None:
            self.add_violation(invariant, f"{what} raised {call.trace}")
        elif call.value != expect:
            self.add_violation(invariant, f"{what} returned {call.value!r}")
        else:
            return True
        return False

    def stored_runs(self) -> dict[str, tuple[str, bool]]:
        """Return for each run in the file its status and whether it was started."""
        connection = sqlite3.connect(self.database)
        try:
            rows = connection.execute("SELECT id, status, startedAt FROM ccr_runs").fetchall()
        finally:
            connection.close()
        return {run_id: (status, started is not None) for run_id, status, started in rows}

    def check_stored_ends(self) -> None:
        """Check I1 in the database that the shutdown leaves, and I3 for the runs that the shutdown had to end."""
        runs = self.stored_runs()
        left = [run_id for run_id, (status, started) in runs.items() if status == "running" and started]
        if self.start_refused is not None:
            left = []  # the previous service's runs, which the next start still has to recover
        if left:
            self.add_violation("I1", f"the shutdown left {len(left)} started runs running")
        with self.probes.hidden():
            if any(marked(run_id) for run_id in runs):
                self.add_violation("I3", f"processes left by the shutdown: {self.commands(list(runs))}")
        self.kill_remaining()

    def kill_remaining(self) -> None:
        """Kill remaining processes so that they do not disturb other stages."""
        with self.probes.hidden():
            for run_id in self.stored_runs():
                for pid in marked(run_id):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def check_next_service(self, *, completes: bool = True) -> None:
        """Check I5: the next service ends all runs, and a new run completes."""
        if self.violations:
            # This service may still hold the database, which in production it would have released with its process.
            connection, self.database = sqlite3.connect(self.database), self.folder / "next.sqlite"
            copy = sqlite3.connect(self.database)
            connection.backup(copy)
            copy.close()
            connection.close()
        try:
            self.start()
        except Exception as error:
            self.add_violation("I5", f"the next service does not start: {_short_trace(error)}")
            return
        if not self.until(lambda: all(run.ended for run in self.service.queries.runs({}, limit=100, after=None))):
            self.add_violation("I5", "a run is running after the start of the next service")
        elif completes:
            self._clients_left = False
            self._check_completes("I5")
        self._bounded("I5", "end_runs() of the next service", self.service.end_runs, expect=True)
        self._bounded("I5", "close() of the next service", self.service.close)
        self.kill_remaining()


def stacks() -> str:
    """Return the current stack of each thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        own = [f for f in traceback.extract_stack(frame) if f"{os.sep}ccm{os.sep}" in f.filename]
        if own:
            where = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in own[-4:])
            lines.append(f"    {names.get(ident)}: {where}")
    return "\n".join(lines)
