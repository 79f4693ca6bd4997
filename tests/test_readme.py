"""The README's tables of codes beside the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.readme import README

CCM = Path(__file__).parents[1] / "ccm"
FILES = [CCM / "errors.py", CCM / "server/server.py", *(CCM / "api").rglob("*.py"), *(CCM / "core").rglob("*.py")]
CODE = re.compile(r"[A-Z]+(_[A-Z]+)+")
# Codes of a single word cannot be told from other words of the code's own.
SINGLE_WORDS = {"UNAUTHORIZED", "UNHEALTHY", "INTERRUPTED", "TIMEOUT"}
# Names of variables and of WSGI's keys.
OTHER_NAMES = ("CCM_", "CLAUDE_", "DATABASE_", "HTTP_", "PATH_INFO", "REMOTE_ADDR", "SCRIPT_NAME")
# Werkzeug's own names, which the API takes over.
NOT_OURS = {"METHOD_NOT_ALLOWED"}


def texts() -> set[str]:
    """Every text that stands in the code."""
    nodes = [node for file in FILES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def section(title: str) -> str:
    """What stands under a heading of the README, up to the next one."""
    return README.read_text(encoding="utf-8").partition(f"\n### {title}\n")[2].partition("\n#")[0]


def errors() -> list[str]:
    return re.findall(r"^\| \d{3} \| `(\w+)` \|", section("Errors"), re.M)


def reasons() -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", section("Why a run failed"), re.M)


def test_the_readme_has_every_code() -> None:
    codes = {text for text in texts() if CODE.fullmatch(text) and not text.startswith(OTHER_NAMES)}

    assert (codes | SINGLE_WORDS) - {*errors(), *reasons()} == set()


def test_the_readme_has_no_error_that_is_never_given() -> None:
    assert set(errors()) - texts() - NOT_OURS == set()


def test_the_readme_has_each_code_once() -> None:
    assert len(set(errors())) == len(errors())
    assert len(set(reasons())) == len(reasons())
