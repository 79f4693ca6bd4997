"""A real browser's own EventSource follows runs: Chromium, driven through WebDriver on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client import Client

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
# Runs in the page: collects what an EventSource is told until it gives up, which it does at a 204 only.
FOLLOW = """
const [path, done] = arguments;
const seen = [], source = new EventSource(path);
let opened = 0;
source.onopen = () => opened++;
const note = event => seen.push([event.type, event.lastEventId, JSON.parse(event.data)]);
source.onmessage = note;
source.addEventListener("end", note);
source.onerror = () => source.readyState === EventSource.CLOSED && done([opened, seen]);
"""
# The same until it has been told so many ends.
FOLLOW_ENDS = """
const [path, ends, done] = arguments;
const seen = [], source = new EventSource(path);
source.onmessage = event => seen.push(event.lastEventId);
source.addEventListener("end", event => {
  seen.push(event.lastEventId);
  if (seen.filter(id => id.endsWith("end")).length === ends) { source.close(); done(seen); }
});
"""


class Browser:
    """One Chromium."""

    def __init__(self, driver: str) -> None:
        self._driver = driver
        options = {"args": FLAGS}
        value = self._call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self._session = f"/session/{value['sessionId']}"
        self._call("POST", f"{self._session}/timeouts", {"script": 60_000})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as response:
            return json.load(response)["value"]

    def open(self, url: str) -> None:
        self._call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page hands to its last argument."""
        return self._call("POST", f"{self._session}/execute/async", {"script": script, "args": arguments})

    def close(self) -> None:
        self._call("DELETE", self._session)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromedriver")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs a browser: install Debian's package chromium-driver")
        pytest.skip("chromedriver is not installed; Debian's package chromium-driver has it")
    folder = tmp_path_factory.mktemp("browser")
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8"}
    driver = subprocess.Popen([program, "--port=0"], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(line.split()[-1].rstrip(".") for line in driver.stdout if "started successfully on port" in line)
        chromium = Browser(f"http://127.0.0.1:{port}")
        try:
            yield chromium
        finally:
            chromium.close()
    finally:
        driver.terminate()
        driver.communicate()


def test_a_browser_follows_a_run_to_its_end_and_does_not_come_back(
    client: Client, browser: Browser, project: Path
) -> None:
    browser.open(client.url)
    run = client.start(project, "[[slow 20 0.02]]", wait=0, options={"includePartialMessages": True})
    opened, seen = browser.run(FOLLOW, f"/api/runs/{run['id']}/stream")

    messages = client.messages(run["id"])
    told = [["message", str(index), message] for index, message in enumerate(messages)]
    assert seen == [*told, ["end", "end", client.run(run["id"])]]
    assert len(messages) > 20
    assert opened == 1


def test_a_browser_follows_a_session_from_run_to_run(client: Client, browser: Browser, project: Path) -> None:
    browser.open(client.url)
    first = client.start(project, "Hello.", wait=0)
    second = client.resume(first["sessionId"], "And now?", wait=0, ifBusy="enqueue")
    seen = browser.run(FOLLOW_ENDS, f"/api/sessions/{first['sessionId']}/stream", 2)

    assert seen == [
        f"{run['id']}:{place}" for run in (first, second) for place in (*range(len(client.messages(run["id"]))), "end")
    ]
