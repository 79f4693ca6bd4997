"""The lock that allows one service per database."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ccm.db.driver.lock import service_lock
from ccm.errors import DatabaseRefused
from tests.client import Client
from tests.conftest import ServeFunction

ROOT = Path(__file__).parents[3]


def test_a_second_holder_is_refused_until_the_first_releases(database_url: str) -> None:
    with service_lock(database_url):
        with (
            pytest.raises(DatabaseRefused, match="Another CC Manager is at work") as refusal,
            service_lock(database_url),
        ):
            pass
        assert refusal.value.exit_code == 3

    with service_lock(database_url):
        pass


def test_the_lock_of_a_killed_holder_is_released(database_url: str) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from ccm.db.driver.lock import service_lock; "
        "lock = service_lock(sys.argv[2]); lock.__enter__(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), database_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(DatabaseRefused), service_lock(database_url):
        pass

    holder.kill()
    holder.communicate()
    with service_lock(database_url, patience=10):
        pass


def test_a_service_is_refused_a_database_with_two_names(
    serve: ServeFunction, environ: dict[str, str], tmp_path: Path
) -> None:
    first, second = tmp_path / "db.sqlite", tmp_path / "elsewhere" / "db.sqlite"
    second.parent.mkdir()
    service = serve()
    second.hardlink_to(first)

    def start(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "app.py"],
            env=environ | {"DATABASE_PATH": str(path), "PORT": "0"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    # Refused while the first service runs and after it was killed, because its log has data that the file lacks.
    beside = start(second)
    service.process.kill()
    service.wait()
    for refusal, path in ((beside, second), (start(second), second), (start(first), first)):
        assert refusal.returncode == 3
        assert f"{path} has 2 names (hard links)" in refusal.stderr
        assert "Traceback" not in refusal.stderr
    assert [path.name for path in second.parent.iterdir()] == ["db.sqlite"]

    second.unlink()
    assert Client(serve().url).get("/health").status == 200


def test_the_lock_file_is_private_to_its_owner(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with service_lock(f"sqlite:///{tmp_path}/db.sqlite"):
            assert (tmp_path / "db.sqlite.lock").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
