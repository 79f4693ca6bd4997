"""The version stands once, and the commands, `python app.py` and `GET /` tell it."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

from ccm import __version__
from tests.client import Client
from tests.conftest import ServeFunction
from tests.flask_commands import FLASK, call

CHANGELOG = Path(__file__).parents[2] / "ccm" / "docs" / "changelog.md"


def test_the_commands_tell_it(environ: dict[str, str]) -> None:
    lines = call([*FLASK, "version"], environ).stdout.splitlines()

    assert lines[0] == f"CC Manager {__version__}"
    assert f"Flask {version('flask')}" in lines
    assert call([sys.executable, "app.py", "--version"], environ).stdout == f"CC Manager {__version__}\n"


def test_the_service_tells_it(serve: ServeFunction) -> None:
    assert Client(serve().url).get("/").json["version"] == __version__


def test_other_arguments_of_app_py_are_refused(environ: dict[str, str]) -> None:
    for words in (["--port", "3001"], ["--helpme"], ["--version", "x"]):
        result = call([sys.executable, "app.py", *words], environ)
        assert [result.returncode, result.stdout] == [2, ""]
        assert "environment variables" in result.stderr


def test_app_py_helps_and_starts_nothing(environ: dict[str, str]) -> None:
    result = call([sys.executable, "app.py", "--help"], environ)

    assert [result.returncode, result.stderr] == [0, ""]
    assert result.stdout.startswith("Usage: python app.py")


def test_the_changelog_begins_with_it_and_goes_back_to_the_first() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+)\b", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)

    assert versions[0] == __version__
    assert versions[-1] == "0.1.0"
    assert versions == sorted(set(versions), key=lambda text: tuple(map(int, text.split("."))), reverse=True)
