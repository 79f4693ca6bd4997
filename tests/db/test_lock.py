"""One service for each database."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ccm.db.lock import ServiceLock
from ccm.errors import DatabaseRefused

ROOT = Path(__file__).parents[2]


def test_a_second_one_is_refused_until_the_first_has_gone(database_url: str) -> None:
    first = ServiceLock(database_url).acquire()
    with pytest.raises(DatabaseRefused, match="Another CC Manager is at work") as refusal:
        ServiceLock(database_url).acquire()
    assert refusal.value.exit_code == 3

    first.release()
    with ServiceLock(database_url):
        pass


def test_a_holder_that_is_killed_lets_go(database_url: str) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from ccm.db.lock import ServiceLock; "
        "lock = ServiceLock(sys.argv[2]).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), database_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(DatabaseRefused):
        ServiceLock(database_url).acquire()

    holder.kill()
    holder.communicate()
    with ServiceLock(database_url, patience=10):
        pass


def test_the_lock_file_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with ServiceLock(f"sqlite:///{tmp_path}/db.sqlite"):
            assert (tmp_path / "db.sqlite.lock").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
