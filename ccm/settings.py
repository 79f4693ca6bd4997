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

from ccm.errors import BadSetting

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
# The longest CCM_RUN_TIMEOUT (seconds): thirty days.
LONGEST_RUN = 30 * 24 * 3600
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


def _loopback(value: str) -> str:
    if value != "localhost":
        try:
            loopback = ipaddress.ip_address(value).is_loopback
        except ValueError:
            raise ValueError("must be an IP address or localhost") from None
        if not loopback:
            raise ValueError(
                "must be a loopback address: whoever reaches the service has a shell as its user, "
                "so put a reverse proxy that authenticates in front of it"
            )
    return value


def _database_url(value: str) -> str:
    scheme, _, rest = value.partition("://")
    if scheme not in ("postgresql", "postgres"):
        raise ValueError("must begin with postgresql://; DATABASE_PATH names a SQLite file")
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
    host: str = _setting("HOST", "127.0.0.1", _loopback, "Address to listen on; a loopback address")
    database_path: Path = _setting("DATABASE_PATH", Path("db.sqlite"), _sqlite_path, "SQLite file", "./db.sqlite")
    database_url: str | None = _setting(
        "DATABASE_URL",
        None,
        _database_url,
        "`postgresql://user:password@host/name` instead of the SQLite file",
        "(empty)",
    )
    log_level: str = _setting("LOG_LEVEL", "info", _log_level, "`debug`, `info`, `warn` or `error`")
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
        f"Directories, separated by `{os.pathsep}`, in one of which every `cwd` must lie. It prevents mistakes; "
        "it is no sandbox",
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
                # Not that of a URL, which holds a password; not twice.
                known = variable == "DATABASE_URL" or repr(raw) in str(error)
                shown = "" if known else f" (it is {raw!r})"
                raise BadSetting(f"{variable} {error}{shown}.") from None
        return cls(**values)

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
