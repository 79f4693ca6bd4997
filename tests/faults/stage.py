"""A service in this process, with the stand-in CLI, on which a scenario is played; and the eyes of the test on it.

What the test only looks at goes past the probes. All that the test knows of the service's insides stands here.
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
from ccm.models import Run, RunMode
from ccm.settings.settings import Settings
from tests.faults.probes import Injected, Probes

T = TypeVar("T")

# The name of the thread that writes to the database.
WRITER_THREAD = "writer"
# What the names of the threads begin with in which runs are made.
RUN_THREADS = "run"
# Bounds of the service that are shortened, wherever in `ccm.core` they stand, so that what waits for one is quick.
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


def shorten(bound: float) -> None:
    """
    Args:
        bound: what counts as never; the service's own time to stop is to be shorter.
    """
    shorter = SHORTER | dict.fromkeys(("STOP_TIMEOUT",), bound * 0.6)
    for name, module in list(sys.modules.items()):
        if name.startswith("ccm.core."):
            for constant, seconds in shorter.items():
                if hasattr(module, constant):
                    setattr(module, constant, min(seconds, getattr(module, constant)))


class Call(Generic[T]):
    """A call in a thread of its own, so that one which hangs is noticed."""

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
    """The last frames of the project's own, one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}ccm{os.sep}" in f.filename]
    where = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-4:])
    return f"{type(error).__name__}: {error} ({where})"


class Stage:
    """
    Args:
        base: what all stages share: the project directory, the program, the templates.
        folder: this one's own, which is there and empty.
        bound: how long anything may take before it counts as never (seconds).
    """

    def __init__(self, base: Path, folder: Path, probes: Probes, bound: float) -> None:
        self.base, self.folder, self.probes, self.bound = base, folder, probes, bound
        # How long the ends of runs are waited for (seconds).
        self.patience = bound
        self.home = folder / "home"
        self.database = folder / "db.sqlite"
        self.workers = 1
        self.service: Service
        self.violations: list[tuple[str, str]] = []
        # Requests that were refused, with what was raised.
        self.refused: list[str] = []
        # Whether a fault that stays keeps a client from what would end the runs.
        self.gave_up = False
        # What a start raised that met the fault.
        self.start_refused: str | None = None
        self._waiters: dict[str, Call[Run | None]] = {}
        self._clients: list[Call[Run | None]] = []
        self._have_left = False
        self.home.mkdir(exist_ok=True)

    @property
    def project(self) -> str:
        return os.path.realpath(self.base / "project")

    def use(self, template: str) -> None:
        """Begin with a copy of what a service has left."""
        content = (self.base / template / "db.sqlite").read_bytes()
        self.database.write_bytes(content)
        for run_id in self.stored_runs():
            # Ids of its own, or the processes of another stage would carry the same mark. Their order stays.
            content = content.replace(run_id.encode(), (run_id[:-12] + uuid.uuid4().hex[-12:]).encode())
        self.database.write_bytes(content)

    def open(self) -> Service:
        """A service on the stage's database that is not started."""
        settings = Settings(
            database_path=self.database,
            cli_path=self.base / "claude",
            max_concurrent_runs=self.workers,
        )
        self.service = Service(settings, {"PATH": os.environ["PATH"], "HOME": str(self.home)})
        return self.service

    def start(self) -> Service:
        self.open().start()
        return self.service

    # ---- what clients do

    def ask(self, request: Callable[[], T], what: str, tries: int = 1) -> T | None:
        """A client's request; None if it is refused each time. What was injected once does not refuse it twice."""
        for _ in range(tries):
            call = Call(request, f"client: {what}")
            if not call.ends(self.bound):
                self.violate("I1", f"the request hangs: {what}\n{stacks()}")
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
        """Have a client wait for a run's end."""

        def wait() -> Run | None:
            with self.probes.hidden():
                return self.service.notifier.wait(run.id, 600, lambda: self._ended(run.id), lambda: self._have_left)

        self._waiters[run.id] = Call(wait, "waits for a run")
        self._clients.append(self._waiters[run.id])
        return run

    def _ended(self, run_id: str) -> Run | None:
        run = self.service.queries.run(run_id)
        return run if run.ended else None

    # ---- what the test sees

    def violate(self, invariant: str, what: str) -> None:
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
        return self.until(lambda: self.service.queries.next_batch(run_id, -1) is not None)

    def check_ended(self) -> None:
        """I1: each run that is stored ends; I7: whoever waits for it is told."""

        def have_ended() -> bool:
            for waiter in self._waiters.values():
                waiter.ends(0.02)  # woken, it returns at once, and nothing need be asked again and again
            return all(run.ended for run in self.service.queries.runs({}, limit=100, after=None))

        if not self.until(have_ended, self.patience):
            left = [f"{run.mode} run, started {run.started_at}" for run in self.runs() if not run.ended]
            self.violate("I1", f"still running after {self.patience:.0f} s: {'; '.join(left)}")
        ended = {run.id for run in self.runs() if run.ended}
        for run_id, waiter in list(self._waiters.items()):
            if run_id in ended:
                self._check_waiter(waiter)
                del self._waiters[run_id]

    def _check_waiter(self, waiter: Call[Run | None]) -> None:
        if not waiter.ends(min(5.0, self.bound)):
            self.violate("I7", "the end is stored, and whoever waits for it is not woken")
        elif waiter.error is not None:
            self.violate("I7", f"the wait failed: {waiter.trace}")
        elif waiter.value is None:
            self.violate("I7", "the wait returned without the ended run")

    def recover(self) -> None:
        """The start of a service that finds what a killed one has left."""
        call = Call(self.service.start, "start()")
        if not call.ends(self.bound):
            self.violate("I1", f"start() hangs\n{stacks()}")
        elif call.error is not None:
            self.start_refused = call.trace

    def check_service_works(self) -> None:
        """I2: with the fault gone, each worker takes a run, and it completes."""
        holding = [self.start_run('{"hold": true, "count": 1}') for _ in range(self.workers - 1)]
        if any(run is None or not self.has_message(run.id) for run in holding):
            self.violate("I2", f"a run that should hold did not start: {self.refused[-1:]}")
        self._check_completes("I2")
        for run in holding:
            if run is not None:
                self.ask(partial(self.service.runs.cancel, run.id), "cancel")
        if holding:
            self.check_ended()

    def _check_completes(self, invariant: str) -> None:
        run = self.start_run("hello")
        if run is None:
            self.violate(invariant, f"a new run is refused: {self.refused[-1]}")
        elif not (self._waiters[run.id].ends(self.bound) or self.until(lambda: self._ended(run.id), 1.0)):
            self.violate(invariant, f"a new run does not end: started {self.run(run.id).started_at}")
        elif (ended := self.run(run.id)).status != "completed":
            self.violate(invariant, f"a new run is {ended.status}: {ended.error_code}: {ended.error_message}")
        else:
            self._check_waiter(self._waiters.pop(run.id))

    def check_writer_lives(self) -> None:
        if not any(thread.name == WRITER_THREAD and thread.is_alive() for thread in threading.enumerate()):
            self.violate("I6", "the writer's thread has ended")

    def check_no_process_left(self) -> None:
        """I3. Those of a run that goes on because nobody could end it yet do not count."""
        ended = [run.id for run in self.runs() if run.ended]
        if not self.until(lambda: not any(marked(run_id) for run_id in ended), min(5.0, self.bound)):
            self.violate("I3", f"processes left: {self.commands(ended)}")

    def commands(self, run_ids: list[str]) -> list[str]:
        found = []
        with self.probes.hidden():
            for pid in [pid for run_id in run_ids for pid in marked(run_id)]:
                with contextlib.suppress(OSError):
                    found.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").strip())
        return found

    def stop(self) -> None:
        """I4: the service ends its runs and itself in time, and well: that is exit code 0."""
        self._bounded("I4", "end_runs()", self.service.end_runs, expect=True)
        # As the server does: what is being read is read to its end before the database is closed.
        for waiter in self._waiters.values():
            if not waiter.ends(min(5.0, self.bound)):
                self.violate("I7", "the service has stopped, and whoever waits is not woken")
        self._waiters.clear()
        self.close()

    def close(self) -> None:
        # Also those that nobody has woken: SQLite crashes where it is closed while somebody reads.
        self._have_left = True
        for client in self._clients:
            client.ends(2.0)
        self._bounded("I4", "close()", self.service.close)

    def _bounded(self, invariant: str, what: str, function: Callable[[], object], expect: object = None) -> bool:
        call = Call(function, what)
        if not call.ends(self.bound):
            self.violate(invariant, f"{what} hangs\n{stacks()}")
        elif call.error is not None:
            self.violate(invariant, f"{what} raised {call.trace}")
        elif call.value != expect:
            self.violate(invariant, f"{what} returned {call.value!r}")
        else:
            return True
        return False

    def stored_runs(self) -> dict[str, tuple[str, bool]]:
        """Of each run in the file its status, and whether it was started."""
        connection = sqlite3.connect(self.database)
        try:
            rows = connection.execute("SELECT id, status, startedAt FROM ccr_runs").fetchall()
        finally:
            connection.close()
        return {run_id: (status, started is not None) for run_id, status, started in rows}

    def check_stored_ends(self) -> None:
        """I1, as the next service will find it; I3, for the runs that the shutdown had to end."""
        runs = self.stored_runs()
        left = [run_id for run_id, (status, started) in runs.items() if status == "running" and started]
        if self.start_refused is not None:
            left = []  # of the service before, and still to be found by the next one
        if left:
            self.violate("I1", f"{len(left)} started runs are left running by the shutdown")
        with self.probes.hidden():
            if any(marked(run_id) for run_id in runs):
                self.violate("I3", f"processes left by the shutdown: {self.commands(list(runs))}")
        self.kill_left()

    def kill_left(self) -> None:
        """What is left is ended, so that it disturbs nothing else."""
        with self.probes.hidden():
            for run_id in self.stored_runs():
                for pid in marked(run_id):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def check_next_service(self, *, completes: bool = True) -> None:
        """I5: the next service finds nothing that runs, and does its job."""
        if self.violations:
            # This one may hold the database still; in life it would have ended with its process.
            connection, self.database = sqlite3.connect(self.database), self.folder / "next.sqlite"
            copy = sqlite3.connect(self.database)
            connection.backup(copy)
            copy.close()
            connection.close()
        try:
            self.start()
        except Exception as error:
            self.violate("I5", f"the next service does not start: {_short_trace(error)}")
            return
        if not self.until(lambda: all(run.ended for run in self.service.queries.runs({}, limit=100, after=None))):
            self.violate("I5", "a run is running after the start of the next service")
        elif completes:
            self._have_left = False
            self._check_completes("I5")
        self._bounded("I5", "end_runs() of the next service", self.service.end_runs, expect=True)
        self._bounded("I5", "close() of the next service", self.service.close)
        self.kill_left()


def stacks() -> str:
    """What each thread of this process is at."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        own = [f for f in traceback.extract_stack(frame) if f"{os.sep}ccm{os.sep}" in f.filename]
        if own:
            where = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in own[-4:])
            lines.append(f"    {names.get(ident)}: {where}")
    return "\n".join(lines)
