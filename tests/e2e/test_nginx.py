"""A real nginx, configured as in ccm/docs, in front of the service and the real Claude Code."""

from __future__ import annotations

import base64
import getpass
import os
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ccm.testing.service_process import ServiceProcess
from tests.browser import Browser, chromium
from tests.client import Client
from tests.conftest import ProgramFunction, ServeFunction, stand_in_cli
from tests.docs import filled_in, page, samples
from tests.docs_pages import START_RUN, DocsPages
from tests.event_source import Stream
from tests.programs import can_connect, free_port
from tests.receiver import Receiver
from tests.waiting import until

TOKEN = "0123456789-a-token-of-the-tests"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
UPSTREAM = "http://unix:/run/cc-manager/socket:/"
# A typical server around the sample, with limits so low that the tests fail unless the sample raises them.
CONFIGURATION = """
{user}
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log notice;
events {{ worker_connections 256; }}
http {{
    access_log off;
    proxy_read_timeout 1s;
    client_max_body_size 1k;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
{locations}
    }}
}}
"""


NginxFunction = Callable[..., AbstractContextManager[Client]]


@pytest.fixture
def nginx(program: ProgramFunction, tmp_path: Path) -> NginxFunction:
    """Return a function that runs an nginx with the given locations and yields a client of it."""
    return partial(_nginx, program("nginx", "nginx"), tmp_path / "nginx")


@contextmanager
def _nginx(path: str, folder: Path, locations: str) -> Iterator[Client]:
    folder.mkdir()
    port = free_port()
    user = f"user {getpass.getuser()};" if os.getuid() == 0 else ""
    configuration = folder / "nginx.conf"
    configuration.write_text(
        CONFIGURATION.format(user=user, folder=folder, port=port, locations=textwrap.indent(locations, " " * 8))
    )
    words = [path, "-p", str(folder), "-c", str(configuration), "-e", str(folder / "error.log")]
    checked = subprocess.run([*words, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr
    process = subprocess.Popen(words)
    try:
        until(lambda: can_connect(port))
        yield Client(f"http://localhost:{port}")
    finally:
        process.send_signal(signal.SIGQUIT if process.poll() is None else signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


def location(service: ServiceProcess, *more: str) -> str:
    """Return the page's sample for a service, with additional lines."""
    upstream = f"http://{service.url}:/" if service.url.startswith("unix:") else f"{service.url}/"
    sample = filled_in(samples(page("reverse-proxy"), "nginx")[0], {UPSTREAM: upstream})
    return sample.rstrip().removesuffix("}") + "".join(more) + "}\n"


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    rules = "MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
    with chromium(tmp_path_factory.mktemp("browser"), rules) as browser:
        yield browser


@pytest.fixture(params=["unix", "tcp"])
def service(request: pytest.FixtureRequest, serve: ServeFunction, tmp_path: Path) -> ServiceProcess:
    """Start a service for the proxy, on either kind of socket."""
    if request.param == "tcp":
        return serve(CCM_TRUSTED_PROXY="127.0.0.1")
    return serve(CCM_TRUSTED_PROXY="unix", CCM_UNIX_SOCKET=tmp_path / "socket")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def proxied(service: ServiceProcess, nginx: NginxFunction) -> Iterator[Client]:
    with nginx(location(service)) as client:
        yield client


def start(client: Client, project: Path, prompt: str, wait: int = 60, **fields: Any) -> dict[str, Any]:
    body = {"cwd": str(project), "prompt": prompt, **fields}
    answer = client.post("/agents/api/runs/start", body, wait=wait)
    assert answer.status in (200, 202), answer.body
    run: dict[str, Any] = answer.json
    return run


def test_a_front_end_in_development_reaches_the_service(
    serve: ServeFunction, nginx: NginxFunction, project: Path, receiver: Receiver
) -> None:
    service = serve()
    (sample,) = samples(page("front-end"), "nginx")
    places = {"http://127.0.0.1:3000": service.url, "http://127.0.0.1:5173": receiver.url}
    with nginx(filled_in(sample, places)) as client:
        own = f"http://localhost:{client.port}"
        # The front end's own pages come from the development server, which gets the browser's Host too.
        client.request("POST", "/src/main.js", {}, headers={"Origin": own})
        assert [(got.path, got.headers["host"]) for got in receiver.wait_for(1)] == [("/src/main.js", own[7:])]

        def start(origin: str) -> int:
            body = {"cwd": str(project), "prompt": "[[slow 20 0.1]]"}
            headers = {"Origin": origin, "Sec-Fetch-Site": "same-origin"}
            return client.request("POST", "/api/runs/start", body, headers).status

        assert start("http://evil.example") == 403
        assert start(own) == 202
        run = client.get("/api/runs").json[0]
        with Stream(client, f"/api/runs/{run['id']}/stream") as stream:
            assert [event.type for event in stream][-1] == "end"


def test_a_run_works_through_nginx(service: ServiceProcess, proxied: Client, project: Path) -> None:
    body = {"cwd": str(project), "prompt": "Hello through a proxy."}
    answer = proxied.post("/agents/api/runs/start", body, wait=60)

    assert [answer.status, answer.json["status"]] == [200, "completed"]
    # URLs in answers lead through the proxy.
    assert answer.headers["Location"] == f"/agents/api/runs/{answer.json['id']}"
    assert proxied.get(answer.headers["Location"]).json == answer.json
    start(proxied, project, "And another.")
    page = proxied.get("/agents/api/runs", limit=1)
    assert page.headers["Link"].startswith(f"<http://localhost:{proxied.port}/agents/api/runs?")
    assert page.next is not None
    assert proxied.get(page.next).json == [answer.json]
    # The log shows the client's address, not the proxy's.
    until(
        lambda: [
            line for line in service.log if "POST /api/runs/start 200" in line and line.endswith(" from 127.0.0.1")
        ]
    )


def test_nginx_does_not_buffer_a_stream(proxied: Client, project: Path) -> None:
    run = start(proxied, project, "[[stall]]", wait=0, options={"includePartialMessages": True})
    address = f"/agents/api/runs/{run['id']}"
    until(lambda: b"content_block_delta" in proxied.get(f"{address}/messages").body)
    messages = proxied.get(f"{address}/messages").json
    # No further byte follows within the timeout, not even a comment, so buffered events would stay in nginx.
    with Stream(proxied, f"{address}/stream", timeout=14) as stream:
        assert [event.json for event in stream.take(len(messages))] == messages
        assert proxied.get(address).json["status"] == "running"
        assert proxied.delete(address).status == 200
        assert [event.type for event in stream][-1] == "end"


def test_a_wait_may_exceed_the_default_timeout_of_nginx(proxied: Client, project: Path) -> None:
    run = start(proxied, project, "[[hang]]", wait=0)
    began = time.monotonic()
    answer = proxied.get(f"/agents/api/runs/{run['id']}", wait=3)

    assert time.monotonic() - began >= 3
    assert [answer.status, answer.json["status"]] == [200, "running"]
    assert proxied.delete(f"/agents/api/runs/{run['id']}").status == 200


def test_large_images_pass_through(proxied: Client, project: Path) -> None:
    image = {"mediaType": "image/png", "data": base64.b64encode(PNG_SIGNATURE + bytes(20_000_000)).decode()}
    body = {"cwd": str(project), "prompt": "[[text What a picture.]]", "images": [image]}
    answer = proxied.post("/agents/api/runs/start", body)

    assert answer.status == 202, answer.body
    assert answer.json["imageCount"] == 1
    proxied.get(f"/agents/api/runs/{answer.json['id']}", wait=60)


def test_admission_checks_work_behind_nginx(proxied: Client) -> None:
    def status(**headers: str) -> int:
        return proxied.request(
            "GET", "/agents/", headers={name.replace("_", "-"): v for name, v in headers.items()}
        ).status

    own = f"localhost:{proxied.port}"
    assert status() == 200
    assert status(Origin=f"http://{own}", Sec_Fetch_Site="same-origin") == 200
    assert status(Origin="http://evil.example") == 403
    assert status(Sec_Fetch_Site="cross-site") == 403
    assert status(Host="evil.example") == 403
    # The proxy replaces forged headers.
    assert status(Host="evil.example", X_Forwarded_Host=own) == 403
    page = proxied.request("GET", "/agents/nothing", headers={"X-Forwarded-Prefix": "//evil", "X-Forwarded-For": "x y"})
    assert page.status == 404


def test_a_token_passes_through(serve: ServeFunction, nginx: NginxFunction, tmp_path: Path) -> None:
    service = serve(CCM_TRUSTED_PROXY="unix", CCM_UNIX_SOCKET=tmp_path / "socket", CCM_API_TOKEN=TOKEN)
    with nginx(location(service)) as client:
        assert client.get("/agents/api/runs").status == 401
        with_token = {"Authorization": f"Bearer {TOKEN}"}
        assert client.request("GET", "/agents/api/runs", headers=with_token).json == []
        assert client.get("/agents/health").status == 200


def test_nginx_can_require_a_password_and_add_the_token(
    serve: ServeFunction, nginx: NginxFunction, tmp_path: Path
) -> None:
    service = serve(CCM_TRUSTED_PROXY="unix", CCM_UNIX_SOCKET=tmp_path / "socket", CCM_API_TOKEN=TOKEN)
    passwords = tmp_path / "htpasswd"
    passwords.write_text("me:{PLAIN}secret\n")
    lines = filled_in(
        samples(page("reverse-proxy"), "nginx")[1], {"/etc/nginx/agents.htpasswd": str(passwords), "TOKEN": TOKEN}
    )
    with nginx(location(service, lines)) as client:
        assert client.get("/agents/api/runs").status == 401

        def status(**headers: str) -> int:
            login = {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
            return client.request("GET", "/agents/api/runs", headers=login | headers).status

        assert status() == 200
        # A browser also sends the password with requests of other sites' pages.
        assert status(Origin="http://evil.example") == 403


def test_the_documentation_works_behind_nginx(
    serve: ServeFunction, nginx: NginxFunction, browser: Browser, home: Path, tmp_path: Path
) -> None:
    service = serve(
        CCM_TRUSTED_PROXY="unix",
        CCM_UNIX_SOCKET=tmp_path / "socket",
        CCM_API_TOKEN=TOKEN,
        CCM_CLI_PATH=stand_in_cli(home),
    )
    project = tmp_path / "project"
    project.mkdir()
    with nginx(location(service)) as client:
        docs = DocsPages(browser, f"{client.url}/agents")
        docs.resize(1440, 1000)
        docs.open("/docs/streams")
        docs.enter(TOKEN)
        docs.wait_for("Streams", "#page h1")
        docs.click("#page a", "")
        docs.browser.until("location.pathname.startsWith('/agents/docs/')")
        docs.open("/docs#tag/runs/startRun")
        docs.wait_for(START_RUN)
        docs.start_run({"cwd": str(project), "prompt": "Hello through a proxy."})

        with_token = {"Authorization": f"Bearer {TOKEN}"}
        (run,) = client.request("GET", "/agents/api/runs", headers=with_token).json
        assert run["prompt"] == "Hello through a proxy."
        docs.assert_nothing_went_wrong()
