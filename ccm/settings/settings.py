"""The settings, read from the environment. Each is defined once, with its default and description.

`max_held` is read from the variable CCM_MAX_HELD, and so is each other setting, except for those in UNPREFIXED.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccm.errors import BadSetting
from ccm.settings import parsers as parse
from ccm.settings.webhook_urls import host_patterns, web_address

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
# Variables with names that other services use too.
UNPREFIXED = ("PORT", "HOST", "DATABASE_PATH", "DATABASE_URL", "LOG_LEVEL")
# Variables whose values are never shown.
SECRETS = ("DATABASE_URL", "CCM_API_TOKEN", "CCM_WEBHOOK_URL", "CCM_WEBHOOK_SECRET")
# Variables that the service itself sets for its runs (core/claude/processes.py). A service inherits them if an agent
# starts it.
RUN_VARIABLES = ("CCM_RUN_ID",)


def _setting(default: Any, parser: Callable[[str], Any], about: str, shown: str | None = None) -> Any:
    """Return a field of Settings. `shown` is the default as the README shows it, unless that is its value."""
    if shown is None:
        text = ",".join(default) if isinstance(default, tuple) else str(default)
        shown = "(empty)" if default in (None, "") else text
    return dataclasses.field(default=default, metadata={"parse": parser, "about": about, "shown": shown})


def variable_of(setting: str) -> str:
    """Return the name of the environment variable of a setting."""
    name = setting.upper()
    return name if name in UNPREFIXED else f"CCM_{name}"


@dataclass(frozen=True)
class Settings:
    """The configuration of one service."""

    port: int = _setting(3000, parse.integer(0, 65535), "TCP port; 0 takes a free one and logs it")
    host: str = _setting(
        "127.0.0.1", parse.address, "Address to listen on. Any but a loopback address requires a token"
    )
    database_path: Path = _setting(Path("db.sqlite"), parse.sqlite_path, "SQLite file", "./db.sqlite")
    database_url: str | None = _setting(
        None, parse.database_url, "`postgresql://user:password@host/name` instead of the SQLite file"
    )
    log_level: str = _setting("info", parse.log_level, "`debug`, `info`, `warn` or `error`")
    api_token: str | None = _setting(
        None,
        parse.token,
        "The token that clients send as `Authorization: Bearer TOKEN`. Without one, everyone who can reach the "
        "service may use it",
    )
    api_token_file: Path | None = _setting(
        None,
        parse.file,
        "A file with a token for each client, one `NAME:TOKEN` per line (`flask token NAME` adds one). It is reread "
        "when it changes. Only its owner may write it, and others may not read it: mode `0600` or `0640`",
    )
    allowed_hosts: tuple[str, ...] = _setting(
        ("localhost", "127.0.0.1", "[::1]"),
        parse.hosts,
        "Accepted names in the `Host` header, with any port, separated by commas",
    )
    trusted_proxy: tuple[str, ...] = _setting(
        (),
        parse.peers,
        "Addresses of the reverse proxies, separated by commas, whose `X-Forwarded-For`, `-Proto`, `-Host` and "
        f"`-Prefix` are trusted; `{parse.UNIX_PEER}` for all clients of the Unix socket",
        "(empty: none)",
    )
    url_prefix: str = _setting(
        "",
        parse.url_prefix,
        "The path under which clients reach the service, such as `/agents`, for a proxy that sends no "
        "`X-Forwarded-Prefix`. The proxy may strip it from the request's path or not",
    )
    unix_socket: Path | None = _setting(
        None, parse.unix_socket, "Path of a Unix socket to listen on instead of `HOST` and `PORT`"
    )
    unix_socket_mode: int = _setting(
        0o600,
        parse.file_mode,
        "Who may open the socket: `0600` this user, `0660` its group as well. A socket requires no token",
        "0600",
    )
    max_concurrent_runs: int = _setting(
        8,
        parse.integer(1, 1000),
        "Concurrent runs. Each is a Claude Code process of 100-200 MB that takes a core while it starts",
    )
    spare_runs: int = _setting(
        1,
        parse.integer(0, 100),
        "Claude Codes that wait for fresh runs, so that a run need not wait for its start. Each takes about 130 MB",
    )
    warm_sessions: int = _setting(
        0,
        parse.integer(0, 100),
        "Sessions, those whose runs ended last, for whose next run a Claude Code waits with the transcript loaded. "
        "Each takes about 130 MB",
    )
    max_queued_runs: int = _setting(
        1000, parse.integer(0, 1_000_000), "Runs that may wait for a worker; beyond that 429"
    )
    max_held: int = _setting(
        200,
        parse.integer(1, 4000),
        "Requests that may be held open at once: `?wait=`, streams, long lists of messages. Each has a thread of its "
        "own, about 60 KB, and up to 1 MB more while its client reads slowly",
    )
    max_body_bytes: int = _setting(32 * 2**20, parse.integer(1024, 2**30), "Largest request body; beyond that 413")
    max_message_bytes: int = _setting(
        32 * 2**20,
        parse.integer(2**16, 2**29),
        "Largest single message of a run; a larger one ends it as `MESSAGE_TOO_LARGE`",
    )
    message_budget_bytes: int = _setting(
        64 * 2**20,
        parse.integer(2**16, 2**34),
        "Messages that may wait in memory for the database; beyond that the agents have to wait",
    )
    allowed_roots: tuple[Path, ...] = _setting(
        (),
        parse.directories,
        f"Directories, separated by `{os.pathsep}`, one of which must contain the `cwd` of every run, resumed and "
        "forked ones included. It prevents mistakes; it is no sandbox",
        "(empty: any directory)",
    )
    privileged_options: tuple[str, ...] = _setting(
        (),
        parse.some_of(*PRIVILEGED_OPTIONS, wildcard=True),
        "Options that clients may use although they run programs or widen access, separated by commas, or `*` for all. "
        "They are " + ", ".join(f"`{name}`" for name in PRIVILEGED_OPTIONS),
        "(empty: none)",
    )
    permission_mode: str = _setting(
        "acceptEdits",
        parse.one_of(*PERMISSION_MODES, *PRIVILEGED_PERMISSION_MODES),
        "Claude Code's permission mode for runs that name none: `default`, `acceptEdits`, `plan`, `dontAsk`, "
        "`bypassPermissions` (not as root) or `auto`",
    )
    setting_sources: tuple[str, ...] = _setting(
        SETTING_SOURCES,
        parse.some_of(*SETTING_SOURCES),
        "Which of the host's Claude Code settings runs load; `project` includes CLAUDE.md. Empty for none",
    )
    max_turns: int | None = _setting(
        None,
        parse.integer(1, 1_000_000),
        "Maximum turns of a run, and of each agent that its request defines; a request may set fewer with `maxTurns`",
        "(empty: no ceiling)",
    )
    max_budget_usd: float | None = _setting(
        None,
        parse.money,
        "Maximum cost of a single run, in US dollars; a request may set less with `maxBudgetUsd`",
        "(empty: no ceiling)",
    )
    run_timeout: int | None = _setting(
        None,
        parse.duration,
        "Maximum time from a run's start to its end, in seconds or as `90s`, `30m`, `2h`, `3d`; a request may set less "
        "with `timeoutMs`",
        "(empty: no ceiling)",
    )
    approval_timeout: int = _setting(
        3600,
        parse.duration,
        "How long an approval waits for its answer if the request sets no `approvalTimeoutMs`, in seconds or as `90s`, "
        "`30m`, `2h`, `3d`; then it is denied",
        "1h",
    )
    webhook_url: str | None = _setting(
        None,
        web_address,
        "An http(s) address that gets the events of every run, in addition to the `webhookUrl` of a request",
    )
    webhook_secret: tuple[bytes, ...] = _setting(
        (),
        parse.signing_secrets,
        "Signs webhooks: `whsec_` and 24 to 64 random bytes in base64. Several, separated by spaces, during a rotation",
        "(empty: unsigned)",
    )
    webhook_allow: tuple[str, ...] = _setting(
        (),
        host_patterns,
        "Hosts, separated by commas, that a `webhookUrl` may have: `hooks.example.com` (any port), "
        "`hooks.example.com:8443`, `*.example.com`. `CCM_WEBHOOK_URL` is exempt",
        "(empty: any host)",
    )
    cli_path: Path | None = _setting(
        None,
        parse.file,
        "The Claude Code to run instead of the one that comes with the SDK",
        "(empty: the bundled one)",
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from an environment.

        An empty variable counts as unset, as in systemd's `Environment=NAME=`, except for `CCM_SETTING_SOURCES`,
        where empty means none.

        Raises:
            BadSetting: a value is invalid. The message names the variable, and shows the value unless it is a secret.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = variable_of(field.name)
            raw = environ.get(variable)
            if raw is None or (not raw.strip() and variable != "CCM_SETTING_SOURCES"):
                continue
            try:
                values[field.name] = field.metadata["parse"](raw)
            except ValueError as error:
                omit_value = variable in SECRETS or repr(raw) in str(error)  # no secrets, and nothing twice
                shown = "" if omit_value else f" (it is {raw!r})"
                raise BadSetting(f"{variable} {error}{shown}.") from None
        return cls(**values)

    @property
    def has_tokens(self) -> bool:
        return self.api_token is not None or self.api_token_file is not None

    @property
    def url(self) -> str:
        """The URL of the database, as SQLAlchemy takes it."""
        # Links are resolved, because two names of one file must not count as two databases with a lock file each.
        return self.database_url or f"sqlite:///{self.database_path.resolve()}"


def variables() -> list[dict[str, str]]:
    """Return each setting as the README's table shows it: `variable`, `default`, `about`."""
    return [
        {"variable": variable_of(f.name), "default": f.metadata["shown"], "about": f.metadata["about"]}
        for f in dataclasses.fields(Settings)
    ]


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for each `CCM_` variable that is no setting, because it is probably misspelled."""
    known = [entry["variable"] for entry in variables()]
    sentences = []
    for name in sorted(environ):
        if name.startswith("CCM_") and name not in known and name not in RUN_VARIABLES:
            near = difflib.get_close_matches(name, known, n=1)
            sentences.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else "."))
    return sentences
