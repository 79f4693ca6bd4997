"""Every run ends, whatever is raised by anything: each call that a run's way makes beyond its module raises in turn.

`python -m tests.faults report` shows the same with what the service logged, for one call or all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.exempt import EXEMPTIONS

ROOT = Path(__file__).parents[2]
MODES = ("once", "for_ever")
SCENARIOS = (
    *("fresh", "resume", "fork", "cancel", "crash", "answer", "cancel-asking", "follow-up", "time-limit"),
    *("shutdown", "recovery"),
)
# Some that must be among what is traced, or the trace has lost its way.
KNOWN = (
    *("tempfile.mkdtemp", "subprocess.Popen", "threading.Thread.start", "posix.scandir", "time.monotonic"),
    *("shutil.rmtree", "asyncio.runners.run", "pathlib.Path.is_dir", "uuid.uuid4", "json.loads"),
    *("Recorder.append", "Recorder.submit", "Reaper.watch", "Reaper.release", "models.timestamp"),
    *("ClaudeSDKClient.connect", "ClaudeSDKClient.query", "ClaudeSDKClient.disconnect", "Client.receive_raw"),
    *("sdk.find_transcript", "Database.transaction", "messages.insert_many", "runs.end", "Outbox.tell"),
)


def run_walker(*arguments: object) -> Any:
    """What the walker prints. In a process of its own: the probes must be there before the service is imported."""
    # From nothing: the SDK passes on all that is in a service's environment.
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
    """What each scenario crosses that none before it did: by the key of the call, the name of what is called."""
    found: dict[str, dict[str, str]] = run_walker("trace", base)
    return found


def test_the_trace_finds_well_known_boundaries(traced: dict[str, dict[str, str]]) -> None:
    assert set(traced) == set(SCENARIOS)
    names = {name for found in traced.values() for name in found.values()}
    assert [known for known in KNOWN if not any(f".{name}".endswith(f".{known}") for name in names)] == []
    assert all(traced.values()), "a scenario crosses nothing of its own"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_run_ends_whatever_is_raised(
    base: Path, traced: dict[str, dict[str, str]], scenario: str, mode: str
) -> None:
    told = run_walker("walk", base, scenario, mode)
    findings = [f"{f['site']} in {f['thread']}: {f['invariant']}: {f['what']}" for f in told["findings"]]
    assert findings == [], f"{len(findings)} findings:\n" + "\n".join(findings)
    # Where threads race, a call may not be made each time.
    assert told["fired"] >= 0.9 * len(traced[scenario]) - 1


def test_exemptions_say_why() -> None:
    for exemption in EXEMPTIONS:
        assert exemption.text
        assert exemption.reason
