"""The ends of runs with the real Claude Code: failures, session rules, and the end of the service."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ccm.core.claude.processes import marked
from tests.client import Client
from tests.conftest import ServeFunction
from tests.waiting import until

SLOW = "[[slow 2000 0.02]]"
SLEEPING_TOOL = '[[tool Bash {"command": "perl -e \\"sleep 300\\""}]]'


def commands(run_id: str) -> str:
    """Return the command lines of a run's processes."""
    lines = []
    for pid in marked(run_id):
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return "\n".join(lines)


# ---- failures


def test_a_run_that_reaches_max_turns_fails(client: Client, project: Path) -> None:
    run = client.start(project, '[[tool Bash {"command": "ls"}]] [[text Done.]]', options={"maxTurns": 1})

    assert [run["status"], run["error"]["code"]] == ["error", "MAX_TURNS_REACHED"]
    assert run["resultType"] == run["result"]["subtype"] == "error_max_turns"


@pytest.mark.parametrize(("status", "code"), [(400, "API_ERROR"), (403, "AUTHENTICATION_FAILED")])
def test_an_api_error_fails_the_run(client: Client, project: Path, status: int, code: str) -> None:
    run = client.start(project, f"[[status {status}]]")

    assert [run["status"], run["error"]["code"]] == ["error", code]
    assert run["result"]["subtype"] == "success"  # Claude Code reports success; only is_error counts
    assert str(status) in run["error"]["message"]


def test_the_error_of_a_missing_login_says_what_to_do(serve: ServeFunction, project: Path) -> None:
    run = Client(serve(ANTHROPIC_API_KEY="").url).start(project, "Hello.")

    assert [run["status"], run["error"]["code"]] == ["error", "AUTHENTICATION_FAILED"]
    assert "ANTHROPIC_API_KEY" in run["error"]["message"]


def test_a_refused_login_fails_the_run_at_the_second_refusal(client: Client, project: Path) -> None:
    run = client.start(project, "[[status 401]]")

    assert [run["status"], run["error"]["code"]] == ["error", "AUTHENTICATION_FAILED"]
    # Claude Code itself retries for three minutes.
    assert len([m for m in client.messages(run["id"]) if m.get("subtype") == "api_retry"]) == 2


def test_a_temporary_api_error_does_not_fail_the_run(client: Client, project: Path) -> None:
    run = client.start(project, "Try me. [[status 500 1]] [[text Now.]]")

    assert run["status"] == "completed"
    assert run["result"]["result"] == "Now."


@pytest.mark.main_job
def test_a_failed_run_can_be_continued(client: Client, project: Path) -> None:
    failed = client.start(project, "[[status 400]]")
    assert failed["status"] == "error"
    assert client.resume(failed["sessionId"], "Once more.")["status"] == "completed"


def test_a_missing_cli_fails_the_run_and_the_health_check(serve: ServeFunction, project: Path, tmp_path: Path) -> None:
    client = Client(serve(CCM_CLI_PATH=tmp_path / "nowhere").url)
    run = client.start(project, "Hello.")

    assert [run["status"], run["error"]["code"]] == ["error", "CLI_NOT_FOUND"]
    assert "CCM_CLI_PATH" in run["error"]["message"]
    health = client.get("/health")
    assert [health.status, health.json["error"]["code"]] == [503, "UNHEALTHY"]


def test_a_session_whose_directory_is_gone_cannot_be_resumed(client: Client, project: Path) -> None:
    run = client.start(project, "Hello.")
    (project / "here-is-a-file.txt").unlink()
    project.rmdir()

    answer = client.post("/api/runs/resume", {"sessionId": run["sessionId"], "prompt": "x"})
    assert [answer.status, answer.error["code"]] == [409, "SESSION_NOT_RESUMABLE"]


# ---- the rules of a session


def test_a_busy_session_refuses_a_resume_and_names_its_run(client: Client, project: Path) -> None:
    first = client.start(project, "Hello.")
    busy = client.resume(first["sessionId"], SLOW, wait=0)

    answer = client.post("/api/runs/resume", {"sessionId": first["sessionId"], "prompt": "Me too."})
    assert [answer.status, answer.error["code"]] == [409, "SESSION_BUSY"]
    assert busy["id"] in answer.error["message"]
    assert client.get(f"/api/sessions/{first['sessionId']}").json["status"] == "running"

    # A fork does not wait: it starts from the last ended run.
    fork = client.fork(first["sessionId"], "Aside.")
    assert [fork["status"], fork["parentRunId"]] == ["completed", first["id"]]
    client.delete(f"/api/runs/{busy['id']}")


def test_enqueued_runs_execute_one_after_another(client: Client, project: Path) -> None:
    first = client.start(project, "[[slow 20 0.05]]", wait=0)
    others = [client.resume(first["sessionId"], f"Then {n}.", wait=0, ifBusy="enqueue") for n in range(2)]

    assert [run["startedAt"] for run in others] == [None, None]
    ended = [client.run(run["id"]) for run in (first, *others)]
    assert [run["status"] for run in ended] == ["completed"] * 3
    assert [run["parentRunId"] for run in ended] == [None, ended[0]["id"], ended[1]["id"]]
    assert ended[0]["endedAt"] <= ended[1]["startedAt"] <= ended[1]["endedAt"] <= ended[2]["startedAt"]


@pytest.mark.main_job
def test_interrupt_cancels_the_busy_and_the_queued_runs(client: Client, project: Path) -> None:
    first = client.start(project, "Hello.")
    busy = client.resume(first["sessionId"], SLOW, wait=0)
    waiting = client.resume(first["sessionId"], "Patience.", wait=0, ifBusy="enqueue")
    client.wait_for_message(busy["id"], "system")

    urgent = client.resume(first["sessionId"], "At once.", ifBusy="interrupt")

    assert urgent["status"] == "completed"
    assert urgent["parentRunId"] == busy["id"]
    assert [client.run(run["id"])["status"] for run in (busy, waiting)] == ["cancelled"] * 2


@pytest.mark.main_job
def test_of_two_concurrent_resumes_one_is_accepted(client: Client, project: Path) -> None:
    session = client.start(project, "Hello.")["sessionId"]
    barrier = threading.Barrier(2)

    def resume(number: int) -> int:
        barrier.wait()
        body = {"sessionId": session, "prompt": f"Number {number}."}
        return client.post("/api/runs/resume", body, wait=60).status

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(resume, range(2))) == [200, 409]


def test_a_full_queue_refuses_a_start(serve: ServeFunction, project: Path) -> None:
    client = Client(serve(CCM_MAX_CONCURRENT_RUNS=1, CCM_MAX_QUEUED_RUNS=1).url)
    runs = [client.start(project, SLOW, wait=0) for _ in range(2)]

    answer = client.post("/api/runs/start", {"cwd": str(project), "prompt": "x"})

    assert [answer.status, answer.error["code"]] == [429, "QUEUE_FULL"]
    assert int(answer.headers["Retry-After"]) > 0
    assert len(client.get("/api/runs").json) == len(client.get("/api/sessions").json) == 2
    for run in reversed(runs):
        client.delete(f"/api/runs/{run['id']}")


# ---- the end of the service


def test_sigterm_interrupts_every_run_and_records_its_end(serve: ServeFunction, project: Path) -> None:
    service = serve(CCM_MAX_CONCURRENT_RUNS=2)
    client = Client(service.url)
    running = [
        client.start(project, prompt, wait=0, options={"allowedTools": ["Bash"]}) for prompt in (SLOW, SLEEPING_TOOL)
    ]
    waiting = client.start(project, "Afterwards.", wait=0)
    client.wait_for_message(running[0]["id"], "system")
    until(lambda: "sleep 300" in commands(running[1]["id"]))

    service.process.send_signal(signal.SIGTERM)

    assert service.wait() == 0
    assert [marked(run["id"]) for run in running] == [[], []]
    client = Client(serve().url)
    for run in running:
        ended = client.run(run["id"])
        assert [ended["status"], ended["error"]["code"]] == ["error", "INTERRUPTED"]
        assert ended["result"]["subtype"] == "error_during_execution"
    assert client.run(waiting["id"])["status"] == "completed"


def test_a_signal_delivered_to_another_thread_stops_the_service(serve: ServeFunction) -> None:
    service = serve()
    threads = [int(name) for name in os.listdir(f"/proc/{service.process.pid}/task")]
    other = max(threads)
    assert other != service.process.pid

    os.kill(other, signal.SIGTERM)  # Linux delivers it to that thread

    assert service.process.wait(timeout=60) == 0


@pytest.mark.main_job
def test_a_killed_service_leaves_no_agent_and_its_runs_are_interrupted(serve: ServeFunction, project: Path) -> None:
    service = serve(CCM_MAX_CONCURRENT_RUNS=1)
    client = Client(service.url)
    running = client.start(project, SLEEPING_TOOL, wait=0, options={"allowedTools": ["Bash"]})
    waiting = client.start(project, "Afterwards.", wait=0)
    until(lambda: "sleep 300" in commands(running["id"]))
    seen = client.messages(running["id"])

    os.kill(service.process.pid, signal.SIGKILL)
    service.wait()

    until(lambda: not marked(running["id"]))
    client = Client(serve().url)
    ended = client.run(running["id"])
    assert [ended["status"], ended["error"]["code"]] == ["error", "INTERRUPTED"]
    assert client.messages(running["id"])[: len(seen)] == seen
    assert client.run(waiting["id"])["status"] == "completed"
    assert client.resume(running["sessionId"], "Go on.")["status"] == "completed"


def test_a_second_service_on_the_same_database_is_refused(serve: ServeFunction) -> None:
    serve()
    with pytest.raises(RuntimeError, match="Another CC Manager is at work on this database"):
        serve()
