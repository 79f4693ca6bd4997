"""Attacks: each test is one that would succeed without the control that it is named after.

Those that depend on the process (its memory, umask, environment) or on raw bytes go to a served service, the others to
an app in process.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from waitress.adjustments import Adjustments
from waitress.channel import ClientDisconnected

from app import create_app
from ccm.core.claude.processes import marked
from ccm.errors import BadSetting, StartRefused
from ccm.server.server import _Channel
from ccm.settings.access import check_access
from ccm.settings.settings import Settings
from ccm.settings.token_file import add_token
from ccm.testing.service_process import APP, ServiceProcess
from tests.api.conftest import connect, folder_of, post_head, read_all, refused, script, umask, write_tokens
from tests.api.in_process import InProcessService
from tests.api.test_fuzzing import LOG_LINE
from tests.client import Client
from tests.conftest import ServeFunction, stand_in_cli
from tests.flask_commands import FLASK, call
from tests.postgresql import new_database

TOKEN = "0123456789-a-token-of-the-tests"
SECRET = "sk-nobody-else-may-read-this"
MIB = 2**20


# ---- secrets


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_an_agent_finds_no_secrets_of_the_service(
    request: pytest.FixtureRequest, serve: ServeFunction, project: Path, tmp_path: Path, database: str
) -> None:
    tokens = tmp_path / "tokens"
    write_tokens(tokens, f"alice:{TOKEN}-of-alice\n")
    own = {"CCM_API_TOKEN": TOKEN, "CCM_API_TOKEN_FILE": tokens, "PGPASSWORD": SECRET}
    if database == "postgresql":
        server = request.getfixturevalue("postgresql")
        own["DATABASE_URL"] = new_database(server).replace("ccm@", f"ccm:{SECRET}@")
    service = serve(**own)
    # The tool's own environment, that of Claude Code around it, and the arguments of every process: into files, because
    # a tool's long output is kept out of the messages.
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
    assert [line for line in service.log if " DEBUG " in line], "the lines of the debug level count too"


def test_a_token_is_neither_answered_nor_logged(tmp_path: Path) -> None:
    with InProcessService(tmp_path, CCM_API_TOKEN=TOKEN) as service:
        for path, headers in [
            ("/api/runs", {"Authorization": f"Bearer {SECRET}"}),
            ("/api/runs", {"Authorization": f"Basic {SECRET}"}),
            (f"/api/runs?token={SECRET}", {}),
            (f"/nothing?access_token={SECRET}", {"Authorization": f"Bearer {TOKEN}"}),
        ]:
            answer = service.client.request("GET", path, headers=headers)
            assert answer.status in (400, 401)
            assert SECRET not in answer.body.decode() + str(answer.headers)
    assert len([line for line in service.log if "ccm.api: GET" in line]) == 4
    assert [line for line in service.log if SECRET in line] == []


WRONG_DATABASE = {"DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:1/db"}


@pytest.mark.parametrize(
    "variables",
    [
        WRONG_DATABASE,
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
def test_a_refused_start_shows_no_secrets(
    variables: dict[str, str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with patch.dict(os.environ, variables), patch("app.configure"):  # which would replace the tests' own log handlers
        with pytest.raises((SystemExit, StartRefused)) as refusal:
            create_app().extensions["ccm"].start()
        result = create_app(Settings()).test_cli_runner().invoke(args=["migrate", "--status"])
    error = refusal.value
    assert isinstance(error, SystemExit | StartRefused)
    codes = [error.code if isinstance(error, SystemExit) else error.exit_code, result.exit_code]
    shown = capsys.readouterr()

    for code, text in zip(codes, (f"{shown.err}{error}", result.stderr), strict=True):
        assert code in (2, 3)
        assert text
    for text in (shown.err, shown.out, str(error), result.output, caplog.text):
        assert SECRET not in text
        assert "Traceback" not in text


def test_a_process_that_does_not_start_shows_no_secrets(environ: dict[str, str]) -> None:
    for words in ([sys.executable, "app.py"], [*FLASK, "migrate", "--status"]):
        result = call(words, environ | {"LOG_LEVEL": "debug"} | WRONG_DATABASE)

        assert result.returncode in (2, 3)
        assert result.stderr
        assert SECRET not in result.stderr + result.stdout
        assert "Traceback" not in result.stderr


def test_an_invalid_token_file_is_refused_without_its_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}\nbob {SECRET}\n")
    with pytest.raises(BadSetting) as refusal:
        check_access(Settings(api_token_file=file))

    assert refusal.value.exit_code == 2
    assert "line 2" in str(refusal.value)
    assert SECRET not in str(refusal.value)
    assert TOKEN not in str(refusal.value)


def test_a_token_file_that_is_open_to_other_users_ends_the_start(tmp_path: Path) -> None:
    file = tmp_path / "tokens of mine"
    write_tokens(file, f"alice:{TOKEN}\n", 0o644)
    before = file.read_bytes()

    flask = create_app(Settings(database_path=tmp_path / "unused.sqlite")).test_cli_runner()
    command = flask.invoke(args=["token", "bob"], env={"CCM_API_TOKEN_FILE": str(file)})
    with pytest.raises(BadSetting) as refusal:
        check_access(Settings.from_env({"CCM_API_TOKEN_FILE": str(file)}))

    assert [command.exit_code, command.stdout, refusal.value.exit_code] == [2, "", 2]
    for text in (command.stderr, f"{refusal.value}\n"):
        assert f"CCM_API_TOKEN_FILE {file} has mode 0644" in text
        assert f"`chmod 600 '{file}'`" in text
        assert text.count("\n") == 1
        assert TOKEN not in text
    assert file.read_bytes() == before, "no new token is put where others can read it"


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o620, 0o660, 0o777], ids=oct)
def test_a_token_file_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}\n", mode)

    with pytest.raises(BadSetting):
        check_access(Settings(api_token_file=file))
    with pytest.raises(BadSetting):
        add_token(file, "bob", TOKEN)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440], ids=oct)
def test_a_token_file_may_be_readable_for_its_group(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}\n", mode)

    check_access(Settings(api_token_file=file))


def test_the_mode_of_the_token_file_counts_and_not_that_of_a_link_to_it(tmp_path: Path) -> None:
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
    """A client of a service that was started with umask 0, and the directory that all its files are in."""
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


def test_no_other_user_can_read_a_runs_options(secretive: tuple[Client, Path], project: Path) -> None:
    client, written = secretive
    for options in OPTIONS:
        prompt = script({"type": "assistant", "text": SECRET}, hold=True)
        run = client.start(project, prompt, wait=0, options=options, title=SECRET, metadata={"x": SECRET})
        client.wait_for_message(run["id"], "assistant")
        commands = [Path("/proc", str(pid), "cmdline").read_bytes() for pid in marked(run["id"])]
        assert any(b"--session-id" in command for command in commands)
        assert not any(SECRET.encode() in command for command in commands), f"{options} is in the arguments"
        # The files in a directory that is closed to others are closed as well.
        readable = []
        for folder, names, files in os.walk(written):
            names[:] = [name for name in names if Path(folder, name).stat().st_mode & 0o077]
            readable += [Path(folder, name) for name in files if Path(folder, name).stat().st_mode & 0o077]
        assert readable == []
        own = [path for path in (written / "tmp").rglob("*") if path.is_file() and path.name != "stderr"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in own} <= {0o600}
        client.delete(f"/api/runs/{run['id']}")
    assert list((written / "tmp").iterdir()) == [], "and none of it stays"


# ---- the log


def test_a_client_cannot_forge_lines_of_the_log(serve: ServeFunction, home: Path, project: Path) -> None:
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
    assert forged in run["error"]["message"], "the client may see the words of Claude Code"
    client.start(project, f"hello\r\n{forged}", title=f"\n{forged}")

    assert len(service.log) > 10
    assert [line for line in service.log if not LOG_LINE.match(line) or not line.isprintable()] == []
    assert [line for line in service.log if line.startswith(forged)] == []


# ---- access


def test_a_session_outside_of_roots_that_were_set_later_cannot_continue(tmp_path: Path) -> None:
    inside, outside = folder_of(tmp_path, "inside"), folder_of(tmp_path, "outside")
    swapped = folder_of(inside, "swapped")
    with InProcessService(tmp_path) as service:
        ids = {path.name: service.client.start(path, "Hello.")["sessionId"] for path in (inside, outside, swapped)}
    swapped.rmdir()
    swapped.symlink_to(outside)

    with InProcessService(tmp_path, CCM_ALLOWED_ROOTS=inside) as service:
        client = service.client
        for name in ("outside", "swapped"):
            for kind in ("resume", "fork"):
                answer = client.post(f"/api/runs/{kind}", {"sessionId": ids[name], "prompt": "x"})
                assert "CCM_ALLOWED_ROOTS" in refused(answer, None, 403, "CWD_FORBIDDEN")
        assert client.resume(ids["inside"], "x")["status"] == "completed"
        assert client.fork(ids["outside"], "x", cwd=str(inside))["cwd"] == str(inside)


def peak(service: ServiceProcess) -> int:
    """The peak of a service's memory, in bytes."""
    status = Path("/proc", str(service.process.pid), "status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.fixture(scope="module")
def roomy(serve_all: ServeFunction) -> ServiceProcess:
    """A service that takes bodies of 32 MiB."""
    service = serve_all()
    Client(service.url).post("/api/runs/start", {"prompt": "x" * 20 * MIB})  # so that its peak includes one large body
    return service


def filled(before: bytes, unit: bytes, after: bytes) -> bytes:
    """JSON of exactly the largest size that is read."""
    return before + unit * ((32 * MIB - len(before) - len(after)) // len(unit)) + after


def unknown_fields() -> bytes:
    return b'{"cwd": "/", "prompt": "x"' + b"".join(b',"%x":0' % number for number in range(3_000_000)) + b"}"


# Made when a test needs them: together they are 250 MiB.
BOMBS: dict[str, Callable[[], bytes]] = {
    "lists": lambda: filled(b'{"cwd": "/", "prompt": "x", "metadata": {"x": [', b"[],", b"[]]}}"),
    "objects": lambda: filled(b'{"cwd": "/", "prompt": "x", "images": [', b"{},", b"{}]}"),
    "numbers": lambda: filled(b'{"cwd": "/", "prompt": "x", "options": {"allowedTools": [', b"0,", b"0]}}"),
    "texts": lambda: filled(b'{"cwd": "/", "prompt": "x", "bogus": [', b'"",', b'""]}'),
    "unknown fields": unknown_fields,
    "a name": lambda: filled(b'{"cwd": "/", "prompt": "x", "', b"x", b'": 1}'),
    "brackets": lambda: filled(b'{"cwd": "/", "prompt": "x", "metadata": {"x": ', b"[", b""),
    "half a text": lambda: filled(b'{"prompt": "', b'\\"', b""),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_body_does_not_take_much_memory_within_the_service(roomy: ServiceProcess, bomb: str) -> None:
    before = peak(roomy)
    answer = Client(roomy.url).request("POST", "/api/runs/start", BOMBS[bomb](), timeout=60)

    assert answer.status == 400
    assert len(answer.body) < 1000
    assert peak(roomy) - before < 150 * MIB


def test_texts_may_have_any_number_of_commas(roomy: ServiceProcess) -> None:
    body = {"cwd": "/nowhere/at/all", "prompt": ',[{"\\' * 200_000, "options": {"systemPrompt": "[,]" * 300_000}}
    assert "does not exist" in refused(Client(roomy.url).post("/api/runs/start", body), "cwd")


def test_unfinished_bodies_take_no_memory(roomy: ServiceProcess) -> None:
    before = peak(roomy)
    part = b"%x\r\n" % MIB + b" " * MIB + b"\r\n"
    with ExitStack() as stack:
        connections = [
            stack.enter_context(connect(Client(roomy.url), post_head("/api/runs/start", "Transfer-Encoding: chunked")))
            for _ in range(8)
        ]

        def send(connection: socket.socket) -> None:
            for _ in range(30):
                connection.sendall(part)

        with ThreadPoolExecutor(len(connections)) as pool:
            list(pool.map(send, connections))
        assert Client(roomy.url).get("/health").status == 200
        assert peak(roomy) - before < 60 * MIB, "240 MiB were sent"


def test_a_client_that_leaves_just_before_its_refusal_causes_no_fault() -> None:
    """Waitress logs the request's path then, and an invalid request has none."""

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
