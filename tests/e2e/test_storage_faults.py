"""Services whose storage fails while runs are going on: nothing is lost or doubled, and they heal by themselves.

Claude Code is the stand-in of tests/stand_in_cli.py, which says just so many messages; the storage is real.
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

from ccm.testing.service_process import APP, ServiceProcess
from tests.client import Answer, Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.disks import SmallDisk
from tests.postgresql import PostgreSQLServer
from tests.waiting import until

# Each test waits until a fault is noticed and until it is over.
pytestmark = pytest.mark.many_rounds

SECRETS = ("/tmp", "db.sqlite", "127.0.0.1", "SELECT", "INSERT")


class Site:
    """A service with the stand-in CLI, and what is asked of it here again and again."""

    def __init__(self, service: ServiceProcess, project: Path) -> None:
        self.service = service
        self.client = Client(service.url)
        self.project = project

    def run(self, count: int, **script: Any) -> str:
        """Starts a run that says `count` messages; its id."""
        return str(self.client.start(self.project, json.dumps({"count": count, **script}), wait=0)["id"])

    def start(self) -> Answer:
        return self.client.post("/api/runs/start", {"cwd": str(self.project), "prompt": "Hello."})

    def health(self) -> str | None:
        """What /health complains of, or None."""
        answer = self.client.get("/health")
        if answer.status == 200:
            return None
        assert answer.status == 503
        message = answer.error["message"]
        assert not [secret for secret in SECRETS if secret in message]
        return message

    def unhealthy(self, reason: str) -> None:
        until(lambda: reason in (self.health() or ""))

    def heals(self) -> None:
        until(lambda: self.health() is None)

    def refuses_starts(self) -> None:
        answer = self.start()
        assert [answer.status, answer.error["code"]] == [503, "STORAGE_UNAVAILABLE"]
        assert answer.error["message"].startswith("Nothing was stored: ")
        assert not [secret for secret in SECRETS if secret in answer.error["message"]]
        assert "Retry-After" in answer.headers

    def completes(self, run_id: str, count: int) -> None:
        """The run ends well, with each of its messages once, in order, and its result."""
        run = self.client.run(run_id)
        assert [run["status"], run["error"]] == ["completed", None]
        said = self.client.messages(run_id)
        # The SDK tells that the transcript could not be mirrored at once.
        said = [message for message in said if message.get("subtype") != "mirror_error"]
        assert [message["type"] for message in said] == ["assistant"] * count + ["result"]
        assert len({message["uuid"] for message in said}) == count + 1

    def storage_log(self) -> list[str]:
        return [
            line.partition("ccm.core.storage.writer: ")[2]
            for line in self.service.log
            if "ccm.core.storage.writer" in line
        ]


def start_refused(environ: dict[str, str], **variables: object) -> subprocess.CompletedProcess[str]:
    own = {"PORT": "0"} | {name: str(value) for name, value in variables.items()}
    words = [sys.executable, str(APP)]
    return subprocess.run(words, env=environ | own, capture_output=True, text=True, timeout=60, check=False)


SiteFunction = Callable[..., Site]


@pytest.fixture
def site(serve: ServeFunction, project: Path, home: Path) -> Iterator[SiteFunction]:
    sites: list[Site] = []

    def make(**settings: object) -> Site:
        sites.append(Site(serve(CCM_CLI_PATH=stand_in_cli(home), **settings), project))
        return sites[-1]

    yield make
    for made in sites:
        assert not [line for line in made.service.log if "Traceback" in line]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


# ---- locked


@pytest.mark.many_rounds
def test_a_locked_database_holds_the_agents_and_loses_nothing(
    site: SiteFunction, tmp_path: Path, project: Path
) -> None:
    log = tmp_path / "said"
    ours = site(CCM_MESSAGE_BUDGET_BYTES=2**18, STAND_IN_CLI_LOG=log)
    before = resident(ours.service.process.pid)
    # 20,000 messages of 1 KB, of which the service may hold a quarter of a MiB.
    count = 20_000
    run_id = ours.run(count, pad=1_000)
    until(lambda: ours.client.messages(run_id, limit=1))
    with locked(tmp_path / "db.sqlite"):
        ours.unhealthy("another program has locked the database")
        said = settled(log)
        stored = len(ours.client.messages(run_id))
        held = (said - stored) * 1_200
        assert said < count
        assert ours.client.get("/api/runs").status == 200
        assert held < 2**21  # the budget, the pipe, and what the SDK holds beside
        assert resident(ours.service.process.pid) - before < 64
    ours.heals()
    ours.completes(run_id, count)
    assert [line.partition(":")[0].partition(",")[0] for line in ours.storage_log()] == [
        "database not writable",
        "database writable again",
    ]


def settled(log: Path) -> int:
    """How many messages the agent has said, once it says no more: it is held."""
    seen = -1
    while True:
        now = log.read_text().count("\n")
        if now == seen:
            return now
        seen = now
        time.sleep(0.5)  # a process that stands still tells nobody


def resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


# ---- full


def test_a_full_disk_refuses_starts_and_the_runs_in_progress_wait_for_room(
    small_disk: SmallDisk, site: SiteFunction
) -> None:
    ours = site(DATABASE_PATH=small_disk.path / "db.sqlite")
    early = ours.run(50)
    ours.completes(early, 50)
    late = ours.run(5_000, pad=500)
    ours.unhealthy("the disk of the database is full")
    seen = ours.client.messages(late)
    ours.refuses_starts()
    ours.completes(early, 50)  # reads go on
    ours.unhealthy("the disk of the database is full")

    small_disk.grow()
    ours.heals()
    ours.completes(late, 5_000)
    assert ours.client.messages(late)[: len(seen)] == seen
    assert ours.start().status == 202
    assert len(ours.storage_log()) == 2


# ---- removed


def test_a_removed_file_is_noticed_by_an_idle_service_and_its_return_too(site: SiteFunction, tmp_path: Path) -> None:
    ours = site()
    ours.completes(ours.run(10), 10)
    (tmp_path / "db.sqlite").rename(tmp_path / "away")
    ours.unhealthy("the database file has been removed or replaced")
    ours.refuses_starts()
    answer = ours.client.get("/api/runs")
    assert [answer.status, answer.error["code"]] == [503, "STORAGE_UNAVAILABLE"]
    assert not [secret for secret in SECRETS if secret in answer.error["message"]]
    assert not (tmp_path / "db.sqlite").exists()

    (tmp_path / "away").rename(tmp_path / "db.sqlite")
    ours.heals()
    assert ours.client.get("/api/runs").status == 200
    ours.completes(ours.run(10), 10)
    assert len(ours.storage_log()) == 2


@pytest.mark.many_rounds
def test_a_run_outlives_the_absence_of_its_file(site: SiteFunction, tmp_path: Path) -> None:
    ours = site(CCM_MESSAGE_BUDGET_BYTES=2**18)
    run_id = ours.run(20_000)
    until(lambda: ours.client.messages(run_id, limit=1))
    (tmp_path / "db.sqlite").rename(tmp_path / "away")
    ours.unhealthy("the database file has been removed or replaced")
    (tmp_path / "away").rename(tmp_path / "db.sqlite")
    ours.heals()
    ours.completes(run_id, 20_000)


def test_a_removed_log_is_noticed_and_a_clean_stop_saves_what_it_held(site: SiteFunction, tmp_path: Path) -> None:
    first = site()
    run_id = first.run(100)
    first.completes(run_id, 100)
    (tmp_path / "db.sqlite-wal").unlink()
    first.unhealthy("the database's -wal file has been removed or replaced")
    first.service.process.terminate()
    assert first.service.wait() == 0

    second = site()
    second.completes(run_id, 100)
    assert second.health() is None


# ---- damaged


def test_a_damaged_file_is_refused_at_the_start(site: SiteFunction, environ: dict[str, str], tmp_path: Path) -> None:
    ours = site()
    ours.completes(ours.run(2_000), 2_000)
    ours.service.process.terminate()
    ours.service.wait()
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


def test_damage_that_comes_later_is_told(site: SiteFunction, tmp_path: Path) -> None:
    ours = site()
    run_id = ours.run(3_000, pad=1_000)
    ours.completes(run_id, 3_000)
    path = tmp_path / "db.sqlite"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    size = path.stat().st_size
    with path.open("r+b") as file:  # all but the first pages, where the tables begin
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))

    answer = ours.client.get(f"/api/runs/{run_id}/messages", after=2_000)
    assert [answer.status, answer.error["code"]] == [503, "STORAGE_UNAVAILABLE"]
    ours.unhealthy("the database is damaged")
    ours.refuses_starts()


# ---- read-only


def test_a_read_only_disk_is_refused_at_the_start(
    small_disk: SmallDisk, site: SiteFunction, environ: dict[str, str]
) -> None:
    path = small_disk.path / "db.sqlite"
    ours = site(DATABASE_PATH=path)
    ours.service.process.terminate()
    ours.service.wait()
    small_disk.make_read_only()
    result = start_refused(environ, DATABASE_PATH=path)
    assert result.returncode == 3
    assert f"{path} cannot be written: Read-only file system" in result.stderr


def test_a_server_that_is_read_only_is_refused_at_the_start(
    postgresql_server: PostgreSQLServer, environ: dict[str, str], site: SiteFunction
) -> None:
    url = postgresql_server.new_database()
    first = site(DATABASE_URL=url).service
    first.process.terminate()
    first.wait()
    postgresql_server.configure(default_transaction_read_only="on")
    try:
        result = start_refused(environ, DATABASE_URL=url)
    finally:
        postgresql_server.configure(default_transaction_read_only="off")
    assert result.returncode == 3
    assert "the database is read-only" in result.stderr


def test_a_server_that_becomes_read_only_goes_on_being_read(
    postgresql_server: PostgreSQLServer, site: SiteFunction
) -> None:
    ours = site(DATABASE_URL=postgresql_server.new_database())
    run_id = ours.run(10)
    ours.completes(run_id, 10)
    postgresql_server.configure(default_transaction_read_only="on")
    try:
        ours.unhealthy("the database is read-only")
        ours.refuses_starts()
        ours.completes(run_id, 10)
    finally:
        postgresql_server.configure(default_transaction_read_only="off")
    ours.heals()
    ours.completes(ours.run(10), 10)


@pytest.mark.root
def test_a_file_that_becomes_read_only_goes_on_being_read(site: SiteFunction, tmp_path: Path) -> None:
    ours = site()
    run_id = ours.run(10)
    ours.completes(run_id, 10)
    with immutable(tmp_path / "db.sqlite", tmp_path / "db.sqlite-wal"):
        ours.unhealthy("read-only")
        ours.refuses_starts()
        ours.completes(run_id, 10)
    ours.heals()
    ours.completes(ours.run(10), 10)
    assert len(ours.storage_log()) == 2


@contextmanager
def immutable(*files: Path) -> Iterator[None]:
    """Files that nobody can write, not even root, nor who has them open: as on a disk that has become read-only."""
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
def test_a_server_restarted_in_mid_run_loses_nothing(
    postgresql_server: PostgreSQLServer, site: SiteFunction, mode: str
) -> None:
    ours = site(DATABASE_URL=postgresql_server.new_database(), CCM_MESSAGE_BUDGET_BYTES=2**18)
    runs = [ours.run(10_000, pad=200) for _ in range(3)]
    for already in (1_000, 5_000):
        until(lambda already=already: ours.client.run(runs[0], wait=0)["messageCount"] > already)  # type: ignore[misc]
        postgresql_server.stop(mode)
        postgresql_server.start()
    for run_id in runs:
        ours.completes(run_id, 10_000)
    sessions = ours.client.get("/api/sessions").json
    assert [[session["runCount"], session["messageCount"]] for session in sessions] == [[1, 10_001]] * 3
    ours.heals()


def test_a_server_that_is_gone_for_a_while_is_told_and_found_again(
    postgresql_server: PostgreSQLServer, site: SiteFunction
) -> None:
    ours = site(DATABASE_URL=postgresql_server.new_database(), CCM_MESSAGE_BUDGET_BYTES=2**18)
    run_id = ours.run(10_000)
    until(lambda: ours.client.messages(run_id, limit=1))
    postgresql_server.stop()
    try:
        ours.unhealthy("the database server cannot be reached")
        ours.refuses_starts()
        answer = ours.client.get("/api/runs")
        assert [answer.status, answer.error["code"]] == [503, "STORAGE_UNAVAILABLE"]
        assert not [secret for secret in SECRETS if secret in answer.error["message"]]
    finally:
        postgresql_server.start()
    ours.heals()
    ours.completes(run_id, 10_000)
    assert ours.client.get("/api/runs").status == 200
    assert len(ours.storage_log()) == 2


# ---- PostgreSQL that stands still


def test_a_server_that_stands_still_is_told_and_nobody_is_held(
    postgresql_server: PostgreSQLServer, site: SiteFunction
) -> None:
    ours = site(DATABASE_URL=postgresql_server.new_database(), CCM_MESSAGE_BUDGET_BYTES=2**18)
    run_id = ours.run(20_000)
    until(lambda: ours.client.messages(run_id, limit=1))
    with postgresql_server.standing_still():
        ours.unhealthy("the database does not answer")
        answer = ours.start()
        assert answer.status == 503
        assert answer.error["code"] in ("STORAGE_UNAVAILABLE", "OUTCOME_UNKNOWN")
        assert ours.client.get("/api/runs").status == 503
    ours.heals()
    ours.completes(run_id, 20_000)
    assert ours.client.get("/api/runs").status == 200


# ---- a second service


def test_a_second_service_is_refused_even_if_the_first_has_lost_its_connections(
    postgresql_server: PostgreSQLServer, environ: dict[str, str], site: SiteFunction
) -> None:
    url = postgresql_server.new_database()
    first = site(DATABASE_URL=url)
    for restarted in (False, True):
        if restarted:
            postgresql_server.stop()
            postgresql_server.start()
        first.heals()
        second = start_refused(environ, DATABASE_URL=url)
        assert second.returncode == 3
        assert "Another CC Manager is at work on this database; stop it first" in second.stderr
    first.completes(first.run(10), 10)
    first.service.process.kill()
    first.service.wait()
    third = site(DATABASE_URL=url)
    assert third.health() is None
