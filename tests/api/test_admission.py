"""Admission checks: every path is behind them, and each refuses the requests that it is made for.

The requests are made in process. Those that waitress reads in its own way are sent to a served service, and so is the
sequence that shows that they are in front of it.
"""

from __future__ import annotations

import logging
import re
import resource
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import create_app
from ccm.api.http.tokens import Tokens
from ccm.errors import BadSetting
from ccm.settings.access import access_warnings, check_access
from ccm.settings.settings import Settings
from tests.api.conftest import NOWHERE, connect, folder_of, read_all, umask, write_tokens
from tests.api.in_process import InProcessClient, InProcessService
from tests.client import Answer, Client
from tests.conftest import ServeFunction
from tests.flask_commands import FLASK, call

TOKEN = "0123456789-a-token-of-the-tests"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def open_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessClient]:
    """A client of a service without a token."""
    with InProcessService(tmp_path_factory.mktemp("open")) as service:
        yield service.client


@pytest.fixture(scope="module")
def closed_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessClient]:
    """A client of a service with a token, which it does not send by itself."""
    with InProcessService(tmp_path_factory.mktemp("closed"), CCM_API_TOKEN=TOKEN) as service:
        yield service.client


@pytest.fixture(scope="module")
def served(serve_all: ServeFunction) -> Client:
    """The same over a socket."""
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


def ask(client: InProcessClient, headers: list[str], path: str = "/") -> int:
    """The status of a request with just these headers."""
    named = [header.partition(":") for header in headers]
    return client.send("GET", path, [(name, value.strip()) for name, _, value in named]).status


def ask_served(client: Client, headers: list[str], line: str) -> int:
    """The status of a request with this request line and just these headers, over a socket."""
    text = "\r\n".join([line, *headers, "Connection: close", "", ""])
    with connect(client, text.encode("latin-1")) as connection:
        head, _ = read_all(connection)
    return int(head.split()[1])


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:80", "127.0.0.1", "127.0.0.1:65535", "[::1]", "[::1]:3000", "[0:0:0:0:0:0:0:1]:3000"],
)
def test_the_services_own_names_are_allowed_with_any_port(open_api: InProcessClient, host: str) -> None:
    assert ask(open_api, [f"Host: {host}"]) == 200


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
def test_any_other_host_is_refused(open_api: InProcessClient, headers: list[str]) -> None:
    assert ask(open_api, headers) in (400, 403)
    assert ask(open_api, headers, "/health") in (400, 403)
    assert ask(open_api, headers, "/nothing") in (400, 403)


def test_an_absolute_target_does_not_replace_the_host(served: Client) -> None:
    assert ask_served(served, ["Host: evil.example"], "GET http://localhost/ HTTP/1.1") == 403
    assert ask_served(served, [], "GET / HTTP/1.0") == 403


def test_two_hosts_over_a_socket_are_refused(served: Client) -> None:
    assert ask_served(served, ["Host: localhost", "Host: localhost"], "GET /health HTTP/1.1") in (400, 403)
    assert ask_served(served, ["Host: localhost", "Host: evil.example"], "GET /health HTTP/1.1") in (400, 403)
    assert ask_served(served, ["Host: localhost"], "GET /health HTTP/1.1") == 200


def test_a_refused_host_names_the_setting_that_allows_it(open_api: Client, tmp_path: Path) -> None:
    answer = open_api.request("GET", "/", headers={"Host": "agents.example"})
    assert status_and_code(answer) == (403, "HOST_FORBIDDEN")
    assert "CCM_ALLOWED_HOSTS" in answer.error["message"]

    with InProcessService(tmp_path, CCM_ALLOWED_HOSTS="Agents.example, [::1]") as service:
        assert service.client.request("GET", "/", headers={"Host": "agents.example:443"}).status == 200
        assert service.client.request("GET", "/", headers={"Host": "localhost"}).status == 403


# ---- every path


def status_without_a_token(method: str, path: str) -> int:
    """What the service answers where it requires a token, for the paths of `endpoints`."""
    if path in ("/health", "/docs"):
        return {"GET": 200, "HEAD": 200}.get(method, 405)
    # The pages of the documentation are open, and what they load; none has the name of these paths.
    return 404 if path.startswith("/docs/") and not path.endswith(".md") else 401


@pytest.mark.parametrize(("method", "path"), endpoints())
def test_no_path_goes_around_the_guard(closed_api: Client, method: str, path: str) -> None:
    foreign = closed_api.request(method, path, headers={**bearer(), **JSON, "Host": "evil.example"})
    nobody = closed_api.request(method, path, headers=JSON)
    page = closed_api.request(method, path, headers={**bearer(), **JSON, "Origin": "http://evil.example"})

    assert foreign.status == 403
    assert nobody.status == status_without_a_token(method, path)
    assert page.status == 403
    for answer in (foreign, nobody, page):
        assert answer.headers["X-Request-Id"]
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


@pytest.mark.parametrize("fixture", ["closed_api", "served"], ids=["in process", "over a socket"])
def test_the_order_is_host_token_origin_media_type(request: pytest.FixtureRequest, fixture: str) -> None:
    client: Client = request.getfixturevalue(fixture)
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
        assert status_and_code(client.request("POST", "/api/runs/start", b"{}", headers)) == expected


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
def test_a_request_without_the_token_is_refused(closed_api: Client, value: str) -> None:
    answer = closed_api.request("GET", "/api/runs", headers={"Authorization": value})

    assert status_and_code(answer) == (401, "UNAUTHORIZED")
    assert {name.lower(): value for name, value in answer.headers.items()}["www-authenticate"] == "Bearer"
    assert "CCM_API_TOKEN" in answer.error["message"]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, "This service requires a token: send"),
        ({"Authorization": f"Basic {TOKEN}"}, "does not begin with 'Bearer '"),
        ({"Authorization": TOKEN}, "does not begin with 'Bearer '"),
        ({"Authorization": f"Bearer me:{TOKEN}"}, "leave off the name and the colon"),
        ({"Authorization": f"Bearer {TOKEN}x"}, "The token is not known: send"),
    ],
)
def test_the_refusal_tells_what_is_wrong_and_shows_no_token(
    closed_api: Client, headers: dict[str, str], expected: str
) -> None:
    answer = closed_api.request("GET", "/api/runs", headers=headers)

    assert status_and_code(answer) == (401, "UNAUTHORIZED")
    assert expected in answer.error["message"]
    assert TOKEN not in answer.body.decode()


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_a_request_with_the_token_is_answered(closed_api: Client, scheme: str) -> None:
    assert closed_api.request("GET", "/api/runs", headers={"Authorization": f"{scheme} {TOKEN}"}).json == []


@pytest.mark.parametrize("name", ["token", "access_token", "Api_Key"])
def test_a_token_in_an_address_is_refused(closed_api: Client, name: str) -> None:
    for headers in ({}, bearer()):
        answer = closed_api.request("GET", f"/api/runs?{name}={TOKEN}", headers=headers)
        assert status_and_code(answer) == (400, "VALIDATION_ERROR")
        assert TOKEN not in answer.body.decode()


def test_health_needs_no_token_and_shows_nothing_else(closed_api: Client) -> None:
    assert closed_api.get("/health").json == {"status": "ok"}


def test_tokens_have_names_that_runs_and_logs_show(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"# clients\n\nalice:{TOKEN}-a\nbob-2:{TOKEN}-b:with-a-colon\n")
    project = folder_of(tmp_path)
    with InProcessService(tmp_path, CCM_API_TOKEN_FILE=file, CCM_API_TOKEN=TOKEN) as service:

        def start(token: str) -> Any:
            body = {"cwd": str(project), "prompt": "hello"}
            return service.client.request("POST", "/api/runs/start", body, bearer(token)).json

        names = [start(token)["createdBy"] for token in (f"{TOKEN}-a", f"{TOKEN}-b:with-a-colon", TOKEN)]
    assert names == ["alice", "bob-2", "api"]
    assert any("POST /api/runs/start 202" in line and line.endswith("by alice") for line in service.log)
    assert not [line for line in service.log if TOKEN in line]


def test_the_token_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}-a\n")
    with InProcessService(tmp_path, CCM_API_TOKEN_FILE=file) as service:

        def admits(token: str) -> bool:
            return service.client.request("GET", "/api/runs", headers=bearer(token)).status == 200

        assert [admits(f"{TOKEN}-a"), admits(f"{TOKEN}-b")] == [True, False]
        write_tokens(file, f"bob:{TOKEN}-b\n")
        assert [admits(f"{TOKEN}-a"), admits(f"{TOKEN}-b")] == [False, True]
        write_tokens(file, f"bob:{TOKEN}-b\nno token at all\n")  # an invalid line keeps the tokens, and is logged
        assert [admits(f"{TOKEN}-a"), admits(f"{TOKEN}-b")] == [False, True]
        assert [line for line in service.log if "line 2: must be NAME:TOKEN" in line]
        file.unlink()
        assert [admits(f"{TOKEN}-a"), admits(f"{TOKEN}-b")] == [False, False]
        write_tokens(file, f"carol:{TOKEN}-c\n")
        assert admits(f"{TOKEN}-c")


def test_a_token_file_that_others_can_read_keeps_the_tokens_read_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="ccm.api.http.tokens")
    file = tmp_path / "tokens"
    write_tokens(file, f"alice:{TOKEN}-a\n")
    tokens = Tokens(Settings(api_token_file=file))
    assert tokens.client(f"{TOKEN}-a") == "alice"

    write_tokens(file, f"bob:{TOKEN}-b\n", 0o644)
    for _ in range(10):
        assert [tokens.client(f"{TOKEN}-a"), tokens.client(f"{TOKEN}-b")] == ["alice", None]
    (message,) = caplog.messages
    assert message.startswith(f"the tokens stay as they were: CCM_API_TOKEN_FILE {file} has mode 0644")

    file.chmod(0o600)
    assert [tokens.client(f"{TOKEN}-a"), tokens.client(f"{TOKEN}-b")] == [None, "bob"]


def test_a_token_file_that_could_not_be_read_is_tried_with_each_request(
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

    assert [message for message in caplog.messages if "no token is accepted" in message] == [
        f"no token is accepted, because CCM_API_TOKEN_FILE {file} cannot be read: Too many open files"
    ]
    assert tokens.client(f"{TOKEN}-a") == "alice"


def test_a_missing_token_file_is_logged_once_each_time_it_disappears(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ccm.api.http.tokens")
    file = tmp_path / "tokens"
    tokens = Tokens(Settings(api_token_file=file))

    def logged() -> list[str]:
        """The log's lines for ten requests."""
        caplog.clear()
        for _ in range(10):
            tokens.client(f"{TOKEN}-a")
        return caplog.messages

    gone = [
        f"no token is accepted, because CCM_API_TOKEN_FILE {file} cannot be read: No such file or directory",
        "tokens of nobody",
    ]
    for _ in range(2):
        assert logged() == gone
        assert logged() == []
        write_tokens(file, f"alice:{TOKEN}-a\n")
        assert logged() == ["tokens of alice"]
        file.unlink()


def test_flask_token_makes_a_token_that_is_admitted(environ: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    flask = create_app(Settings(database_path=tmp_path / "unused.sqlite")).test_cli_runner()
    own = {"CCM_API_TOKEN_FILE": str(file)}
    with umask(0):
        process = call([*FLASK, "token", "alice"], environ, CCM_API_TOKEN_FILE=file)
        command = flask.invoke(args=["token", "bob"], env=own)

    assert file.read_text() == process.stdout + command.stdout
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with InProcessService(tmp_path, CCM_API_TOKEN_FILE=file) as service:
        for line in (process.stdout, command.stdout):
            token = line.strip().partition(":")[2]
            assert len(token) > 40
            assert service.client.request("GET", "/api/runs", headers=bearer(token)).status == 200
    again = flask.invoke(args=["token", "alice"], env=own)
    assert [again.exit_code, again.stdout] == [2, ""]
    assert "alice already" in again.stderr
    alone = flask.invoke(args=["token", "carol"], env={"CCM_API_TOKEN_FILE": None})
    assert re.fullmatch(r"carol:[\w-]{43}\n", alone.stdout)
    assert flask.invoke(args=["token", "a b"], env={"CCM_API_TOKEN_FILE": None}).exit_code == 2


def test_a_start_without_a_token_logs_who_is_admitted(serve: ServeFunction) -> None:
    assert [line for line in serve().log if "WARNING" in line and "every user of this host" in line]


def test_a_token_makes_the_warning_needless() -> None:
    (warning,) = access_warnings(Settings())
    assert "every user of this host" in warning
    assert "`flask token NAME`" in warning
    assert access_warnings(Settings(api_token=TOKEN)) == []


UNSAFE = [
    ({"HOST": "0.0.0.0"}, "HOST 0.0.0.0 needs a token"),
    ({"HOST": "::"}, "HOST :: needs a token"),
    ({"HOST": "192.0.2.1"}, "HOST 192.0.2.1 needs a token"),
    ({"CCM_API_TOKEN": "short"}, "CCM_API_TOKEN must have 16 to 512"),
    ({"CCM_API_TOKEN": "with a blank in the midst"}, "CCM_API_TOKEN must have 16 to 512"),
    ({"CCM_API_TOKEN_FILE": "/nowhere/tokens"}, "/nowhere/tokens cannot be read"),
    ({"CCM_ALLOWED_HOSTS": "localhost:3000"}, "CCM_ALLOWED_HOSTS has 'localhost:3000'"),
    ({"CCM_ALLOWED_HOSTS": "*"}, "CCM_ALLOWED_HOSTS has '*'"),
]


@pytest.mark.parametrize(("variables", "says"), UNSAFE)
def test_an_unsafe_setting_is_refused(variables: dict[str, str], says: str) -> None:
    with pytest.raises(BadSetting) as refusal:
        check_access(Settings.from_env(variables))

    assert refusal.value.exit_code == 2
    assert says in str(refusal.value)
    assert "with a blank" not in str(refusal.value)


@pytest.mark.parametrize(("variables", "says"), [UNSAFE[0], UNSAFE[4]])
def test_an_unsafe_setting_ends_the_start(environ: dict[str, str], variables: dict[str, str], says: str) -> None:
    result = call([sys.executable, "app.py"], environ | variables)

    assert result.returncode == 2
    assert says in result.stderr
    assert "with a blank" not in result.stderr
    assert "Traceback" not in result.stderr


def test_a_token_allows_an_address_that_is_not_loopback(serve: ServeFunction) -> None:
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
def test_a_page_of_the_services_own_origin_is_admitted(open_api: Client, origin: str, site: str) -> None:
    assert open_api.request("GET", "/api/runs", headers={"Origin": origin, "Sec-Fetch-Site": site}).status == 200


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_the_media_types_of_a_form_are_refused(open_api: InProcessClient, kind: str | None, tmp_path: Path) -> None:
    body = f'{{"cwd": "{tmp_path}", "prompt": "hello"}}'.encode()
    headers = [("Host", "localhost"), ("Content-Length", str(len(body)))]
    headers += [] if kind is None else [("Content-Type", kind)]
    for path in ("/api/runs/start", "/api/runs/resume", "/nothing"):
        assert open_api.send("POST", path, headers, body).status == 415
