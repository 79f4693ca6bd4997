"""Walks the boundaries that a run crosses and makes each of them raise: once, and always.

python -m tests.faults trace BASE                 find the boundaries, for `walk`
python -m tests.faults walk BASE SCENARIO MODE    make each boundary of this scenario raise
python -m tests.faults report [TEXT]              do both for all calls, or only those whose line contains TEXT

Each fault is injected into a separate process, forked from one that has imported everything and started nothing. So the
threads and locks that one fault leaves disturb no other, and a process that hangs is killed with its stacks reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import importlib
import json
import logging
import os
import select
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.conftest import stand_in_cli
from tests.faults.exempt import is_exempt, may_refuse_to_start
from tests.faults.probes import Probes, Site
from tests.faults.scenarios import BY_NAME, HOLD, SCENARIOS, Scenario
from tests.faults.stage import RUN_THREADS, Stage, shorten_timeouts

ONCE, ALWAYS = "once", "always"
MODES = (ONCE, ALWAYS)
# The time for each condition that the invariants demand, the same if the call is exempt, and the time for a whole
# injection (seconds).
CHECK_TIMEOUT = 20.0
EXEMPT_TIMEOUT = 2.0
INJECTION_TIMEOUT = 120.0
# After this time without a call, the work of a part of a scenario is done (seconds).
QUIET_INTERVAL = 0.06


@dataclasses.dataclass(frozen=True)
class Finding:
    scenario: str
    mode: str
    site: str
    invariant: str
    what: str
    thread: str = ""
    log: tuple[str, ...] = ()


class Faults(logging.Handler):
    """Collects unhandled exceptions and the latest log lines of the service."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.unhandled: list[str] = []
        self.lines: list[str] = []
        threading.excepthook = self._of_thread
        sys.unraisablehook = self._unraisable
        logging.getLogger().handlers = [self]
        logging.getLogger().setLevel(logging.WARNING)

    def _of_thread(self, args: threading.ExceptHookArgs) -> None:
        self.unhandled.append(f"thread {args.thread and args.thread.name}: {args.exc_type.__name__}: {args.exc_value}")

    def _unraisable(self, unraisable: Any) -> None:
        if "BaseSubprocessTransport.__del__" in repr(unraisable.object):
            # asyncio raises it for a process whose end it did not see before its loop was closed. The pipes are closed
            # nevertheless, when they are freed.
            return
        self.unhandled.append(f"unraisable: {unraisable.exc_value!r} in {unraisable.object!r}")

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        line = f"{record.levelname} {record.name}: {record.getMessage()}" + (f" [{error!r}]" if error else "")
        self.lines.append(line[:400])
        # A task or future whose exception was never retrieved, or a failed callback.
        if record.name == "asyncio" and record.levelno >= logging.ERROR:
            self.unhandled.append(line[:400])


# ---- functions that run in a forked process


def _set_up(stage: Stage, scenario: Scenario) -> None:
    """Run the part of a scenario before the fault."""
    stage.workers = scenario.workers
    stage.use(scenario.template)
    if scenario.starts:
        stage.open()
    else:
        stage.start()
    scenario.prepare(stage)
    # Otherwise the trace on a busy machine contains calls of the part before, which no fault of this part can meet.
    stage.until(lambda: stage.probes.is_quiet(QUIET_INTERVAL))


def trace(stage: Stage, scenario: Scenario) -> dict[str, str]:
    """Return the boundaries that a scenario crosses: for each key the callee's name.

    Raises:
        AssertionError: the scenario violates an invariant without a fault.
    """
    faults = Faults()
    _set_up(stage, scenario)
    # Exclude the threads of runs: a run queued before the start executes like any other.
    stage.probes.record(excluded=RUN_THREADS if scenario.starts else None)
    scenario.trigger(stage)
    if not scenario.stops:
        stage.check_ended()
        stage.until(lambda: stage.probes.is_quiet(QUIET_INTERVAL))
    stage.probes.disarm()
    if not scenario.stops:
        stage.check_no_process_left()
        stage.check_writer_lives()
        stage.stop()
    stage.check_stored_ends()
    stage.check_next_service()
    gc.collect()
    wrong = stage.violations + [("refused", text) for text in stage.refused] + [("I6", t) for t in faults.unhandled]
    assert not wrong, f"{scenario.name} without a fault: {wrong}\n{faults.lines}"
    return stage.probes.reached


def inject(stage: Stage, scenario: Scenario, site: Site, mode: str) -> dict[str, Any]:
    """Run a scenario with one fault; return `fired`, `thread`, `violations` and `log`."""
    faults = Faults()
    if is_exempt(site, mode, "I1"):
        stage.end_timeout = EXEMPT_TIMEOUT  # the runs need not end
    if is_exempt(site, mode, "I4"):
        shorten_timeouts(EXEMPT_TIMEOUT)
    _set_up(stage, scenario)
    stage.probes.arm(site.key, always=mode == ALWAYS)
    scenario.trigger(stage)
    if stage.start_refused is not None:
        if not may_refuse_to_start(site, stage.start_refused):
            stage.add_violation("I1", f"the service does not start: {stage.start_refused}")
        stage.probes.disarm()
        stage.close()
    elif not scenario.stops:
        _check_after_fault(stage, mode)
        stage.check_no_process_left()
        stage.check_writer_lives()
        stage.stop()
    stage.probes.disarm()
    stage.check_stored_ends()
    if stage.probes.fired:
        # check_service_works() has already completed a run in the other cases.
        stage.check_next_service(completes=mode == ALWAYS or scenario.stops or scenario.starts)
    gc.collect()
    for unhandled in faults.unhandled:
        stage.add_violation("I6", f"unhandled: {unhandled}")
    violations = [found for found in stage.violations if not is_exempt(site, mode, found[0])]
    return {
        "fired": stage.probes.fired,
        "thread": stage.probes.fired_in,
        "violations": violations if stage.probes.fired else [],
        "log": [*stage.refused[-3:], *faults.lines[-10:]],
    }


def _check_after_fault(stage: Stage, mode: str) -> None:
    if not stage.cancel_refused:
        stage.check_ended()
    elif mode == ONCE:
        stage.add_violation("I1", f"after a single fault the run cannot be ended: {stage.refused[-1]}")
    if mode == ONCE:
        # The work after a stored end may not have reached the fault yet.
        stage.until(lambda: stage.probes.fired, QUIET_INTERVAL * 3)
        stage.probes.disarm()
        if not stage.violations:
            stage.check_service_works()
    elif not stage.cancel_refused and not stage.violations:
        stage.start_run("hello")
        stage.check_ended()


def make_templates(base: Path, probes: Probes) -> None:
    """Make the databases that scenarios start from: empty, with an ended run, and with interrupted runs."""
    (base / "project").mkdir()
    stand_in_cli(base)
    for name in ("empty", "ended", "killed"):
        (base / name).mkdir()
        stage = Stage(base, base / name, probes, CHECK_TIMEOUT)
        stage.start()
        if name == "ended":
            stage.start_run(json.dumps({"count": 2}))
            stage.check_ended()
        elif name == "killed":
            run = stage.start_run(HOLD)
            assert run is not None
            assert stage.has_message(run.id)
            stage.start_run("hello")
            _copy(stage.database, base / "copy.sqlite")
        stage.stop()
        assert not stage.violations, stage.violations
        if name == "killed":
            os.replace(base / "copy.sqlite", stage.database)


def _copy(database: Path, to: Path) -> None:
    source, target = sqlite3.connect(database), sqlite3.connect(to)
    source.backup(target)
    source.close()
    target.close()


# ---- the processes


@dataclasses.dataclass
class _Child:
    pid: int
    pipe: int
    stacks: Path
    deadline: float
    output: bytes = b""


class Processes:
    """Calls functions in forked processes, several at a time.

    Args:
        base: the parent of each process's directory.
        jobs: the number of processes at a time.
    """

    def __init__(self, base: Path, jobs: int) -> None:
        self._base = base
        self._jobs = jobs

    def each(self, work: dict[str, Callable[[Path], Any]]) -> Iterator[tuple[str, Any, str]]:
        """Yield for each function its name, its result and "", or its name, None and how its process ended."""
        waiting = list(work.items())
        running: dict[str, _Child] = {}
        gc.collect()
        gc.freeze()
        while waiting or running:
            while waiting and len(running) < self._jobs:
                name, function = waiting.pop(0)
                running[name] = self._fork(function)
            ready, _, _ = select.select([child.pipe for child in running.values()], [], [], 1.0)
            for name, child in list(running.items()):
                if child.pipe in ready:
                    received = os.read(child.pipe, 2**16)
                    child.output += received
                    if not received:
                        del running[name]
                        yield (name, *self._result(child))
                elif time.monotonic() > child.deadline:
                    os.kill(child.pid, signal.SIGABRT)  # faulthandler writes its stacks
                    child.deadline += 10

    def _fork(self, function: Callable[[Path], Any]) -> _Child:
        folder = Path(tempfile.mkdtemp(dir=self._base))
        stacks = self._base / f"{folder.name}.stacks"
        receiving, sending = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._run_child(function, folder, stacks, sending)
        os.close(sending)
        return _Child(pid, receiving, stacks, time.monotonic() + INJECTION_TIMEOUT)

    @staticmethod
    def _run_child(function: Callable[[Path], Any], folder: Path, stacks: Path, sending: int) -> None:
        """Run the function in the forked process and exit."""
        code = 1
        try:
            faulthandler.enable(stacks.open("w"), all_threads=True)
            output = json.dumps(function(folder)).encode()
            with open(sending, "wb") as pipe:
                pipe.write(output)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(code)

    @staticmethod
    def _result(child: _Child) -> tuple[Any, str]:
        os.close(child.pipe)
        _, status = os.waitpid(child.pid, 0)
        stacks = child.stacks.read_text()
        child.stacks.unlink()
        if status == 0:
            return json.loads(child.output), ""
        return None, f"ended with {os.waitstatus_to_exitcode(status)}\n{stacks}"


class Walk:
    def __init__(self, base: Path, probes: Probes, *, jobs: int, bound: float, log: Callable[[str], None]) -> None:
        self._base = base
        self._probes = probes
        self._bound = bound
        self._log = log
        self._processes = Processes(base, jobs)
        self._sites = {site.key: site for site in probes.sites}

    def trace(self) -> dict[str, Any]:
        """Make the templates; return for each scenario the keys and callees that are new in its phase."""
        for _, done, how in self._processes.each({"templates": self._make_templates}):
            assert done is not None, how
            for module in done:
                # Import it here once, or each process would import it again.
                if module not in sys.modules and not module.startswith("__"):
                    # An extension may register a module that cannot be imported by its name (`_openssl`).
                    with suppress(ImportError):
                        importlib.import_module(module)
        work = {scenario.name: self._tracing(scenario) for scenario in SCENARIOS}
        reached: dict[str, dict[str, str]] = {}
        for name, found, how in self._processes.each(work):
            assert found is not None, f"{name} without a fault: {how}"
            reached[name] = found
        first_reached: dict[str, Any] = {}
        walked: set[tuple[str, str]] = set()
        for scenario in SCENARIOS:
            new = {k: v for k, v in reached[scenario.name].items() if (scenario.phase, k) not in walked}
            walked |= {(scenario.phase, key) for key in new}
            first_reached[scenario.name] = new
        return first_reached

    def _make_templates(self, _folder: Path) -> list[str]:
        make_templates(self._base, self._probes)
        return [name for name, module in sorted(sys.modules.items()) if module is not None]

    def _tracing(self, scenario: Scenario) -> Callable[[Path], dict[str, str]]:
        return lambda folder: trace(Stage(self._base, folder, self._probes, self._bound), scenario)

    def walk(self, scenario: Scenario, mode: str, keys: list[str]) -> tuple[int, list[Finding]]:
        """Make each call raise; return how many did, and the findings."""
        work = {key: self._injecting(scenario, self._sites[key], mode) for key in keys}
        findings = []
        fired = 0
        for key, result, how in self._processes.each(work):
            site = str(self._sites[key])
            if result is None:
                findings.append(Finding(scenario.name, mode, site, "hangs", how))
            else:
                fired += bool(result["fired"])
                findings += [
                    Finding(scenario.name, mode, site, invariant, what, result["thread"], tuple(result["log"]))
                    for invariant, what in result["violations"]
                ]
            self._log(f"{scenario.name} {mode} {site}: {'fired' if result and result['fired'] else 'not reached'}")
        return fired, findings

    def _injecting(self, scenario: Scenario, site: Site, mode: str) -> Callable[[Path], dict[str, Any]]:
        return lambda folder: inject(Stage(self._base, folder, self._probes, self._bound), scenario, site, mode)


def main(probes: Probes) -> None:
    """Run a command of the command line.

    Args:
        probes: probes that were installed before any module of the service was imported.
    """
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("command", choices=("trace", "walk", "report"))
    arguments.add_argument("rest", nargs="*")
    # Most injections wait for a time limit.
    arguments.add_argument("--jobs", type=int, default=3 * (os.cpu_count() or 1))
    arguments.add_argument("--bound", type=float, default=CHECK_TIMEOUT)
    arguments.add_argument("--scenario", action="append", default=[])
    arguments.add_argument("--mode", action="append", default=[])
    arguments.add_argument("--verbose", action="store_true")
    given = arguments.parse_args()
    importlib.import_module("ccm.core.claude.execution")  # otherwise the first run would import it under the fault
    shorten_timeouts(given.bound)
    log = (lambda line: print(line, file=sys.stderr, flush=True)) if given.verbose else (lambda _line: None)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary if given.command == "report" else given.rest[0])
        walk = Walk(base, probes, jobs=given.jobs, bound=given.bound, log=log)
        sites = base / "sites.json"
        if given.command != "walk":
            sites.write_text(json.dumps(walk.trace()))
        traced = json.loads(sites.read_text())
        if given.command == "trace":
            print(json.dumps(traced))
        elif given.command == "walk":
            scenario, mode = given.rest[1:]
            fired, findings = walk.walk(BY_NAME[scenario], mode, list(traced[scenario]))
            print(json.dumps({"fired": fired, "findings": [dataclasses.asdict(found) for found in findings]}))
        else:
            _report(walk, probes, traced, given)


def _report(walk: Walk, probes: Probes, traced: dict[str, dict[str, str]], given: argparse.Namespace) -> None:
    text = given.rest[0] if given.rest else ""
    sites = {site.key: str(site) for site in probes.sites}
    begun = time.monotonic()
    for scenario in given.scenario or BY_NAME:
        keys = [key for key in traced[scenario] if text in sites[key]]
        for mode in given.mode or MODES:
            since = time.monotonic()
            fired, findings = walk.walk(BY_NAME[scenario], mode, keys)
            took = time.monotonic() - since
            print(f"==== {scenario}, {mode}: {fired} of {len(keys)} calls raised, {took:.0f} s", flush=True)
            for found in findings:
                print(f"{found.site} [{found.thread}] {found.invariant}: {found.what}")
                for line in found.log:
                    print(f"      {line}")
    print(f"==== {time.monotonic() - begun:.0f} s in all")
