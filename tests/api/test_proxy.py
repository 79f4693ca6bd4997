"""Behind a reverse proxy: only a trusted peer's forwarded headers are believed, and no value of theirs does harm.

The requests are made in process, from an address of the test's choice; one sequence goes over a socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from app import create_app
from ccm.settings.settings import Settings
from ccm.testing.service_process import ServiceProcess
from tests.api.conftest import folder_of, refused
from tests.api.in_process import InProcessService
from tests.client import Answer, Client
from tests.conftest import ServeFunction
from tests.waiting import until

FORWARDED = {
    "Host": "agents.example",
    "X-Forwarded-For": "203.0.113.7",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "agents.example",
    "X-Forwarded-Prefix": "/agents",
}
OWN_NAMES = "localhost,127.0.0.1,agents.example"


TRUSTING = {"CCM_TRUSTED_PROXY": "127.0.0.1", "CCM_ALLOWED_HOSTS": OWN_NAMES}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessService]:
    """A service whose proxy is at 127.0.0.1."""
    with InProcessService(tmp_path_factory.mktemp("proxied"), **TRUSTING) as service:
        yield service


@pytest.fixture(scope="module")
def proxied(service: InProcessService, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A client in the place of that proxy; there are runs to list."""
    return with_runs(service.client, tmp_path_factory)


@pytest.fixture(scope="module")
def served(serve_all: ServeFunction) -> ServiceProcess:
    """The same service over a socket."""
    return serve_all(**TRUSTING)


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a service that trusts other addresses than the client's."""
    own = {"CCM_TRUSTED_PROXY": "192.0.2.1,unix", "CCM_ALLOWED_HOSTS": OWN_NAMES}
    with InProcessService(tmp_path_factory.mktemp("direct"), **own) as service:
        yield with_runs(service.client, tmp_path_factory)


def with_runs(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """The client, once its service has runs to list."""
    folder = folder_of(tmp_path_factory.mktemp("with-runs"))
    for _ in range(3):
        client.start(folder, "hello")
    return client


def link(client: Client, headers: Mapping[str, str], path: str = "/api/runs?limit=1") -> str:
    """The address of the next page in a client's answer."""
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


def test_addresses_over_a_socket_are_as_the_proxys_clients_see_them(served: ServiceProcess, tmp_path: Path) -> None:
    client = Client(served.url)
    started = start(client, tmp_path, FORWARDED | {"X-Request-Id": "over-a-socket"})

    assert [started.status, started.headers["Location"]] == [202, f"/agents/api/runs/{started.json['id']}"]
    start(client, tmp_path, FORWARDED)
    assert link(client, FORWARDED) == "<https://agents.example/agents/api/runs"
    until(lambda: [line for line in served.log if "request over-a-socket from 203.0.113.7" in line])
    assert client.request("GET", "/api/runs", headers=FORWARDED | {"X-Forwarded-Host": "evil.example"}).status == 403


def test_the_clients_address_is_in_the_log(service: InProcessService, proxied: Client) -> None:
    proxied.request("GET", "/api/runs?limit=2", headers=FORWARDED | {"X-Request-Id": "who-was-it"})

    (line,) = [line for line in service.log if "who-was-it" in line]
    assert line.endswith("GET /api/runs 200 request who-was-it from 203.0.113.7")


def test_only_the_last_value_is_the_proxys_own(service: InProcessService, proxied: Client) -> None:
    forged = {
        "X-Forwarded-For": "198.51.100.9, 203.0.113.7",
        "X-Forwarded-Proto": "gopher, https",
        "X-Forwarded-Host": "evil.example, agents.example",
        "X-Forwarded-Prefix": "//evil.example, /agents",
        "X-Request-Id": "a-chain",
    }
    assert link(proxied, FORWARDED | forged) == "<https://agents.example/agents/api/runs"
    assert [line for line in service.log if "request a-chain from 203.0.113.7" in line]


def test_a_pages_own_origin_is_the_forwarded_one(proxied: Client) -> None:
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


def test_a_proxy_that_forwards_nothing_is_treated_as_any_client(proxied: Client) -> None:
    assert link(proxied, {"Host": "localhost"}) == "<http://localhost/api/runs"
    empty = {name: "" for name in FORWARDED if name != "Host"}
    assert link(proxied, {"Host": "localhost", **empty, "X-Forwarded-Prefix": "/"}) == "<http://localhost/api/runs"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-Host": "evil.example"},
        {"X-Forwarded-Host": "agents.example, evil.example"},
        # A page whose name was rebound onto the proxy's address can forge the forwarded headers, but not the Host.
        {"Host": "evil.example"},
    ],
    ids=str,
)
def test_a_forwarded_host_is_checked_like_the_requests_own(proxied: Client, headers: dict[str, str]) -> None:
    answer = proxied.request("GET", "/api/runs", headers=FORWARDED | headers)

    assert answer.status == 403
    assert answer.error["code"] == "HOST_FORBIDDEN"


def test_forwarded_headers_of_other_peers_are_removed(direct: Client, tmp_path: Path) -> None:
    assert link(direct, FORWARDED) == "<http://agents.example/api/runs"
    assert start(direct, tmp_path, FORWARDED).headers["Location"].startswith("/api/runs/")
    assert direct.request("GET", "/", headers=FORWARDED | {"Host": "evil.example"}).status == 403
    origin = {"Origin": "https://agents.example"}
    assert direct.request("GET", "/", headers=FORWARDED | origin).status == 403
    for header in ("X-Forwarded-Host", "X-Forwarded-Prefix", "X-Forwarded-Proto", "X-Forwarded-Port", "Forwarded"):
        answer = direct.request("GET", "/api/runs?limit=1", headers={"Host": "localhost", header: "//evil/\xff"})
        assert [answer.status, answer.headers["Link"].partition("?")[0]] == [200, "<http://localhost/api/runs"]


def test_the_removal_of_forwarded_headers_is_logged_once(tmp_path: Path) -> None:
    with InProcessService(tmp_path) as service:
        for _ in range(3):
            headers = {"X-Forwarded-For": "203.0.113.7", "X-Request-Id": "not-so"}
            service.client.request("GET", "/", headers=headers)

    assert len([line for line in service.log if "request not-so from 127.0.0.1" in line]) == 3
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
def test_an_invalid_forwarded_value_is_refused(proxied: Client, header: str, value: str) -> None:
    message = refused(proxied.request("GET", "/api/runs?limit=1", headers=FORWARDED | {header: value}))

    assert header in message
    assert value not in message


def test_control_characters_in_a_forwarded_value_are_refused(served: ServiceProcess) -> None:
    client = Client(served.url)
    for header in FORWARDED:
        for value in ("/a\x01b", "\x1b[2J", "a\x7fb"):
            assert client.request("GET", "/api/runs?limit=1", headers=FORWARDED | {header: value}).status == 400


# ---- a prefix that the proxy does not forward


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client in the place of the proxy of a service with a prefix."""
    own = {"CCM_URL_PREFIX": "/agents/", "CCM_TRUSTED_PROXY": "127.0.0.1"}
    with InProcessService(tmp_path_factory.mktemp("prefixed"), **own) as service:
        yield with_runs(service.client, tmp_path_factory)


@pytest.mark.parametrize("mounted", ["", "/agents"], ids=["taken off", "left on"])
def test_a_fixed_prefix_is_in_all_addresses(prefixed: Client, mounted: str, tmp_path: Path) -> None:
    started = start(prefixed, tmp_path, {}, f"{mounted}/api/runs/start")
    headers = {"Host": "localhost", "X-Forwarded-Proto": "https"}

    assert started.headers["Location"] == f"/agents/api/runs/{started.json['id']}"
    assert link(prefixed, headers, f"{mounted}/api/runs?limit=1") == "<https://localhost/agents/api/runs"
    assert prefixed.get(f"{mounted}/health").json == {"status": "ok"}
    assert prefixed.get(f"{mounted}/").json["name"] == "CC Manager"
    assert prefixed.get(f"{mounted}x/api/runs").status == 404


def test_a_forwarded_prefix_replaces_the_fixed_one(prefixed: Client) -> None:
    assert link(prefixed, {"Host": "localhost", "X-Forwarded-Prefix": "/other"}) == "<http://localhost/other/api/runs"
    assert prefixed.get("/agents").json["name"] == "CC Manager"
    assert prefixed.get("/agents/agents/api/runs").status == 404


def test_no_prefix_goes_around_the_token(tmp_path: Path) -> None:
    own = {"CCM_URL_PREFIX": "/agents", "CCM_API_TOKEN": "0123456789-a-token-of-the-tests"}
    with InProcessService(tmp_path, **own) as service:
        client = service.client

        assert [client.get(path).status for path in ("/health", "/agents/health")] == [200, 200]
        for path in ("/agents/api/runs", "/agents", "/health/../api/runs", "/agents/health/../api/runs", "//agents/"):
            assert client.get(path).status == 401


# ---- trusted addresses


def app_of(**settings: Any) -> Any:
    """Asks an app for `/` from an address, without a service."""
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
    # The guard refuses a forwarded host that is believed; otherwise the service is asked, and cannot start.
    assert app_of(trusted_proxy=peers)(address) == (403 if believed else 503)
