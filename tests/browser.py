"""Chromium, controlled through WebDriver on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
]


class Browser:
    """One Chromium session.

    Args:
        driver: the address of its WebDriver.
        resolver_rules: Chromium's host resolver rules; a name without a rule does not resolve.
    """

    def __init__(self, driver: str, resolver_rules: str) -> None:
        self._driver = driver
        capabilities = {
            "goog:chromeOptions": {"args": [*FLAGS, f"--host-resolver-rules={resolver_rules}"]},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        value = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{value['sessionId']}"
        self._call("POST", f"{self._session}/timeouts", {"script": 60_000})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """Send a command of the WebDriver protocol and return its value.

        Raises:
            RuntimeError: the command failed, such as a script that raised.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self._call("POST", f"{self._session}/url", {"url": url})

    def new_tab(self) -> None:
        """Replace the tab with a new one, which has nothing of the old one's: sessionStorage, emulation, logs."""
        tab = self._call("POST", f"{self._session}/window/new", {"type": "tab"})
        self._call("DELETE", f"{self._session}/window")
        self._call("POST", f"{self._session}/window", {"handle": tab["handle"]})
        self.errors()
        self.requested()

    def close_other_windows(self) -> None:
        """Close the windows that the page has opened."""
        own = self._call("GET", f"{self._session}/window")
        for window in self._call("GET", f"{self._session}/window/handles"):
            if window != own:
                self._call("POST", f"{self._session}/window", {"handle": window})
                self._call("DELETE", f"{self._session}/window")
                self._call("POST", f"{self._session}/window", {"handle": own})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page and return the value that it passes to its last argument."""
        return self._call("POST", f"{self._session}/execute/async", {"script": script, "args": arguments})

    def value(self, expression: str, *arguments: Any) -> Any:
        """Return the value of an expression in the page, in which `given` is the list of the arguments."""
        script = f"const given = [...arguments], done = given.pop(); done({expression})"
        return self.run(script, *arguments)

    def until(self, expression: str, *arguments: Any) -> Any:
        """Wait until an expression in the page is true, and return its value."""
        return until(lambda: self.value(expression, *arguments))

    def errors(self) -> list[str]:
        """Return the console's errors since the last call. They include violations of a page's security policy."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def requested(self) -> list[str]:
        """Return the URLs that were requested since the last call."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        urls = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self._call("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def close(self) -> None:
        self._call("DELETE", self._session)


@contextmanager
def chromium(folder: Path, resolver_rules: str = "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1") -> Iterator[Browser]:
    """Start a Chromium that keeps its files in a folder."""
    program = shutil.which("chromedriver")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs a browser: install Debian's package chromium-driver")
        pytest.skip("chromedriver is not installed; Debian's package chromium-driver has it")
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8"}
    driver = subprocess.Popen([program, "--port=0"], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(line.split()[-1].rstrip(".") for line in driver.stdout if "started successfully on port" in line)
        browser = Browser(f"http://127.0.0.1:{port}", resolver_rules)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.communicate()
