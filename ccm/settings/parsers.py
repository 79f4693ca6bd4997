"""Parsers of environment variables: one function for each kind of value.

Each takes the variable's text, and perhaps limits, and returns its value. For an invalid text it raises a ValueError.
The message continues a sentence that begins with the variable's name, and says what the value must be. The caller adds
the text itself, except for secrets; their parsers never quote it.
"""

from __future__ import annotations

import base64
import ipaddress
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from ccm.settings.token_file import TOKEN

T = TypeVar("T")

HOST_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_-])?|\[[0-9a-f:.]+\]", re.ASCII)
# The units of a duration, in seconds.
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
# The longest duration of a setting, in seconds: thirty days.
LONGEST_RUN = 30 * 24 * 3600
# Stands for every client of the Unix socket, among the addresses of CCM_TRUSTED_PROXY.
UNIX_PEER = "unix"
# No characters that need quoting in a URL or a header, and no `.` or `..` segments, which clients resolve.
URL_PREFIX = re.compile(r"(?=.{1,200}\Z)(?:/(?!\.{1,2}(?:/|\Z))[\w.~-]+)+", re.ASCII)
# The format of https://www.standardwebhooks.com for secrets, and the lengths of a key that it allows.
SECRET_PREFIX = "whsec_"  # noqa: S105  # a prefix, no secret
SECRET_BYTES = (24, 64)
# The longest path that Linux accepts for a socket.
UNIX_PATH_BYTES = 107


def integer(value: str, lowest: int, highest: int) -> int:
    """Parse a whole number from `lowest` to `highest`, inclusive."""
    try:
        number = int(value)
    except ValueError:
        raise ValueError("must be a whole number") from None
    if not lowest <= number <= highest:
        raise ValueError(f"must be from {lowest} to {highest}")
    return number


def money(value: str) -> float:
    """Parse a positive amount of US dollars."""
    try:
        amount = float(value)
    except ValueError:
        amount = math.nan
    if not (math.isfinite(amount) and amount > 0):
        raise ValueError("must be an amount above 0, such as 2.50")
    return amount


def seconds_in(value: str, units: Sequence[str]) -> int | None:
    """Return the seconds of a whole number with one of these UNITS. None if the text is no such duration."""
    match = re.fullmatch(r"([0-9]{1,9})([a-z]?)", value)
    return int(match[1]) * UNITS[match[2]] if match is not None and match[2] in units else None


def duration(value: str) -> int:
    """Parse seconds, or a number with a unit (`90s`, `30m`, `2h`, `3d`), to seconds; at most LONGEST_RUN."""
    seconds = seconds_in(value.strip(), ("", "s", "m", "h", "d"))
    if seconds is None:
        raise ValueError("must be a duration: whole seconds, or a whole number with a unit, such as 90s, 30m, 2h or 3d")
    if not 1 <= seconds <= LONGEST_RUN:
        raise ValueError(f"must be from 1s to {LONGEST_RUN // 86_400}d")
    return seconds


def one_of(value: str, allowed: Sequence[str]) -> str:
    """Check a word that must be one of those `allowed`."""
    if value not in allowed:
        raise ValueError(f"must be one of {', '.join(allowed)}")
    return value


def log_level(value: str) -> str:
    """Parse a level in any case to lower case."""
    return one_of(value.lower(), ("debug", "info", "warn", "error"))


def some_of(value: str, allowed: tuple[str, ...], wildcard: bool = False) -> tuple[str, ...]:
    """Parse words that are `allowed`, separated by commas. With `wildcard`, `*` stands for all of them."""
    if wildcard and value.strip() == "*":
        return allowed
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in names:
        if name not in allowed:
            raise ValueError(f"has {name!r}; it takes any of {', '.join(allowed)}" + (", or *" if wildcard else ""))
    return names


def address(value: str) -> str:
    """Parse `localhost`, or an IP address to its canonical form."""
    try:
        return value if value == "localhost" else str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("must be an IP address or localhost") from None


def token(value: str) -> str:
    """Check a token that fits into a header unquoted."""
    if not TOKEN.fullmatch(value):
        raise ValueError("must have 16 to 512 visible ASCII characters and no spaces; `flask token NAME` makes one")
    return value


def each(value: str, item: Callable[[str], T], separator: str | None = ",") -> tuple[T, ...]:
    """Parse each part of a list with the parser `item`. Without a separator, blanks separate the parts."""
    return tuple(item(part) for part in value.split(separator))


def host(value: str) -> str:
    """Parse one of several host names to lower case."""
    name = value.strip().lower()
    if not HOST_NAME.fullmatch(name):
        raise ValueError(f"has {name!r}, which is not a host name or address (no port; IPv6 in brackets)")
    return name


def peer(value: str) -> str:
    """Parse one of several IP addresses to its canonical form, or UNIX_PEER."""
    name = value.strip()
    try:
        return name if name == UNIX_PEER else str(ipaddress.ip_address(name))
    except ValueError:
        raise ValueError(f"has {name!r}, which is neither an IP address nor {UNIX_PEER}") from None


def url_prefix(value: str) -> str:
    """Parse a path to one without a trailing slash; empty for `/`."""
    prefix = value.rstrip("/")
    if prefix and not URL_PREFIX.fullmatch(prefix):
        raise ValueError("must be a path such as /agents, of letters, digits, '.', '_', '~' and '-'")
    if prefix.split("/")[1:2] in (["api"], ["health"]):
        raise ValueError("must not begin with the service's own paths, /api and /health")
    return prefix


def unix_socket(value: str) -> Path:
    """Parse the absolute path of a Unix socket."""
    path = file(value)
    if len(os.fsencode(value)) > UNIX_PATH_BYTES:
        raise ValueError(f"must have {UNIX_PATH_BYTES} bytes at most, the limit of the system for paths of sockets")
    return path


def file_mode(value: str) -> int:
    """Parse permission bits, written in octal."""
    if not re.fullmatch(r"0?[67][0-7]{2}", value, re.ASCII):
        raise ValueError("must be an octal mode with read and write permission for the owner, such as 0600 or 0660")
    return int(value, 8)


def signing_key(value: str) -> bytes:
    """Parse one of several secrets for webhooks to its key."""
    lowest, highest = SECRET_BYTES
    try:
        key = base64.b64decode(value.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not value.startswith(SECRET_PREFIX) or not lowest <= len(key) <= highest:
        raise ValueError(
            f"must be {SECRET_PREFIX} and {lowest} to {highest} random bytes in base64, such as "
            f'"{SECRET_PREFIX}$(openssl rand -base64 32)"; several during a rotation, separated by spaces'
        )
    return key


def database_url(value: str) -> str:
    """Parse the URL of a PostgreSQL database to the scheme that SQLAlchemy accepts."""
    scheme, _, rest = value.partition("://")
    if scheme not in ("postgresql", "postgres"):
        raise ValueError("must begin with postgresql://; DATABASE_PATH names a SQLite file")
    try:
        urlsplit(value).port  # noqa: B018  # raises ValueError if it is no number
    except ValueError:
        # Without the original message, which quotes a part of the URL, maybe of the password.
        raise ValueError(
            "must be postgresql://user:password@host:port/name, with special characters in the password "
            "percent-encoded, such as %40"
        ) from None
    return f"postgresql://{rest}"


def directory(value: str) -> Path:
    """Parse one of several existing directories; links are resolved."""
    path = Path(value)
    if not path.is_absolute() or not path.is_dir():
        raise ValueError(f"has {value!r}, which is not the absolute path of a directory")
    return path.resolve()


def sqlite_path(value: str) -> Path:
    """Parse the path of a SQLite file."""
    if "?" in value:
        raise ValueError("must not contain a question mark, which would start the options of the database's URL")
    return Path(value)


def file(value: str) -> Path:
    """Parse an absolute path."""
    path = Path(value)
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path
