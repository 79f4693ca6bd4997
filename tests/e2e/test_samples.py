"""The samples for Caddy and systemd: the programs accept them, and they work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ccm.core import service as core_service
from ccm.core.claude.processes import marked
from ccm.core.storage import writer
from ccm.server import connections, server
from ccm.settings.settings import Settings, unknown_variables
from tests.client import Client
from tests.conftest import ProgramFunction, ServeFunction
from tests.docs import filled_in, page, samples
from tests.programs import can_connect, free_port
from tests.waiting import until

SOCKET = "unix//run/cc-manager/socket"


@pytest.fixture
def unit() -> str:
    sample, _ = samples(page("systemd"), "ini")
    return sample


# ---- Caddy


@pytest.fixture
def caddy(program: ProgramFunction, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """Return Caddy's command and environment, with a HOME of its own because Caddy writes there."""
    (tmp_path / "caddy").mkdir()
    return [program("caddy", "caddy")], {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "caddy")}


def test_caddy_accepts_its_sample(caddy: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    words, environ = caddy
    path = tmp_path / "Caddyfile"
    path.write_text(samples(page("reverse-proxy"), "caddyfile")[0])
    checked = subprocess.run(
        [*words, "validate", "--adapter", "caddyfile", "--config", str(path)],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert checked.returncode == 0, checked.stderr
    assert '"level":"warn"' not in checked.stderr, "the sample is not in Caddy's own format"


def test_urls_are_correct_behind_caddy(
    caddy: tuple[list[str], dict[str, str]], serve: ServeFunction, tmp_path: Path, project: Path
) -> None:
    own = tmp_path / "socket"
    service = serve(CCM_UNIX_SOCKET=own, CCM_TRUSTED_PROXY="unix")
    words, environ = caddy
    port = free_port()
    places = {"agents.example {": f"http://localhost:{port} {{", SOCKET: f"unix/{own}"}
    path = tmp_path / "Caddyfile"
    path.write_text("{\n\tadmin off\n}\n" + filled_in(samples(page("reverse-proxy"), "caddyfile")[0], places))
    process = subprocess.Popen(
        [*words, "run", "--adapter", "caddyfile", "--config", str(path)], env=environ, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: can_connect(port))
        client = Client(f"http://localhost:{port}")
        answer = client.post("/agents/api/runs/start", {"cwd": str(project), "prompt": "Hello."}, wait=60)
        assert answer.headers["Location"] == f"/agents/api/runs/{answer.json['id']}"
        link = client.get(f"/agents/api/runs/{answer.json['id']}/messages", limit=1).headers["Link"]
        assert link.startswith(f"<http://localhost:{port}/agents/api/runs/{answer.json['id']}/messages?")
        until(
            lambda: [
                line for line in service.log if "POST /api/runs/start 200" in line and line.endswith(" from 127.0.0.1")
            ]
        )
    finally:
        process.terminate()
        process.wait()


# ---- systemd


def test_systemd_accepts_the_unit(unit: str, program: ProgramFunction, tmp_path: Path) -> None:
    path = tmp_path / "cc-manager.service"
    path.write_text(filled_in(unit, {"/opt/cc-manager/.venv/bin/python": sys.executable}))
    checked = subprocess.run(
        [program("systemd-analyze", "systemd"), "verify", "--man=no", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    # systemd-analyze also exits with 0 when it ignores unknown lines, and only prints a warning.
    assert [checked.returncode, checked.stdout, checked.stderr] == [0, "", ""]


def test_the_units_file_has_valid_settings(unit: str) -> None:
    assert "\nEnvironmentFile=/etc/cc-manager.env\n" in unit
    _, file = samples(page("systemd"), "ini")
    environ = dict(line.split("=", 1) for line in file.splitlines())
    settings = Settings.from_env(environ)

    assert unknown_variables(environ) == []
    assert settings.has_tokens
    assert settings.unix_socket_mode == 0o660


def test_systemd_waits_longer_than_the_service_takes_to_stop(unit: str) -> None:
    match = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert match is not None
    # The runs, a writer that does not stop, the requests in flight, their threads.
    longest = core_service.STOP_TIMEOUT + writer.MAX_DELAY + 5 + server.DRAIN_TIMEOUT + 1
    assert int(match[1]) > longest + 10
    assert connections.IDLE_TIMEOUT > 60  # the time that nginx keeps an idle connection


def test_without_new_privileges_agents_run_and_exit_with_the_service(
    serve: ServeFunction, program: ProgramFunction, project: Path
) -> None:
    # The same as the unit's NoNewPrivileges.
    service = serve(program("setpriv", "util-linux"), "--no-new-privs")
    client = Client(service.url)
    done = client.start(project, '[[tool Bash {"command": "ls"}]] [[text Listed.]]')
    assert [done["status"], done["permissionDenials"]] == ["completed", []]

    run = client.start(project, "[[hang]]", wait=0)
    client.wait_for_message(run["id"], "system")
    assert marked(run["id"])
    service.process.send_signal(signal.SIGKILL)
    service.wait()
    until(lambda: not marked(run["id"]))
