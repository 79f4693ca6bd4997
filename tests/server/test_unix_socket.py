"""The service on a Unix socket: its mode controls access, and a second instance cannot take it over."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client import Client
from tests.conftest import ServeFunction
from tests.event_source import events_of
from tests.flask_commands import call
from tests.waiting import until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def test_the_service_works_over_a_unix_socket(serve: ServeFunction, path: Path, project: Path) -> None:
    service = serve(CCM_UNIX_SOCKET=path)
    client = Client(service.url)

    assert service.url == f"unix:{path}"
    run = client.start(project, "Hello over a socket.")
    assert run["status"] == "completed"
    assert events_of(client, f"/api/runs/{run['id']}/stream")[-1].type == "end"
    until(lambda: [line for line in service.log if "POST /api/runs/start" in line and line.endswith(" from unix")])
    curl = ["curl", "-sS", "--unix-socket", str(path)]
    health = subprocess.run([*curl, "http://localhost/health"], capture_output=True, text=True, check=True).stdout
    assert health == '{"status": "ok"}\n'
    other = subprocess.run([*curl, "http://evil.example/"], capture_output=True, text=True, check=True).stdout
    assert "HOST_FORBIDDEN" in other


@pytest.mark.parametrize(
    ("mode", "bits", "expected"),
    [
        (None, 0o600, "only root and this user"),
        ("0660", 0o660, "anyone with access to"),
        ("666", 0o666, "anyone with access to"),
    ],
)
def test_the_sockets_mode_controls_access_and_the_log_says_so(
    serve: ServeFunction, path: Path, mode: str | None, bits: int, expected: str
) -> None:
    before = os.umask(0)
    try:
        service = serve(CCM_UNIX_SOCKET=path, **({} if mode is None else {"CCM_UNIX_SOCKET_MODE": mode}))
    finally:
        os.umask(before)

    assert stat.S_IMODE(path.stat().st_mode) == bits
    assert stat.S_IMODE(path.with_name("socket.lock").stat().st_mode) == 0o600
    warning = f"no token is set: {expected}"
    assert [line for line in service.log if warning in line and f"(mode {bits:04o})" in line]


def test_a_clean_stop_removes_the_socket(serve: ServeFunction, path: Path) -> None:
    service = serve(CCM_UNIX_SOCKET=path)
    service.process.terminate()

    assert service.wait() == 0
    assert not path.exists()


def test_a_refused_start_removes_the_socket(environ: dict[str, str], path: Path) -> None:
    result = call([sys.executable, "app.py"], environ, CCM_UNIX_SOCKET=path, DATABASE_PATH="/nowhere/db.sqlite")

    assert result.returncode == 3
    assert not path.exists()


def test_the_socket_of_a_killed_service_is_replaced(serve: ServeFunction, path: Path) -> None:
    killed = serve(CCM_UNIX_SOCKET=path)
    killed.process.kill()
    killed.wait()
    assert path.is_socket()

    assert Client(serve(CCM_UNIX_SOCKET=path).url).get("/health").status == 200


def test_a_second_instance_cannot_take_the_socket(
    serve: ServeFunction, environ: dict[str, str], path: Path, tmp_path: Path
) -> None:
    client = Client(serve(CCM_UNIX_SOCKET=path).url)
    second = call([sys.executable, "app.py"], environ, CCM_UNIX_SOCKET=path, DATABASE_PATH=tmp_path / "b.sqlite")

    assert second.returncode == 4
    assert f"another CC Manager listens on CCM_UNIX_SOCKET {path}" in second.stderr
    assert client.get("/health").status == 200


def test_another_programs_socket_is_left_untouched(environ: dict[str, str], path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen(1)
        result = call([sys.executable, "app.py"], environ, CCM_UNIX_SOCKET=path)
        assert path.is_socket()

    assert result.returncode == 4
    assert "another program listens" in result.stderr


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_a_path_that_is_not_a_socket_is_refused_and_left_untouched(
    environ: dict[str, str], path: Path, kind: str
) -> None:
    precious = path.with_name("precious.txt")
    precious.write_text("Dear diary.")
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(precious)
    else:
        path.write_text("Dear diary.")
    before = path.lstat()

    result = call([sys.executable, "app.py"], environ, CCM_UNIX_SOCKET=path)

    assert result.returncode == 2
    assert "is no socket" in result.stderr
    after = path.lstat()
    assert [after.st_ino, after.st_mode, after.st_mtime_ns] == [before.st_ino, before.st_mode, before.st_mtime_ns]
    assert precious.read_text() == "Dear diary."


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CCM_UNIX_SOCKET": "/tmp/" + "x" * 103}, "CCM_UNIX_SOCKET must have 107 bytes at most"),
        ({"CCM_UNIX_SOCKET": "socket"}, "CCM_UNIX_SOCKET must be an absolute path"),
        ({"CCM_UNIX_SOCKET": "/nowhere/socket"}, "/nowhere/socket.lock of CCM_UNIX_SOCKET cannot be written"),
        ({"CCM_UNIX_SOCKET_MODE": "0400"}, "CCM_UNIX_SOCKET_MODE must be an octal mode"),
        ({"CCM_UNIX_SOCKET_MODE": "rw"}, "CCM_UNIX_SOCKET_MODE must be an octal mode"),
    ],
)
def test_an_unusable_path_or_mode_refuses_the_start(
    environ: dict[str, str], variables: dict[str, str], expected: str
) -> None:
    result = call([sys.executable, "app.py"], environ | variables)

    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_the_longest_path_works(serve: ServeFunction, tmp_path: Path) -> None:
    name = str(tmp_path) + "/"
    longest = Path(name + "s" * (107 - len(name)))
    assert Client(serve(CCM_UNIX_SOCKET=longest).url).get("/health").status == 200
