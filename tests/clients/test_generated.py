"""Clients are generated from the API's document, and the programs of ccm/docs/clients.md run with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from ccm.testing.service_process import APP
from tests.client import Client
from tests.conftest import ProgramFunction
from tests.docs import filled_in, page, samples

# The generated client's own fixed text, the same for any document, passes `*args: object` on to httpx.
MYPY = "[mypy]\nstrict = True\n[mypy-cc_manager_client.client]\ndisable_error_code = arg-type\n"
TSCONFIG = {
    "compilerOptions": {
        "strict": True,
        "noUncheckedIndexedAccess": True,
        "exactOptionalPropertyTypes": True,
        "module": "nodenext",
        "target": "es2023",
        "outDir": "out",
        "types": ["node"],
    },
    "include": ["src"],
}


def call(folder: Path, *words: str, **variables: str) -> str:
    """Run a command in a folder and return its output.

    Raises:
        AssertionError: it failed.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = {**os.environ, "PATH": path, **variables}
    done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "openapi.json"
    path.write_text(call(tmp_path, sys.executable, "-m", "flask", "--app", str(APP), "openapi"))
    return path


def prompts(project: Path) -> Mapping[str, str]:
    """Return what the stand-in is told instead of the programs' prompts."""
    tool = json.dumps({"file_path": f"{project}/haiku.txt", "content": "a run becomes rows"})
    return {
        '"Write a haiku into haiku.txt."': json.dumps(f"[[tool Write {tool}]] [[text Written.]]"),
        '"Make it a sonnet."': json.dumps("[[hang]]"),
    }


def check(output: str, project: Path) -> None:
    *types, completed, last = output.splitlines()
    assert [types[0], types[-1], completed, last] == ["system", "result", "completed", "completed cancelled"]
    assert (project / "haiku.txt").read_text() == "a run becomes rows"


def test_a_python_client(document: Path, client: Client, project: Path) -> None:
    pytest.importorskip("openapi_python_client")
    folder = document.parent
    call(
        folder, "openapi-python-client", "generate", "--path", document.name, "--meta", "none",
        "--output-path", "cc_manager_client", "--fail-on-warning",
    )  # fmt: skip
    (folder / "program.py").write_text(filled_in(samples(page("clients"), "python")[0], prompts(project)))
    (folder / "mypy.ini").write_text(MYPY)
    call(folder, sys.executable, "-m", "mypy", "-p", "cc_manager_client", "-m", "program")

    check(call(folder, sys.executable, "program.py", client.url, "none", str(project)), project)


def test_a_typescript_client(document: Path, client: Client, project: Path, program: ProgramFunction) -> None:
    program("node", "nodejs")
    npm, folder = program("npm", "npm"), document.parent
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    (folder / "tsconfig.json").write_text(json.dumps(TSCONFIG))
    (folder / "src").mkdir()
    (folder / "src/program.ts").write_text(filled_in(samples(page("clients"), "ts")[0], prompts(project)))
    install, _, generate = samples(page("clients"), "sh")[1].partition("\n")
    assert install.startswith("npm install ")
    call(folder, "bash", "-ec", filled_in(install, {"npm": npm}) + "\n" + generate)

    check(call(folder, shutil.which("node") or "node", "out/program.js", client.url, "", str(project)), project)
