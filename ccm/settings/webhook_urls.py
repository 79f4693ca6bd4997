"""Addresses of webhooks: their validation, and the operator's list of allowed hosts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

URL_CHARACTERS = 2_048
HOST_CHARACTERS = 253
PORTS = {"http": 80, "https": 443}
NAME = r"[a-z0-9_][a-z0-9_.-]*"
IPV6 = r"\[[0-9a-f:.]+\]"
URL = re.compile(rf"https?://(?:{NAME}|{IPV6})(?::\d{{1,5}})?(?:[/?][!-~]*)?", re.ASCII | re.IGNORECASE)
PATTERN = re.compile(rf"((?:\*\.)?{NAME}|{IPV6})(?::([1-9]\d{{0,4}}))?", re.ASCII)


def web_address(url: str) -> str:
    """Return an absolute http or https URL unchanged if webhooks can be sent to it.

    Raises:
        ValueError: they cannot. The message says what the URL must be, without quoting it, because it may be a secret.
    """
    if len(url) > URL_CHARACTERS:
        raise ValueError(f"must have at most {URL_CHARACTERS} characters")
    scheme, _, rest = url.partition("://")
    if scheme.lower() not in PORTS:
        raise ValueError("must be an absolute URL that begins with http:// or https://")
    if "#" in url:
        raise ValueError("must have no fragment (#...), which would not be sent")
    if "@" in re.split("[/?]", rest)[0]:
        raise ValueError("must have no user or password, because runs show it; receivers can verify the signature")
    if not URL.fullmatch(url):
        raise ValueError(
            "must have a host, a port only as a number, and no blanks, control or non-ASCII characters: encode those "
            "in the host as in xn--..., elsewhere as in %20"
        )
    try:
        parts = urlsplit(url)  # validates IPv6 addresses
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or port == 0 or ".." in host or len(host) > HOST_CHARACTERS:
        raise ValueError("must have a valid host, and a port from 1 to 65535 if it names one")
    return url


def host_of(url: str) -> str:
    """Return host and port, such as `hooks.example:443`: the part of an address that may be logged."""
    host, port = _host_and_port(url)
    return f"{host}:{port}"


def host_pattern(text: str) -> str:
    """Return a pattern for `allowed` in lower case: a host or `*.` and a domain, with or without a port.

    Raises:
        ValueError: it is no such pattern.
    """
    pattern = text.strip().lower()
    if not PATTERN.fullmatch(pattern):
        raise ValueError(
            f"has {text!r}, which is no host pattern: a name, an address (IPv6 in brackets) or *.example.com, with "
            "or without :PORT"
        )
    return pattern


def allowed(url: str, patterns: Sequence[str]) -> bool:
    """Return whether the host of a URL matches one of these patterns, or there are none.

    `*.example.com` matches every host below example.com, but not itself. A pattern without a port matches any port.
    """
    return not patterns or any(_matches(*_host_and_port(url), pattern) for pattern in patterns)


def _matches(host: str, port: int, pattern: str) -> bool:
    match = PATTERN.fullmatch(pattern)
    if match is None or match[2] not in (None, str(port)):
        return False
    return host.endswith(match[1][1:]) if match[1].startswith("*.") else host == match[1]


def _host_and_port(url: str) -> tuple[str, int]:
    """Return a URL's host, in lower case and with IPv6 in brackets, and its port."""
    parts = urlsplit(url)
    name = parts.hostname or ""
    return f"[{name}]" if ":" in name else name, parts.port or PORTS[parts.scheme]
