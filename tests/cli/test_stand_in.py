"""`flask stand-in`: with the variables that it prints, a service runs real Claude Code without a login."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ccm.testing.script import DIRECTIVES
from ccm.testing.service_process import APP, ServiceProcess
from tests.client import Client
from tests.flask_commands import FLASK, call
from tests.programs import free_port
from tests.waiting import until

TOKEN = "t" * 40
STAND_IN = [*FLASK, "stand-in"]
LAST_VARIABLE = "CLAUDE_CODE_USE_FOUNDRY"
# Runs a command in a shell that has read the variables in a file.
WITH_VARIABLES = ["sh", "-c", 'set -a; . "$0"; set +a; exec "$@"']


@contextmanager
def stand_in(environ: dict[str, str], file: Path) -> Iterator[subprocess.Popen[str]]:
    """Serve the stand-in on a free port, with its variables in a file."""
    with file.open("w") as output:
        process = subprocess.Popen(
            [*STAND_IN, "--port", "0"], env=environ, cwd=APP.parent, stdout=output, stderr=subprocess.PIPE, text=True
        )
    assert process.stderr is not None
    try:
        assert "listens on http://127.0.0.1:" in process.stderr.readline()
        until(lambda: f"{LAST_VARIABLE}=\n" in file.read_text())
        yield process
    finally:
        process.terminate()
        process.communicate()
    assert process.returncode == 0


@pytest.fixture
def user(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who is set up for other APIs, which no test may call."""
    claude = tmp_path / "home" / ".claude"
    claude.mkdir(parents=True)
    (claude / "settings.json").write_text(json.dumps({"env": {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}}))
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(claude.parent),
        "CLAUDE_CODE_USE_BEDROCK": "1",
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": "example.com",
    }


def test_a_service_with_its_variables_and_own_settings_runs_claude_code(
    user: dict[str, str], tmp_path: Path, project: Path
) -> None:
    file = tmp_path / "variables"
    own = {"DATABASE_PATH": str(tmp_path / "db.sqlite"), "CCM_API_TOKEN": TOKEN, "CCM_MAX_TURNS": "5"}
    with stand_in(user, file), ServiceProcess(user | own, through=[*WITH_VARIABLES, str(file)]) as service:
        client = Client(service.url)
        write = json.dumps({"file_path": f"{project}/x", "content": "y"})
        body = {"cwd": str(project), "prompt": f"[[tool Write {write}]]"}
        sent = {"Authorization": f"Bearer {TOKEN}"}
        run = client.request("POST", "/api/runs/start?wait=60", body, sent).json

        assert [run["status"], run["result"]["result"]] == ["completed", "Done."]
        assert (project / "x").read_text() == "y"
        over = client.request("POST", "/api/runs/start", body | {"options": {"maxTurns": 6}}, sent)
        assert "CCM_MAX_TURNS" in over.error["message"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(environ: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    with stand_in(environ, tmp_path / "variables") as process:
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)

        assert [process.returncode, rest.endswith("Stopping.\n")] == [0, True]


def test_it_prints_the_variables_in_both_forms_without_serving(environ: dict[str, str]) -> None:
    port = free_port()
    shell, file = (
        call([*STAND_IN, "--port", str(port), "--print", form], environ).stdout.splitlines()
        for form in ("shell", "env-file")
    )

    assert shell == [f"export {line}" for line in file]
    assert f"ANTHROPIC_BASE_URL=http://127.0.0.1:{port}" in file


def test_the_variables_of_a_free_port_cannot_be_printed_in_advance(environ: dict[str, str]) -> None:
    result = call([*STAND_IN, "--port", "0", "--print", "shell"], environ)

    assert [result.returncode, result.stdout] == [1, ""]
    assert "Give the --port" in result.stderr


def test_a_port_in_use_is_reported(environ: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "variables"
    with stand_in(environ, file):
        port = file.read_text().partition("http://127.0.0.1:")[2].splitlines()[0]
        result = call([*STAND_IN, "--port", port], environ)

    assert [result.returncode, result.stdout] == [1, ""]
    assert f"Port {port} is in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_help_describes_every_directive(environ: dict[str, str]) -> None:
    lines = call([*STAND_IN, "--help"], environ).stdout.splitlines()

    for form, does in DIRECTIVES.values():
        assert any(line.split() == f"{form} {does}".split() for line in lines), form
