"""File descriptors: their limit, their uses, and a check that enough are left for a run."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys

from ccm.errors import BadSetting, OutOfDescriptors

# For the listening socket, logs, lock files, the database's connections (20 readers with up to 3 files each), up to 16
# webhooks in progress, and files that libraries open for a moment.
RESERVED = 126
# A run's pipes, its event loop and its transcript, including those that are open only while Claude Code starts.
PER_RUN = 16
# A connection, and the temporary file for a large body.
PER_CONNECTION = 2
MIN_CONNECTIONS = 20
# The limit to set where the hard one is infinite, because macOS accepts no higher number.
MAX_FILES = 10_240
# The error numbers for "no descriptors left", in this process and in the system.
SHORTAGES = (errno.EMFILE, errno.ENFILE)


def limit() -> int | None:
    """Return how many files this process may have open; None for any number."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> int:
    """Raise this process's limit of open files as far as it is allowed to, and return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_FILES
    highest = MAX_FILES if hard == resource.RLIM_INFINITY else hard
    if soft < highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    return max(soft, highest)


def lower(pid: int, files: int) -> None:
    """Lower the limit of another process to the one that this service was started with.

    Some programs cannot cope with many thousands, which the service needs for itself. Linux only.
    """
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user; it runs with any limit
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (files, hard))


def connections_that_fit(files: int, runs: int) -> int:
    """Return how many connections can be open at once without taking descriptors from the runs.

    Args:
        files: the limit of open files.
        runs: the number of concurrent runs.

    Raises:
        BadSetting: fewer than MIN_CONNECTIONS.
    """
    connections = (files - RESERVED - runs * PER_RUN) // PER_CONNECTION
    if connections < MIN_CONNECTIONS:
        needed = RESERVED + runs * PER_RUN + MIN_CONNECTIONS * PER_CONNECTION
        raise BadSetting(
            f"{files} open files are too few for {runs} concurrent runs: raise the limit to at least {needed} (ulimit "
            "-n, LimitNOFILE in systemd), or lower CCM_MAX_CONCURRENT_RUNS."
        )
    return connections


def check_spare() -> None:
    """Check that enough descriptors are left to start a run.

    Raises:
        OutOfDescriptors: too few are left.
    """
    most = limit()
    try:
        is_short = most is not None and len(os.listdir("/dev/fd")) + PER_RUN > most
    except OSError as error:
        is_short = error.errno in SHORTAGES  # otherwise they cannot be counted here, and the run itself will fail
    if is_short:
        raise OutOfDescriptors(
            "The service has too many files open to start a run; nothing was stored. Try again later, or ask the "
            "operator to raise the limit (ulimit -n, LimitNOFILE in systemd)."
        )
