"""A full directory for temporary files, which agents can cause, with the database on another disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ccm.testing.service_process import ServiceProcess
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.disks import SmallDisk
from tests.postgresql import new_database
from tests.waiting import until

# The size above which waitress keeps a body in a file (bytes).
IN_MEMORY = 2**19
# The loggers that must not log errors. Others may, because the run's own directory cannot be written.
LOGGERS = ("ccm.core.storage.writer", "waitress")


@pytest.fixture(params=["sqlite", "postgresql"])
def service(
    request: pytest.FixtureRequest, serve: ServeFunction, small_disk: SmallDisk, home: Path, tmp_path: Path
) -> Iterator[ServiceProcess]:
    database = {"DATABASE_PATH": str(tmp_path / "db.sqlite")}
    if request.param == "postgresql":
        database = {"DATABASE_URL": new_database(request.getfixturevalue("postgresql"))}
    started = serve(TMPDIR=small_disk.path, CCM_CLI_PATH=stand_in_cli(home), **database)
    yield started
    assert not [line for line in started.log if any(f"ERROR {name}" in line for name in LOGGERS)]


def body(project: Path, size: int) -> dict[str, Any]:
    """Return a body with an unknown field of `size` bytes, which is refused after it is read."""
    return {"cwd": str(project), "prompt": "Hello.", "unknown": "x" * size}


def test_the_service_works_with_a_full_directory_for_temporary_files(
    service: ServiceProcess, small_disk: SmallDisk, project: Path
) -> None:
    client = Client(service.url)
    large = client.start(project, json.dumps({"count": 1, "pad": 20_000_000}), wait=120)
    assert large["status"] == "completed", large
    path = f"/api/runs/{large['id']}/messages"
    before = client.get(path)
    assert len(before.body) > 20_000_000
    assert client.post("/api/runs/start", body(project, 2 * IN_MEMORY)).status == 400
    small_disk.fill()

    assert client.get("/health").status == 200
    started = client.start(project, "Hello.", wait=0)
    assert client.run(started["id"], wait=60)["status"] != "running"
    assert client.get(path).body == before.body
    assert client.get("/api/runs").status == 200
    assert client.post("/api/runs/start", body(project, IN_MEMORY // 2)).status == 400
    assert client.get("/health").status == 200


def test_starts_are_accepted_if_the_directory_was_full_before_the_first_one(
    service: ServiceProcess, small_disk: SmallDisk, project: Path
) -> None:
    client = Client(service.url)
    small_disk.fill()
    for _ in range(2):
        answer = client.post("/api/runs/start", {"cwd": str(project), "prompt": "Hello."})
        assert [answer.status, client.get("/health").status] == [202, 200]
        assert client.run(answer.json["id"], wait=60)["status"] != "running"


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
@pytest.mark.parametrize("space", [0, 2**16, 2**20])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_for_the_disk_is_refused_in_json(
    service: ServiceProcess, small_disk: SmallDisk, project: Path, space: int, chunked: bool
) -> None:
    client = Client(service.url)
    # The first body fixes the directory; later Python would choose another one with space.
    assert client.post("/api/runs/start", body(project, 2 * IN_MEMORY)).status == 400
    # The server deletes the body's file after its answer.
    until(lambda: small_disk.used() == 0)
    small_disk.fill()
    os.truncate(small_disk.path / "filler", (small_disk.path / "filler").stat().st_size - space)
    sent = json.dumps(body(project, 8 * IN_MEMORY)).encode()

    connection = client.connection()
    headers = {"Content-Type": "application/json"}
    parts = (sent[at : at + 100_000] for at in range(0, len(sent), 100_000)) if chunked else sent
    connection.request("POST", "/api/runs/start", parts, headers, encode_chunked=chunked)
    answer = connection.getresponse()

    assert answer.status == 503
    assert answer.headers["Retry-After"]
    assert answer.headers["Content-Type"] == "application/json"
    error = json.loads(answer.read())["error"]
    assert error["code"] == "OUT_OF_DISK"
    assert str(small_disk.path) not in error["message"]
    connection.close()
    assert not [line for line in service.log if "Traceback" in line]

    (small_disk.path / "filler").unlink()
    assert client.post("/api/runs/start", body(project, 2 * IN_MEMORY)).status == 400
