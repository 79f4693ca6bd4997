"""Imported and pruned history with the real Claude Code."""

from __future__ import annotations

import json
from pathlib import Path

from ccm.core.claude.locations import transcript_path
from ccm.testing.messages_api import MessagesAPI
from tests.client import Client
from tests.conftest import ServeFunction
from tests.core.archive.history import add_bun_run, make_bun
from tests.e2e.test_runs import prompts_sent
from tests.flask_commands import Flask, variables


def test_a_run_of_the_original_service_can_be_resumed_while_its_transcript_exists(
    serve: ServeFunction, database_url: str, tmp_path: Path, home: Path, messages_api: MessagesAPI
) -> None:
    made = Client(serve(DATABASE_PATH=tmp_path / "first.sqlite").url).start(tmp_path, "The parrot is called Polly.")
    bun = tmp_path / "bun.sqlite"
    make_bun(bun)
    add_bun_run(bun, "b1", made["sdkSessionId"], cwd=made["cwd"], result_json=json.dumps(made["result"]))
    add_bun_run(bun, "b2", "00000000-0000-4000-8000-000000000001", cwd=made["cwd"])
    before = transcript_path(made["cwd"], made["sdkSessionId"], {"HOME": str(home)}).read_bytes()

    imported = Flask(home)(database_url, "import", str(bun))

    assert "because their transcript is here: 1 run." in imported.stdout
    service = Client(serve(**variables(database_url)).url)
    prompt = f"What is the parrot called on {database_url[:6]}?"
    resumed = service.resume(made["sessionId"], prompt)
    assert [resumed["status"], resumed["parentRunId"], resumed["sessionId"]] == ["completed", "b1", made["sessionId"]]
    assert any("The parrot is called Polly." in text for text in prompts_sent(messages_api, prompt))
    assert transcript_path(made["cwd"], made["sdkSessionId"], {"HOME": str(home)}).read_bytes() == before
    assert [run["id"] for run in service.get(f"/api/sessions/{made['sessionId']}/runs").json] == ["b1", resumed["id"]]


def test_prune_removes_a_recorded_secret_everywhere(
    serve: ServeFunction, environ: dict[str, str], tmp_path: Path, project: Path
) -> None:
    secret = "sk-a-secret-that-slipped-in-4711"
    own_home = tmp_path / "home"
    own_home.mkdir()
    running = serve(HOME=own_home)
    service = Client(running.url)
    first = service.start(project, f"My key is {secret}.")
    service.fork(first["sessionId"], "Forget it.")
    running.process.terminate()
    running.wait()
    assert any(secret.encode() in file.read_bytes() for file in _files(own_home / ".claude" / "projects"))

    done = Flask(own_home)(f"sqlite:///{tmp_path}/db.sqlite", "prune", "--session", first["sessionId"])

    assert "2 sessions, 2 runs" in done.stdout
    left = [file for file in _files(tmp_path) if secret.encode() in file.read_bytes()]
    assert left == []


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
