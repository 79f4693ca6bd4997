"""`flask demo --serve` heeds the settings that it is given, and its commands fit them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from ccm.demo.client import DemoClient
from ccm.demo.tour import settings_in
from ccm.errors import CommandRefused
from ccm.settings.settings import Settings
from ccm.testing.service_process import APP
from tests.client import Client
from tests.conftest import stand_in_cli
from tests.flask_commands import FLASK

TOKEN = "a-token-that-is-never-printed"


def serve(environ: dict[str, str], **settings: object) -> tuple[subprocess.Popen[str], str]:
    """Start the demo in a session of its own, and return it with its output up to the end of the tour."""
    own = {name: str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [*FLASK, "demo", "--serve"],
        env=environ | own,
        cwd=APP.parent,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("Serving on "):
            return process, output
    raise AssertionError(output)


def stop(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_its_service_has_the_given_settings(environ: dict[str, str], home: Path, tmp_path: Path) -> None:
    root, database = tmp_path / "root", tmp_path / "db.sqlite"
    root.mkdir()
    process, output = serve(
        environ,
        CCM_ALLOWED_ROOTS=root,
        CCM_API_TOKEN=TOKEN,
        CCM_CLI_PATH=stand_in_cli(home),
        CCM_RUN_ID="of an agent that has started the demo",
        DATABASE_PATH=database,
        LOG_LEVEL="debug",
    )
    try:
        address = output.rpartition("Serving on ")[2].partition(" ")[0]
        assert Client(address).get("/api/runs").status == 401
        runs = Client(address).request("GET", "/api/runs", headers={"Authorization": f"Bearer {TOKEN}"}).json
        assert [run["mode"] for run in runs] == ["fresh", "fork", "resume", "fresh"]
        assert {run["createdBy"] for run in runs} == {"api"}
        assert {Path(run["cwd"]).parent for run in runs} == {root}
    finally:
        stop(process)

    assert database.exists()
    assert list(root.iterdir()) == []
    assert TOKEN not in output
    given = "CCM_ALLOWED_ROOTS, CCM_API_TOKEN, CCM_CLI_PATH, CCM_SPARE_RUNS, DATABASE_PATH, LOG_LEVEL, PORT"
    assert f"Its settings from your environment: {given}.\n" in output
    assert "$TOKEN in the commands: TOKEN=$CCM_API_TOKEN\n" in output
    commands = [line for line in output.splitlines() if line.startswith("   $ curl")]
    assert len(commands) == 6
    assert all('-H "Authorization: Bearer $TOKEN"' in command for command in commands)


def test_a_step_that_the_settings_refuse_ends_the_tour_and_not_the_service(
    environ: dict[str, str], home: Path, tmp_path: Path
) -> None:
    settings = {"CCM_CLI_PATH": home / "no-claude", "CCM_UNIX_SOCKET": tmp_path / "socket"}
    process, output = serve(environ, **settings)
    try:
        assert '"code": "CLI_NOT_FOUND"' in output
        assert '"code": "SESSION_NOT_RESUMABLE"' in output
        assert "The tour ends, because the service refused this step." in output
        assert Client(f"unix:{tmp_path / 'socket'}").get("/api/runs").status == 200
    finally:
        stop(process)


def test_only_the_services_settings_are_taken_from_the_environment() -> None:
    settings = {"HOST": "::1", "CCM_MAX_TURNS": "5", "CCM_SETTING_SOURCES": "", "CCM_MISSPELT": "1"}
    others = {"HOME": "/root", "CCM_RUN_ID": "x", "CCM_WEBHOOK_URL": " ", "PGPASSWORD": "x", "ANTHROPIC_API_KEY": "x"}

    assert settings_in(settings | others) == {"PORT": "3000"} | settings
    url = {"DATABASE_URL": "postgresql:///ccm", "PGPASSWORD": "x", "PORT": "1"}
    assert settings_in(others | url) == url


@pytest.mark.parametrize(
    ("address", "settings", "expected"),
    [
        ("http://127.0.0.1:3000", {}, "curl -s 'http://127.0.0.1:3000/x?y'"),
        ("http://0.0.0.0:3000", {}, "curl -s 'http://127.0.0.1:3000/x?y'"),
        ("http://[::]:3000", {}, "curl -s 'http://[::1]:3000/x?y'"),
        ("http://localhost:3000", {}, "curl -s 'http://localhost:3000/x?y'"),
        (
            "http://127.0.0.1:3000",
            {"CCM_ALLOWED_HOSTS": "agents.example"},
            "curl -s -H 'Host: agents.example' 'http://127.0.0.1:3000/x?y'",
        ),
        (
            "unix:/run/a socket",
            {"CCM_UNIX_SOCKET": "/run/a socket"},
            "curl -s --unix-socket '/run/a socket' 'http://localhost/x?y'",
        ),
        (
            "http://127.0.0.1:3000",
            {"CCM_API_TOKEN": TOKEN},
            "curl -s -H \"Authorization: Bearer $TOKEN\" 'http://127.0.0.1:3000/x?y'",
        ),
    ],
)
def test_commands_fit_the_settings(address: str, settings: dict[str, str], expected: str) -> None:
    client = DemoClient(address, Settings.from_env(settings))
    assert client.command("GET", "/x?y") == expected


def test_the_token_of_a_file_is_found_by_the_command_that_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "the tokens"
    file.write_text(f"# comment\nme:{TOKEN}\nyou:{TOKEN}2\n")
    file.chmod(0o600)
    client = DemoClient("http://127.0.0.1:3000", Settings.from_env({"CCM_API_TOKEN_FILE": str(file)}))

    [note] = client.notes
    shell = f'{note.partition(": ")[2]}; printf %s "$TOKEN"'
    assert subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout == TOKEN
    assert shlex.split(client.command("GET", "/"))[2:4] == ["-H", "Authorization: Bearer $TOKEN"]


def test_a_file_without_tokens_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("")
    file.chmod(0o600)
    with pytest.raises(CommandRefused, match="flask token NAME"):
        DemoClient("http://127.0.0.1:3000", Settings.from_env({"CCM_API_TOKEN_FILE": str(file)}))
