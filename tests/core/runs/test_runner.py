"""Every run ends, whatever fails: regression tests of real faults. tests/faults covers every call."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import dataset
import psycopg
import pytest

from ccm.core.claude.reaper import Reaper
from ccm.core.runs.request import RunRequest
from ccm.core.service import Service
from ccm.core.storage.notifier import DELIVERIES, end_of
from ccm.core.webhooks.dispatcher import Dispatcher
from ccm.models import Run, RunMode
from ccm.settings.settings import Settings
from ccm.testing.service_process import ServiceProcess
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.disks import SmallDisk
from tests.postgresql import new_database
from tests.waiting import until

HOLD = json.dumps({"hold": True, "count": 1})
# Root reads everything, unless it lacks these.
AS_ROOT = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
WITHOUT_ROOTS_RIGHTS = AS_ROOT if os.geteuid() == 0 else ()


@pytest.fixture
def environ_in_process(tmp_path: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}


@pytest.fixture
def service_for(tmp_path: Path, environ_in_process: dict[str, str]) -> Iterator[Callable[..., Service]]:
    """Yield a function that makes services in this process, by default on one SQLite database, and close them."""
    services: list[Service] = []

    def make(**settings: Any) -> Service:
        own: dict[str, Any] = {
            "database_path": tmp_path / "r.sqlite",
            "cli_path": stand_in_cli(tmp_path),
            "spare_runs": 0,
        }
        services.append(Service(Settings(**own | settings), environ_in_process))
        return services[-1]

    yield make
    for service in services:
        service.close()


def start(service: Service, cwd: Path, prompt: str = "hello") -> Run:
    return service.runs.start(RunRequest(mode=RunMode.FRESH, prompt=prompt), str(cwd)).run


def ended(service: Service, run_id: str) -> Run:
    """Wait for a run to end, as a client waits."""

    def look() -> Run | None:
        run = service.queries.run(run_id)
        return run if run.ended else None

    run = service.notifier.wait(end_of(run_id), 60, look, lambda: False)
    assert run is not None, "the run has not ended"
    return run


def code_of(run: Run) -> tuple[str, str | None]:
    return run.status, run.error_code


# ---- commits


def test_a_run_costs_one_commit_at_its_start_and_one_at_its_end(
    service_for: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, project: Path, tmp_path: Path
) -> None:
    """Claude Code writes to its transcript even as it exits."""
    service = service_for()
    service.start()
    settle = service._writer._settle
    # The run's status after each commit, and how many messages and entries of its transcript are stored.
    commits: list[tuple[str, int, int]] = []

    def note(*settled: Any) -> None:
        with closing(sqlite3.connect(tmp_path / "r.sqlite")) as database:
            (state,) = database.execute(
                "SELECT status, (SELECT COUNT(*) FROM ccr_run_messages), (SELECT COUNT(*) FROM ccr_transcript_entries)"
                " FROM ccr_runs"
            )
        commits.append(state)
        settle(*settled)

    monkeypatch.setattr(service._writer, "_settle", note)
    run = start(service, project, json.dumps({"late": "as it exits"}))
    assert code_of(ended(service, run.id)) == ("completed", None)

    assert commits[0] == ("running", 0, 0)
    assert commits[-1] == ("completed", 2, 2)
    # Each commit in between stores messages.
    assert commits[1:-1] == [("running", stored, 0) for stored in sorted({stored for _, stored, _ in commits[1:-1]})]
    assert commits[1][1] > 0


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9/"])
def test_only_runs_with_a_webhook_wake_the_dispatcher(
    service_for: Callable[..., Service], project: Path, url: str | None
) -> None:
    service = service_for()
    service.start()
    request = RunRequest(mode=RunMode.FRESH, prompt="hello", run_fields={"webhookUrl": url})
    with service.notifier.subscribe(DELIVERIES) as notified:
        ended(service, service.runs.start(request, str(project)).run.id)

        assert notified.is_set() == (url is not None)


# ---- transcripts that cannot be read


def check_that_service_is_well(
    serve: ServeFunction, service: ServiceProcess, project: Path, **settings: object
) -> None:
    """Check that another run completes, SIGTERM ends the service with 0, and the next start works without reports."""
    assert Client(service.url).start(project, "hello")["status"] == "completed"
    service.process.terminate()
    assert service.wait() == 0
    again = serve(**settings)
    assert Client(again.url).get("/api/runs", status="running").json == []
    assert Client(again.url).start(project, "hello")["status"] == "completed"
    assert stack_traces(service) + stack_traces(again) == []


def stack_traces(service: ServiceProcess) -> list[str]:
    """Return the service's own stack traces: the stderr of a crashed Claude Code may contain others."""
    return [line for line in service.log if "Traceback" in line and "CLI_CRASHED" not in line]


def test_a_run_ends_if_the_path_of_its_transcript_is_too_long(serve: ServeFunction, home: Path, project: Path) -> None:
    settings = {"CCM_CLI_PATH": stand_in_cli(home), "CCM_MAX_CONCURRENT_RUNS": 1, "CCM_PRIVILEGED_OPTIONS": "env"}
    service = serve(**settings)

    run = Client(service.url).start(project, "hello", options={"env": {"HOME": "/" + "x" * 300}})

    assert run["status"] == "error"
    check_that_service_is_well(serve, service, project, **settings)


def test_a_run_ends_if_its_transcript_is_unreadable(
    serve: ServeFunction, home: Path, project: Path, tmp_path: Path
) -> None:
    own_home = tmp_path / "home"
    projects = own_home / ".claude" / "projects"
    projects.mkdir(parents=True)
    settings = {"CCM_CLI_PATH": stand_in_cli(home), "CCM_MAX_CONCURRENT_RUNS": 1, "HOME": own_home}
    service = serve(*WITHOUT_ROOTS_RIGHTS, **settings)
    client = Client(service.url)
    first = client.start(project, "hello")
    (own_home / ".claude").chmod(0)

    run = client.start(project, "hello")
    assert run["status"] == "error"
    # The stored transcript must be written to a file, which fails here. The run ends with the reason.
    resumed = client.resume(first["sessionId"], "and on")
    assert (resumed["status"], resumed["error"]["code"]) == ("error", "SESSION_NOT_RESUMABLE")

    (own_home / ".claude").chmod(0o700)
    service.log[:] = [line for line in service.log if "Traceback" not in line]  # of the failed write
    check_that_service_is_well(serve, service, project, **settings)


def test_a_service_recovers_a_run_whose_transcript_is_unreadable(
    serve: ServeFunction, home: Path, project: Path, tmp_path: Path
) -> None:
    own_home = tmp_path / "home"
    (own_home / ".claude" / "projects").mkdir(parents=True)
    settings = {"CCM_CLI_PATH": stand_in_cli(home), "HOME": own_home}
    service = serve(**settings)
    client = Client(service.url)
    run = client.start(project, HOLD, wait=0)
    client.wait_for_message(run["id"], "assistant")
    service.process.kill()
    service.wait()
    (own_home / ".claude").chmod(0)

    again = serve(*WITHOUT_ROOTS_RIGHTS, **settings)

    assert Client(again.url).run(run["id"])["error"]["code"] == "INTERRUPTED"
    assert stack_traces(again) == []
    (own_home / ".claude").chmod(0o700)


# ---- threads and processes that cannot be started


@contextmanager
def no_new_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Refuse new threads whose name begins with `name`, as the system does if a cgroup's pids.max is reached."""
    start_thread = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def counting_cli(folder: Path) -> tuple[Path, Path]:
    """Return a stand-in CLI, and the file to which each of its starts adds an empty line."""
    program, begun = folder / "spy", folder / "begun"
    program.write_text(f'#!/bin/sh\necho >> {begun}\nexec {stand_in_cli(folder)} "$@"\n')
    program.chmod(0o755)
    return program, begun


def test_a_run_without_a_thread_ends_and_is_not_executed_later(
    service_for: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, project: Path
) -> None:
    spy, begun = counting_cli(tmp_path)
    service = service_for(cli_path=spy, max_concurrent_runs=1)
    service.start()

    with no_new_thread(monkeypatch, "run-"):
        refused = ended(service, start(service, project).id)

    assert code_of(refused) == ("error", "EXECUTION_ERROR")
    assert "can't start new thread" in str(refused.error_message)
    assert code_of(ended(service, start(service, project).id)) == ("completed", None)
    assert begun.read_text() == "\n"  # the second run alone
    assert service.end_runs()


def test_the_next_run_starts_after_one_without_a_thread(
    service_for: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    service = service_for(max_concurrent_runs=2)
    service.start()
    first = start(service, project, HOLD)
    with no_new_thread(monkeypatch, "run-"):
        second = start(service, project)
        assert code_of(ended(service, second.id)) == ("error", "EXECUTION_ERROR")

    assert code_of(ended(service, start(service, project).id)) == ("completed", None)
    service.runs.cancel(first.id)
    assert code_of(ended(service, first.id)) == ("cancelled", None)


def test_a_run_without_a_process_ends(
    service_for: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    service = service_for(max_concurrent_runs=1)
    service.start()

    def refuse(_reaper: Reaper, _run_id: str) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(Reaper, "watch", refuse)
        assert code_of(ended(service, start(service, project).id)) == ("error", "EXECUTION_ERROR")

    assert code_of(ended(service, start(service, project).id)) == ("completed", None)


def test_a_run_without_a_thread_is_never_executed_even_if_its_end_is_stored_late(
    service_for: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, project: Path
) -> None:
    spy, begun = counting_cli(tmp_path)
    service = service_for(cli_path=spy, max_concurrent_runs=1)
    service.start()
    tries: list[int] = []

    def refuse(*_: object) -> None:
        tries.append(1)
        raise MemoryError

    with no_new_thread(monkeypatch, "run-"), monkeypatch.context() as patch:
        patch.setattr(service._runner._ends, "_end", refuse)
        patch.setattr(service._runner._ends, "_end_row_only", refuse)
        run = start(service, project)
        until(lambda: len(tries) > 6)
        service._runner.catch_up()
    assert code_of(ended(service, run.id)) == ("error", "EXECUTION_ERROR")
    assert code_of(ended(service, start(service, project).id)) == ("completed", None)
    assert begun.read_text() == "\n"  # the second run alone


def test_waiting_runs_start_when_the_fault_that_prevented_it_is_over(
    service_for: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    service = service_for(max_concurrent_runs=1)
    service.start()
    transitions = service._runner._transitions

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(transitions, "dispatch_again", fail)
        run = start(service, project)
        until(service.problems.sentences)
        assert service.problems.sentences() == ["waiting runs cannot be started"]
        assert service.queries.run(run.id).waiting

    # No other event triggers the decision.
    assert code_of(ended(service, run.id)) == ("completed", None)
    until(lambda: not service.problems.sentences())


# ---- rows that cannot be used


def corrupt(database: Path, run_id: str) -> None:
    """Make a run's row unusable, by text that is not JSON."""
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE ccr_runs SET optionsJson = '{' WHERE id = ?", (run_id,))
    connection.close()


def test_one_unusable_row_affects_neither_the_service_nor_other_runs(
    serve: ServeFunction, home: Path, project: Path, tmp_path: Path
) -> None:
    settings = {"CCM_CLI_PATH": stand_in_cli(home), "CCM_MAX_CONCURRENT_RUNS": 2}
    service = serve(**settings)
    client = Client(service.url)
    started = [client.start(project, HOLD, wait=0) for _ in range(2)]
    for run in started:
        client.wait_for_message(run["id"], "assistant")
    waiting = [client.start(project, "hello", wait=0) for _ in range(2)]
    service.process.kill()
    service.wait()
    for run in (started[0], waiting[0]):
        corrupt(tmp_path / "db.sqlite", run["id"])

    client = Client(serve(**settings).url)

    assert client.run(started[1]["id"])["error"]["code"] == "INTERRUPTED"
    assert client.run(waiting[1]["id"])["status"] == "completed"
    with sqlite3.connect(tmp_path / "db.sqlite") as connection:
        rows = dict(connection.execute("SELECT id, errorCode FROM ccr_runs WHERE optionsJson = '{'"))
    connection.close()
    assert rows == {started[0]["id"]: "INTERRUPTED", waiting[0]["id"]: "EXECUTION_ERROR"}


def test_recovery_with_uncertain_commits_begins_each_run_once(
    service_for: Callable[..., Service], postgresql: str, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    url = new_database(postgresql)
    first = service_for(database_url=url, max_concurrent_runs=1)
    first.start()
    left = start(first, project, HOLD)
    ended_before = start(first, project)  # waits
    first.close()
    # The state after a kill: the first run has started, the second waits.
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            'UPDATE ccr_runs SET status = \'running\', "endedAt" = NULL, "errorCode" = NULL WHERE id = %s', [left.id]
        )
    commit = dataset.Database.commit
    lost: list[int] = []

    def commit_and_lose_the_answer(database: dataset.Database) -> None:
        commit(database)
        if threading.current_thread().name == "writer" and len(lost) < 6 and len(lost) % 2 == 0:
            lost.append(1)
            raise psycopg.OperationalError("the connection was lost in COMMIT")
        lost.append(0)

    monkeypatch.setattr(dataset.Database, "commit", commit_and_lose_the_answer)
    service = service_for(database_url=url, max_concurrent_runs=1)
    service.start()

    assert code_of(ended(service, left.id)) == ("error", "INTERRUPTED")
    assert code_of(ended(service, ended_before.id)) == ("completed", None)
    assert sum(lost) > 1


# ---- a failed start of the service


def test_a_failed_start_of_the_service_leaves_no_thread_and_no_lock(
    service_for: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    def fail(_dispatcher: Dispatcher) -> None:
        raise RuntimeError("can't start new thread")

    service = service_for()
    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(Dispatcher, "start", fail)
        for _ in range(3):  # as each request does under `flask run`
            with pytest.raises(RuntimeError):
                service.start()
    assert [thread.name for thread in set(threading.enumerate()) - before] == []

    service.start()
    assert code_of(ended(service, start(service, project).id)) == ("completed", None)


# ---- temporary files


def test_a_full_temporary_directory_ends_a_run_with_the_reason(
    serve: ServeFunction, home: Path, project: Path, small_disk: SmallDisk
) -> None:
    settings = {"CCM_CLI_PATH": stand_in_cli(home), "TMPDIR": small_disk.path}
    service = serve(**settings)
    client = Client(service.url)
    # Python chooses its temporary directory at the first file and skips a full one, so it must choose now.
    assert client.start(project, "hello")["status"] == "completed"
    small_disk.fill()

    # A custom system prompt is passed in a file.
    run = client.start(project, "hello", options={"systemPrompt": "x" * 100_000})

    assert (run["status"], run["error"]["code"]) == ("error", "TMPDIR_NOT_WRITABLE")
    assert "No space left on device" in run["error"]["message"]
    assert stack_traces(service) == []
    small_disk.grow()
    assert client.start(project, "hello", options={"systemPrompt": "x" * 100_000})["status"] == "completed"


# ---- faults that cannot be handled


def test_an_unstorable_end_is_reported_until_it_is_stored(
    service_for: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    service = service_for(max_concurrent_runs=1)
    service.start()
    submit = service._writer.submit
    refused = threading.Event()

    def refuse(work: Any, on_commit: Any = None) -> Any:
        if threading.current_thread().name.startswith("run-"):
            refused.set()
            raise RuntimeError("a fault")
        return submit(work, on_commit)

    with monkeypatch.context() as patch:
        patch.setattr(service._writer, "submit", refuse)
        run = start(service, project)
        assert refused.wait(60)
        until(service.problems.sentences)
        assert service.problems.sentences() == ["the end of a run cannot be stored"]
        assert not service.queries.run(run.id).ended

    assert code_of(ended(service, run.id)) == ("completed", None)
    until(lambda: not service.problems.sentences())


def test_a_problem_is_shown_in_health(serve: ServeFunction, home: Path) -> None:
    from app import create_app

    app = create_app(Settings(database_path=home / "problems.sqlite", cli_path=stand_in_cli(home), spare_runs=0))
    service: Service = app.extensions["ccm"]
    client = app.test_client()
    try:
        client.get("/api/runs")
        assert client.get("/health").json == {"status": "ok"}
        service.problems.report("somewhere", "something does not work")
        assert client.get("/health").json == {"status": "ok", "problems": ["something does not work"]}
        assert client.get("/health").status_code == 200
        service.problems.clear("somewhere")
        assert client.get("/health").json == {"status": "ok"}
    finally:
        service.close()


def test_a_cancel_whose_notification_is_lost_still_ends_the_run(
    service_for: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    import asyncio

    service = service_for()
    service.start()
    run = start(service, project, HOLD)
    until(lambda: service.queries.run(run.id).message_count)
    call = asyncio.BaseEventLoop.call_soon_threadsafe

    def lose(loop: Any, callback: Any, *args: Any, **named: Any) -> Any:
        if callback.__qualname__ == "Event.set":
            return None
        return call(loop, callback, *args, **named)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", lose)
    service.runs.cancel(run.id)
    assert code_of(ended(service, run.id)) == ("cancelled", None)
