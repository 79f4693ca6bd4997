"""What the tests share: databases on both servers, the stand-in for the Messages API, services as real processes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.migrate import migrate
from ccm.testing.messages_api import MessagesAPI
from ccm.testing.service_process import ServiceProcess, credential_free_environment
from tests.client import Client
from tests.disks import SmallDisk
from tests.postgresql import PostgreSQLServer, drop_database, new_database
from tests.programs import program as find_program

STAND_IN_CLI = Path(__file__).with_name("stand_in_cli.py")

# What a test needs besides Python is told by the fixtures that it uses: the marker of each.
MARKERS = {
    "postgresql": "postgresql",
    "postgresql_server": "postgresql",
    "browser": "browser",
    "small_disk": "root",
    "program": "program",
}
EXTRA = {*MARKERS.values(), "claude", "many_rounds", "slow"}
# In this directory only the tests marked `main_job` belong to the README's command: each case takes a second or more.
REAL_CLAUDE = Path(__file__).with_name("e2e")


def pytest_configure() -> None:
    """Give the processes that the tests start the default for SIGINT, which a shell's background job ignores."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A handler, and not SIG_DFL: what has a handler is reset to its default in every program that is executed.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of tests that `-n auto` runs at once: more than cores, because many tests wait."""
    return 2 * len(os.sched_getaffinity(0))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with what it needs, before pytest selects by markers, so that no test can forget to say it."""
    for item in items:
        needs = {MARKERS[name] for name in getattr(item, "fixturenames", ()) if name in MARKERS}
        if "postgresql" in _kinds(item):
            needs.add("postgresql")
        if item.path.is_relative_to(REAL_CLAUDE) and not item.get_closest_marker("main_job"):
            needs.add("claude")
        for name in needs:
            item.add_marker(name)
        if any(item.get_closest_marker(name) for name in EXTRA):
            item.add_marker("extra")


def _kinds(item: pytest.Item) -> list[object]:
    """The parameters of a test that may name a kind of database: each, or the first of it where it is a tuple.

    A fixture that is there for each kind asks for a server only where its parameter says so.
    """
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return [value[0] if isinstance(value, tuple) and value else value for value in parameters]


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


ProgramFunction = Callable[[str, str], str]


@pytest.fixture(scope="session")
def program() -> ProgramFunction:
    """Finds a program of the system by its name and Debian's package, as `tests.programs.program`."""
    return find_program


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the schema, to be copied."""
    path = tmp_path_factory.mktemp("template") / "db.sqlite"
    sqlite_file.prepare(f"sqlite:///{path}")
    database = Database(f"sqlite:///{path}", writable=True, pool_size=1)
    migrate(database)
    database.close()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new database with the schema, once on each kind of server: a copy, for a migration takes far longer."""
    if request.param == "sqlite":
        path = tmp_path / "db.sqlite"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
    else:
        url = new_database(request.getfixturevalue("postgresql"))
        yield url
        drop_database(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new database without the schema, for tests of the migrations."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/empty.sqlite"
        sqlite_file.prepare(url)
        yield url
    else:
        url = new_database(request.getfixturevalue("postgresql"), empty=True)
        yield url
        drop_database(url)


@pytest.fixture
def writable(database_url: str) -> Iterator[Database]:
    """The one writer of a database with the schema in place."""
    database = Database(database_url, writable=True, pool_size=1)
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
        # A free port, because another test or program may have the default one.
        "PORT": "0",
    }


ServeFunction = Callable[..., ServiceProcess]


@pytest.fixture
def serve(request: pytest.FixtureRequest, environ: dict[str, str], tmp_path: Path) -> Iterator[ServeFunction]:
    """Starts services as processes of their own, with settings of a test's choice; ends them afterwards."""
    if "database_url" in request.fixturenames:
        request.getfixturevalue("database_url")  # made before the services, and so deleted after they have stopped
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
