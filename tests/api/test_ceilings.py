"""What the operator's settings hold a request to: when it comes, and again when its run starts."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.processes import marked
from ccm.testing.service_process import ServiceProcess
from tests.api.conftest import NOWHERE, folder_of, refused
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli

KINDS = ("start", "resume", "fork")
HOLD = json.dumps({"hold": True, "count": 1})
AGENT = {"description": "Writes poems.", "prompt": "You are a poet."}


def spy_cli(folder: Path) -> Path:
    """The stand-in CLI, which first writes down its arguments, one a line, in a file named after its session."""
    spy = folder / "spy"
    spy.write_text(
        f'#!/bin/sh\nfor a; do case "$a" in --session-id=*) id=${{a#*=}};; esac; done\n'
        f'printf "%s\\n" "$@" > {folder}/$id.arguments\nexec {stand_in_cli(folder)} "$@"\n'
    )
    spy.chmod(0o755)
    return spy


def after(folder: Path, run: Mapping[str, Any], flag: str) -> str:
    """What Claude Code was given for a flag in a run."""
    arguments = (folder / f"{run['sdkSessionId']}.arguments").read_text().split("\n")
    assert arguments.count(flag) == 1
    return arguments[arguments.index(flag) + 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the services' Claude Code is, and writes down what it was given."""
    return tmp_path_factory.mktemp("ceilings")


@pytest.fixture(scope="module")
def low(serve_all: ServeFunction, folder: Path) -> Client:
    """A client of a service with a ceiling on everything."""
    own = {"CCM_MAX_TURNS": "5", "CCM_MAX_BUDGET_USD": "0.50", "CCM_RUN_TIMEOUT": "1m"}
    return Client(serve_all(**own, CCM_CLI_PATH=spy_cli(folder), CCM_PRIVILEGED_OPTIONS="extraArgs").url)


def body_for(kind: str, project: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    place = {"cwd": str(project)} if kind == "start" else {"sessionId": NOWHERE}
    return {**place, "prompt": "Hello.", **fields}


# ---- when a request comes


# What is asked for, and the field and the setting that the refusal names.
TOO_MUCH: list[tuple[dict[str, Any], str, str]] = [
    ({"options": {"maxTurns": 6}}, "options.maxTurns", "CCM_MAX_TURNS"),
    ({"options": {"maxBudgetUsd": 0.51}}, "options.maxBudgetUsd", "CCM_MAX_BUDGET_USD"),
    (
        {"options": {"agents": {"poet": AGENT, "critic": {**AGENT, "maxTurns": 6}}}},
        "options.agents.critic.maxTurns",
        "CCM_MAX_TURNS",
    ),
    ({"timeoutMs": 60_001}, "timeoutMs", "CCM_RUN_TIMEOUT"),
]


@pytest.mark.parametrize(("fields", "field", "setting"), TOO_MUCH, ids=[field for _, field, _ in TOO_MUCH])
def test_more_than_a_ceiling_is_forbidden(
    low: Client, project: Path, fields: Mapping[str, Any], field: str, setting: str
) -> None:
    code = "TIMEOUT_FORBIDDEN" if field == "timeoutMs" else "OPTION_FORBIDDEN"
    for kind in KINDS:
        answer = low.post(f"/api/runs/{kind}", body_for(kind, project, fields))
        assert setting in refused(answer, field, 403, code)


def test_a_request_that_names_nothing_gets_the_ceilings(low: Client, folder: Path, project: Path) -> None:
    run = low.start(project, "Hello.")

    assert [run["status"], run["options"], run["timeoutMs"]] == ["completed", {}, None]
    assert [after(folder, run, "--max-turns"), after(folder, run, "--max-budget-usd")] == ["5", "0.5"]


@pytest.mark.parametrize(
    "fields",
    [
        {"options": {"maxTurns": 5, "maxBudgetUsd": 0.5}, "timeoutMs": 60_000},
        {"options": {"maxTurns": 1, "maxBudgetUsd": 0.01}, "timeoutMs": 30_000},
    ],
    ids=["as much", "less"],
)
def test_a_request_may_name_as_much_or_less(low: Client, folder: Path, project: Path, fields: dict[str, Any]) -> None:
    start = low.start(project, "Hello.", **fields)
    for run in (
        start,
        low.resume(start["sessionId"], "More.", **fields),
        low.fork(start["sessionId"], "Or.", **fields),
    ):
        assert run["status"] == "completed"
        assert {name: run[name] for name in fields} == fields
        assert low.run(run["id"]) == run
        assert after(folder, run, "--max-turns") == str(fields["options"]["maxTurns"])
        assert after(folder, run, "--max-budget-usd") == str(fields["options"]["maxBudgetUsd"])


@pytest.mark.parametrize("name", ["max-turns", "max-budget-usd", "setting-sources"])
def test_no_extra_argument_goes_past_a_ceiling(low: Client, project: Path, name: str) -> None:
    answer = low.post("/api/runs/start", body_for("start", project, {"options": {"extraArgs": {name: "1"}}}))
    assert f"--{name}" in refused(answer, "options.extraArgs")


def test_without_a_setting_there_is_no_ceiling(quick: Client, project: Path) -> None:
    fields: dict[str, Any] = {"options": {"maxTurns": 1_000_000, "maxBudgetUsd": 1_000_000}, "timeoutMs": 86_400_000}
    assert quick.start(project, "Hello.", **fields)["status"] == "completed"


# ---- when its run starts


@pytest.fixture
def served(serve: ServeFunction, tmp_path: Path, database_url: str) -> Callable[..., ServiceProcess]:
    """Starts services on one database, of each kind, with a Claude Code that writes down what it is given."""
    own = {"DATABASE_URL": database_url} if database_url.startswith("postgresql") else {}
    spy = spy_cli(tmp_path)
    return lambda **settings: serve(HOME=tmp_path, CCM_CLI_PATH=spy, **own, **settings)


def restart_while_waiting(
    served: Callable[..., ServiceProcess],
    cwd: Path,
    first: Mapping[str, object],
    then: Mapping[str, object],
    **fields: Any,
) -> dict[str, Any]:
    """A run that was accepted under the first settings and comes to its turn under the later ones; it has ended."""
    service = served(CCM_MAX_CONCURRENT_RUNS=1, **first)
    client = Client(service.url)
    client.start(cwd, HOLD, wait=0)
    waiting = client.start(cwd, "Hello.", wait=0, **fields)
    assert waiting["startedAt"] is None
    service.process.terminate()
    assert service.wait() == 0
    return Client(served(**then).url).run(waiting["id"])


def test_a_run_that_has_waited_is_held_to_the_ceilings_of_its_start(
    served: Callable[..., ServiceProcess], tmp_path: Path, project: Path
) -> None:
    asked: dict[str, Any] = {"options": {"maxTurns": 50, "maxBudgetUsd": 0.25}, "timeoutMs": 120_000}
    lower = {"CCM_MAX_TURNS": 5, "CCM_MAX_BUDGET_USD": 1, "CCM_RUN_TIMEOUT": "1m"}
    run = restart_while_waiting(served, project, {}, lower, **asked)

    assert [run["status"], run["options"], run["timeoutMs"]] == ["completed", asked["options"], 120_000]
    assert [after(tmp_path, run, "--max-turns"), after(tmp_path, run, "--max-budget-usd")] == ["5", "0.25"]


@pytest.mark.parametrize(
    ("first", "then", "options"),
    [
        ({}, {"CCM_SETTING_SOURCES": "user"}, {"settingSources": ["user", "project"]}),
        ({"CCM_PRIVILEGED_OPTIONS": "env"}, {}, {"env": {"GREETING": "hello"}}),
    ],
)
def test_a_run_that_has_waited_is_held_to_the_policy_of_its_start(
    served: Callable[..., ServiceProcess],
    project: Path,
    first: Mapping[str, object],
    then: Mapping[str, object],
    options: Mapping[str, Any],
) -> None:
    run = restart_while_waiting(served, project, first, then, options=options)

    assert [run["status"], run["error"]["code"], run["messageCount"]] == ["error", "OPTION_FORBIDDEN", 0]
    assert "CCM_PRIVILEGED_OPTIONS" in run["error"]["message"]


def test_a_run_that_has_waited_is_held_to_the_roots_of_its_start(
    served: Callable[..., ServiceProcess], tmp_path: Path, project: Path
) -> None:
    run = restart_while_waiting(served, project, {}, {"CCM_ALLOWED_ROOTS": folder_of(tmp_path, "elsewhere")})

    assert [run["status"], run["error"]["code"], run["messageCount"]] == ["error", "CWD_FORBIDDEN", 0]
    assert "CCM_ALLOWED_ROOTS" in run["error"]["message"]


# ---- sessions whose directory lies outside the roots


def test_a_session_outside_the_roots_is_continued_only_by_a_fork_into_them(
    served: Callable[..., ServiceProcess], tmp_path: Path, project: Path
) -> None:
    service = served()
    run = Client(service.url).start(project, "Hello.")
    service.process.terminate()
    assert service.wait() == 0
    allowed = folder_of(tmp_path, "allowed")
    client = Client(served(CCM_ALLOWED_ROOTS=allowed).url)

    for kind in ("resume", "fork"):
        answer = client.post(f"/api/runs/{kind}", {"sessionId": run["sessionId"], "prompt": "x"})
        assert "CCM_ALLOWED_ROOTS" in refused(answer, None, 403, "CWD_FORBIDDEN")
    by_point = {"sessionId": run["sessionId"], "prompt": "x", "atRunId": run["id"]}
    refused(client.post("/api/runs/fork", by_point), None, 403, "CWD_FORBIDDEN")
    refused(client.post("/api/runs/fork", {**by_point, "cwd": str(project)}), "cwd", 403, "CWD_FORBIDDEN")
    assert len(client.get("/api/runs").json) == 1
    fork = client.fork(run["sessionId"], "x", cwd=str(allowed))
    assert [fork["status"], fork["cwd"]] == ["completed", str(allowed)]


def test_a_directory_that_has_become_a_link_out_of_the_roots_is_outside_them(
    served: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    allowed = folder_of(tmp_path, "allowed")
    inside, outside = folder_of(allowed), folder_of(tmp_path, "outside")
    client = Client(served(CCM_ALLOWED_ROOTS=allowed).url)
    run = client.start(inside, "Hello.")
    inside.rmdir()
    inside.symlink_to(outside)

    for kind in ("resume", "fork"):
        answer = client.post(f"/api/runs/{kind}", {"sessionId": run["sessionId"], "prompt": "x"})
        refused(answer, None, 403, "CWD_FORBIDDEN")


# ---- time


def test_time_counts_from_the_start_and_not_in_the_queue(serve: ServeFunction, home: Path, project: Path) -> None:
    client = Client(serve(CCM_CLI_PATH=stand_in_cli(home), CCM_MAX_CONCURRENT_RUNS=1).url)
    first = client.start(project, HOLD, wait=0, timeoutMs=4_000)
    second = client.start(project, "Hello.", timeoutMs=3_500)

    assert client.run(first["id"])["error"]["code"] == "TIMEOUT"
    assert [second["status"], second["error"]] == ["completed", None]


def test_the_services_time_limit_needs_no_word_of_the_request(serve: ServeFunction, home: Path, project: Path) -> None:
    client = Client(serve(CCM_CLI_PATH=stand_in_cli(home), CCM_RUN_TIMEOUT="1s").url)
    run = client.start(project, HOLD)

    assert [run["status"], run["error"]["code"], run["timeoutMs"]] == ["error", "TIMEOUT", None]
    assert "CCM_RUN_TIMEOUT" in run["error"]["message"]
    assert marked(run["id"]) == []
    answer = client.delete(f"/api/runs/{run['id']}")
    assert [answer.status, answer.error["code"]] == [409, "RUN_ALREADY_ENDED"]
    assert client.resume(run["sessionId"], "Hello.")["status"] == "completed"


def test_time_and_cancel_racing_completion_have_one_outcome(serve: ServeFunction, home: Path, project: Path) -> None:
    client = Client(serve(CCM_CLI_PATH=stand_in_cli(home), CCM_MAX_CONCURRENT_RUNS=8).url)
    chance = random.Random(11)

    def race(number: int) -> str:
        run = client.start(project, "hello", wait=0, timeoutMs=chance.randint(1, 600))
        answer = None
        if number % 2:
            threading.Event().wait(chance.random() * 0.2)  # not to synchronise: to meet it at any moment of its life
            answer = client.delete(f"/api/runs/{run['id']}")
        ended = client.run(run["id"])
        outcome = str(ended["error"]["code"] if ended["error"] else ended["status"])
        assert outcome in ("completed", "TIMEOUT", "cancelled")
        assert (outcome == "cancelled") == (answer is not None and answer.status == 200)
        assert client.run(run["id"]) == ended
        assert marked(run["id"]) == []
        return outcome

    with ThreadPoolExecutor(8) as pool:
        outcomes = set(pool.map(race, range(300)))
    assert outcomes == {"completed", "TIMEOUT", "cancelled"}
    assert client.get("/api/runs", status="running").json == []
