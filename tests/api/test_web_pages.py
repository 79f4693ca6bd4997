"""Web pages that try to use the service, by every means that a page has.

In process, every request that Chromium makes for them is sent with every set of headers that it marks them with. A real
Chromium, where there is one, runs the pages themselves against a served service.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ccm.testing.service_process import ServiceProcess
from tests.api.conftest import folder_of, script
from tests.api.in_process import InProcessService
from tests.browser import Browser, chromium
from tests.client import Client
from tests.conftest import ServeFunction
from tests.waiting import until

TOKEN = "0123456789-a-token-of-the-tests"
SECRET = "the text that no page may read"
EVIL = "evil.example"
# Marks the test's own requests in the log.
MARK = "the-tests-own"
# The script around each attack; it hands over the text that the page could read.
PAGE = """
const [base, body, run, done] = arguments;
const start = base + "/api/runs/start", runs = base + "/api/runs", stream = runs + "/" + run + "/stream";
const text = answer => answer.text();
const post = options => fetch(start, {method: "POST", body, ...options}).then(text);
const typed = type => ({mode: "no-cors", headers: {"Content-Type": type}});
const insert = (name, attributes) => new Promise(resolve => {
  const element = Object.assign(document.createElement(name), attributes);
  element.onload = element.onerror = () => resolve(element);
  document.documentElement.append(element);
});
const said = element => {
  try { return element.contentDocument.documentElement.innerText; } catch (error) { return error; }
};
const opened = async view => {
  for (;;) {  // until it shows the service's answer, or that it is no business of this page
    await new Promise(resolve => setTimeout(resolve, 20));
    let shown;
    try {
      shown = view.location.href !== "about:blank" && view.document.body.innerText;
    } catch (error) {
      shown = error;
    }
    if (shown) return shown;  // not closed here: an error may come before the request
  }
};
const form = (enctype, target, method = "POST") => {
  const form = Object.assign(document.createElement("form"), {action: method === "POST" ? start : runs, target});
  Object.assign(form, {method, enctype});
  // As text/plain the field's name, "=" and its value are sent as they are: together they are JSON.
  const [name, value] = [body.slice(0, -1) + ', "metadata": {"x": "', '"}}'];
  form.append(Object.assign(document.createElement("input"), {name, value}));
  document.documentElement.append(form);
  form.submit();
};
const formInFrame = async enctype => {
  const frame = document.createElement("iframe");
  frame.name = "frame" + Math.random();
  document.documentElement.append(frame);
  const loaded = new Promise(resolve => frame.onload = resolve);
  form(enctype, frame.name);
  await loaded;
  return said(frame);
};
const request = (method, url, type) => new Promise(resolve => {
  const request = new XMLHttpRequest();
  request.open(method, url);
  request.onload = request.onerror = () => resolve(request.status + request.responseText);
  if (type) request.setRequestHeader("Content-Type", type);
  request.send(method === "POST" ? body : null);
});
const attack = async () => { %s };
attack().then(told => done(String(told)), error => done("no: " + error));
"""
ATTACKS = {
    "fetch of JSON": 'return post({headers: {"Content-Type": "application/json"}})',
    "fetch of JSON with credentials": """
        return post({headers: {"Content-Type": "application/json"}, credentials: "include"})""",
    "fetch of JSON with a token": """
        return post({headers: {"Content-Type": "application/json", "Authorization": "Bearer " + "x".repeat(20)}})""",
    "fetch of JSON as a file": 'return post({mode: "no-cors", body: new Blob([body], {type: "application/json"})})',
    "fetch of text": 'return post({mode: "no-cors"})',
    "fetch of text that says JSON": 'return post(typed("text/plain; application/json"))',
    "fetch of text whose charset is JSON": 'return post(typed("text/plain;charset=application/json"))',
    "fetch without a type": 'return post({mode: "no-cors", body: new TextEncoder().encode(body)})',
    "fetch of a form": 'return post(typed("application/x-www-form-urlencoded"))',
    "fetch of form fields": 'return post({mode: "no-cors", body: new URLSearchParams({prompt: "hello"})})',
    "fetch of a form of parts": 'return post(typed("multipart/form-data; boundary=x"))',
    "fetch of fields in parts": """
        const parts = new FormData(); parts.set("prompt", body); return post({mode: "no-cors", body: parts})""",
    "fetch without a referrer": 'return post({mode: "no-cors", referrerPolicy: "no-referrer"})',
    "XHR of JSON": 'return request("POST", start, "application/json")',
    "XHR of text": 'return request("POST", start, "text/plain")',
    "XHR that reads": 'return request("GET", runs)',
    "beacon of text": "return navigator.sendBeacon(start, body)",
    "beacon of JSON": 'return navigator.sendBeacon(start, new Blob([body], {type: "application/json"}))',
    "form of text": 'return formInFrame("text/plain")',
    "form of fields": 'return formInFrame("application/x-www-form-urlencoded")',
    "form of parts": 'return formInFrame("multipart/form-data")',
    "form instead of the page": 'form("text/plain", "_self")',
    "form that reads": 'form("text/plain", "_self", "GET")',
    "link": "location = runs",
    "fetch that reads": "return fetch(runs).then(text)",
    "fetch that reads the other way": 'return fetch(runs, {mode: "no-cors"}).then(text)',
    "fetch of health": 'return fetch(base + "/health", {mode: "no-cors"}).then(text)',
    "DELETE": 'return fetch(runs + "/" + run, {method: "DELETE"}).then(text)',
    "PATCH": """
        return fetch(base + "/api/sessions/" + run, {method: "PATCH", headers: {"Content-Type": "application/json"},
                                                     body: "{}"}).then(text)""",
    "EventSource": """
        return new Promise(resolve => {
          const source = new EventSource(stream);
          source.onmessage = event => { source.close(); resolve(event.data); };
          source.onerror = () => { source.close(); resolve("an error"); };
        })""",
    "WebSocket": """
        return new Promise(resolve => {
          const socket = new WebSocket(stream.replace("http", "ws"));
          socket.onmessage = event => resolve(event.data);
          socket.onclose = socket.onopen = event => resolve(event.type);
        })""",
    "image": 'await insert("img", {src: runs})',
    "script": 'await insert("script", {src: runs}); return Object.keys(window).join()',
    "style sheet": """
        await insert("link", {rel: "stylesheet", href: runs});
        return [...document.styleSheets].map(sheet => sheet.cssRules.length)""",
    "frame": 'return said(await insert("iframe", {src: runs}))',
    "window": "return opened(open(runs))",
}

# The headers that Chromium marks a page's requests with, by the page. OWN stands for the service's port; the page's own
# port is 8000.
OWN = "OWN"
CROSS_SITE = {"Sec-Fetch-Site": "cross-site"}
SOURCES: dict[str, dict[str, str]] = {
    "of another site, a script": CROSS_SITE | {"Origin": f"http://{EVIL}:8000"},
    "of another site, a link or an image": CROSS_SITE,
    "of another site, a WebSocket": {"Origin": f"http://{EVIL}:8000"},
    "of another port, a script": {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-site"},
    "of another port, a link or an image": {"Sec-Fetch-Site": "same-site"},
    "of another port, a WebSocket": {"Origin": "http://127.0.0.1:8000"},
    "of no origin, a script": CROSS_SITE | {"Origin": "null"},
    "of no origin, a link or an image": CROSS_SITE,
    "of no origin, a WebSocket": {"Origin": "null"},
    "whose name leads to the service, a script": {"Host": f"{EVIL}:{OWN}", "Origin": f"http://{EVIL}:{OWN}"},
    "whose name leads to the service, a link or an image": {"Host": f"{EVIL}:{OWN}"},
}
# The requests of all the attacks: method, path and media type. The last two are a page's only where it is of the
# service's origin, or where a preflight (OPTIONS) has allowed them.
PAGE_REQUESTS: list[tuple[str, str, str | None]] = [
    ("OPTIONS", "/api/runs/start", None),
    ("OPTIONS", "/api/runs/{run}", None),
    ("OPTIONS", "/api/sessions/{run}", None),
    ("POST", "/api/runs/start", None),
    ("POST", "/api/runs/start", "text/plain"),
    ("POST", "/api/runs/start", "text/plain;charset=UTF-8"),
    ("POST", "/api/runs/start", "text/plain; application/json"),
    ("POST", "/api/runs/start", "text/plain;charset=application/json"),
    ("POST", "/api/runs/start", "application/x-www-form-urlencoded"),
    ("POST", "/api/runs/start", "multipart/form-data; boundary=x"),
    ("POST", "/api/runs/start", "application/json"),
    ("GET", "/health", None),
    ("GET", "/api/runs", None),
    ("GET", "/api/runs?x=y", None),
    ("GET", "/api/runs/{run}/stream", None),
    ("PATCH", "/api/sessions/{run}", "application/json"),
    ("DELETE", "/api/runs/{run}", None),
]


def answers_to(client: Client, run: Any, source: Mapping[str, str], token: str | None) -> set[str]:
    """The statuses of all requests of a page's."""
    body = json.dumps({"cwd": run["cwd"], "prompt": "hello"}).encode()
    headers = {name: value.replace(OWN, str(client.port)) for name, value in source.items()}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    statuses = set()
    for method, path, media_type in PAGE_REQUESTS:
        own = {} if media_type is None else {"Content-Type": media_type}
        data = body if method in ("POST", "PATCH") else None
        answer = client.request(method, path.format(run=run["id"]), data, {**headers, **own})
        assert SECRET not in answer.body.decode()
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]
        statuses.add(str(answer.status))
    return statuses


@dataclass
class Guarded:
    """A service in process with a run that is running, and the run as it was."""

    client: Client
    token: str | None
    run: Any = None

    def ask(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return self.client.request("GET", path, headers=headers).json


@pytest.fixture(scope="module")
def open_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with InProcessService(tmp_path_factory.mktemp("open")) as service:
        yield _guarded(Guarded(service.client, None), tmp_path_factory)


@pytest.fixture(scope="module")
def closed_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with InProcessService(tmp_path_factory.mktemp("closed"), CCM_API_TOKEN=TOKEN) as service:
        yield _guarded(Guarded(service.client, TOKEN), tmp_path_factory)


def _guarded(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    body = {"cwd": str(tmp_path_factory.mktemp("project")), "prompt": _secret_prompt()}
    headers = {"Authorization": f"Bearer {guarded.token}"} if guarded.token else {}
    started = guarded.client.request("POST", "/api/runs/start", body, headers).json
    path = f"/api/runs/{started['id']}"
    until(lambda: guarded.ask(path)["messageCount"])
    guarded.run = guarded.ask(path)
    return guarded


def _secret_prompt() -> str:
    return script({"type": "assistant", "text": SECRET}, hold=True)


@pytest.mark.parametrize("page", SOURCES)
def test_every_request_of_a_page_is_refused(open_service: Guarded, page: str) -> None:
    before = open_service.ask("/api/runs")

    assert [run["status"] for run in before] == ["running"]
    assert answers_to(open_service.client, open_service.run, SOURCES[page], None) == {"403"}
    assert open_service.ask("/api/runs") == before, "the page has started or ended something"


@pytest.mark.parametrize("page", SOURCES)
def test_every_request_of_a_page_is_refused_where_tokens_are_required(closed_service: Guarded, page: str) -> None:
    before = closed_service.ask("/api/runs")
    without = answers_to(closed_service.client, closed_service.run, SOURCES[page], None)
    with_one = answers_to(closed_service.client, closed_service.run, SOURCES[page], TOKEN)

    assert [run["status"] for run in before] == ["running"]
    assert without == {"403"} if "Host" in SOURCES[page] else without <= {"401", "403"}
    assert with_one == {"403"}, "a token does not admit a page"
    assert closed_service.ask("/api/runs") == before, "the page has started or ended something"


def test_every_request_of_a_page_is_refused_over_a_socket(open_target: Target) -> None:
    before = open_target.ask("GET", "/api/runs")

    for source in SOURCES.values():
        assert answers_to(open_target.client, open_target.run, source, None) == {"403"}
    assert open_target.ask("GET", "/api/runs") == before, "the page has started or ended something"


# ---- in a real browser


@dataclass
class Target:
    """A service with a run that is running, which no page may read, cancel, or add another one to."""

    service: ServiceProcess
    folder: Path
    token: str | None
    run: Any = None

    @property
    def client(self) -> Client:
        return Client(self.service.url)

    def ask(self, method: str, path: str, body: Any = None, mark: str = MARK) -> Any:
        """The service's answer to a client that is admitted."""
        headers = {"X-Request-Id": mark} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        return self.client.request(method, path, body, headers).json

    def answered(self, after: str) -> list[str]:
        """The method, path and status of each request that the service has answered after one of the test's own.

        Without the test's other requests, and those that the browser makes for a page's icon.
        """
        lines = [re.search(r" ccm\.api: (\S+ \S+ \d{3}) request (\S+)", line) for line in list(self.service.log)]
        requests = [(line[1], line[2]) for line in lines if line and "favicon.ico" not in line[1]]
        marks = [mark for _, mark in requests]
        since = requests[marks.index(after) + 1 :] if after in marks else []
        return [request for request, mark in since if not mark.startswith(MARK)]


class _Pages(BaseHTTPRequestHandler):
    """An empty page, in which the tests run their scripts."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        if self.path == "/sandboxed":
            # Its origin is then "null", like that of a page in a sandboxed frame or of a file.
            self.send_header("Content-Security-Policy", "sandbox allow-scripts allow-forms allow-popups")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>a page</title>")

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """Another server on this host; yields its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def page() -> Iterator[int]:
    """The port of a server of pages."""
    with serving(_Pages) as port:
        yield port


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    rules = f"MAP {EVIL} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with chromium(tmp_path_factory.mktemp("browser"), rules) as browser:
        yield browser


@pytest.fixture(scope="module")
def open_target(serve_all: ServeFunction, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return _target(serve_all(), folder_of(tmp_path_factory.mktemp("open")), None)


@pytest.fixture(scope="module")
def closed_target(serve_all: ServeFunction, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return _target(serve_all(CCM_API_TOKEN=TOKEN), folder_of(tmp_path_factory.mktemp("closed")), TOKEN)


def _target(service: ServiceProcess, folder: Path, token: str | None) -> Target:
    target = Target(service, folder, token)
    body = {"cwd": str(folder), "prompt": _secret_prompt()}
    target.run = target.ask("POST", "/api/runs/start", body)
    until(lambda: target.ask("GET", f"/api/runs/{target.run['id']}")["messageCount"])
    target.run = target.ask("GET", f"/api/runs/{target.run['id']}")
    assert target.run["status"] == "running"
    return target


def refusals(target: Target, browser: Browser, base: str, attack: str) -> set[str]:
    """The statuses of the service's answers to an attack by the page that is open in the browser."""
    before, after = f"{MARK}-{uuid.uuid4()}", f"{MARK}-{uuid.uuid4()}"
    runs = target.ask("GET", "/api/runs", mark=before)
    until(lambda: any(before in line for line in target.service.log))
    body = json.dumps({"cwd": str(target.folder), "prompt": "hello"})
    readable = browser.run(PAGE % ATTACKS[attack], base, body, target.run["id"])

    until(lambda: target.answered(before))  # the browser sends a beacon later
    assert target.ask("GET", "/api/runs", mark=after) == runs, "the page has started or ended something"
    until(lambda: any(after in line for line in target.service.log))
    browser.close_other_windows()
    assert SECRET not in readable
    return {answer.split()[-1] for answer in target.answered(before)}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    "where",
    [f"http://{EVIL}:%d/", "http://127.0.0.1:%d/", "http://127.0.0.1:%d/sandboxed"],
    ids=["of another site", "of another port", "of no origin"],
)
def test_a_page_of_another_origin_gets_nothing(
    open_target: Target, browser: Browser, page: int, where: str, attack: str
) -> None:
    browser.open(where % page)

    assert refusals(open_target, browser, open_target.service.url, attack) == {"403"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_page_gets_nothing_where_tokens_are_required(
    closed_target: Target, browser: Browser, page: int, attack: str
) -> None:
    browser.open(f"http://127.0.0.1:{page}/")

    assert refusals(closed_target, browser, closed_target.service.url, attack) <= {"401", "403"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_page_whose_name_is_led_to_the_service_gets_nothing(
    open_target: Target, closed_target: Target, browser: Browser, attack: str
) -> None:
    """DNS rebinding: for the browser the page and the service have one origin, so it allows everything."""
    for target in (open_target, closed_target):
        base = f"http://{EVIL}:{urlsplit(target.service.url).port}"
        browser.open(f"{base}/")

        assert refusals(target, browser, base, attack) == {"403"}


# An attack of each kind that Chromium marks in its own way.
KINDS = {"a script": "fetch of text", "a link or an image": "link", "a WebSocket": "WebSocket"}


def test_chromium_marks_its_requests_as_the_tests_in_process_do(browser: Browser, page: int) -> None:
    seen: list[dict[str, str]] = []

    class Writer(_Pages):
        """Records the headers that say where a request comes from."""

        def do_GET(self) -> None:
            if "favicon" not in self.path:
                names = [name for name in ("Host", "Origin", "Sec-Fetch-Site") if self.headers[name]]
                seen.append({name: self.headers[name] for name in names})
            super().do_GET()

        do_POST = do_GET

    with serving(Writer) as own:
        pages = {
            "of another site": f"http://{EVIL}:{page}/",
            "of another port": f"http://127.0.0.1:{page}/",
            "of no origin": f"http://127.0.0.1:{page}/sandboxed",
            "whose name leads to the service": f"http://{EVIL}:{own}/",
        }
        for where, address in pages.items():
            for kind, attack in KINDS.items():
                source = SOURCES.get(f"{where}, {kind}", SOURCES[f"{where}, a script"])
                browser.open(address)
                seen.clear()
                host = urlsplit(address).hostname if "Host" in source else "127.0.0.1"
                browser.run(PAGE % ATTACKS[attack], f"http://{host}:{own}", "{}", "run")
                until(lambda: seen)

                expected = {"Host": f"{host}:{OWN}"} | source
                named = {name: value.replace(OWN, f"{own}") for name, value in expected.items()}
                named = {name: value.replace("8000", f"{page}") for name, value in named.items()}
                assert seen[0] == named, f"of {where}, {kind}"
