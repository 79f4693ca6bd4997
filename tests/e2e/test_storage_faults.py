"""Storage that fails during runs: no message is lost or duplicated, and the service wait_until_healthy by itself.

The CLI is the stand-in of tests/stand_in_cli.py, which writes an exact number of messages; the storage is real.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ccm.testing.service_process import ServiceProcess
from tests.client import Answer, Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.disks import SmallDisk
from tests.flask_commands import call
from tests.postgresql import PostgreSQLServer
from tests.programs import resident_memory
from tests.storage_faults import locked
from tests.waiting import until

# Each test waits until the service detects the fault, and until it has recovered.
pytestmark = pytest.mark.many_rounds

SECRETS = ("/tmp", "db.sqlite", "127.0.0.1", "SELECT", "INSERT")


class Deployment:
    """A service with the stand-in CLI, and the requests and checks that the tests repeat."""

    def __init__(self, service: ServiceProcess, project: Path) -> None:
        self.service = service
        self.client = Client(service.url)
        self.project = project

    def run(self, count: int, **script: Any) -> str:
        """Start a run that writes `count` messages; return its id."""
        return str(self.client.start(self.project, json.dumps({"count": count, **script}), wait=0)["id"])

    def start(self) -> Answer:
        return self.client.post("/api/runs/start", {"cwd": str(self.project), "prompt": "Hello."})

    def health(self) -> str | None:
        """Return the error message of /health, or None."""
        answer = self.client.get("/health")
        if answer.status == 200:
            return None
        assert answer.status == 503
        message = answer.error["message"]
        assert not [secret for secret in SECRETS if secret in message]
        return message

    def wait_until_unhealthy(self, reason: str) -> None:
        until(lambda: reason in (self.health() or ""))

    def wait_until_healthy(self) -> None:
        until(lambda: self.health() is None)

    def check_refuses_start(self) -> None:
        answer = self.start()
        assert [answer.status, answer.error["code"]] == [503, "STORAGE_UNAVAILABLE"]
        assert answer.error["message"].startswith("Nothing was stored: ")
        assert not [secret for secret in SECRETS if secret in answer.error["message"]]
        assert "Retry-After" in answer.headers

    def check_completes(self, run_id: str, count: int) -> None:
        """Check that the run completes with each of its messages once, in order, and its result."""
        run = self.client.run(run_id)
        assert [run["status"], run["error"]] == ["completed", None]
        messages = self.client.messages(run_id)
        assert [message["type"] for message in messages] == ["assistant"] * count + ["result"]
        assert len({message["uuid"] for message in messages}) == count + 1

    def storage_log(self) -> list[str]:
        return [
            line.partition("ccm.core.storage.writer: ")[2]
            for line in self.service.log
            if "ccm.core.storage.writer" in line
        ]


def start_refused(environ: dict[str, str], **variables: Any) -> subprocess.CompletedProcess[str]:
    return call([sys.executable, "app.py"], environ, PORT=0, **variables)


DeployFunction = Callable[..., Deployment]


@pytest.fixture
def deploy(serve: ServeFunction, project: Path, home: Path) -> Iterator[DeployFunction]:
    deployments: list[Deployment] = []

    def make(**settings: object) -> Deployment:
        deployments.append(Deployment(serve(CCM_CLI_PATH=stand_in_cli(home), **settings), project))
        return deployments[-1]

    yield make
    for made in deployments:
        assert not [line for line in made.service.log if "Traceback" in line]


# ---- locked


def test_a_locked_database_pauses_the_agents_and_loses_no_message(
    deploy: DeployFunction, tmp_path: Path, project: Path
) -> None:
    log = tmp_path / "written"
    deployed = deploy(CCM_MESSAGE_BUDGET_BYTES=2**18, STAND_IN_CLI_LOG=log)
    before = resident_memory(deployed.service.process.pid)
    # 20,000 messages of 1 KB, of which the service may buffer a quarter of a MiB.
    count = 20_000
    run_id = deployed.run(count, pad=1_000)
    until(lambda: deployed.client.messages(run_id, limit=1))
    with locked(f"sqlite:///{tmp_path}/db.sqlite"):
        deployed.wait_until_unhealthy("another program has locked the database")
        written = settled(log)
        stored = len(deployed.client.messages(run_id))
        buffered = (written - stored) * 1_200
        assert written < count
        assert deployed.client.get("/api/runs").status == 200
        assert buffered < 2**21  # the budget, the pipe, and the SDK's buffer
        assert resident_memory(deployed.service.process.pid) - before < 64
    deployed.wait_until_healthy()
    deployed.check_completes(run_id, count)
    assert [line.partition(":")[0].partition(",")[0] for line in deployed.storage_log()] == [
        "database not writable",
        "database writable again",
    ]


def settled(log: Path) -> int:
    """Wait until the agent pauses; return the number of messages that it has written."""
    seen = -1
    while True:
        now = log.read_text().count("\n")
        if now == seen:
            return now
        seen = now
        time.sleep(0.5)  # a paused process gives no signal


# ---- full


def test_on_a_full_disk_starts_are_refused_and_active_runs_wait_for_space(
    small_disk: SmallDisk, deploy: DeployFunction
) -> None:
    deployed = deploy(DATABASE_PATH=small_disk.path / "db.sqlite")
    early = deployed.run(50)
    deployed.check_completes(early, 50)
    late = deployed.run(5_000, pad=500)
    deployed.wait_until_unhealthy("the disk of the database is full")
    seen = deployed.client.messages(late)
    deployed.check_refuses_start()
    deployed.check_completes(early, 50)  # reads still work
    deployed.wait_until_unhealthy("the disk of the database is full")

    small_disk.grow()
    deployed.wait_until_healthy()
    deployed.check_completes(late, 5_000)
    assert deployed.client.messages(late)[: len(seen)] == seen
    assert deployed.start().status == 202
    assert len(deployed.storage_log()) == 2


# ---- removed


def test_an_idle_service_detects_a_removed_file_and_its_return(deploy: DeployFunction, tmp_path: Path) -> None:
    deployed = deploy()
    deployed.check_completes(deployed.run(10), 10)
    (tmp_path / "db.sqlite").rename(tmp_path / "away")
    deployed.wait_until_unhealthy("the database file has been removed or replaced")
    deployed.check_refuses_start()
    answer = deployed.client.get("/api/runs")
    assert [answer.status, answer.error["code"]] == [503, "STORAGE_UNAVAILABLE"]
    assert not [secret for secret in SECRETS if secret in answer.error["message"]]
    assert not (tmp_path / "db.sqlite").exists()

    (tmp_path / "away").rename(tmp_path / "db.sqlite")
    deployed.wait_until_healthy()
    assert deployed.client.get("/api/runs").status == 200
    deployed.check_completes(deployed.run(10), 10)
    assert len(deployed.storage_log()) == 2


def test_a_run_survives_the_temporary_removal_of_the_file(deploy: DeployFunction, tmp_path: Path) -> None:
    deployed = deploy(CCM_MESSAGE_BUDGET_BYTES=2**18)
    run_id = deployed.run(20_000)
    until(lambda: deployed.client.messages(run_id, limit=1))
    (tmp_path / "db.sqlite").rename(tmp_path / "away")
    deployed.wait_until_unhealthy("the database file has been removed or replaced")
    (tmp_path / "away").rename(tmp_path / "db.sqlite")
    deployed.wait_until_healthy()
    deployed.check_completes(run_id, 20_000)


def test_a_removed_log_is_detected_and_a_clean_stop_saves_its_content(deploy: DeployFunction, tmp_path: Path) -> None:
    first = deploy()
    run_id = first.run(100)
    first.check_completes(run_id, 100)
    (tmp_path / "db.sqlite-wal").unlink()
    first.wait_until_unhealthy("the database's -wal file has been removed or replaced")
    first.service.process.terminate()
    assert first.service.wait() == 0

    second = deploy()
    second.check_completes(run_id, 100)
    assert second.health() is None


# ---- damaged


def test_a_damaged_file_is_refused_at_the_start(
    deploy: DeployFunction, environ: dict[str, str], tmp_path: Path
) -> None:
    deployed = deploy()
    deployed.check_completes(deployed.run(2_000), 2_000)
    deployed.service.process.terminate()
    deployed.service.wait()
    path = tmp_path / "db.sqlite"
    with path.open("r+b") as file:
        file.seek(4096 * 10)
        file.write(b"\xff" * 4096)
    before = path.read_bytes()
    result = start_refused(environ, DATABASE_PATH=path)
    assert result.returncode == 3
    assert f"{path} is damaged: " in result.stderr
    assert "Traceback" not in result.stderr
    assert path.read_bytes() == before


def test_later_damage_is_reported(deploy: DeployFunction, tmp_path: Path) -> None:
    deployed = deploy()
    run_id = deployed.run(3_000, pad=1_000)
    deployed.check_completes(run_id, 3_000)
    path = tmp_path / "db.sqlite"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    size = path.stat().st_size
    with path.open("r+b") as file:  # not the first pages, which hold the roots of the tables
        file.seek(size // 4)
        file.write(b"\xff" * (size * 3 // 4))

    answer = deployed.client.get(f"/api/runs/{run_id}/messages", after=2_000)
    assert [answer.status, answer.error["code"]] == [503, "STORAGE_UNAVAILABLE"]
    deployed.wait_until_unhealthy("the database is damaged")
    deployed.check_refuses_start()


# ---- read-only


def test_a_read_only_disk_is_refused_at_the_start(
    small_disk: SmallDisk, deploy: DeployFunction, environ: dict[str, str]
) -> None:
    path = small_disk.path / "db.sqlite"
    deployed = deploy(DATABASE_PATH=path)
    deployed.service.process.terminate()
    deployed.service.wait()
    small_disk.make_read_only()
    result = start_refused(environ, DATABASE_PATH=path)
    assert result.returncode == 3
    assert f"{path} cannot be written: Read-only file system" in result.stderr


def test_a_read_only_server_is_refused_at_the_start(
    postgresql_server: PostgreSQLServer, environ: dict[str, str], deploy: DeployFunction
) -> None:
    url = postgresql_server.new_database()
    first = deploy(DATABASE_URL=url).service
    first.process.terminate()
    first.wait()
    postgresql_server.configure(default_transaction_read_only="on")
    try:
        result = start_refused(environ, DATABASE_URL=url)
    finally:
        postgresql_server.configure(default_transaction_read_only="off")
    assert result.returncode == 3
    assert "the database is read-only" in result.stderr


def test_a_server_that_becomes_read_only_can_still_be_read(
    postgresql_server: PostgreSQLServer, deploy: DeployFunction
) -> None:
    deployed = deploy(DATABASE_URL=postgresql_server.new_database())
    run_id = deployed.run(10)
    deployed.check_completes(run_id, 10)
    postgresql_server.configure(default_transaction_read_only="on")
    try:
        deployed.wait_until_unhealthy("the database is read-only")
        deployed.check_refuses_start()
        deployed.check_completes(run_id, 10)
    finally:
        postgresql_server.configure(default_transaction_read_only="off")
    deployed.wait_until_healthy()
    deployed.check_completes(deployed.run(10), 10)


@pytest.mark.root
def test_a_file_that_becomes_read_only_can_still_be_read(deploy: DeployFunction, tmp_path: Path) -> None:
    deployed = deploy()
    run_id = deployed.run(10)
    deployed.check_completes(run_id, 10)
    with immutable(tmp_path / "db.sqlite", tmp_path / "db.sqlite-wal"):
        deployed.wait_until_unhealthy("read-only")
        deployed.check_refuses_start()
        deployed.check_completes(run_id, 10)
    deployed.wait_until_healthy()
    deployed.check_completes(deployed.run(10), 10)
    assert len(deployed.storage_log()) == 2


@contextmanager
def immutable(*files: Path) -> Iterator[None]:
    """Make files unwritable, even for root and for open descriptors, as on a disk that became read-only."""
    names = [str(file) for file in files]
    try:
        set_up = subprocess.run(["chattr", "+i", *names], capture_output=True, text=True, check=False)
        if not set_up.returncode and not _can_be_written(files[0]):
            yield
        elif os.environ.get("CI"):
            pytest.fail(f"CI must be able to make files immutable: {set_up.stderr}")
        else:
            pytest.skip(f"files cannot be made immutable here: {set_up.stderr.strip() or 'the file system does not'}")
    finally:
        subprocess.run(["chattr", "-i", *names], capture_output=True, check=False)


def _can_be_written(file: Path) -> bool:
    try:
        file.open("r+b").close()
    except OSError:
        return False
    return True


# ---- PostgreSQL restarted


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_restart_during_a_run_loses_no_message(
    postgresql_server: PostgreSQLServer, deploy: DeployFunction, mode: str
) -> None:
    deployed = deploy(DATABASE_URL=postgresql_server.new_database(), CCM_MESSAGE_BUDGET_BYTES=2**18)
    runs = [deployed.run(10_000, pad=200) for _ in range(3)]
    for already in (1_000, 5_000):
        until(lambda already=already: deployed.client.run(runs[0], wait=0)["messageCount"] > already)  # type: ignore[misc]
        postgresql_server.stop(mode)
        postgresql_server.start()
    for run_id in runs:
        deployed.check_completes(run_id, 10_000)
    sessions = deployed.client.get("/api/sessions").json
    assert [[session["runCount"], session["messageCount"]] for session in sessions] == [[1, 10_001]] * 3
    deployed.wait_until_healthy()


def test_a_temporarily_stopped_server_is_reported_and_used_again(
    postgresql_server: PostgreSQLServer, deploy: DeployFunction
) -> None:
    deployed = deploy(DATABASE_URL=postgresql_server.new_database(), CCM_MESSAGE_BUDGET_BYTES=2**18)
    run_id = deployed.run(10_000)
    until(lambda: deployed.client.messages(run_id, limit=1))
    postgresql_server.stop()
    try:
        deployed.wait_until_unhealthy("the database server cannot be reached")
        deployed.check_refuses_start()
        answer = deployed.client.get("/api/runs")
        assert [answer.status, answer.error["code"]] == [503, "STORAGE_UNAVAILABLE"]
        assert not [secret for secret in SECRETS if secret in answer.error["message"]]
    finally:
        postgresql_server.start()
    deployed.wait_until_healthy()
    deployed.check_completes(run_id, 10_000)
    assert deployed.client.get("/api/runs").status == 200
    assert len(deployed.storage_log()) == 2


# ---- PostgreSQL suspended


def test_a_suspended_server_is_reported_and_blocks_no_request(
    postgresql_server: PostgreSQLServer, deploy: DeployFunction
) -> None:
    deployed = deploy(DATABASE_URL=postgresql_server.new_database(), CCM_MESSAGE_BUDGET_BYTES=2**18)
    run_id = deployed.run(20_000)
    until(lambda: deployed.client.messages(run_id, limit=1))
    with postgresql_server.standing_still():
        deployed.wait_until_unhealthy("the database does not answer")
        answer = deployed.start()
        assert answer.status == 503
        assert answer.error["code"] in ("STORAGE_UNAVAILABLE", "OUTCOME_UNKNOWN")
        assert deployed.client.get("/api/runs").status == 503
    deployed.wait_until_healthy()
    deployed.check_completes(run_id, 20_000)
    assert deployed.client.get("/api/runs").status == 200


# ---- a second service


def test_a_second_service_is_refused_even_after_the_first_lost_its_connections(
    postgresql_server: PostgreSQLServer, environ: dict[str, str], deploy: DeployFunction
) -> None:
    url = postgresql_server.new_database()
    first = deploy(DATABASE_URL=url)
    for restarted in (False, True):
        if restarted:
            postgresql_server.stop()
            postgresql_server.start()
        first.wait_until_healthy()
        second = start_refused(environ, DATABASE_URL=url)
        assert second.returncode == 3
        assert "Another CC Manager is at work on this database; stop it first" in second.stderr
    first.check_completes(first.run(10), 10)
    first.service.process.kill()
    first.service.wait()
    third = deploy(DATABASE_URL=url)
    assert third.health() is None
