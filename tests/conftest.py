"""Shared fixtures: SQLite and PostgreSQL databases, the stand-in for the Messages API, services as real processes."""

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

# Fixtures that need more than Python, and the marker that each adds to the tests that use it.
MARKERS = {
    "postgresql": "postgresql",
    "postgresql_server": "postgresql",
    "browser": "browser",
    "small_disk": "root",
    "program": "program",
}
EXTRA = {*MARKERS.values(), "claude", "many_rounds", "openapi", "slow"}
# In this directory only the tests marked `main_job` belong to the README's command: each case takes a second or more.
REAL_CLAUDE = Path(__file__).with_name("e2e")
FAULTS = Path(__file__).parent / "faults"


def pytest_configure() -> None:
    """Restore the default SIGINT handling, which child processes inherit: a shell's background job ignores SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A handler, not SIG_DFL: exec() resets a handled signal to its default in the child.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of tests that `-n auto` runs at once: more than cores, because many tests wait."""
    return 2 * len(os.sched_getaffinity(0))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark each test with its requirements, let pytest select by the markers, and order the selected tests.

    No test can omit a mark, because they are set here.
    """
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
    yield
    items[:] = _ordered(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _ordered(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Return the tests in an order in which no worker has a long one left when the others are done.

    Each worker gets an equal share of the list. The walk through the faults waits more than it computes, so it begins
    the first share, and the other tests use the processor meanwhile. The other long tests begin the other shares.
    """
    walk = [item for item in items if item.path.is_relative_to(FAULTS)]
    long = [item for item in items if item not in walk and item.get_closest_marker("many_rounds")]
    rest = [item for item in items if item not in walk and item not in long]
    others = max(1, workers - 1)
    heads = [walk, *(long[number::others] for number in range(others))]
    ordered: list[pytest.Item] = []
    for number, head in enumerate(heads):
        share = len(items) * (number + 1) // len(heads)
        ordered += head
        missing = max(0, share - len(ordered))
        ordered += rest[:missing]
        rest = rest[missing:]
    return ordered + rest


def _kinds(item: pytest.Item) -> list[object]:
    """Return a test's parameters that may name a kind of database; of a tuple, its first element.

    A fixture parametrised over both kinds requests the PostgreSQL server only for its own parameter.
    """
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return [value[0] if isinstance(value, tuple) and value else value for value in parameters]


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Start a private PostgreSQL server; the value is its URL without a database name."""
    with PostgreSQLServer() as server:
        yield server.url


@pytest.fixture(scope="module")
def postgresql_server() -> Iterator[PostgreSQLServer]:
    """Start a separate PostgreSQL server for tests that stop or break it."""
    with PostgreSQLServer() as server:
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mount a file system of 2 MiB."""
    with SmallDisk(tmp_path / "small-disk") as disk:
        yield disk


ProgramFunction = Callable[[str, str], str]


@pytest.fixture(scope="session")
def program() -> ProgramFunction:
    """Return `tests.programs.program`, which finds a system program by its name and Debian package."""
    return find_program


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a SQLite file with the schema, for tests to copy."""
    path = tmp_path_factory.mktemp("template") / "db.sqlite"
    sqlite_file.prepare(f"sqlite:///{path}")
    database = Database(f"sqlite:///{path}", writable=True, pool_size=1)
    migrate(database)
    database.close()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Create a database with the schema on each kind of server. It is a copy because a migration takes far longer."""
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
    """Create a database without the schema, for tests of the migrations."""
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
    """Open the only writing `Database` of a database with the schema."""
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
    """Start the stand-in for the Messages API, which keeps the requests it gets in `requests`."""
    with MessagesAPI() as api:
        yield api


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the HOME of the test session's agents."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def environ(messages_api: MessagesAPI, home: Path) -> dict[str, str]:
    """Build a service's environment from scratch, so that no variable of the machine reaches an agent."""
    return credential_free_environment(messages_api.url, str(home)) | {
        # Claude Code refuses to bypass permissions as root outside a sandbox, and CI often runs as root.
        "IS_SANDBOX": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # A free port, because another test or program may have the default one.
        "PORT": "0",
        # Tests of prestarted Claude Code ask for it; in the others each service would cost half a second of a core.
        "CCM_SPARE_RUNS": "0",
    }


ServeFunction = Callable[..., ServiceProcess]


@pytest.fixture
def serve(request: pytest.FixtureRequest, environ: dict[str, str], tmp_path: Path) -> Iterator[ServeFunction]:
    """Return a function that starts a service process with the given settings; stop the services after the test."""
    if "database_url" in request.fixturenames:
        request.getfixturevalue("database_url")  # created before the services, so it is deleted after they stop
    with ExitStack() as stack:

        def start(*through: str, **settings: object) -> ServiceProcess:
            own = {"DATABASE_PATH": str(tmp_path / "db.sqlite"), "LOG_LEVEL": "debug"}
            own |= {name: str(value) for name, value in settings.items()}
            return stack.enter_context(ServiceProcess(environ | own, through=through))

        yield start


@pytest.fixture(scope="session")
def client(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Start one service for the whole test session (default settings, SQLite, real Claude Code); return its client."""
    database = tmp_path_factory.mktemp("shared") / "db.sqlite"
    own = {"DATABASE_PATH": str(database), "LOG_LEVEL": "debug", "CCM_MAX_CONCURRENT_RUNS": "4"}
    with ServiceProcess(environ | own) as service:
        yield Client(service.url)
        assert not [line for line in service.log if "Traceback" in line], "the service logged a stack trace"


@pytest.fixture
def quick(serve: ServeFunction, home: Path) -> Client:
    """Start a service that runs the stand-in CLI of tests/stand_in_cli.py; return its client."""
    return Client(serve(CCM_CLI_PATH=stand_in_cli(home)).url)


def stand_in_cli(folder: Path) -> Path:
    """Write a program that runs the stand-in CLI with this Python, without site-packages for a fast start."""
    program = folder / "claude"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {STAND_IN_CLI} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Create a directory for agents to work in, with one file."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "here-is-a-file.txt").write_text("hello\n")
    return folder
