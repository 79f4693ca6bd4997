"""The pages of `/docs` in a browser."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from tests.browser import Browser

START_RUN = "Start a fresh run in a new session"
FIND = """
[...document.querySelectorAll(given[0])].find(each => each.textContent.includes(given[1]) && each.checkVisibility())"""
TYPE = """
(editor => { editor.focus(); document.execCommand("selectAll"); document.execCommand("insertText", false, given[1]); })
([...document.querySelectorAll("[contenteditable=true]")].find(each => each.innerText.includes(given[0])))"""


class DocsPages:
    """The pages of one service.

    Args:
        url: the address of the service, with its prefix.
    """

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        self.url = url

    def open(self, path: str) -> None:
        self.browser.open(self.url + path)

    def resize(self, width: int, height: int, phone: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.browser.devtools("Emulation.setDeviceMetricsOverride", **size)

    def wait_for(self, text: str, selector: str = "h1, h2, h3", where: str = "found !== undefined") -> None:
        """Wait for a visible element with a text.

        Args:
            where: a further condition in JavaScript, on `found`.
        """
        self.browser.until(f"(found => found && {where})({FIND})", selector, text)

    def click(self, selector: str, text: str) -> None:
        """Click the first visible element that a selector finds and that contains a text."""
        self.wait_for(text, selector)
        self.browser.value(f"{FIND}.click()", selector, text)

    def asks(self) -> bool:
        """Return whether the page asks for a token."""
        return self.browser.value("!document.getElementById('access').hidden") is True

    def enter(self, token: str) -> None:
        """Enter a token into the form, and submit it."""
        self.browser.until("!document.getElementById('access').hidden")
        self.browser.value("document.getElementById('token').value = given[0]", token)
        self.browser.value("document.getElementById('token-form').requestSubmit()")

    def start_run(self, body: dict[str, Any]) -> None:
        """Start a run from the page that shows startRun, and wait until the service has accepted it."""
        self.click("button", "(post /api/runs/start)")
        self.browser.until("document.querySelector('[contenteditable=true]') !== null")
        self.browser.value(TYPE, "prompt", json.dumps(body))
        self.click("button", "Send post request")
        self.wait_for("202 Accepted", "*")

    def kept(self) -> list[str]:
        """Return what the page has stored: localStorage, sessionStorage, the cookies and the address."""
        stored = "[localStorage, sessionStorage].map(each => JSON.stringify(each))"
        found: list[str] = self.browser.value(f"{stored}.concat(document.cookie, location.href)")
        return found

    def assert_nothing_went_wrong(self) -> None:
        """Check that the console has no error, and that no other host was asked for anything."""
        assert {urlsplit(url).netloc for url in self.browser.requested()} == {urlsplit(self.url).netloc}
        assert self.browser.errors() == []
