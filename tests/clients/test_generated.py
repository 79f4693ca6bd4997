"""The description of the API works for others: a linter accepts it, and generated clients work."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.client import Client
from tests.conftest import ProgramFunction, ServeFunction, stand_in_cli
from tests.contract import STORED
from tests.docs import filled_in, page, samples
from tests.node_packages import install, run

pytestmark = pytest.mark.openapi

TOKEN = "0123456789-a-token-of-the-tests"
# What the prompts of the two programs in the documentation make the stand-in CLI do.
SCRIPTS = {
    "Write a haiku into haiku.txt.": {"ask": [{"tool_name": "Write"}, {"tool_name": "Bash"}]},
    "What did you do?": {"result": {"result": "A haiku."}},
    "Make it a sonnet.": {"hold": True},
}


@pytest.fixture(scope="session")
def node(program: ProgramFunction, request: pytest.FixtureRequest) -> Path:
    """Return the directory in which the Node.js packages are installed."""
    program("node", "nodejs")
    npm = program("npm", "npm")
    return install(npm, request.config.cache.mkdir("node"))


class Served:
    """A service with a token and the stand-in CLI, for one of the two programs."""

    def __init__(self, url: str, project: Path, folder: Path) -> None:
        self.url = url
        self.project = project
        self.description = folder / "openapi.json"
        self._client = Client(url)
        self.description.write_bytes(self._get("/openapi.json"))

    def _get(self, path: str) -> bytes:
        answer = self._client.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status == 200
        return answer.body

    def command(self, beginning: str) -> str:
        """Return the line of the documentation that begins so and runs a program, with the arguments filled in."""
        (line,) = [text for text in samples(page("clients"), "sh") if text.startswith(beginning)]
        return f"export TOKEN={TOKEN}; " + filled_in(line, {"URL DIR": shlex.join([self.url, str(self.project)])})

    def check(self, printed: str) -> None:
        """Check what a program printed, and what it did."""
        types = ["answered", "answered", "result"]
        assert printed.splitlines() == [*types, "completed 0.25", "completed A haiku.", "fork cancelled"]
        fork, resumed, first = json.loads(self._get("/api/runs"))
        assert [run["mode"] for run in (first, resumed, fork)] == ["fresh", "resume", "fork"]
        assert [run["parentRunId"] for run in (resumed, fork)] == [first["id"], first["id"]]
        approvals = json.loads(self._get(f"/api/runs/{first['id']}/approvals"))
        assert [(each["toolName"], each["decision"]) for each in approvals] == [("Write", "allow"), ("Bash", "deny")]


@pytest.fixture
def served(serve: ServeFunction, home: Path, project: Path, tmp_path: Path) -> Served:
    service = serve(CCM_CLI_PATH=stand_in_cli(home), CCM_API_TOKEN=TOKEN)
    return Served(service.url, project, tmp_path)


def scripted(language: str) -> str:
    """Return the program of the documentation in a language, with prompts that script the stand-in CLI."""
    (program,) = samples(page("clients"), language)
    return filled_in(program, {f'"{prompt}"': json.dumps(json.dumps(script)) for prompt, script in SCRIPTS.items()})


def test_spectral_finds_nothing(node: Path) -> None:
    run(["npx", "spectral", "lint", "--ruleset", "spectral.yaml", "--fail-severity", "hint", str(STORED)], node)


def test_the_generated_typescript_client_compiles_and_works(node: Path, served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "typescript"
    folder.mkdir()
    (folder / "node_modules").symlink_to(node / "node_modules")
    for name in ("package.json", "tsconfig.json"):
        shutil.copy(node / name, folder)
    (folder / "main.ts").write_text(scripted("ts"), encoding="utf-8")
    run(
        ["npx", "openapi-typescript", str(served.description), "--default-non-nullable=false", "-o", "schema.ts"],
        folder,
    )
    run(["npx", "tsc", "--noEmit"], folder)

    served.check(run(["sh", "-c", served.command("npx tsc")], folder))


def test_the_generated_python_client_is_typed_and_works(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The generator formats the client with ruff, which it looks for there.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    run(["openapi-python-client", "generate", "--path", str(served.description), "--fail-on-warning"], tmp_path)
    folder = tmp_path / "cc-manager-client"
    (folder / "main.py").write_text(scripted("python"), encoding="utf-8")
    run([sys.executable, "-m", "mypy", "--strict", "cc_manager_client", "main.py"], folder)

    served.check(run(["sh", "-c", served.command("python main.py")], folder))
