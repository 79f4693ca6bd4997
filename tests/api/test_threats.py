"""What must not get out, and what must not get in: each test is an attack that would succeed without its control."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waitress.adjustments import Adjustments
from waitress.channel import ClientDisconnected

from ccm.core.claude.processes import marked
from ccm.errors import BadSetting
from ccm.server.server import _Channel
from ccm.settings.access import check_access
from ccm.settings.settings import Settings
from ccm.settings.token_file import add_token
from ccm.testing.service_process import APP, ServiceProcess
from tests.api.conftest import (
    announced,
    connect,
    folder_of,
    new_database,
    read_all,
    refused,
    script,
    until,
    write_tokens,
)
from tests.api.test_fuzzing import LOG_LINE
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.test_app import FLASK, call

TOKEN = "0123456789-a-token-of-the-tests"
SECRET = "sk-nobody-else-may-read-this"
MIB = 2**20


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """For what is started meanwhile."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# ---- what gets out


def test_an_agent_finds_nothing_of_the_services_own(
    serve: ServeFunction, postgresql: str, project: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    write_tokens(tokens, f"alice:{TOKEN}-of-alice\n")
    url = new_database(postgresql).replace("ccm@", f"ccm:{SECRET}@")
    service = serve(CCM_API_TOKEN=TOKEN, CCM_API_TOKEN_FILE=tokens, DATABASE_URL=url, PGPASSWORD=SECRET)
    # Its own environment, that of Claude Code around it, and the arguments of whatever runs here: into files, for
    # a long output of a tool is kept out of the messages.
    command = "(env; cat /proc/$PPID/environ) > environments; cat /proc/[0-9]*/cmdline > arguments; echo all of it"
    prompt = f'[[tool Bash {{"command": "{command}"}}]]'
    body = {"cwd": str(project), "prompt": prompt, "options": {"allowedTools": ["Bash"]}}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    client = Client(service.url)
    run = client.request("POST", "/api/runs/start?wait=60", body, headers).json
    messages = client.request("GET", f"/api/runs/{run['id']}/messages", headers=headers).body.decode()
    environments = (project / "environments").read_text()
    arguments = (project / "arguments").read_text()

    assert "all of it" in messages.split("tool_result", 1)[1]
    assert environments.count(f"CCM_RUN_ID={run['id']}") == 2, "its own, and Claude Code's"
    assert str(APP) in arguments, "the service's own are among them"
    for secret in (TOKEN, SECRET, "CCM_API_TOKEN", "DATABASE_URL", "PGPASSWORD", str(tokens)):
        assert secret not in environments
        assert secret not in messages
        assert secret not in json.dumps(run)
    assert TOKEN not in arguments
    assert SECRET not in arguments
    assert [line for line in service.log if TOKEN in line or SECRET in line] == []
    assert [line for line in service.log if " DEBUG " in line], "what is told at debug level counts too"


def test_what_is_sent_as_a_token_is_told_to_nobody(serve: ServeFunction) -> None:
    service = serve(CCM_API_TOKEN=TOKEN)
    client = Client(service.url)
    for path, headers in [
        ("/api/runs", {"Authorization": f"Bearer {SECRET}"}),
        ("/api/runs", {"Authorization": f"Basic {SECRET}"}),
        (f"/api/runs?token={SECRET}", {}),
        (f"/nothing?access_token={SECRET}", {"Authorization": f"Bearer {TOKEN}"}),
    ]:
        answer = client.request("GET", path, headers=headers)
        assert answer.status in (400, 401)
        assert SECRET not in answer.body.decode() + str(answer.headers)
    until(lambda: len([line for line in service.log if "ccm.api: GET" in line]) == 4)
    assert [line for line in service.log if SECRET in line] == []


@pytest.mark.parametrize(
    "variables",
    [
        {"DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:1/db"},
        {"DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:port/db"},
        {"DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:1/db?bogus={SECRET}"},
        {"DATABASE_URL": f"postgresql://u:{SECRET}@[::1/db"},
        {"DATABASE_URL": f"postgresql://u:{SECRET}%ZZ@127.0.0.1:1/db"},
        {"DATABASE_URL": f"postgresql://u:{SECRET}"},
        {"DATABASE_URL": f"mysql://u:{SECRET}@h/db"},
        {"DATABASE_URL": SECRET},
        {"CCM_API_TOKEN": f"{SECRET} "},
        {"CCM_API_TOKEN": f"{SECRET}\n"},
    ],
    ids=str,
)
def test_a_start_that_is_refused_keeps_its_secrets(environ: dict[str, str], variables: dict[str, str]) -> None:
    for words in ([sys.executable, "app.py"], [*FLASK, "migrate", "--status"]):
        result = call(words, environ | {"LOG_LEVEL": "debug"} | variables)

        assert result.returncode in (2, 3)
        assert result.stderr
        assert SECRET not in result.stderr + result.stdout
        assert "Traceback" not in result.stderr


def test_a_file_of_tokens_that_is_wrong_keeps_them(environ: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}\nbob {SECRET}\n")
    result = call([sys.executable, "app.py"], environ, CCM_API_TOKEN_FILE=file)

    assert result.returncode == 2
    assert "line 2" in result.stderr
    assert SECRET not in result.stderr
    assert TOKEN not in result.stderr


def test_a_file_of_tokens_that_is_open_to_other_users_ends_the_start(environ: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "tokens of mine"
    write_tokens(file, f"alice:{TOKEN}\n", 0o644)
    before = file.read_bytes()

    for words in ([*FLASK, "token", "bob"], [sys.executable, "app.py"]):
        result = call(words, environ, CCM_API_TOKEN_FILE=file)
        assert [result.returncode, result.stdout] == [2, ""]
        assert f"CCM_API_TOKEN_FILE {file} has mode 0644" in result.stderr
        assert f"`chmod 600 '{file}'`" in result.stderr
        assert result.stderr.count("\n") == 1
        assert TOKEN not in result.stderr
    assert file.read_bytes() == before, "no new token is put where others can read it"


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o620, 0o660, 0o777], ids=oct)
def test_a_file_of_tokens_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}\n", mode)

    with pytest.raises(BadSetting):
        check_access(Settings(api_token_file=file))
    with pytest.raises(BadSetting):
        add_token(file, "bob", TOKEN)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440], ids=oct)
def test_a_file_of_tokens_may_be_readable_for_its_group(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}\n", mode)

    check_access(Settings(api_token_file=file))


def test_the_file_that_a_path_leads_to_must_be_safe_not_the_link(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}\n")
    link = tmp_path / "link"
    link.symlink_to(file)  # a link has mode 0777 itself

    check_access(Settings(api_token_file=link))
    file.chmod(0o644)
    with pytest.raises(BadSetting):
        check_access(Settings(api_token_file=link))


@pytest.fixture
def secretive(serve: ServeFunction, home: Path, tmp_path: Path) -> tuple[Client, Path]:
    """A client of a service that was started with no umask at all, and the directory of all that it writes."""
    folder = folder_of(tmp_path, "written")
    (folder / "tmp").mkdir()
    own = {"DATABASE_PATH": folder / "db.sqlite", "TMPDIR": folder / "tmp", "CCM_PRIVILEGED_OPTIONS": "*"}
    with umask(0):
        return Client(serve(CCM_CLI_PATH=stand_in_cli(home), **own).url), folder


OPTIONS: list[dict[str, Any]] = [
    {"systemPrompt": SECRET},
    {"systemPrompt": {"type": "custom", "prompt": SECRET, "snapshot": True}},
    {"systemPrompt": {"type": "preset", "preset": "claude_code", "append": SECRET}},
    {"settings": {"env": {"TOKEN": SECRET}}, "sandbox": {"x": SECRET}},
    {"mcpServers": {"s": {"command": "true", "env": {"TOKEN": SECRET}}}},
    {"agents": {"a": {"description": SECRET, "prompt": SECRET, "mcpServers": [{"s": {"env": {"TOKEN": SECRET}}}]}}},
    {"env": {"TOKEN": SECRET}},
]


def test_what_a_run_is_given_is_for_no_other_user_to_read(secretive: tuple[Client, Path], project: Path) -> None:
    client, written = secretive
    for options in OPTIONS:
        prompt = script({"type": "assistant", "text": SECRET}, hold=True)
        run = client.start(project, prompt, wait=0, options=options, title=SECRET, metadata={"x": SECRET})
        client.wait_for_message(run["id"], "assistant")
        commands = [Path("/proc", str(pid), "cmdline").read_bytes() for pid in marked(run["id"])]
        assert any(b"--session-id" in command for command in commands)
        assert not any(SECRET.encode() in command for command in commands), f"{options} is in the arguments"
        # A directory that is closed to others closes what is in it.
        readable = []
        for folder, names, files in os.walk(written):
            names[:] = [name for name in names if Path(folder, name).stat().st_mode & 0o077]
            readable += [Path(folder, name) for name in files if Path(folder, name).stat().st_mode & 0o077]
        assert readable == []
        own = [path for path in (written / "tmp").rglob("*") if path.is_file() and path.name != "stderr"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in own} <= {0o600}
        client.delete(f"/api/runs/{run['id']}")
    assert list((written / "tmp").iterdir()) == [], "and nothing of it stays"


# ---- the log


def test_nobody_writes_lines_of_the_log(serve: ServeFunction, home: Path, project: Path) -> None:
    service = serve(CCM_CLI_PATH=stand_in_cli(home))
    client = Client(service.url)
    forged = "2026-01-01T00:00:00.000Z INFO ccm: all is well"
    client.get("/x%0d%0a2026-01-01T00:00:00.000Z%20INFO%20ccm:%20all%20is%20well%1b[2J%e2%80%a8")
    client.get(f"/api/runs/x%0a{forged.replace(' ', '%20')}")
    for header in ("X-Request-Id", "Host", "Origin", "User-Agent", "Authorization", "Idempotency-Key"):
        for value in (f"x\x85{forged}", f"x\t{forged}", "\x1b[31mred"):
            text = f"POST /api/runs/start HTTP/1.1\r\n{header}: {value}\r\nConnection: close\r\n\r\n"
            with connect(client, text.encode("latin-1")) as connection:
                head, _ = read_all(connection)
                assert forged.encode() not in head
    run = client.start(project, json.dumps({"stderr": f"\x1b[31mred\r\n{forged}\n\u2028", "exit": 3}))
    assert forged in run["error"]["message"], "the client may see what Claude Code said"
    client.start(project, f"hello\r\n{forged}", title=f"\n{forged}")

    assert len(service.log) > 10
    assert [line for line in service.log if not LOG_LINE.match(line) or not line.isprintable()] == []
    assert [line for line in service.log if line.startswith(forged)] == []


# ---- what gets in


def test_a_session_outside_of_the_roots_that_were_set_later_goes_on_nowhere(
    serve: ServeFunction, home: Path, tmp_path: Path
) -> None:
    inside, outside = folder_of(tmp_path, "inside"), folder_of(tmp_path, "outside")
    own = {"CCM_CLI_PATH": stand_in_cli(home)}
    before = serve(**own)
    ids = {path.name: Client(before.url).start(path, "Hello.")["sessionId"] for path in (inside, outside)}
    swapped = folder_of(inside, "swapped")
    ids["swapped"] = Client(before.url).start(swapped, "Hello.")["sessionId"]
    before.process.terminate()
    before.wait()
    swapped.rmdir()
    swapped.symlink_to(outside)

    client = Client(serve(**own, CCM_ALLOWED_ROOTS=inside).url)
    for name in ("outside", "swapped"):
        for kind in ("resume", "fork"):
            answer = client.post(f"/api/runs/{kind}", {"sessionId": ids[name], "prompt": "x"})
            assert "CCM_ALLOWED_ROOTS" in refused(answer, None, 403, "CWD_FORBIDDEN")
    assert client.resume(ids["inside"], "x")["status"] == "completed"
    assert client.fork(ids["outside"], "x", cwd=str(inside))["cwd"] == str(inside)


def peak(service: ServiceProcess) -> int:
    """The most memory that a service has had, in bytes."""
    status = Path("/proc", str(service.process.pid), "status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.fixture(scope="module")
def roomy(serve_all: ServeFunction) -> ServiceProcess:
    """A service that takes bodies of 32 MiB."""
    service = serve_all()
    Client(service.url).post("/api/runs/start", {"prompt": "x" * 20 * MIB})  # it has read a large body once
    return service


def filled(before: bytes, unit: bytes, after: bytes) -> bytes:
    """JSON of just the largest size that is read."""
    return before + unit * ((32 * MIB - len(before) - len(after)) // len(unit)) + after


BOMBS = {
    "lists": filled(b'{"cwd": "/", "prompt": "x", "metadata": {"x": [', b"[],", b"[]]}}"),
    "objects": filled(b'{"cwd": "/", "prompt": "x", "images": [', b"{},", b"{}]}"),
    "numbers": filled(b'{"cwd": "/", "prompt": "x", "options": {"allowedTools": [', b"0,", b"0]}}"),
    "texts": filled(b'{"cwd": "/", "prompt": "x", "bogus": [', b'"",', b'""]}'),
    "unknown fields": b'{"cwd": "/", "prompt": "x"'
    + b"".join(b',"%x":0' % number for number in range(3_000_000))
    + b"}",
    "a name": filled(b'{"cwd": "/", "prompt": "x", "', b"x", b'": 1}'),
    "brackets": filled(b'{"cwd": "/", "prompt": "x", "metadata": {"x": ', b"[", b""),
    "half a text": filled(b'{"prompt": "', b'\\"', b""),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_body_does_not_grow_within_the_service(roomy: ServiceProcess, bomb: str) -> None:
    before, began = peak(roomy), time.monotonic()
    answer = Client(roomy.url).request("POST", "/api/runs/start", BOMBS[bomb])

    assert answer.status == 400
    assert len(answer.body) < 1000
    assert peak(roomy) - before < 150 * MIB
    assert time.monotonic() - began < 20, "all others wait for as long"


def test_texts_may_have_as_many_commas_as_they_like(roomy: ServiceProcess) -> None:
    body = {"cwd": "/nowhere/at/all", "prompt": ',[{"\\' * 200_000, "options": {"systemPrompt": "[,]" * 300_000}}
    assert "does not exist" in refused(Client(roomy.url).post("/api/runs/start", body), "cwd")


def test_bodies_that_do_not_come_to_their_end_take_no_memory(roomy: ServiceProcess) -> None:
    before = peak(roomy)
    part = b"%x\r\n" % MIB + b" " * MIB + b"\r\n"
    with ExitStack() as stack:
        connections = [
            stack.enter_context(connect(Client(roomy.url), announced("/api/runs/start", "Transfer-Encoding: chunked")))
            for _ in range(8)
        ]

        def send(connection: socket.socket) -> None:
            for _ in range(30):
                connection.sendall(part)

        with ThreadPoolExecutor(len(connections)) as pool:
            list(pool.map(send, connections))
        assert Client(roomy.url).get("/health").status == 200
        assert peak(roomy) - before < 60 * MIB, "240 MiB were sent"


def test_a_client_that_leaves_just_before_it_is_refused_is_no_fault() -> None:
    """Waitress tells of it with the request's path, which a request that is no HTTP has not."""

    class Leaving(_Channel):
        def write_soon(self, data: bytes) -> int:
            raise ClientDisconnected

    nothing = {"add_task": lambda channel: None, "pull_trigger": lambda: None}
    server = SimpleNamespace(active_channels={}, adj=Adjustments(), **nothing)
    here, there = socket.socketpair()
    with here, there:
        channel = Leaving(server, here, ("", 0), server.adj, map={})
        channel.received(b"GET /\0 HTTP/1.1\r\nbad\r\n\r\n")
        channel.service()

    assert channel.close_when_flushed
    assert channel.requests == []
