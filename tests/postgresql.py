"""A private PostgreSQL server that tests can stop, restart and suspend."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from ccm.db.driver.database import Database
from ccm.db.driver.migrate import migrate
from tests.programs import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
# Creating or deleting a database (300 files) takes milliseconds in memory and up to a second on a disk.
MEMORY = Path("/dev/shm")
MEMORY_NEEDED = 2 * 2**30
# No test depends on surviving a crash of the machine. Tests do crash the server, which loses no commit, because each
# commit reaches the operating system; `synchronous_commit = off` would delay that.
TUNING = {"fsync": "off", "full_page_writes": "off"}
# Has the schema; each test gets a clone. PostgreSQL clones only a database without connections.
TEMPLATE = "ccm_template"


class PostgreSQLServer:
    """A context manager that creates and starts a server, then deletes it. `url` has no database name."""

    def __init__(self) -> None:
        found = shutil.which("initdb") or (str(PROGRAMS[-1]) if PROGRAMS else None)
        if found is None:
            if os.environ.get("CI"):
                pytest.fail("CI needs PostgreSQL: install Debian's package postgresql")
            pytest.skip("PostgreSQL's initdb is not installed; Debian's package postgresql has it")
        self._programs = Path(found).resolve().parent
        # Not below pytest's directories: only their owner can enter them, and root must run PostgreSQL as another user.
        self._folder = Path(tempfile.mkdtemp(prefix="ccm-postgresql-", dir=_folder_for_databases()))
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._data = self._folder / "data"
        self._port = free_port()
        self.url = f"postgresql://ccm@127.0.0.1:{self._port}"

    def _call(self, program: str, *words: str) -> None:
        environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(self._folder)}
        command = [str(self._programs / program), "-D", str(self._data), *words]
        subprocess.run(command, check=True, user=self._user, env=environ, cwd=self._folder, stdout=subprocess.DEVNULL)

    def __enter__(self) -> PostgreSQLServer:
        self._call("initdb", "-A", "trust", "-U", "ccm", "-E", "UTF8", "--no-sync")
        self.start()
        self.execute(f"CREATE DATABASE {TEMPLATE}")
        database = Database(f"{self.url}/{TEMPLATE}", writable=True, pool_size=1)
        migrate(database)
        database.close()
        return self

    def __exit__(self, *_: object) -> None:
        if (self._data / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self._folder)

    def start(self) -> None:
        options = (
            f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} "
            "-c max_connections=200 " + " ".join(f"-c {name}={value}" for name, value in TUNING.items())
        )
        self._call("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop like `pg_ctl stop -m`: `fast` ends all connections, `immediate` is a crash."""
        self._call("pg_ctl", "-m", mode, "-w", "stop")

    def new_database(self) -> str:
        """Create a database with the schema and return its URL."""
        return new_database(self.url)

    def execute(self, sql: str) -> list[tuple[object, ...]]:
        """Execute a statement as a superuser and return its rows."""
        return execute(self.url, sql)

    def configure(self, **settings: str) -> None:
        """Change the server's settings; every connection has them when this returns."""
        for name, value in settings.items():
            self.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        self.execute("SELECT pg_reload_conf()")
        # The postmaster rereads its settings when it next accepts a connection; later connections have them.
        for name, value in settings.items():
            while self.execute(f"SHOW {name}") != [(value,)]:
                time.sleep(0.01)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Suspend every process of the server in the block: connections stay open, and none gets an answer."""
        postmaster = int((self._data / "postmaster.pid").read_text().split()[0])
        # The postmaster first, so that it starts no more processes.
        os.kill(postmaster, signal.SIGSTOP)
        stopped = [postmaster, *_children(postmaster)]
        for pid in stopped[1:]:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


def execute(server: str, sql: str) -> list[tuple[object, ...]]:
    """Execute a statement as a superuser and return its rows.

    Args:
        server: the URL of a server, without a database.
    """
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def new_database(server: str, *, empty: bool = False) -> str:
    """Create a database on a server and return its URL.

    Args:
        server: the URL of a PostgreSQLServer, without a database.
        empty: whether to omit the schema.
    """
    name = f"test_{uuid.uuid4().hex}"
    execute(server, f"CREATE DATABASE {name} TEMPLATE {'template1' if empty else TEMPLATE}")
    return f"{server}/{name}"


def drop_database(url: str) -> None:
    """Delete a database together with the connections to it."""
    server, _, name = url.rpartition("/")
    execute(server, f"DROP DATABASE {name} WITH (FORCE)")


def _folder_for_databases() -> Path | None:
    """Return the directory for a server's files; None means the default for temporary files."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > MEMORY_NEEDED:
        return MEMORY
    return None


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
