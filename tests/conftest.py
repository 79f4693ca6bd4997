"""What the tests share: databases on both servers, the stand-in for the Messages API, services as real processes."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.migrate import migrate
from ccm.testing.messages_api import MessagesAPI
from ccm.testing.service_process import ServiceProcess, credential_free_environment
from tests.client import Client
from tests.disks import SmallDisk
from tests.postgresql import PostgreSQLServer

STAND_IN_CLI = Path(__file__).with_name("stand_in_cli.py")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a real PostgreSQL server of the tests' own, without the database's name."""
    with PostgreSQLServer() as server:
        yield server.url


@pytest.fixture(scope="module")
def postgresql_server() -> Iterator[PostgreSQLServer]:
    """Another one, for tests that break it and mend it."""
    with PostgreSQLServer() as server:
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of 2 MiB."""
    with SmallDisk(tmp_path / "small-disk") as disk:
        yield disk


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database, once on each kind of server."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/db.sqlite"
        sqlite_file.prepare(url)
        return url
    server: str = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server}/{name}"


@pytest.fixture
def writable(database_url: str) -> Iterator[Database]:
    """The one writer of a database with the schema in place."""
    database = Database(database_url, writable=True, pool_size=1)
    migrate(database)
    yield database
    database.close()


@pytest.fixture
def reader(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture(scope="session")
def messages_api() -> Iterator[MessagesAPI]:
    """The stand-in for the Messages API; what it was sent is in its `requests`."""
    with MessagesAPI() as api:
        yield api


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HOME of the session's agents."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def environ(messages_api: MessagesAPI, home: Path) -> dict[str, str]:
    """The environment of a service for tests: made from nothing, so that nothing of the machine reaches an agent."""
    return credential_free_environment(messages_api.url, str(home)) | {
        # root, as CI often is, may not bypass permissions outside of a sandbox.
        "IS_SANDBOX": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


ServeFunction = Callable[..., ServiceProcess]


@pytest.fixture
def serve(environ: dict[str, str], tmp_path: Path) -> Iterator[ServeFunction]:
    """Starts services as processes of their own, with settings of a test's choice; ends them afterwards."""
    with ExitStack() as stack:

        def start(*through: str, **settings: object) -> ServiceProcess:
            own = {"DATABASE_PATH": str(tmp_path / "db.sqlite"), "LOG_LEVEL": "debug"}
            own |= {name: str(value) for name, value in settings.items()}
            return stack.enter_context(ServiceProcess(environ | own, through=through))

        yield start


@pytest.fixture(scope="session")
def client(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a service that the whole session shares: default settings, SQLite, the real Claude Code."""
    database = tmp_path_factory.mktemp("shared") / "db.sqlite"
    own = {"DATABASE_PATH": str(database), "LOG_LEVEL": "debug", "CCM_MAX_CONCURRENT_RUNS": "4"}
    with ServiceProcess(environ | own) as service:
        yield Client(service.url)
        assert not [line for line in service.log if "Traceback" in line], "the service logged a stack trace"


@pytest.fixture
def quick(serve: ServeFunction, home: Path) -> Client:
    """A client of a service whose Claude Code is the stand-in of tests/stand_in_cli.py."""
    return Client(serve(CCM_CLI_PATH=stand_in_cli(home)).url)


def stand_in_cli(folder: Path) -> Path:
    """The stand-in CLI as a program that starts with this very Python, and fast: it needs no site-packages."""
    program = folder / "claude"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {STAND_IN_CLI} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory for agents to work in, with one file."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "here-is-a-file.txt").write_text("hello\n")
    return folder
