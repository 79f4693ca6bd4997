"""Who may talk to the service: every path is behind the guard, and each of its checks refuses what it is there for."""

from __future__ import annotations

import logging
import os
import re
import resource
import stat
from pathlib import Path
from typing import Any

import pytest

from app import create_app
from ccm.api.http.tokens import Tokens
from ccm.settings.settings import Settings
from tests.api.conftest import NOWHERE, connect, folder_of, read_all, write_tokens
from tests.client import Answer, Client
from tests.conftest import ServeFunction
from tests.test_app import FLASK, call

TOKEN = "0123456789-a-token-of-the-tests"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def open_api(serve_all: ServeFunction) -> Client:
    """A client of a service without a token."""
    return Client(serve_all().url)


@pytest.fixture(scope="module")
def closed_api(serve_all: ServeFunction) -> Client:
    """A client of a service with a token, which it does not send by itself."""
    return Client(serve_all(CCM_API_TOKEN=TOKEN).url)


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def status_and_code(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.error["code"]


def endpoints() -> list[tuple[str, str]]:
    """Every method and path that the app knows, and some that it does not."""
    found = []
    for rule in create_app(Settings(database_path=Path("/nowhere/db.sqlite"))).url_map.iter_rules():
        path = re.sub(r"<[^>]*>", NOWHERE, rule.rule)
        found += [(method, path) for method in sorted(rule.methods or ())]
    return [*found, ("GET", "/nothing/here"), ("OPTIONS", "/api/runs"), ("TRACE", "/"), ("PROPFIND", "/api/runs")]


# ---- the Host


def ask(client: Client, *headers: str, line: str = "GET / HTTP/1.1") -> int:
    """The status of a request with just these headers."""
    text = "\r\n".join([line, *headers, "Connection: close", "", ""])
    with connect(client, text.encode("latin-1")) as connection:
        head, _ = read_all(connection)
    return int(head.split()[1])


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:80", "127.0.0.1", "127.0.0.1:65535", "[::1]", "[::1]:3000", "[0:0:0:0:0:0:0:1]:3000"],
)
def test_the_services_own_names_are_allowed_whatever_the_port(open_api: Client, host: str) -> None:
    assert ask(open_api, f"Host: {host}") == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Host:"],
        ["Host: evil.example"],
        ["Host: localhost.evil.example"],
        ["Host: evil.example:3000"],
        ["Host: 127.0.0.1.nip.io"],
        ["Host: localhost."],
        ["Host: localhost.:3000"],
        ["Host: 127.0.0.1."],
        ["Host: 127.1"],
        ["Host: 2130706433"],
        ["Host: 0.0.0.0"],
        ["Host: [::]"],
        ["Host: [::ffff:127.0.0.1]"],
        ["Host: ::1"],
        ["Host: [::1"],
        ["Host: localhost, localhost"],
        ["Host: localhost", "Host: localhost"],
        ["Host: localhost", "Host: evil.example"],
        ["Host: evil.example", "Host: localhost"],
        ["Host: localhost@evil.example"],
        ["Host: evil.example#localhost"],
        ["Host: localhost/"],
        ["Host: localhost:x"],
        ["Host: localhost:"],
        ["Host: local host"],
        ["Host: \xe9"],
        ["Host: evil.example", "X-Forwarded-Host: localhost"],
    ],
    ids=lambda headers: " + ".join(headers) or "none",
)
def test_any_other_host_is_refused(open_api: Client, headers: list[str]) -> None:
    assert ask(open_api, *headers) in (400, 403)
    assert ask(open_api, *headers, line="GET /health HTTP/1.1") in (400, 403)
    assert ask(open_api, *headers, line="GET /nothing HTTP/1.1") in (400, 403)


def test_an_absolute_address_does_not_stand_for_the_host(open_api: Client) -> None:
    assert ask(open_api, "Host: evil.example", line="GET http://localhost/ HTTP/1.1") == 403
    assert ask(open_api, line="GET / HTTP/1.0") == 403


def test_a_refused_host_names_the_setting_that_allows_it(serve: ServeFunction, open_api: Client) -> None:
    answer = open_api.request("GET", "/", headers={"Host": "agents.example"})
    assert status_and_code(answer) == (403, "HOST_FORBIDDEN")
    assert "CCM_ALLOWED_HOSTS" in answer.error["message"]

    client = Client(serve(CCM_ALLOWED_HOSTS="Agents.example, [::1]").url)
    assert client.request("GET", "/", headers={"Host": "agents.example:443"}).status == 200
    assert client.request("GET", "/", headers={"Host": "localhost"}).status == 403


# ---- every path


@pytest.mark.parametrize(("method", "path"), endpoints())
def test_no_path_is_beside_the_guard(closed_api: Client, method: str, path: str) -> None:
    foreign = closed_api.request(method, path, headers={**bearer(), **JSON, "Host": "evil.example"})
    nobody = closed_api.request(method, path, headers=JSON)
    page = closed_api.request(method, path, headers={**bearer(), **JSON, "Origin": "http://evil.example"})

    assert foreign.status == 403
    assert nobody.status == (401 if path != "/health" else {"GET": 200, "HEAD": 200}.get(method, 405))
    assert page.status == 403
    for answer in (foreign, nobody, page):
        assert answer.headers["X-Request-Id"]
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


def test_the_order_is_host_token_origin_media_type(closed_api: Client) -> None:
    headers = {"Host": "evil.example", "Origin": "http://evil.example", "Content-Type": "text/plain"}
    steps: list[tuple[dict[str, str], tuple[int, str]]] = [
        ({}, (403, "HOST_FORBIDDEN")),
        ({"Host": "localhost"}, (401, "UNAUTHORIZED")),
        (bearer(), (403, "ORIGIN_FORBIDDEN")),
        ({"Origin": "http://localhost"}, (415, "UNSUPPORTED_MEDIA_TYPE")),
        ({"Content-Type": "application/json"}, (400, "VALIDATION_ERROR")),
    ]
    for change, expected in steps:
        headers |= change
        assert status_and_code(closed_api.request("POST", "/api/runs/start", b"{}", headers)) == expected


# ---- the token


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        f"Bearer {TOKEN} {TOKEN}",
        f"Bearer {TOKEN}, Bearer {TOKEN}",
        "Bearer \xe9\xff",
    ],
)
def test_without_the_token_nothing_is_answered(closed_api: Client, value: str) -> None:
    answer = closed_api.request("GET", "/api/runs", headers={"Authorization": value})

    assert status_and_code(answer) == (401, "UNAUTHORIZED")
    assert {name.lower(): value for name, value in answer.headers.items()}["www-authenticate"] == "Bearer"
    assert "CCM_API_TOKEN" in answer.error["message"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_with_the_token_all_is_as_without_tokens(closed_api: Client, scheme: str) -> None:
    assert closed_api.request("GET", "/api/runs", headers={"Authorization": f"{scheme} {TOKEN}"}).json == []


@pytest.mark.parametrize("name", ["token", "access_token", "Api_Key"])
def test_a_token_in_an_address_is_refused(closed_api: Client, name: str) -> None:
    for headers in ({}, bearer()):
        answer = closed_api.request("GET", f"/api/runs?{name}={TOKEN}", headers=headers)
        assert status_and_code(answer) == (400, "VALIDATION_ERROR")
        assert TOKEN not in answer.body.decode()


def test_health_needs_no_token_and_tells_nothing_else(closed_api: Client) -> None:
    assert closed_api.get("/health").json == {"status": "ok"}


def test_tokens_have_names_that_runs_and_logs_show(serve: ServeFunction, tmp_path: Path, home: Path) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"# clients\n\nalice:{TOKEN}-a\nbob-2:{TOKEN}-b:with-a-colon\n")
    service = serve(CCM_API_TOKEN_FILE=file, CCM_API_TOKEN=TOKEN)
    client = Client(service.url)
    project = folder_of(tmp_path)

    def start(token: str) -> Any:
        body = {"cwd": str(project), "prompt": "hello"}
        return client.request("POST", "/api/runs/start", body, bearer(token)).json

    names = [start(token)["createdBy"] for token in (f"{TOKEN}-a", f"{TOKEN}-b:with-a-colon", TOKEN)]
    assert names == ["alice", "bob-2", "api"]
    assert any("POST /api/runs/start 202" in line and line.endswith("by alice") for line in service.log)
    assert not [line for line in service.log if TOKEN in line]


def test_the_file_of_tokens_is_read_again_when_it_changes(serve: ServeFunction, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}-a\n")
    service = serve(CCM_API_TOKEN_FILE=file)
    client = Client(service.url)

    def let_in(token: str) -> bool:
        return client.request("GET", "/api/runs", headers=bearer(token)).status == 200

    assert [let_in(f"{TOKEN}-a"), let_in(f"{TOKEN}-b")] == [True, False]
    write_tokens(file, f"bob:{TOKEN}-b\n")
    assert [let_in(f"{TOKEN}-a"), let_in(f"{TOKEN}-b")] == [False, True]
    write_tokens(file, f"bob:{TOKEN}-b\nno token at all\n")  # a slip: all stays as it was, and the log says so
    assert [let_in(f"{TOKEN}-a"), let_in(f"{TOKEN}-b")] == [False, True]
    assert [line for line in service.log if "line 2: must be NAME:TOKEN" in line]
    file.unlink()
    assert [let_in(f"{TOKEN}-a"), let_in(f"{TOKEN}-b")] == [False, False]
    write_tokens(file, f"carol:{TOKEN}-c\n")
    assert let_in(f"{TOKEN}-c")


def test_a_file_of_tokens_that_others_can_read_by_now_locks_nobody_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}-a\n")
    tokens = Tokens(Settings(api_token_file=file))
    assert tokens.client(f"{TOKEN}-a") == "alice"

    write_tokens(file, f"bob:{TOKEN}-b\n", 0o644)
    for _ in range(10):
        assert [tokens.client(f"{TOKEN}-a"), tokens.client(f"{TOKEN}-b")] == ["alice", None]
    (told,) = caplog.messages
    assert told.startswith(f"the tokens stay as they were: CCM_API_TOKEN_FILE {file} has mode 0644")

    file.chmod(0o600)
    assert [tokens.client(f"{TOKEN}-a"), tokens.client(f"{TOKEN}-b")] == [None, "bob"]


def test_a_file_of_tokens_that_could_not_be_read_for_a_moment_is_read_when_it_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}-a\n")
    tokens = Tokens(Settings(api_token_file=file))
    assert tokens.client(f"{TOKEN}-a") == "alice"
    file.touch()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        for _ in range(10):
            assert tokens.client(f"{TOKEN}-a") is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert [message for message in caplog.messages if "nobody is let in" in message] == [
        f"nobody is let in, for CCM_API_TOKEN_FILE {file} cannot be read: Too many open files"
    ]
    assert tokens.client(f"{TOKEN}-a") == "alice"


def test_a_missing_file_of_tokens_is_told_once_each_time_it_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ccm.api.http.tokens")
    file = tmp_path / "tokens"
    tokens = Tokens(Settings(api_token_file=file))

    def told() -> list[str]:
        """What the log says while ten clients come."""
        caplog.clear()
        for _ in range(10):
            tokens.client(f"{TOKEN}-a")
        return caplog.messages

    gone = [
        f"nobody is let in, for CCM_API_TOKEN_FILE {file} cannot be read: No such file or directory",
        "tokens of nobody",
    ]
    for _ in range(2):
        assert told() == gone
        assert told() == []
        write_tokens(file, f"alice:{TOKEN}-a\n")
        assert told() == ["tokens of alice"]
        file.unlink()


def test_flask_token_makes_one_that_works(serve: ServeFunction, environ: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    before = os.umask(0)
    try:
        made = [call([*FLASK, "token", name], environ, CCM_API_TOKEN_FILE=file) for name in ("alice", "bob")]
    finally:
        os.umask(before)

    assert file.read_text() == made[0].stdout + made[1].stdout
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    client = Client(serve(CCM_API_TOKEN_FILE=file).url)
    for answer in made:
        token = answer.stdout.strip().partition(":")[2]
        assert len(token) > 40
        assert client.request("GET", "/api/runs", headers=bearer(token)).status == 200
    again = call([*FLASK, "token", "alice"], environ, CCM_API_TOKEN_FILE=file)
    assert [again.returncode, again.stdout] == [2, ""]
    assert "alice already" in again.stderr
    alone = call([*FLASK, "token", "carol"], environ)
    assert re.fullmatch(r"carol:[\w-]{43}\n", alone.stdout)
    assert call([*FLASK, "token", "a b"], environ).returncode == 2


def test_without_a_token_the_start_says_who_is_let_in(serve: ServeFunction, tmp_path: Path) -> None:
    assert [line for line in serve().log if "WARNING" in line and "every user of this host" in line]
    other = serve(CCM_API_TOKEN=TOKEN, DATABASE_PATH=tmp_path / "other.sqlite")
    assert not [line for line in other.log if "every user" in line]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"HOST": "0.0.0.0"}, "HOST 0.0.0.0 needs a token"),
        ({"HOST": "::"}, "HOST :: needs a token"),
        ({"HOST": "192.0.2.1"}, "HOST 192.0.2.1 needs a token"),
        ({"CCM_API_TOKEN": "short"}, "CCM_API_TOKEN must have 16 to 512"),
        ({"CCM_API_TOKEN": "with a blank in the midst"}, "CCM_API_TOKEN must have 16 to 512"),
        ({"CCM_API_TOKEN_FILE": "/nowhere/tokens"}, "/nowhere/tokens cannot be read"),
        ({"CCM_ALLOWED_HOSTS": "localhost:3000"}, "CCM_ALLOWED_HOSTS has 'localhost:3000'"),
        ({"CCM_ALLOWED_HOSTS": "*"}, "CCM_ALLOWED_HOSTS has '*'"),
    ],
)
def test_a_setting_that_is_not_safe_ends_the_start(
    environ: dict[str, str], variables: dict[str, str], says: str
) -> None:
    import sys

    result = call([sys.executable, "app.py"], environ | variables)

    assert result.returncode == 2
    assert says in result.stderr
    assert "with a blank" not in result.stderr
    assert "Traceback" not in result.stderr


def test_with_a_token_another_address_may_be_listened_on(serve: ServeFunction) -> None:
    client = Client(serve(HOST="0.0.0.0", CCM_API_TOKEN=TOKEN).url.replace("0.0.0.0", "127.0.0.1"))

    assert client.get("/api/runs").status == 401
    assert client.request("GET", "/api/runs", headers=bearer()).status == 200


# ---- the origin


@pytest.fixture
def origin(open_api: Client) -> str:
    return f"http://{open_api.host}:{open_api.port}"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost"},  # another port is another origin
        {"Origin": "https://{own}"},
        {"Origin": "http://{own}.evil.example"},
        {"Origin": "http://{own}", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_a_page_of_another_origin_is_refused(open_api: Client, headers: dict[str, str], tmp_path: Path) -> None:
    own = f"{open_api.host}:{open_api.port}"
    sent = {name: value.format(own=own) for name, value in headers.items()}
    body = {"cwd": str(tmp_path), "prompt": "hello"}

    for answer in (
        open_api.request("POST", "/api/runs/start", body, sent),
        open_api.request("GET", "/api/runs", headers=sent),
        open_api.request("GET", "/health", headers=sent),
    ):
        assert status_and_code(answer) == (403, "ORIGIN_FORBIDDEN")
    assert open_api.get("/api/runs").json == []


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_a_page_of_the_services_own_origin_is_let_in(open_api: Client, origin: str, site: str) -> None:
    assert open_api.request("GET", "/api/runs", headers={"Origin": origin, "Sec-Fetch-Site": site}).status == 200


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_can_send_is_refused(open_api: Client, kind: str | None, tmp_path: Path) -> None:
    body = f'{{"cwd": "{tmp_path}", "prompt": "hello"}}'
    for path in ("/api/runs/start", "/api/runs/resume", "/nothing"):
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
        lines += [] if kind is None else [f"Content-Type: {kind}"]
        with connect(open_api, "\r\n".join([*lines, "", body]).encode()) as connection:
            head, _ = read_all(connection)
        assert int(head.split()[1]) == 415
