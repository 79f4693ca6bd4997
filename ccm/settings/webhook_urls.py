"""The addresses of webhooks: which can be used at all, and which the operator allows."""

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
    """An absolute http or https URL, as it is given.

    Raises:
        ValueError: it is none that a webhook can be sent to. It says what it must be, and nothing of what it is, which
            may be a secret.
    """
    if len(url) > URL_CHARACTERS:
        raise ValueError(f"must have at most {URL_CHARACTERS} characters")
    scheme, _, rest = url.partition("://")
    if scheme.lower() not in PORTS:
        raise ValueError("must be an absolute URL that begins with http:// or https://")
    if "#" in url:
        raise ValueError("must have no fragment (#...), which would not be sent")
    if "@" in re.split("[/?]", rest)[0]:
        raise ValueError("must have no user or password: it is shown with the run. The signature proves who calls")
    if not URL.fullmatch(url):
        raise ValueError(
            "must have a host, a port only as a number, and no blanks, control characters or others than ASCII: write "
            "those in the host as in xn--..., elsewhere as in %20"
        )
    try:
        parts = urlsplit(url)  # it knows which IPv6 addresses are some
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or ".." in (parts.hostname or "") or len(parts.hostname or "") > HOST_CHARACTERS:
        raise ValueError("must have a valid host, and a port from 1 to 65535 if it names one")
    return url


def host_of(url: str) -> str:
    """Host and port, such as `hooks.example:443`: as much of an address as may be logged."""
    host, port = _place(url)
    return f"{host}:{port}"


def host_pattern(text: str) -> str:
    """A host with or without a port, or `*.` and a domain, in lower case: what `allowed` takes.

    Raises:
        ValueError: it is none.
    """
    pattern = text.strip().lower()
    if not PATTERN.fullmatch(pattern):
        raise ValueError(
            f"has {text!r}, which is no host: a name or an address (IPv6 in brackets), with :PORT or without, or "
            "*.example.com"
        )
    return pattern


def allowed(url: str, patterns: Sequence[str]) -> bool:
    """Whether an address has one of these hosts; every one does where there are none.

    `*.example.com` is every host below example.com, not itself. A host without a port goes with every port.
    """
    return not patterns or any(_fits(*_place(url), pattern) for pattern in patterns)


def _fits(host: str, port: int, pattern: str) -> bool:
    match = PATTERN.fullmatch(pattern)
    if match is None or match[2] not in (None, str(port)):
        return False
    return host.endswith(match[1][1:]) if match[1].startswith("*.") else host == match[1]


def _place(url: str) -> tuple[str, int]:
    """Its host in lower case, in brackets if it is IPv6, and its port."""
    parts = urlsplit(url)
    name = parts.hostname or ""
    return f"[{name}]" if ":" in name else name, parts.port or PORTS[parts.scheme]
