"""Imports at the start: only the necessary modules, because imports take most of a start's time."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from ccm.core.service import Service
from tests.flask_commands import call

# Modules that are imported later, and why a start does not need them.
LATER = {
    "claude_agent_sdk": "the first run needs it",
    "mcp": "the SDK imports it",
    "anyio": "the SDK imports it",
    "httpx2": "the SDK imports it",
    "starlette": "the SDK imports it",
    "opentelemetry": "the SDK imports it",
    "jsonschema": "the SDK imports it",
    "ccm.core.claude.execution": "the first run needs it",
    "ccm.core.claude.sdk": "the first run needs it",
    "psycopg": "PostgreSQL needs it",
    "ccm.db.driver.postgresql": "PostgreSQL needs it",
}
# Modules that only `flask` imports at the start, for its commands.
COMMANDS = {
    "ccm.cli": "`flask` needs it",
    "ccm.core.archive": "`flask export`, `flask import` and `flask prune` need it",
    "ccm.demo": "`flask demo` needs it",
}
# Starts the service and prints the modules imported by the time it listens.
LISTEN = """
import os, signal, sys, app
from ccm.core.service import Service

def show_modules():
    print(*sys.modules, sep="\\n")
    os.kill(os.getpid(), signal.SIGTERM)

Service.import_sdk = staticmethod(show_modules)
sys.exit(app.main())
"""
CREATE = """
import sys, app
app.create_app()
print(*sys.modules, sep="\\n")
"""
IMPORT_SDK = """
import sys
from ccm.core.service import Service
Service.import_sdk()
print(*sys.modules, sep="\\n")
"""


def python(code: str, environ: dict[str, str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return call([sys.executable, "-c", code], environ, DATABASE_PATH=tmp_path / "db.sqlite", PORT=0)


@pytest.mark.parametrize(("code", "later"), [(LISTEN, LATER | COMMANDS), (CREATE, LATER)], ids=["python", "flask"])
def test_a_start_imports_only_what_it_needs(
    environ: dict[str, str], tmp_path: Path, code: str, later: dict[str, str]
) -> None:
    result = python(code, environ, tmp_path)

    assert result.returncode == 0, result.stderr
    imported = result.stdout.split()
    assert "ccm.core.service" in imported
    assert {name: why for name, why in later.items() if name in imported} == {}


def test_the_sdk_is_imported_before_the_first_run_needs_it(environ: dict[str, str], tmp_path: Path) -> None:
    result = python(IMPORT_SDK, environ, tmp_path)

    assert {"ccm.core.claude.execution", "claude_agent_sdk"} <= set(result.stdout.split()), result.stderr


def test_an_sdk_that_cannot_be_imported_stops_the_service(environ: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "claude_agent_sdk"
    broken.mkdir()
    (broken / "__init__.py").write_text("import a_package_that_is_not_installed\n")
    result = python("import sys, app; sys.exit(app.main())", environ | {"PYTHONPATH": str(tmp_path)}, tmp_path)

    assert result.returncode == 1
    assert "a_package_that_is_not_installed" in result.stderr
    assert "the Claude Agent SDK cannot be imported" in result.stderr


def test_without_the_sdk_the_service_does_not_start(environ: dict[str, str], tmp_path: Path) -> None:
    hide = "import sys; sys.modules['claude_agent_sdk'] = None; import app; sys.exit(app.main())"
    result = python(hide, environ, tmp_path)

    assert result.returncode == 1
    assert "claude_agent_sdk" in result.stderr


def test_a_temporary_failure_to_import_the_sdk_does_not_stop_the_service(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OutOfDescriptors:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "ccm.core.claude.execution":
                raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.delitem(sys.modules, "ccm.core.claude.execution", raising=False)
    monkeypatch.setattr(sys, "meta_path", [OutOfDescriptors(), *sys.meta_path])
    Service.import_sdk()

    assert "the first run imports it" in caplog.text
