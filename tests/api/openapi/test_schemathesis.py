"""Requests that schemathesis derives from the description: valid and invalid ones, and sequences of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ccm.api.http.query import cursor_of
from ccm.testing.service_process import APP
from tests.api.conftest import stack_traces
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.waiting import until

pytestmark = pytest.mark.openapi

CHECKS = Path(__file__).with_name("schemathesis_checks.py")
TOKEN = "0123456789-a-token-of-the-tests"
# For each operation and phase.
EXAMPLES = 20
# How many approvals wait for an answer.
APPROVALS = 20
# Nothing listens at this port.
HOOK = "127.0.0.1:9"
# Values that schemathesis uses instead of random ones, which would be refused nearly always: no random text is a
# directory or an image. A wait would take its time.
CONFIGURATION = """\
hooks = {hooks}
[parameters]
"body.approvals" = true
"body.cwd" = {project}
"body.images" = []
"body.webhookUrl" = {hook}
"query.cursor" = {cursor}
"query.wait" = 0
"body.atRunId" = {{ dictionary = "runs", probability = 0.5 }}
"body.sessionId" = {{ dictionary = "sessions", probability = 0.8 }}
"path.approvalId" = {{ dictionary = "approvals", probability = 0.5 }}
"path.runId" = {{ dictionary = "runs", probability = 0.5 }}
"path.sessionId" = {{ dictionary = "sessions", probability = 0.5 }}
[dictionaries]
approvals.values = {approvals}
runs.values = {runs}
sessions.values = {sessions}
"""
# `valid_requests_are_accepted` replaces the first. A DELETE cancels a run, which stays.
LEFT_OUT = "positive_data_acceptance,use_after_free"


@pytest.mark.parametrize("token", ["", TOKEN], ids=["without a token", "with a token"])
def test_the_service_does_what_the_description_says(
    serve: ServeFunction, home: Path, project: Path, tmp_path: Path, token: str
) -> None:
    # Coverage takes most of the time, and a token makes no difference to what it covers.
    phases = ["Examples", "Fuzzing", "Stateful"] if token else ["Examples", "Coverage", "Fuzzing", "Stateful"]
    settings = {"CCM_API_TOKEN": token} if token else {}
    service = serve(CCM_CLI_PATH=stand_in_cli(home), CCM_WEBHOOK_ALLOW=HOOK, **settings)
    client = Client(service.url)
    sent = {"Authorization": f"Bearer {token}"} if token else {}
    description = client.request("GET", "/openapi.json", headers=sent).json
    if token:
        description["security"] = [{"bearer": []}]  # it is no longer one of two possibilities
    # The example of a start has a directory, which must exist here.
    text = json.dumps(description).replace("/home/me/project", str(project))
    (tmp_path / "openapi.json").write_text(text, encoding="utf-8")
    asking = json.dumps({"ask": [{"tool_name": "Bash"}] * APPROVALS, "at_once": True})
    body = {"cwd": str(project), "prompt": asking, "approvals": True}
    asking_run = client.request("POST", "/api/runs/start", body, sent).json
    path = f"/api/runs/{asking_run['id']}/approvals"
    until(lambda: len(client.request("GET", path, headers=sent).json) == APPROVALS)
    ended_run = client.request("POST", "/api/runs/start?wait=60", {**body, "prompt": "Hello."}, sent).json
    assert ended_run["status"] == "completed"
    values = {
        "hooks": str(CHECKS),
        "project": str(project),
        "hook": f"http://{HOOK}/",
        "cursor": cursor_of(10**6),
        "approvals": [approval["id"] for approval in client.request("GET", path, headers=sent).json],
        "runs": [asking_run["id"], ended_run["id"]],
        "sessions": [asking_run["sessionId"], ended_run["sessionId"]],
    }
    configuration = CONFIGURATION.format(**{name: json.dumps(value) for name, value in values.items()})
    (tmp_path / "schemathesis.toml").write_text(configuration, encoding="utf-8")
    words = [
        str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.json", "--url", service.url,
        "--checks", "all", "--exclude-checks", LEFT_OUT, "--exclude-operation-id-regex", "^stream",
        "--seed", "1", "--max-examples", str(EXAMPLES), "--request-timeout", "120", "--continue-on-failure",
        "--phases", ",".join(phases).lower(),
        *(option for name, value in sent.items() for option in ("--header", f"{name}: {value}")),
    ]  # fmt: skip
    ran = subprocess.run(
        words,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(APP.parent)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout
    assert [phase for phase in phases if f"{phase} (in" not in ran.stdout] == []
    # The requests got behind the validation.
    runs = client.request("GET", "/api/runs?limit=1000", headers=sent).json
    assert len(runs) > (100 if "Coverage" in phases else 10)
    assert {run["mode"] for run in runs} == {"fresh", "resume", "fork"}
    assert any(approval["decision"] for approval in client.request("GET", path, headers=sent).json)
    assert stack_traces(service) == []
