"""The tables of error codes in ccm/docs/errors.md match the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ccm.errors import CCMError
from ccm.models import RunErrorCode
from tests.docs import page, section

ERRORS = page("errors")
CCM = Path(__file__).parents[1] / "ccm"
FILES = [CCM / "errors.py", CCM / "server/server.py", *(CCM / "api").rglob("*.py"), *(CCM / "core").rglob("*.py")]
CODE = re.compile(r"[A-Z]+(_[A-Z]+)+")
# Single-word codes cannot be recognised among the other strings.
SINGLE_WORDS = {"UNAUTHORIZED", "UNHEALTHY", "INTERRUPTED", "TIMEOUT"}
# Prefixes of environment variables and WSGI keys.
OTHER_NAMES = ("CCM_", "CLAUDE_", "DATABASE_", "HTTP_", "PATH_INFO", "REMOTE_ADDR", "GIT_", "SC_", "SCRIPT_NAME")
# The API derives these from Werkzeug's names.
NOT_OURS = {"METHOD_NOT_ALLOWED", "NOT_FOUND"}
# Errors without an exception in ccm/errors.py, those of Flask.
WITHOUT_CLASS = {(404, "NOT_FOUND"), (405, "METHOD_NOT_ALLOWED")}


def texts() -> set[str]:
    """Return every string constant in the code."""
    nodes = [node for file in FILES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def errors() -> list[str]:
    return re.findall(r"^\| \d{3} \| `(\w+)` \|", section(ERRORS, "Errors of requests"), re.M)


def classes(base: type[CCMError] = CCMError) -> list[type[CCMError]]:
    """Return the classes that are raised, which are those without subclasses."""
    subclasses = base.__subclasses__()
    return [found for subclass in subclasses for found in classes(subclass)] if subclasses else [base]


def reasons() -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", section(ERRORS, "Why a run failed"), re.M)


def test_the_page_lists_every_code() -> None:
    codes = {text for text in texts() if CODE.fullmatch(text) and not text.startswith(OTHER_NAMES)}

    assert (codes | SINGLE_WORDS) - {*errors(), *reasons()} == set()


def test_each_error_code_has_one_class_and_the_page_lists_its_status() -> None:
    table = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", section(ERRORS, "Errors of requests"), re.M)

    assert all("code" in vars(error) for error in classes())
    assert len({error.code for error in classes()}) == len(classes())
    assert {(error.status, error.code) for error in classes()} | WITHOUT_CLASS == {(int(s), code) for s, code in table}


def test_the_page_lists_the_codes_of_runs() -> None:
    assert reasons() == list(RunErrorCode)


def test_the_page_lists_only_errors_that_the_code_has() -> None:
    assert set(errors()) - texts() - NOT_OURS == set()


def test_the_page_lists_each_code_once() -> None:
    assert len(set(errors())) == len(errors())
    assert len(set(reasons())) == len(reasons())
