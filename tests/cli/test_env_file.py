"""One environment file serves `flask --env-file`, systemd's EnvironmentFile and a shell."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import dotenv
import pytest

from ccm.cli.stand_in import PREFIXES
from ccm.testing.service_process import APP
from tests.conftest import ProgramFunction
from tests.flask_commands import FLASK, call

APP_FILE = str(APP)
# What all readers take in the same way: comments on lines of their own, and in single quotes whatever has more than
# letters, digits and the signs of the unquoted values. No single quote, backslash or dollar sign within.
FILE = """\
# The service's settings.
PORT=3000
CCM_ALLOWED_HOSTS=localhost,127.0.0.1
CCM_ALLOWED_ROOTS=/srv/a:/srv/b
DATABASE_URL=postgresql://ccm:p%40ss@db.example:5432/ccm
CCM_WEBHOOK_SECRET=whsec_c2VjcmV0+/c2VjcmV0c2VjcmV0c2VjcmV0==

CCM_API_TOKEN_FILE='/srv/with a blank/tokens'
CCM_PRIVILEGED_OPTIONS='*'
CCM_API_TOKEN='a;b#c"d(e)&f|g!h~i<j>k'
"""
MEANT = {
    "PORT": "3000",
    "CCM_ALLOWED_HOSTS": "localhost,127.0.0.1",
    "CCM_ALLOWED_ROOTS": "/srv/a:/srv/b",
    "DATABASE_URL": "postgresql://ccm:p%40ss@db.example:5432/ccm",
    "CCM_WEBHOOK_SECRET": "whsec_c2VjcmV0+/c2VjcmV0c2VjcmV0c2VjcmV0==",
    "CCM_API_TOKEN_FILE": "/srv/with a blank/tokens",
    "CCM_PRIVILEGED_OPTIONS": "*",
    "CCM_API_TOKEN": 'a;b#c"d(e)&f|g!h~i<j>k',
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cc-manager.env"
    path.write_text(FILE)
    return path


def test_flask_reads_it(file: Path) -> None:
    assert dotenv.dotenv_values(file) == MEANT


def test_a_shell_reads_it(file: Path) -> None:
    shell = ["sh", "-c", 'set -a; . "$0"; env -0', str(file)]
    output = subprocess.run(shell, env={}, capture_output=True, text=True, check=True).stdout
    assert MEANT.items() <= dict(line.split("=", 1) for line in output.split("\0") if line).items()


def test_systemd_reads_it(program: ProgramFunction, tmp_path: Path) -> None:
    # systemd parses these files in the same way, and this program prints what it has read, quoted for a shell.
    program("systemd-analyze", "systemd")
    generator = "/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator"
    folder = tmp_path / "environment.d"
    folder.mkdir()
    (folder / "cc-manager.conf").write_text(FILE)
    output = subprocess.run(
        [generator], env={"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert output.stderr == ""
    assert MEANT.items() <= dict(shlex.split(line)[0].split("=", 1) for line in output.stdout.splitlines()).items()


def test_a_command_uses_its_settings(environ: dict[str, str], tmp_path: Path) -> None:
    file, database = tmp_path / "cc-manager.env", tmp_path / "with a blank.sqlite"
    file.write_text(f"DATABASE_PATH='{database}'\n")
    migrated = call([*FLASK, "--app", APP_FILE, "--env-file", str(file), "migrate"], environ, cwd=tmp_path)

    assert [migrated.returncode, migrated.stderr] == [0, ""]
    assert database.exists()
    # As its help says, what the shell has set counts more.
    shell = call(
        [*FLASK, "--app", APP_FILE, "--env-file", str(file), "migrate"], environ, tmp_path, DATABASE_PATH="/no/db"
    )
    assert "/no/db" in shell.stderr


def test_the_stand_ins_file_is_one(environ: dict[str, str], tmp_path: Path) -> None:
    for form in PREFIXES:
        result = call([*FLASK, "stand-in", "--print", form], environ | {"HOME": str(tmp_path / "a home")})
        file = tmp_path / form
        file.write_text(result.stdout)
        values = dotenv.dotenv_values(file)
        assert values["CLAUDE_CONFIG_DIR"] == f"{tmp_path}/a home/.cache/cc-manager/stand-in"
        assert values["CLAUDE_CODE_USE_BEDROCK"] == ""


@pytest.mark.parametrize("name", [".env", ".flaskenv"])
def test_settings_in_a_file_that_nobody_named_are_refused(environ: dict[str, str], tmp_path: Path, name: str) -> None:
    project = tmp_path / "project" / "below"
    project.mkdir(parents=True)
    file = project.parent / name
    file.write_text(
        "SECRET_KEY=x\nexport DATABASE_URL=postgresql://u@127.0.0.1:1/of-the-project\n'CCM_MAX_TURNS'=1\nPGHOST=h\n"
    )
    words = [*FLASK, "--app", APP_FILE, "migrate", "--status"]
    result = call(words, environ, cwd=project)

    assert [result.returncode, result.stdout] == [2, ""]
    assert f"flask has read DATABASE_URL, CCM_MAX_TURNS, PGHOST from {file}" in result.stderr
    assert "missing" in call(words, environ, cwd=project, FLASK_SKIP_DOTENV=1).stdout
    named = call([*words[:3], "--env-file", f"../{name}", *words[3:]], environ, cwd=project)
    assert "of-the-project" not in named.stderr
    assert "port 1 failed: Connection refused" in named.stderr


def test_a_file_without_settings_is_nobodys_business(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SECRET_KEY=x\nCCM=1\n")
    result = call([sys.executable, "-m", "flask", "--app", APP_FILE, "version"], environ, cwd=tmp_path)
    assert [result.returncode, result.stderr] == [0, ""]
