"""The samples of ccm/docs/python-client.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ccm import client as module
from tests import client as plain
from tests.docs import page, samples
from tests.waiting import until

PROGRAM, RULE, ANSWER, FOLLOW_UP = samples(page("python-client"), "python")


@pytest.fixture
def names(client: plain.Client) -> dict[str, Any]:
    """Return the names that the samples use."""
    return {**vars(module), "client": module.Client(client.url)}


def bash(command: str) -> str:
    return f"[[tool Bash {json.dumps({'command': command})}]]"


def test_the_program_is_the_one_that_is_tested() -> None:
    assert Path(__file__).with_name("example.py").read_text() == PROGRAM


def test_the_rule_allows_make_and_leaves_the_rest(names: dict[str, Any], client: plain.Client, project: Path) -> None:
    exec(RULE, names)
    run = client.start(project, bash("make test") + bash("touch x"), wait=0, approvals=True)

    def pending(command: str) -> dict[str, Any]:
        found = client.get(f"/api/runs/{run['id']}/approvals").json
        return next((one for one in found if one["input"] == {"command": command}), {})

    approval = until(lambda: pending("make test"))
    assert names["rule"](approval) == {"decision": "allow", "remember": True}
    assert client.post(f"/api/approvals/{approval['id']}", names["rule"](approval)).status == 200
    assert names["rule"](until(lambda: pending("touch x"))) is None
    client.delete(f"/api/runs/{run['id']}")


def test_the_loop_answers_all_runs(
    names: dict[str, Any], client: plain.Client, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names["rule"] = lambda approval: {"decision": "deny"}
    run = client.start(project, bash("touch x"), wait=0, approvals=True)
    # The loop has no end of its own.
    exec(ANSWER.rstrip() + "\n    break\n", names)

    assert capsys.readouterr().out == "Bash deny\n"
    assert client.run(run["id"])["status"] == "completed"


def test_the_follow_up_reaches_the_run(names: dict[str, Any], client: plain.Client, project: Path) -> None:
    names["run"] = run = client.start(project, "[[slow 100 0.2]]", wait=0)
    client.wait_for_message(run["id"], "system")
    exec(FOLLOW_UP, names)

    texts = [message["message"]["content"][0]["text"] for message in client.messages(run["id"], type="user")]
    assert texts[-1] == "Keep it short."
    client.delete(f"/api/runs/{run['id']}")
