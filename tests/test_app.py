"""The entry points: `create_app`, `flask run`, `flask migrate`, `flask demo`, `python app.py`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest

from app import create_app
from ccm.db.driver.migrate import read_migrations
from ccm.settings.settings import Settings
from tests.client import Client
from tests.conftest import ServeFunction
from tests.flask_commands import FLASK, call
from tests.programs import free_port
from tests.receiver import Receiver

ROOT = Path(__file__).parents[1]
MIGRATIONS = [f"{migration.number:04}" for migration in read_migrations("sqlite")]


def test_create_app_opens_nothing_and_starts_no_thread(tmp_path: Path) -> None:
    threads = threading.active_count()
    create_app(Settings(database_path=tmp_path / "db.sqlite"))

    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


def test_flask_migrate_prints_what_it_applied_and_can_run_twice(environ: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite"
    status = call([*FLASK, "migrate", "--status"], environ, DATABASE_PATH=path)
    first = call([*FLASK, "migrate"], environ, DATABASE_PATH=path)
    second = call([*FLASK, "migrate"], environ, DATABASE_PATH=path)
    after = call([*FLASK, "migrate", "--status"], environ, DATABASE_PATH=path)

    assert re.findall(r"^missing  (\d{4})", status.stdout, re.M) == MIGRATIONS
    assert re.findall(r"^applied  (\d{4})", first.stdout, re.M) == MIGRATIONS
    assert second.stdout == "The schema is up to date.\n"
    assert "missing" not in after.stdout
    assert [run.returncode for run in (status, first, second, after)] == [0] * 4


def test_concurrent_flask_migrate_applies_each_migration_once(environ: dict[str, str], tmp_path: Path) -> None:
    variables = {**environ, "DATABASE_PATH": str(tmp_path / "db.sqlite")}
    processes = [
        subprocess.Popen([*FLASK, "migrate"], env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [process.communicate()[0] for process in processes]

    assert [process.returncode for process in processes] == [0] * 4
    assert sum(output.count("applied") for output in outputs) == len(MIGRATIONS)


def test_flask_migrate_beside_a_running_service_succeeds_if_nothing_is_missing(
    serve: ServeFunction, environ: dict[str, str], tmp_path: Path
) -> None:
    serve()
    result = call([*FLASK, "migrate"], environ, DATABASE_PATH=tmp_path / "db.sqlite")
    assert [result.returncode, result.stdout] == [0, "The schema is up to date.\n"]


def test_flask_migrate_on_postgresql(environ: dict[str, str], postgresql: str) -> None:
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE migrated")
    result = call([*FLASK, "migrate"], environ, DATABASE_URL=f"{postgresql}/migrated")

    assert result.stdout.count("applied") == len(MIGRATIONS)


def test_flask_run_starts_the_service_with_the_first_request(
    environ: dict[str, str], tmp_path: Path, project: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    path = tmp_path / "db.sqlite"
    variables = {**environ, "DATABASE_PATH": str(path)}
    process = subprocess.Popen(
        [*FLASK, "run", "--debug", "--port", str(port)],
        env=variables,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        # The reloader's child serves; its line is the second.
        waiting_for = iter(["Debugger PIN", None])
        word = next(waiting_for)
        for line in process.stderr:
            if word and word in line:
                break
        assert not path.exists()
        client = Client(f"http://127.0.0.1:{port}")
        run = client.start(project, "Hello, developer.")
        assert run["status"] == "completed"
        assert client.get("/health").json == {"status": "ok"}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()


def test_ctrl_c_under_flask_run_interrupts_the_runs(environ: dict[str, str], tmp_path: Path, project: Path) -> None:
    path = tmp_path / "db.sqlite"
    process = subprocess.Popen(
        [*FLASK, "run", "--port", "0"],
        env={**environ, "DATABASE_PATH": str(path), "LOG_LEVEL": "info"},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        match = re.search(r"Running on (http://127\S+)", line)
        if match:
            client = Client(match[1])
            break
    run = client.start(project, "[[slow 3000 0.02]]", wait=0)
    client.wait_for_message(run["id"], "system")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)

    with sqlite3.connect(path) as database:
        ended = database.execute('SELECT status, "errorCode" FROM ccr_runs').fetchall()
    database.close()
    assert ended == [("error", "INTERRUPTED")]


def test_flask_demo_shows_every_step(environ: dict[str, str], tmp_path: Path) -> None:
    # Run it from another directory and with a service's settings in the environment, which it must ignore.
    own = {name: environ[name] for name in ("PATH", "LANG")} | {"HOME": str(tmp_path)}
    with Receiver() as receiver:
        settings = {
            "CCM_API_TOKEN": "t" * 40,
            "CCM_API_TOKEN_FILE": str(tmp_path / "tokens"),
            "CCM_UNIX_SOCKET": str(tmp_path / "socket"),
            "CCM_WEBHOOK_URL": receiver.url,
            "DATABASE_PATH": str(tmp_path / "db.sqlite"),
            "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
            "HOST": "0.0.0.0",
            "PGHOST": "nowhere.invalid",
            "PORT": receiver.url.rpartition(":")[2],
        }
        result = call([*FLASK, "--app", str(ROOT / "app.py"), "demo"], own | settings, cwd=tmp_path)
        assert receiver.received == []

    assert result.returncode == 0, result.stderr
    assert result.stdout.count("$ curl") == 6
    assert result.stdout.count('"status": "completed"') == 3
    tree = [
        line.split()[:2] for line in result.stdout.partition("The tree of runs")[2].splitlines() if "session" in line
    ]
    assert [words[0] if words[0] != "└─" else words[1] for words in tree][:3] == ["fresh", "resume", "fork"]
    assert "a run becomes rows" in result.stdout
    assert re.search(r"first message after \d+ ms", result.stdout)
    assert list(tmp_path.iterdir()) == []


def test_flask_demo_serve_runs_until_ctrl_c(environ: dict[str, str], tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen(
        [*FLASK, "demo", "--serve"],
        env=environ | {"PORT": str(port)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        match = re.search(r"Serving on (\S+) until", line)
        if match:
            assert match[1] == f"http://127.0.0.1:{port}"
            assert Client(match[1]).get("/health").json == {"status": "ok"}
            break
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert "Stopping." in rest
    assert process.returncode == 0


def test_flask_demo_serve_reports_a_port_in_use(environ: dict[str, str]) -> None:
    # Without PORT the demo uses 3000, the README's port. Ignore a failing bind: another program may already use it.
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", 3000))
            taken.listen()
        others = {name: value for name, value in environ.items() if name != "PORT"}
        # In one test, because two at once would free the port for each other.
        for variables in ({}, {"PORT": ""}, {"PORT": "3000"}):
            result = call([*FLASK, "demo", "--serve"], others | variables)

            assert result.returncode == 1
            assert "PORT 3000: Address already in use.\n" in result.stderr
            assert result.stderr.endswith("a free one with PORT=0.\n")
            assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("variables", "code", "expected"),
    [
        ({"PORT": "x"}, 2, "PORT must be a whole number"),
        ({"HOST": "0.0.0.0"}, 2, "HOST 0.0.0.0 needs a token"),
        ({"DATABASE_PATH": "/nowhere/db.sqlite"}, 3, "/nowhere/db.sqlite cannot be written"),
        ({"DATABASE_URL": "postgresql://u@127.0.0.1:1/db"}, 3, "PostgreSQL cannot be reached"),
    ],
)
def test_a_refused_start_says_why(environ: dict[str, str], variables: dict[str, str], code: int, expected: str) -> None:
    result = call([sys.executable, "app.py"], environ | variables)

    assert result.returncode == code
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_refuses_the_start(serve: ServeFunction, environ: dict[str, str], tmp_path: Path) -> None:
    port = Client(serve().url).port
    result = call([sys.executable, "app.py"], environ, PORT=port, DATABASE_PATH=tmp_path / "other.sqlite")

    assert result.returncode == 4
    assert "Address already in use" in result.stderr


def test_another_programs_database_file_is_refused_untouched(environ: dict[str, str], tmp_path: Path) -> None:
    text, foreign = tmp_path / "notes.txt", tmp_path / "foreign.sqlite"
    text.write_text("Dear diary.")
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sqlite3; sqlite3.connect({str(foreign)!r}).execute('CREATE TABLE ccr_runs (id)')",
        ],
        check=True,
    )
    for path in (text, foreign):
        before, mode = path.read_bytes(), path.stat().st_mode
        result = call([sys.executable, "app.py"], environ, DATABASE_PATH=path)
        assert result.returncode == 3
        assert str(path) in result.stderr
        assert (path.read_bytes(), path.stat().st_mode) == (before, mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.sqlite", "notes.txt"]


def test_only_the_owner_can_read_the_files_of_the_service(serve: ServeFunction, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        serve()
    finally:
        os.umask(before)

    files = sorted(tmp_path.glob("db.sqlite*"))
    assert [path.name for path in files] == ["db.sqlite", "db.sqlite-shm", "db.sqlite-wal", "db.sqlite.lock"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_an_unsupported_python_is_refused() -> None:
    check = (ROOT / "app.py").read_text(encoding="utf-8").partition("import atexit")[0]
    code = f"import sys; sys.version_info = (3, 10, 0); exec({check!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert result.returncode != 0
    assert "needs Python 3.11 to 3.14" in result.stderr
