"""The socket that the service listens on: TCP, or a Unix socket that a second instance cannot take over."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ccm.errors import BadSetting, ListenFailed
from ccm.settings.settings import Settings


@contextmanager
def listener(settings: Settings) -> Iterator[socket.socket]:
    """Bind the socket that the settings name, without listening on it. On exit, remove it if it is a Unix socket.

    Raises:
        BadSetting: the path cannot be used.
        ListenFailed: the address cannot be bound, or another program listens on it.
    """
    if settings.unix_socket is not None:
        with _unix(settings.unix_socket, settings.unix_socket_mode) as bound:
            yield bound
        return
    host, port = settings.host, settings.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            raise ListenFailed(f"it cannot listen on HOST {host}, PORT {port}: {error.strerror or error}.") from None
        yield bound


def shown_address(bound: socket.socket) -> str:
    """Return a socket's address as the log shows it: `http://127.0.0.1:3000` or `unix:/path`."""
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _unix(path: Path, mode: int) -> Iterator[socket.socket]:
    with _locked(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        try:
            _remove_stale(path)
            bound.bind(os.fspath(path))
            os.chmod(path, mode)  # no race: connections are refused until the server listens
            inode = os.lstat(path).st_ino
        except OSError as error:
            raise ListenFailed(f"it cannot listen on CCM_UNIX_SOCKET {path}: {error.strerror or error}.") from None
        try:
            yield bound
        finally:
            with suppress(FileNotFoundError):
                if os.lstat(path).st_ino == inode:  # another program may have replaced it
                    os.unlink(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the path.

    The lock file beside it is never removed: two instances could each lock a file of this name, one of them removed.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BadSetting(f"the lock file {lock} of CCM_UNIX_SOCKET cannot be written: {error.strerror}.") from None
    with os.fdopen(descriptor, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ListenFailed(
                f"another CC Manager listens on CCM_UNIX_SOCKET {path}; stop it, or give this one a path of its own."
            ) from None
        yield


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed service left behind.

    Raises:
        BadSetting: the path is no socket. It is left untouched.
        ListenFailed: another program listens on it. It is left untouched.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise BadSetting(f"CCM_UNIX_SOCKET {path} exists and is no socket; remove it or name another path.")
    # The lock excludes another CC Manager only; another program may listen here.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)  # a blocking connect would wait while the backlog is full
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ListenFailed(f"another program listens on CCM_UNIX_SOCKET {path}; give this service a path of its own.")
