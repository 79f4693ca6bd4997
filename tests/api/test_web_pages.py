"""Web pages that would like to use the service: in a real Chromium, by every means that a page has."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ccm.testing.service_process import ServiceProcess
from tests.api.conftest import folder_of, script, until
from tests.browser import Browser, chromium
from tests.client import Client
from tests.conftest import ServeFunction

TOKEN = "0123456789-a-token-of-the-tests"
SECRET = "what no page may read"
EVIL = "evil.example"
# What the requests of the test's own are known by in the log.
MARK = "the-tests-own"
# What stands around each attack; it hands over what the page has got to read.
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
    if (shown) { view.close(); return shown; }
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


@dataclass
class Target:
    """A service with a run that goes on, which no page may read, cancel, or add another one to."""

    service: ServiceProcess
    folder: Path
    token: str | None
    run: Any = None

    @property
    def client(self) -> Client:
        return Client(self.service.url)

    def ask(self, method: str, path: str, body: Any = None, mark: str = MARK) -> Any:
        """What the service says to a client that may ask."""
        headers = {"X-Request-Id": mark} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        return self.client.request(method, path, body, headers).json

    def answered(self, after: str) -> list[str]:
        """The method, path and status of each request that the service has answered after a request of the test's own.

        Without those that the browser makes by itself, for the icon of what it shows.
        """
        lines = [re.search(r" ccm\.api: (\S+ \S+ \d{3}) request (\S+)", line) for line in list(self.service.log)]
        requests = [(line[1], line[2]) for line in lines if line and "favicon.ico" not in line[1]]
        marks = [mark for _, mark in requests]
        since = requests[marks.index(after) + 1 :] if after in marks else []
        return [request for request, mark in since if not mark.startswith(MARK)]


class _Pages(BaseHTTPRequestHandler):
    """A page with nothing in it: the tests bring the scripts."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        if self.path == "/sandboxed":
            # Its origin is "null" then, as that of a page in a sandboxed frame or out of a file.
            self.send_header("Content-Security-Policy", "sandbox allow-scripts allow-forms allow-popups")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>a page</title>")

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def page() -> Iterator[int]:
    """The port of another server on this host."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


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
    body = {"cwd": str(folder), "prompt": script({"type": "assistant", "text": SECRET}, hold=True)}
    target.run = target.ask("POST", "/api/runs/start", body)
    until(lambda: target.ask("GET", f"/api/runs/{target.run['id']}")["messageCount"])
    target.run = target.ask("GET", f"/api/runs/{target.run['id']}")
    assert target.run["status"] == "running"
    return target


def refusals(target: Target, browser: Browser, base: str, attack: str) -> set[str]:
    """With which status the service answered what a page did that is open in a browser."""
    before, after = f"{MARK}-{uuid.uuid4()}", f"{MARK}-{uuid.uuid4()}"
    runs = target.ask("GET", "/api/runs", mark=before)
    until(lambda: any(before in line for line in target.service.log))
    body = json.dumps({"cwd": str(target.folder), "prompt": "hello"})
    told = browser.run(PAGE % ATTACKS[attack], base, body, target.run["id"])

    until(lambda: target.answered(before))  # a beacon is sent whenever the browser likes
    assert target.ask("GET", "/api/runs", mark=after) == runs, "the page has started or ended something"
    until(lambda: any(after in line for line in target.service.log))
    assert SECRET not in told
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
def test_a_page_gets_nothing_where_tokens_are_wanted(
    closed_target: Target, browser: Browser, page: int, attack: str
) -> None:
    browser.open(f"http://127.0.0.1:{page}/")

    assert refusals(closed_target, browser, closed_target.service.url, attack) <= {"401", "403"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_page_whose_name_is_led_to_the_service_gets_nothing(
    open_target: Target, closed_target: Target, browser: Browser, attack: str
) -> None:
    """DNS rebinding: to the browser the page and the service are of one origin, and so everything is allowed."""
    for target in (open_target, closed_target):
        base = f"http://{EVIL}:{urlsplit(target.service.url).port}"
        browser.open(f"{base}/")

        assert refusals(target, browser, base, attack) == {"403"}
