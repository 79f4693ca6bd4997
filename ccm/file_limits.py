"""File descriptors: how many there are, what they are needed for, and whether some are left."""

from __future__ import annotations

import errno
import os
import resource

from ccm.errors import BadSetting, OutOfDescriptors

# The listening socket, logs, lock files, the database's connections (20 readers, each with up to 3 files), webhooks on
# their way (16) and what libraries open for a moment.
RESERVED = 126
# A run's pipes and its event loop, with those that live only while Claude Code is started.
PER_RUN = 16
# A connection, and the temporary file in which a large body is kept.
PER_CONNECTION = 2
FEWEST_CONNECTIONS = 20
# Where there is no limit to raise it to: macOS takes no higher number.
ENOUGH = 10_240
SHORTAGES = (errno.EMFILE, errno.ENFILE)


def limit() -> int | None:
    """How many files this process may have open; None for any number."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> int:
    """Raise this process's own limit as far as it may. Gives the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ENOUGH
    highest = ENOUGH if hard == resource.RLIM_INFINITY else hard
    if soft < highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    return max(soft, highest)


def connections_that_fit(files: int, runs: int) -> int:
    """How many connections can be open at once beside so many runs. waitress must be kept from accepting more: with
    no descriptor left it would try again and again, at full load.

    Raises:
        BadSetting: hardly any.
    """
    room = (files - RESERVED - runs * PER_RUN) // PER_CONNECTION
    if room < FEWEST_CONNECTIONS:
        needed = RESERVED + runs * PER_RUN + FEWEST_CONNECTIONS * PER_CONNECTION
        raise BadSetting(
            f"{files} open files are too few for {runs} runs at once: raise the limit to {needed} at least (ulimit -n, "
            "LimitNOFILE in systemd), or lower CCM_MAX_CONCURRENT_RUNS."
        )
    return room


def check_spare() -> None:
    """
    Raises:
        OutOfDescriptors: not enough are left to start a run with.
    """
    most = limit()
    try:
        is_short = most is not None and len(os.listdir("/dev/fd")) + PER_RUN > most
    except OSError as error:
        is_short = error.errno in SHORTAGES  # else they cannot be counted here, and the run itself will tell
    if is_short:
        raise OutOfDescriptors(
            "The service has too many files open to start a run, and nothing was stored. Try again later; "
            "a higher limit (ulimit -n, LimitNOFILE in systemd) mends it."
        )
