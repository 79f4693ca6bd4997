"""Walks the boundaries that a run's way crosses, and has each of them raise: once, and for ever.

    python -m tests.faults trace BASE                 finds out which boundaries there are, for `walk`
    python -m tests.faults walk BASE SCENARIO MODE    has each raise that is walked in this scenario
    python -m tests.faults report [TEXT]              all of it, or only the calls whose line contains TEXT

Each fault meets a process of its own, forked from one that has imported everything and started nothing: what one
fault leaves behind (threads, locks) disturbs no other, and one that hangs is ended with its stacks told.
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
from tests.faults.stage import RUN_THREADS, Stage, shorten

ONCE, FOR_EVER = "once", "for_ever"
MODES = (ONCE, FOR_EVER)
# How long a single thing may take that the invariants demand, and a whole injection (seconds).
BOUND = 20.0
# The same where a call is exempt from having to end well.
EXEMPT_SECONDS = 2.0
INJECTION_BOUND = 120.0
# No probe is passed for so long once all that follows a run's end is done (seconds).
QUIET_SECONDS = 0.06


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
            # asyncio's own: of a process whose end was not seen before its loop was closed. Its pipes are closed all
            # the same, each when it is freed.
            return
        self.unhandled.append(f"unraisable: {unraisable.exc_value!r} in {unraisable.object!r}")

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        line = f"{record.levelname} {record.name}: {record.getMessage()}" + (f" [{error!r}]" if error else "")
        self.lines.append(line[:400])
        # A task or a future whose exception nobody has asked for, or a callback that failed.
        if record.name == "asyncio" and record.levelno >= logging.ERROR:
            self.unhandled.append(line[:400])


# ---- what is played in a process of its own


def _set_up(stage: Stage, scenario: Scenario) -> None:
    """All that comes before the part that meets a fault."""
    stage.workers = scenario.workers
    stage.use(scenario.template)
    if scenario.starts:
        stage.open()
    else:
        stage.start()
    scenario.prepare(stage)


def trace(stage: Stage, scenario: Scenario) -> dict[str, str]:
    """The boundaries that a scenario crosses, by their keys.

    Raises:
        AssertionError: something is wrong with it without any fault.
    """
    faults = Faults()
    _set_up(stage, scenario)
    # The run that waited when a service starts is then made as any other.
    stage.probes.record(left_out=RUN_THREADS if scenario.starts else None)
    scenario.trigger(stage)
    if not scenario.stops:
        stage.check_ended()
        stage.until(lambda: stage.probes.is_quiet(QUIET_SECONDS))
    stage.probes.disarm()
    if not scenario.stops:
        stage.check_no_process_left()
        stage.check_writer_lives()
        stage.stop()
    stage.check_stored_ends()
    stage.check_next_service()
    gc.collect()
    wrong = stage.violations + [("refused", text) for text in stage.refused] + [("I6", t) for t in faults.unhandled]
    assert not wrong, f"{scenario.name} without any fault: {wrong}\n{faults.lines}"
    return stage.probes.reached


def inject(stage: Stage, scenario: Scenario, site: Site, mode: str) -> dict[str, Any]:
    """Play a scenario with one fault, and say what was wrong: `fired`, `thread`, `violations`, `log`."""
    faults = Faults()
    if is_exempt(site, mode, "I1"):
        stage.patience = EXEMPT_SECONDS  # nothing is expected to happen
    if is_exempt(site, mode, "I4"):
        shorten(EXEMPT_SECONDS)
    _set_up(stage, scenario)
    stage.probes.arm(site.key, for_ever=mode == FOR_EVER)
    scenario.trigger(stage)
    if stage.start_refused is not None:
        if not may_refuse_to_start(site, stage.start_refused):
            stage.violate("I1", f"the service does not start: {stage.start_refused}")
        stage.probes.disarm()
        stage.close()
    elif not scenario.stops:
        _look_at_the_ends(stage, mode)
        stage.check_no_process_left()
        stage.check_writer_lives()
        stage.stop()
    stage.probes.disarm()
    stage.check_stored_ends()
    if stage.probes.fired:
        # The service itself has shown that it can still complete a run, where it was there to be asked.
        stage.check_next_service(completes=mode == FOR_EVER or scenario.stops or scenario.starts)
    gc.collect()
    for unhandled in faults.unhandled:
        stage.violate("I6", f"nobody handled: {unhandled}")
    violations = [found for found in stage.violations if not is_exempt(site, mode, found[0])]
    return {
        "fired": stage.probes.fired,
        "thread": stage.probes.fired_in,
        "violations": violations if stage.probes.fired else [],
        "log": [*stage.refused[-3:], *faults.lines[-10:]],
    }


def _look_at_the_ends(stage: Stage, mode: str) -> None:
    if not stage.gave_up:
        stage.check_ended()
    elif mode == ONCE:
        stage.violate("I1", f"the fault was raised once, and the run cannot be ended any more: {stage.refused[-1]}")
    if mode == ONCE:
        # What follows an end that is stored may be still to come.
        stage.until(lambda: stage.probes.fired, QUIET_SECONDS * 3)
        stage.probes.disarm()
        if not stage.violations:
            stage.check_service_works()
    elif not stage.gave_up and not stage.violations:
        stage.start_run("hello")
        stage.check_ended()


def make_templates(base: Path, probes: Probes) -> None:
    """Make the databases that scenarios start from: empty, with an ended run, and with interrupted runs."""
    (base / "project").mkdir()
    stand_in_cli(base)
    for name in ("empty", "ended", "killed"):
        (base / name).mkdir()
        stage = Stage(base, base / name, probes, BOUND)
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
    """Has functions called in processes that are forked from this one, some at a time.

    Args:
        base: where each gets a directory of its own.
        jobs: how many at once.
    """

    def __init__(self, base: Path, jobs: int) -> None:
        self._base = base
        self._jobs = jobs

    def each(self, work: dict[str, Callable[[Path], Any]]) -> Iterator[tuple[str, Any, str]]:
        """The name of each with what it returned; or None, and how it ended."""
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
                    os.kill(child.pid, signal.SIGABRT)  # it tells its stacks then
                    child.deadline += 10

    def _fork(self, function: Callable[[Path], Any]) -> _Child:
        folder = Path(tempfile.mkdtemp(dir=self._base))
        stacks = self._base / f"{folder.name}.stacks"
        receiving, sending = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._live(function, folder, stacks, sending)
        os.close(sending)
        return _Child(pid, receiving, stacks, time.monotonic() + INJECTION_BOUND)

    @staticmethod
    def _live(function: Callable[[Path], Any], folder: Path, stacks: Path, sending: int) -> None:
        """The forked process, to its end."""
        code = 1
        try:
            faulthandler.enable(stacks.open("w"), all_threads=True)
            told = json.dumps(function(folder)).encode()
            with open(sending, "wb") as pipe:
                pipe.write(told)
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
        """Make the templates, and find out what each scenario crosses: by its name, the keys and callees."""
        for _, done, how in self._processes.each({"templates": self._make_templates}):
            assert done is not None, how
            for module in done:
                # What is imported late would be imported anew in each process.
                if module not in sys.modules and not module.startswith("__"):
                    # An extension may register a module that cannot be imported by its name (`_openssl`).
                    with suppress(ImportError):
                        importlib.import_module(module)
        work = {scenario.name: self._tracing(scenario) for scenario in SCENARIOS}
        reached: dict[str, dict[str, str]] = {}
        for name, found, how in self._processes.each(work):
            assert found is not None, f"{name} without any fault: {how}"
            reached[name] = found
        told: dict[str, Any] = {}
        walked: set[tuple[str, str]] = set()
        for scenario in SCENARIOS:
            new = {k: v for k, v in reached[scenario.name].items() if (scenario.phase, k) not in walked}
            walked |= {(scenario.phase, key) for key in new}
            told[scenario.name] = new
        return told

    def _make_templates(self, _folder: Path) -> list[str]:
        make_templates(self._base, self._probes)
        return [name for name, module in sorted(sys.modules.items()) if module is not None]

    def _tracing(self, scenario: Scenario) -> Callable[[Path], dict[str, str]]:
        return lambda folder: trace(Stage(self._base, folder, self._probes, self._bound), scenario)

    def walk(self, scenario: Scenario, mode: str, keys: list[str]) -> tuple[int, list[Finding]]:
        """Have each call raise. Gives how many did, and what was wrong."""
        work = {key: self._injecting(scenario, self._sites[key], mode) for key in keys}
        findings = []
        fired = 0
        for key, told, how in self._processes.each(work):
            site = str(self._sites[key])
            if told is None:
                findings.append(Finding(scenario.name, mode, site, "hangs", how))
            else:
                fired += bool(told["fired"])
                findings += [
                    Finding(scenario.name, mode, site, invariant, what, told["thread"], tuple(told["log"]))
                    for invariant, what in told["violations"]
                ]
            self._log(f"{scenario.name} {mode} {site}: {'fired' if told and told['fired'] else 'not reached'}")
        return fired, findings

    def _injecting(self, scenario: Scenario, site: Site, mode: str) -> Callable[[Path], dict[str, Any]]:
        return lambda folder: inject(Stage(self._base, folder, self._probes, self._bound), scenario, site, mode)


def main(probes: Probes) -> None:
    """
    Args:
        probes: installed before anything of the service was imported.
    """
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("command", choices=("trace", "walk", "report"))
    arguments.add_argument("rest", nargs="*")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments.add_argument("--bound", type=float, default=BOUND)
    arguments.add_argument("--scenario", action="append", default=[])
    arguments.add_argument("--mode", action="append", default=[])
    arguments.add_argument("--verbose", action="store_true")
    given = arguments.parse_args()
    importlib.import_module("ccm.core.claude.execution")  # the first run would import it, and its calls are walked too
    shorten(given.bound)
    log = (lambda line: print(line, file=sys.stderr, flush=True)) if given.verbose else (lambda _line: None)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary if given.command == "report" else given.rest[0])
        walk = Walk(base, probes, jobs=given.jobs, bound=given.bound, log=log)
        sites = base / "sites.json"
        if given.command != "walk":
            sites.write_text(json.dumps(walk.trace()))
        told = json.loads(sites.read_text())
        if given.command == "trace":
            print(json.dumps(told))
        elif given.command == "walk":
            scenario, mode = given.rest[1:]
            fired, findings = walk.walk(BY_NAME[scenario], mode, list(told[scenario]))
            print(json.dumps({"fired": fired, "findings": [dataclasses.asdict(found) for found in findings]}))
        else:
            _report(walk, probes, told, given)


def _report(walk: Walk, probes: Probes, told: dict[str, dict[str, str]], given: argparse.Namespace) -> None:
    text = given.rest[0] if given.rest else ""
    sites = {site.key: str(site) for site in probes.sites}
    begun = time.monotonic()
    for scenario in given.scenario or BY_NAME:
        keys = [key for key in told[scenario] if text in sites[key]]
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
