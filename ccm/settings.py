"""The one reader of the environment. Every setting stands here once, with its default and its reason."""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ccm.errors import BadSetting
from ccm.token_file import TOKEN, read_tokens

LOG_LEVELS = ("debug", "info", "warn", "error")
PERMISSION_MODES = ("default", "acceptEdits", "plan", "dontAsk")
PRIVILEGED_PERMISSION_MODES = ("bypassPermissions", "auto")
SETTING_SOURCES = ("user", "project", "local")
PRIVILEGED_OPTIONS = (
    "additionalDirectories",
    "env",
    "extraArgs",
    "mcpServers",
    "permissionMode",
    "plugins",
    "sandbox",
    "settingSources",
    "settings",
)
# Variables whose value is never shown.
SECRETS = ("DATABASE_URL", "CCM_API_TOKEN")
HOST_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_-])?|\[[0-9a-f:.]+\]", re.ASCII)
# The longest CCM_RUN_TIMEOUT (seconds): thirty days.
LONGEST_RUN = 30 * 24 * 3600
# Whoever comes through the Unix socket, among the addresses of CCM_TRUSTED_PROXY.
UNIX_PEER = "unix"
# Nothing that would need quoting in an address or a header, and no dots that a client resolves.
URL_PREFIX = re.compile(r"(?=.{1,200}\Z)(?:/(?!\.{1,2}(?:/|\Z))[\w.~-]+)+", re.ASCII)
# What Linux takes as the path of a socket.
UNIX_PATH_BYTES = 107
# What the service itself puts into a run's environment (core/processes.py): inherited when an agent starts a service.
OWN_MARKS = ("CCM_RUN_ID",)


def _text(value: str) -> str:
    return value


def _integer(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError("must be a whole number") from None
        if not lowest <= number <= highest:
            raise ValueError(f"must be from {lowest} to {highest}")
        return number

    return parse


def _money(value: str) -> float:
    try:
        amount = float(value)
    except ValueError:
        amount = math.nan
    if not (math.isfinite(amount) and amount > 0):
        raise ValueError("must be an amount above 0, such as 2.50")
    return amount


def _duration(value: str) -> int:
    """Seconds."""
    match = re.fullmatch(r"([0-9]{1,9})([smh]?)", value.strip())
    if match is None:
        raise ValueError("must be a duration: whole seconds, or a whole number with a unit, such as 90s, 30m or 2h")
    seconds = int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if not 1 <= seconds <= LONGEST_RUN:
        raise ValueError(f"must be from 1s to {LONGEST_RUN // 3600}h")
    return seconds


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return parse


def _log_level(value: str) -> str:
    return _one_of(*LOG_LEVELS)(value.lower())


def _some_of(*allowed: str, wildcard: bool = False) -> Callable[[str], tuple[str, ...]]:
    def parse(value: str) -> tuple[str, ...]:
        if wildcard and value.strip() == "*":
            return allowed
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        for name in names:
            if name not in allowed:
                raise ValueError(f"has {name!r}; it takes any of {', '.join(allowed)}" + (", or *" if wildcard else ""))
        return names

    return parse


def _address(value: str) -> str:
    try:
        return value if value == "localhost" else str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("must be an IP address or localhost") from None


def _is_loopback(address: str) -> bool:
    return address == "localhost" or ipaddress.ip_address(address).is_loopback


def _token(value: str) -> str:
    if not TOKEN.fullmatch(value):
        raise ValueError("must have 16 to 512 visible characters and no blanks; `flask token NAME` makes one")
    return value


def _hosts(value: str) -> tuple[str, ...]:
    names = tuple(name.strip().lower() for name in value.split(","))
    for name in names:
        if not HOST_NAME.fullmatch(name):
            raise ValueError(f"has {name!r}, which is no host's name or address (without a port, IPv6 in brackets)")
    return names


def _peers(value: str) -> tuple[str, ...]:
    peers = []
    for name in (name.strip() for name in value.split(",")):
        try:
            peers.append(name if name == UNIX_PEER else str(ipaddress.ip_address(name)))
        except ValueError:
            raise ValueError(f"has {name!r}, which is neither an IP address nor {UNIX_PEER}") from None
    return tuple(peers)


def _url_prefix(value: str) -> str:
    prefix = value.rstrip("/")
    if prefix and not URL_PREFIX.fullmatch(prefix):
        raise ValueError("must be a path such as /agents, of letters, digits, '.', '_', '~' and '-'")
    if prefix.split("/")[1:2] in (["api"], ["health"]):
        raise ValueError("must not begin like the service's own paths, /api and /health")
    return prefix


def _unix_socket(value: str) -> Path:
    path = _file(value)
    if len(os.fsencode(value)) > UNIX_PATH_BYTES:
        raise ValueError(f"must have {UNIX_PATH_BYTES} bytes at most: the system takes no longer path of a socket")
    return path


def _file_mode(value: str) -> int:
    if not re.fullmatch(r"0?[67][0-7]{2}", value, re.ASCII):
        raise ValueError("must be an octal mode that lets its owner in, such as 0600 or 0660")
    return int(value, 8)


def _database_url(value: str) -> str:
    scheme, _, rest = value.partition("://")
    if scheme not in ("postgresql", "postgres"):
        raise ValueError("must begin with postgresql://; DATABASE_PATH names a SQLite file")
    try:
        urlsplit(value).port  # noqa: B018  # it looks whether it is one
    except ValueError:
        # Without their words, which show a part of it: that may be the password.
        raise ValueError(
            "must be postgresql://user:password@host:port/name, with what is special in the password written as in %40"
        ) from None
    return f"postgresql://{rest}"


def _directories(value: str) -> tuple[Path, ...]:
    roots = []
    for part in value.split(os.pathsep):
        path = Path(part)
        if not path.is_absolute() or not path.is_dir():
            raise ValueError(f"has {part!r}, which is not the absolute path of a directory")
        roots.append(path.resolve())
    return tuple(roots)


def _sqlite_path(value: str) -> Path:
    if "?" in value:
        raise ValueError("must not contain a question mark, which would begin the options of a database's URL")
    return Path(value)


def _file(value: str) -> Path:
    path = Path(value)
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _setting(variable: str, default: Any, parse: Callable[[str], Any], about: str, shown: str | None = None) -> Any:
    """A field read from `variable`; `shown` is how the README writes the default."""
    metadata = {"variable": variable, "parse": parse, "about": about, "shown": str(default) if shown is None else shown}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The configuration of one service."""

    port: int = _setting("PORT", 3000, _integer(0, 65535), "TCP port; 0 takes a free one and logs it")
    host: str = _setting(
        "HOST", "127.0.0.1", _address, "Address to listen on. One that is not loopback needs a token as well"
    )
    database_path: Path = _setting("DATABASE_PATH", Path("db.sqlite"), _sqlite_path, "SQLite file", "./db.sqlite")
    database_url: str | None = _setting(
        "DATABASE_URL",
        None,
        _database_url,
        "`postgresql://user:password@host/name` instead of the SQLite file",
        "(empty)",
    )
    log_level: str = _setting("LOG_LEVEL", "info", _log_level, "`debug`, `info`, `warn` or `error`")
    api_token: str | None = _setting(
        "CCM_API_TOKEN",
        None,
        _token,
        "The token that clients send as `Authorization: Bearer TOKEN`. Without one, whoever reaches the service may "
        "use it",
        "(empty)",
    )
    api_token_file: Path | None = _setting(
        "CCM_API_TOKEN_FILE",
        None,
        _file,
        "A file with a token for each client, `NAME:TOKEN` a line (`flask token NAME`). Read again when it changes",
        "(empty)",
    )
    allowed_hosts: tuple[str, ...] = _setting(
        "CCM_ALLOWED_HOSTS",
        ("localhost", "127.0.0.1", "[::1]"),
        _hosts,
        "Names that the service may be called by (the `Host` header, whatever the port), separated by commas",
        "localhost,127.0.0.1,[::1]",
    )
    trusted_proxy: tuple[str, ...] = _setting(
        "CCM_TRUSTED_PROXY",
        (),
        _peers,
        "Addresses of the reverse proxies, separated by commas, whose `X-Forwarded-For`, `-Proto`, `-Host` and "
        f"`-Prefix` are believed; `{UNIX_PEER}` for whoever comes through the Unix socket",
        "(empty: none)",
    )
    url_prefix: str = _setting(
        "CCM_URL_PREFIX",
        "",
        _url_prefix,
        "The path under which clients find the service, such as `/agents`, where the proxy sends no "
        "`X-Forwarded-Prefix`. The proxy may take it off the request's path, or not",
        "(empty)",
    )
    unix_socket: Path | None = _setting(
        "CCM_UNIX_SOCKET",
        None,
        _unix_socket,
        "Path of a Unix socket to listen on instead of `HOST` and `PORT`",
        "(empty)",
    )
    unix_socket_mode: int = _setting(
        "CCM_UNIX_SOCKET_MODE",
        0o600,
        _file_mode,
        "Who may open the socket: `0600` this user, `0660` its group as well. It is the guard, so no token is demanded",
        "0600",
    )
    max_concurrent_runs: int = _setting(
        "CCM_MAX_CONCURRENT_RUNS",
        8,
        _integer(1, 1000),
        "Runs at once. Each is a Claude Code process of 100-200 MB that takes a core while it starts",
    )
    max_queued_runs: int = _setting(
        "CCM_MAX_QUEUED_RUNS", 1000, _integer(0, 1_000_000), "Runs that may wait for a worker; beyond that 429"
    )
    max_held: int = _setting(
        "CCM_MAX_HELD",
        200,
        _integer(1, 4000),
        "Requests that may be held open at once: `?wait=`, streams, long lists of messages. Each has a thread of its "
        "own, about 60 KB, and up to 1 MB more while its client reads slowly",
    )
    max_body_bytes: int = _setting(
        "CCM_MAX_BODY_BYTES", 32 * 2**20, _integer(1024, 2**30), "Largest request body; beyond that 413"
    )
    max_message_bytes: int = _setting(
        "CCM_MAX_MESSAGE_BYTES",
        32 * 2**20,
        _integer(2**16, 2**29),
        "Largest single message of a run; a larger one ends it as `MESSAGE_TOO_LARGE`",
    )
    message_budget_bytes: int = _setting(
        "CCM_MESSAGE_BUDGET_BYTES",
        64 * 2**20,
        _integer(2**16, 2**34),
        "Messages that may wait for the database, in memory; beyond that the agents are made to wait",
    )
    allowed_roots: tuple[Path, ...] = _setting(
        "CCM_ALLOWED_ROOTS",
        (),
        _directories,
        f"Directories, separated by `{os.pathsep}`, in one of which every `cwd` must lie, that of a session which goes "
        "on too. It prevents mistakes; it is no sandbox",
        "(empty: any directory)",
    )
    privileged_options: tuple[str, ...] = _setting(
        "CCM_PRIVILEGED_OPTIONS",
        (),
        _some_of(*PRIVILEGED_OPTIONS, wildcard=True),
        "Options that run programs or widen access and that clients may use all the same: names separated by commas, "
        "or `*`. They are " + ", ".join(f"`{name}`" for name in PRIVILEGED_OPTIONS),
        "(empty: none)",
    )
    permission_mode: str = _setting(
        "CCM_PERMISSION_MODE",
        "acceptEdits",
        _one_of(*PERMISSION_MODES, *PRIVILEGED_PERMISSION_MODES),
        "Claude Code's permission mode for runs that name none: `default`, `acceptEdits`, `plan`, `dontAsk`, "
        "`bypassPermissions` (not as root) or `auto`",
    )
    setting_sources: tuple[str, ...] = _setting(
        "CCM_SETTING_SOURCES",
        SETTING_SOURCES,
        _some_of(*SETTING_SOURCES),
        "Which of the host's Claude Code settings runs load; `project` brings CLAUDE.md. Empty for none",
        ",".join(SETTING_SOURCES),
    )
    max_turns: int | None = _setting(
        "CCM_MAX_TURNS",
        None,
        _integer(1, 1_000_000),
        "Most turns of a run, and of each agent that its request defines; a request may name fewer in `maxTurns`",
        "(empty: no ceiling)",
    )
    max_budget_usd: float | None = _setting(
        "CCM_MAX_BUDGET_USD",
        None,
        _money,
        "What a run alone may cost at the most; a request may name less in `maxBudgetUsd`",
        "(empty: no ceiling)",
    )
    run_timeout: int | None = _setting(
        "CCM_RUN_TIMEOUT",
        None,
        _duration,
        "Longest time from a run's start to its end, in seconds or as `90s`, `30m`, `2h`; a request may name less in "
        "`timeoutMs`",
        "(empty: no ceiling)",
    )
    cli_path: Path | None = _setting(
        "CCM_CLI_PATH",
        None,
        _file,
        "A Claude Code other than the one that comes with the SDK",
        "(empty: the bundled one)",
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """The settings of an environment.

        An empty variable counts as unset, as in systemd's `Environment=NAME=`, except for `CCM_SETTING_SOURCES`,
        where empty means none.

        Raises:
            BadSetting: a value cannot be used; the sentence names the variable.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = field.metadata["variable"]
            raw = environ.get(variable)
            if raw is None or (not raw.strip() and variable != "CCM_SETTING_SOURCES"):
                continue
            try:
                values[field.name] = field.metadata["parse"](raw)
            except ValueError as error:
                # Not what holds a secret; not twice.
                known = variable in SECRETS or repr(raw) in str(error)
                shown = "" if known else f" (it is {raw!r})"
                raise BadSetting(f"{variable} {error}{shown}.") from None
        return cls(**values)

    def check_access(self) -> None:
        """Whether it is settled who may use a service with these settings; before it listens.

        Raises:
            BadSetting: it is not.
        """
        if self.api_token_file is not None:
            try:
                read_tokens(self.api_token_file)
            except OSError as error:
                raise BadSetting(
                    f"CCM_API_TOKEN_FILE {self.api_token_file} cannot be read: {error.strerror}."
                ) from None
        if self.unix_socket is None and not self.has_tokens and not _is_loopback(self.host):
            raise BadSetting(
                f"HOST {self.host} needs a token, for whoever reaches the service has a shell as its user: set "
                "CCM_API_TOKEN or CCM_API_TOKEN_FILE (`flask token NAME` makes one), or leave HOST on loopback."
            )

    def access_warnings(self) -> list[str]:
        """What the operator should know of who is let in, a sentence each."""
        if self.has_tokens:
            return []
        who = "every user of this host"
        if self.unix_socket is not None:
            who = f"whoever may open {self.unix_socket} (mode {self.unix_socket_mode:04o})"
            if not self.unix_socket_mode & 0o066:
                who = f"root, and this user alone by {self.unix_socket} (mode {self.unix_socket_mode:04o}),"
        if self.trusted_proxy:
            who = f"everybody whom the proxy lets in, and {who}"
        return [f"no token is set: {who} may use the service, and so has a shell as its user; CCM_API_TOKEN sets one"]

    @property
    def has_tokens(self) -> bool:
        return self.api_token is not None or self.api_token_file is not None

    @property
    def url(self) -> str:
        """The database as SQLAlchemy names it."""
        # Links resolved: two names of one file must not pass for two databases.
        return self.database_url or f"sqlite:///{self.database_path.resolve()}"


def variables() -> list[dict[str, str]]:
    """Each setting as the README's table shows it: `variable`, `default`, `about`."""
    return [
        {"variable": f.metadata["variable"], "default": f.metadata["shown"], "about": f.metadata["about"]}
        for f in dataclasses.fields(Settings)
    ]


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each `CCM_` variable that is no setting: most likely a typing mistake."""
    known = [entry["variable"] for entry in variables()]
    sentences = []
    for name in sorted(environ):
        if name.startswith("CCM_") and name not in known and name not in OWN_MARKS:
            near = difflib.get_close_matches(name, known, n=1)
            sentences.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else "."))
    return sentences
