"""Behind a reverse proxy: what a named one forwards is believed, what anybody else does is not, and no value harms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app import create_app
from ccm.settings.settings import Settings
from ccm.testing.service_process import ServiceProcess
from tests.api.conftest import folder_of, refused, until
from tests.client import Answer, Client
from tests.conftest import ServeFunction

FORWARDED = {
    "Host": "agents.example",
    "X-Forwarded-For": "203.0.113.7",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "agents.example",
    "X-Forwarded-Prefix": "/agents",
}
OWN_NAMES = "localhost,127.0.0.1,agents.example"


@pytest.fixture(scope="module")
def service(serve_all: ServeFunction) -> ServiceProcess:
    """A service whose proxy is at 127.0.0.1."""
    return serve_all(CCM_TRUSTED_PROXY="127.0.0.1", CCM_ALLOWED_HOSTS=OWN_NAMES)


@pytest.fixture(scope="module")
def proxied(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A client in the place of that proxy; there are runs to list."""
    client = Client(service.url)
    folder = folder_of(tmp_path_factory.mktemp("proxied"))
    for _ in range(3):
        client.start(folder, "hello")
    return client


@pytest.fixture(scope="module")
def direct(serve_all: ServeFunction, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A client of a service that knows of no proxy at this address."""
    client = Client(serve_all(CCM_TRUSTED_PROXY="192.0.2.1,unix", CCM_ALLOWED_HOSTS=OWN_NAMES).url)
    folder = folder_of(tmp_path_factory.mktemp("direct"))
    for _ in range(3):
        client.start(folder, "hello")
    return client


def link(client: Client, headers: Mapping[str, str], path: str = "/api/runs?limit=1") -> str:
    """The address of the next page, as it is given to a client."""
    answer = client.request("GET", path, headers=headers)
    assert answer.status == 200, answer.body
    return answer.headers["Link"].partition("?")[0]


def start(client: Client, folder: Path, headers: Mapping[str, str], path: str = "/api/runs/start") -> Answer:
    return client.request("POST", path, {"cwd": str(folder), "prompt": "hello"}, headers)


def test_addresses_are_as_the_proxys_clients_see_them(proxied: Client, tmp_path: Path) -> None:
    started = start(proxied, tmp_path, FORWARDED)

    assert started.status == 202
    assert started.headers["Location"] == f"/agents/api/runs/{started.json['id']}"
    assert link(proxied, FORWARDED) == "<https://agents.example/agents/api/runs"
    assert link(proxied, FORWARDED | {"X-Forwarded-Host": "Agents.example:8443"}) == (
        "<https://agents.example:8443/agents/api/runs"
    )
    run = started.json["id"]
    assert link(proxied, FORWARDED, f"/api/runs/{run}/messages?limit=1") == (
        f"<https://agents.example/agents/api/runs/{run}/messages"
    )


def test_the_clients_address_is_in_the_log(service: ServiceProcess, proxied: Client) -> None:
    proxied.request("GET", "/api/runs?limit=2", headers=FORWARDED | {"X-Request-Id": "who-was-it"})

    until(lambda: [line for line in service.log if "who-was-it" in line])
    (line,) = [line for line in service.log if "who-was-it" in line]
    assert line.endswith("GET /api/runs 200 request who-was-it from 203.0.113.7")


def test_the_last_value_is_the_proxys_own(service: ServiceProcess, proxied: Client) -> None:
    forged = {
        "X-Forwarded-For": "198.51.100.9, 203.0.113.7",
        "X-Forwarded-Proto": "gopher, https",
        "X-Forwarded-Host": "evil.example, agents.example",
        "X-Forwarded-Prefix": "//evil.example, /agents",
        "X-Request-Id": "a-chain",
    }
    assert link(proxied, FORWARDED | forged) == "<https://agents.example/agents/api/runs"
    until(lambda: [line for line in service.log if "request a-chain from 203.0.113.7" in line])


def test_a_pages_own_origin_is_the_one_that_its_browser_sees(proxied: Client) -> None:
    def status(origin: str, **forwarded: str) -> int:
        named = {f"X-Forwarded-{name}": value for name, value in forwarded.items()}
        return proxied.request("GET", "/api/runs", headers=FORWARDED | named | {"Origin": origin}).status

    assert status("https://agents.example") == 200
    assert status("https://agents.example", Host="agents.example:443") == 200
    assert status("https://agents.example:8443", Host="agents.example:8443") == 200
    assert status("http://agents.example", Proto="http") == 200
    assert status("http://agents.example") == 403
    assert status("https://agents.example:8443") == 403
    assert status("https://evil.example") == 403


def test_from_a_proxy_that_tells_nothing_all_is_as_from_anybody(proxied: Client) -> None:
    assert link(proxied, {"Host": "localhost"}) == "<http://localhost/api/runs"
    empty = {name: "" for name in FORWARDED if name != "Host"}
    assert link(proxied, {"Host": "localhost", **empty, "X-Forwarded-Prefix": "/"}) == "<http://localhost/api/runs"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-Host": "evil.example"},
        {"X-Forwarded-Host": "agents.example, evil.example"},
        # A page of a name that was rebound onto the proxy's address can forge what is forwarded, and not the Host.
        {"Host": "evil.example"},
    ],
    ids=str,
)
def test_a_forwarded_host_is_checked_as_the_own_one_is(proxied: Client, headers: dict[str, str]) -> None:
    answer = proxied.request("GET", "/api/runs", headers=FORWARDED | headers)

    assert answer.status == 403
    assert answer.error["code"] == "HOST_FORBIDDEN"


def test_what_anybody_else_forwards_is_taken_away(direct: Client, tmp_path: Path) -> None:
    assert link(direct, FORWARDED) == "<http://agents.example/api/runs"
    assert start(direct, tmp_path, FORWARDED).headers["Location"].startswith("/api/runs/")
    assert direct.request("GET", "/", headers=FORWARDED | {"Host": "evil.example"}).status == 403
    origin = {"Origin": "https://agents.example"}
    assert direct.request("GET", "/", headers=FORWARDED | origin).status == 403
    for header in ("X-Forwarded-Host", "X-Forwarded-Prefix", "X-Forwarded-Proto", "X-Forwarded-Port", "Forwarded"):
        answer = direct.request("GET", "/api/runs?limit=1", headers={"Host": "localhost", header: "//evil/\xff"})
        assert [answer.status, answer.headers["Link"].partition("?")[0]] == [200, "<http://localhost/api/runs"]


def test_that_it_is_taken_away_is_said_once(serve: ServeFunction) -> None:
    service = serve()
    for _ in range(3):
        Client(service.url).request("GET", "/", headers={"X-Forwarded-For": "203.0.113.7", "X-Request-Id": "not-so"})

    until(lambda: len([line for line in service.log if "request not-so from 127.0.0.1" in line]) == 3)
    assert len([line for line in service.log if "CCM_TRUSTED_PROXY does not name it" in line]) == 1
    assert not [line for line in service.log if "203.0.113.7" in line]


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Forwarded-Prefix", "//evil.example"),
        ("X-Forwarded-Prefix", "no-slash"),
        ("X-Forwarded-Prefix", "https://evil.example"),
        ("X-Forwarded-Prefix", "/a/../b"),
        ("X-Forwarded-Prefix", "/a/./b"),
        ("X-Forwarded-Prefix", "/a//b"),
        ("X-Forwarded-Prefix", "/\\evil.example"),
        ("X-Forwarded-Prefix", '/a>; rel="next"'),
        ("X-Forwarded-Prefix", "/a b"),
        ("X-Forwarded-Prefix", "/a?b"),
        ("X-Forwarded-Prefix", "/%0d%0aX-Evil:1"),
        ("X-Forwarded-Prefix", "/\xe9"),
        ("X-Forwarded-Prefix", "/" + "a" * 300),
        ("X-Forwarded-Proto", "javascript"),
        ("X-Forwarded-Proto", "https://"),
        ("X-Forwarded-Host", "agents.example/evil"),
        ("X-Forwarded-Host", "evil@agents.example"),
        ("X-Forwarded-Host", "agents.example:https"),
        ("X-Forwarded-Host", '"agents.example"'),
        ("X-Forwarded-Host", "\xff"),
        ("X-Forwarded-For", "203.0.113.7 GET /forged 200"),
        ("X-Forwarded-For", "203.0.113.7\tx"),
        ("X-Forwarded-For", "x" * 200),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(proxied: Client, header: str, value: str) -> None:
    message = refused(proxied.request("GET", "/api/runs?limit=1", headers=FORWARDED | {header: value}))

    assert header in message
    assert value not in message


def test_control_characters_in_a_forwarded_value_are_refused(proxied: Client) -> None:
    for header in FORWARDED:
        for value in ("/a\x01b", "\x1b[2J", "a\x7fb"):
            assert proxied.request("GET", "/api/runs?limit=1", headers=FORWARDED | {header: value}).status == 400


# ---- a prefix that the proxy does not tell


@pytest.fixture(scope="module")
def prefixed(serve_all: ServeFunction, tmp_path_factory: pytest.TempPathFactory) -> Client:
    client = Client(serve_all(CCM_URL_PREFIX="/agents/", CCM_TRUSTED_PROXY="127.0.0.1").url)
    folder = folder_of(tmp_path_factory.mktemp("prefixed"))
    for _ in range(3):
        client.start(folder, "hello")
    return client


@pytest.mark.parametrize("mounted", ["", "/agents"], ids=["taken off", "left on"])
def test_a_fixed_prefix_is_in_all_addresses(prefixed: Client, mounted: str, tmp_path: Path) -> None:
    started = start(prefixed, tmp_path, {}, f"{mounted}/api/runs/start")
    headers = {"Host": "localhost", "X-Forwarded-Proto": "https"}

    assert started.headers["Location"] == f"/agents/api/runs/{started.json['id']}"
    assert link(prefixed, headers, f"{mounted}/api/runs?limit=1") == "<https://localhost/agents/api/runs"
    assert prefixed.get(f"{mounted}/health").json == {"status": "ok"}
    assert prefixed.get(f"{mounted}/").json["name"] == "CC Manager"
    assert prefixed.get(f"{mounted}x/api/runs").status == 404


def test_a_prefix_that_the_proxy_tells_comes_first(prefixed: Client) -> None:
    assert link(prefixed, {"Host": "localhost", "X-Forwarded-Prefix": "/other"}) == "<http://localhost/other/api/runs"
    assert prefixed.get("/agents").json["name"] == "CC Manager"
    assert prefixed.get("/agents/agents/api/runs").status == 404


def test_a_prefix_leads_around_no_token(serve: ServeFunction) -> None:
    client = Client(serve(CCM_URL_PREFIX="/agents", CCM_API_TOKEN="0123456789-a-token-of-the-tests").url)

    assert [client.get(path).status for path in ("/health", "/agents/health")] == [200, 200]
    for path in ("/agents/api/runs", "/agents", "/health/../api/runs", "/agents/health/../api/runs", "//agents/"):
        assert client.get(path).status == 401


# ---- who is named


def app_of(**settings: Any) -> Any:
    """An app in this process, asked for `/nothing`: that needs no service."""
    app = create_app(Settings(database_path=Path("/nowhere/db.sqlite"), **settings))

    def status(address: str) -> int:
        environ: Any = {"REMOTE_ADDR": address}
        return (
            app.test_client()
            .get("/", headers={"X-Forwarded-Host": "evil.example"}, environ_overrides=environ)
            .status_code
        )

    return status


@pytest.mark.parametrize(
    ("trusted", "address", "believed"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1, 10.0.0.2", "10.0.0.2", True),
        ("10.0.0.1", "::ffff:10.0.0.1", True),  # how a socket for both kinds names it
        ("0:0:0:0:0:0:0:1", "::1", True),
        ("unix", "localhost", True),  # waitress
        ("unix", "<local>", True),  # flask run
        ("10.0.0.1", "10.0.0.11", False),
        ("10.0.0.1", "localhost", False),
        ("unix", "127.0.0.1", False),
        ("unix", "unix-not", False),
    ],
)
def test_a_proxy_is_known_by_its_address(trusted: str, address: str, believed: bool) -> None:
    peers = Settings.from_env({"CCM_TRUSTED_PROXY": trusted}).trusted_proxy
    # What is believed is refused here, by the guard; what is not believed gets as far as the service, which is nowhere.
    assert app_of(trusted_proxy=peers)(address) == (403 if believed else 503)
