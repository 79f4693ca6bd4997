"""Every run ends whichever call fails: each call of run code into another module raises in turn.

`python -m tests.faults report` shows the same results with the service's log, for one call or all of them.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.processes import marked
from ccm.testing.service_process import ServiceProcess
from tests.client import Client
from tests.conftest import stand_in_cli
from tests.faults.exempt import EXEMPTIONS, STORAGE

ROOT = Path(__file__).parents[2]
SERVED = Path(__file__).with_name("served.py")
MODES = ("once", "always")
SCENARIOS = (
    *("fresh", "resume", "fork", "cancel", "crash", "answer", "cancel-asking", "follow-up", "time-limit"),
    *("shutdown", "recovery"),
)
# Boundaries that the trace must contain; without them the trace is broken.
KNOWN = (
    *("tempfile.mkdtemp", "subprocess.Popen", "threading.Thread.start", "posix.scandir", "time.monotonic"),
    *("shutil.rmtree", "asyncio.runners.run", "pathlib.Path.is_dir", "uuid.uuid4", "json.loads"),
    *("Writer.append", "Writer.submit", "Reaper.watch", "Reaper.release", "timestamps.timestamp"),
    *("ClaudeSDKClient.connect", "ClaudeSDKClient.query", "ClaudeSDKClient.disconnect", "Client.receive_raw"),
    *("locations.find_transcript", "Database.transaction", "messages.insert_many", "runs.end", "Outbox.enqueue"),
)


# How long a service may take to end after SIGTERM (seconds).
EXIT_DELAY = 60


def run_walker(*arguments: object) -> Any:
    """Return the walker's output. It runs in a process because the probes must precede the import of the service."""
    # A minimal environment, because the SDK passes all of a service's variables on to the agents.
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *map(str, arguments)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def traced(base: Path) -> dict[str, dict[str, str]]:
    """Return for each scenario the boundaries that it is the first to cross: the key of each call and its callee."""
    found: dict[str, dict[str, str]] = run_walker("trace", base)
    return found


def test_the_trace_finds_well_known_boundaries(traced: dict[str, dict[str, str]]) -> None:
    assert set(traced) == set(SCENARIOS)
    names = {name for found in traced.values() for name in found.values()}
    assert [known for known in KNOWN if not any(f".{name}".endswith(f".{known}") for name in names)] == []
    assert all(traced.values()), "a scenario crosses no new boundary"


@pytest.mark.many_rounds
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_run_ends_after_any_fault(
    base: Path, traced: dict[str, dict[str, str]], scenario: str, mode: str
) -> None:
    results = run_walker("walk", base, scenario, mode)
    findings = [f"{f['site']} in {f['thread']}: {f['invariant']}: {f['what']}" for f in results["findings"]]
    assert findings == [], f"{len(findings)} findings:\n" + "\n".join(findings)
    # Races between threads decide whether some calls happen: on a busy machine up to a third do not.
    assert results["fired"] >= 0.7 * len(traced[scenario]) - 1


def test_exemptions_name_calls_and_have_reasons() -> None:
    for exemption in EXEMPTIONS:
        source = ROOT.joinpath(*exemption.module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        assert f"{exemption.text}(" in source
        whole = exemption.module in (*STORAGE, "ccm.core.service")
        assert exemption.text or (whole and exemption.modes == ("always",))
        assert exemption.reason


@pytest.mark.parametrize(
    "fault",
    [
        ("shutil.rmtree", "always"),
        ("Reaper.release", "once"),
        ("ClaudeSDKClient.disconnect", "always"),
        ("subprocess.Popen.wait", "once"),
    ],
)
def test_a_service_exits_cleanly_after_a_fault(
    environ: dict[str, str], home: Path, project: Path, tmp_path: Path, fault: tuple[str, str]
) -> None:
    own = {"DATABASE_PATH": str(tmp_path / "db.sqlite"), "CCM_CLI_PATH": str(stand_in_cli(home))}
    through = (sys.executable, str(SERVED), *fault)
    with ServiceProcess(environ | own, through=through) as service:
        client = Client(service.url)
        run = client.start(project, json.dumps({"count": 1, "hold": True, "tool": 1000}), wait=0)
        client.wait_for_message(run["id"], "assistant")
        service.process.terminate()
        service.process.wait(EXIT_DELAY)
    log = "\n".join(service.log)
    assert service.process.returncode == 0, log
    assert "Injected" in log, "the fault was not raised"
    database = sqlite3.connect(tmp_path / "db.sqlite")
    assert database.execute("SELECT COUNT(*) FROM ccr_runs WHERE status = 'running'").fetchone() == (0,)
    database.close()
    assert marked(run["id"]) == []
