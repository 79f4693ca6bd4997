"""The socket that the service listens on: TCP, or a Unix socket that no second instance takes away."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ccm.errors import BadSetting
from ccm.settings.settings import Settings


@contextmanager
def listener(settings: Settings) -> Iterator[socket.socket]:
    """A bound socket; nobody can connect before its server listens. A Unix socket is removed at the end.

    Raises:
        BadSetting: the address or the path cannot be had.
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
            raise BadSetting(f"it cannot listen on HOST {host}, PORT {port}: {error.strerror or error}.") from None
        yield bound


def shown_address(bound: socket.socket) -> str:
    """Where a socket listens, as the log and a client of ours name it: `http://127.0.0.1:3000` or `unix:/path`."""
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
            os.chmod(path, mode)  # in time: a socket refuses everybody until its server listens
            own = os.lstat(path).st_ino
        except OSError as error:
            raise BadSetting(f"it cannot listen on CCM_UNIX_SOCKET {path}: {error.strerror or error}.") from None
        try:
            yield bound
        finally:
            with suppress(FileNotFoundError):
                if os.lstat(path).st_ino == own:
                    os.unlink(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The right to the path. The lock file beside it is never removed: a removed one can be locked twice."""
    lock = path.with_name(path.name + ".lock")
    try:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BadSetting(f"the lock file {lock} of CCM_UNIX_SOCKET cannot be written: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadSetting(
                f"another CC Manager listens on CCM_UNIX_SOCKET {path}; stop it, or give this one a path of its own."
            ) from None
        yield
    finally:
        os.close(file)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a service that was killed.

    Raises:
        BadSetting: something else is there; it is left untouched.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise BadSetting(f"CCM_UNIX_SOCKET {path} is there already and is no socket; remove it or name another path.")
    # Ours are locked; another program's may be alive all the same.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)  # with its backlog full it would be waited for
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise BadSetting(f"another program listens on CCM_UNIX_SOCKET {path}; give this service a path of its own.")
