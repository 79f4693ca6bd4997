"""Sends the tour's requests as the service's settings demand, and shows each as a curl command."""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from ccm.errors import CommandRefused
from ccm.settings.settings import Settings
from ccm.settings.token_file import read_tokens
from ccm.testing.connection import connection

# Longer than any wait (seconds).
TIMEOUT = 330.0


class Refused(Exception):
    """The service refused a request. The message is the body of its answer."""


class DemoClient:
    """A client of the demo's service.

    Args:
        url: the address of the service, as its log shows it.
        settings: of the service.

    Attributes:
        notes: lines to print before the first command: what its $TOKEN is.

    Raises:
        CommandRefused: the service requires a token, and there is none.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = _reachable(url)
        self._shown_url = self._url
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        # The parts of the curl command before the request's own, as a shell takes them.
        self._curl = ["curl", "-s"]
        self.notes: list[str] = []
        if settings.unix_socket is not None:
            self._curl += ["--unix-socket", shlex.quote(str(settings.unix_socket))]
            self._shown_url = "http://localhost"
        name = urlsplit(self._shown_url).netloc.rpartition(":")[0] or "localhost"
        if name not in settings.allowed_hosts:
            self._headers["Host"] = settings.allowed_hosts[0]
            self._curl += ["-H", shlex.quote(f"Host: {settings.allowed_hosts[0]}")]
        if settings.has_tokens:
            token, source = _token(settings)
            self._headers["Authorization"] = f"Bearer {token}"
            self._curl += ["-H", '"Authorization: Bearer $TOKEN"']
            self.notes.append(f"$TOKEN in the commands: TOKEN={source}")

    def command(self, method: str, path: str, body: Mapping[str, Any] | None = None, stream: bool = False) -> str:
        """Return a request as a curl command, with `$TOKEN` for the token."""
        own = ["-N"] if stream else []
        if body is not None:
            own += ["-X", method, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return " ".join([*self._curl, shlex.join([*own, self._shown_url + path])])

    def open(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> HTTPResponse:
        """Send a request, and return its answer to be read.

        Raises:
            Refused: the answer is an error.
        """
        sent = connection(self._url, TIMEOUT)
        data = None if body is None else json.dumps(body)
        sent.request(method, path, data, self._headers)
        response = sent.getresponse()
        if response.status >= 400:
            raise Refused(response.read().decode().strip())
        return response

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request, and return the JSON of its answer. Raises what `open` does."""
        with self.open(method, path, body) as response:
            return json.load(response)


def _reachable(url: str) -> str:
    """Return an address that a client can connect to: one of loopback for a service that listens on all."""
    parts = urlsplit(url)
    if parts.hostname is None or parts.hostname == "localhost":
        return url
    host = ipaddress.ip_address(parts.hostname)
    if not host.is_unspecified:
        return url
    return f"http://{'[::1]' if host.version == 6 else '127.0.0.1'}:{parts.port}"


def _token(settings: Settings) -> tuple[str, str]:
    """Return a token, and how a shell gets it."""
    if settings.api_token is not None:
        return settings.api_token, "$CCM_API_TOKEN"
    file = settings.api_token_file
    tokens = {} if file is None else read_tokens(file)
    if not tokens:
        raise CommandRefused(f"The demo ends: it needs a token, and {file} has none; `flask token NAME` adds one.")
    name = next(iter(tokens))
    return tokens[name], f"$(sed -n {shlex.quote(f's/^{name}://p')} {shlex.quote(str(file))})"
