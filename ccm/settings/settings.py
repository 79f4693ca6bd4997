"""The settings, read from the environment. Each is defined once, with its variable, default and description."""

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
from ccm.settings.webhook_urls import web_address

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
# Variables whose values are never shown.
SECRETS = ("DATABASE_URL", "CCM_API_TOKEN", "CCM_WEBHOOK_URL", "CCM_WEBHOOK_SECRET")
# Variables that the service itself sets for its runs (core/claude/processes.py). A service inherits them if an agent
# starts it.
RUN_VARIABLES = ("CCM_RUN_ID",)


def _setting(variable: str, default: Any, parser: Callable[[str], Any], about: str, shown: str | None = None) -> Any:
    """Return a field that is read from `variable`. `shown` is the default as the README shows it."""
    metadata = {
        "variable": variable,
        "parse": parser,
        "about": about,
        "shown": str(default) if shown is None else shown,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The configuration of one service."""

    port: int = _setting("PORT", 3000, parse.integer(0, 65535), "TCP port; 0 takes a free one and logs it")
    host: str = _setting(
        "HOST", "127.0.0.1", parse.address, "Address to listen on. Any but a loopback address requires a token"
    )
    database_path: Path = _setting("DATABASE_PATH", Path("db.sqlite"), parse.sqlite_path, "SQLite file", "./db.sqlite")
    database_url: str | None = _setting(
        "DATABASE_URL",
        None,
        parse.database_url,
        "`postgresql://user:password@host/name` instead of the SQLite file",
        "(empty)",
    )
    log_level: str = _setting("LOG_LEVEL", "info", parse.log_level, "`debug`, `info`, `warn` or `error`")
    api_token: str | None = _setting(
        "CCM_API_TOKEN",
        None,
        parse.token,
        "The token that clients send as `Authorization: Bearer TOKEN`. Without one, everyone who can reach the "
        "service may use it",
        "(empty)",
    )
    api_token_file: Path | None = _setting(
        "CCM_API_TOKEN_FILE",
        None,
        parse.file,
        "A file with a token for each client, one `NAME:TOKEN` per line (`flask token NAME` adds one). It is reread "
        "when it changes. Only its owner may write it, and others may not read it: mode `0600` or `0640`",
        "(empty)",
    )
    allowed_hosts: tuple[str, ...] = _setting(
        "CCM_ALLOWED_HOSTS",
        ("localhost", "127.0.0.1", "[::1]"),
        parse.hosts,
        "Accepted names in the `Host` header, with any port, separated by commas",
        "localhost,127.0.0.1,[::1]",
    )
    trusted_proxy: tuple[str, ...] = _setting(
        "CCM_TRUSTED_PROXY",
        (),
        parse.peers,
        "Addresses of the reverse proxies, separated by commas, whose `X-Forwarded-For`, `-Proto`, `-Host` and "
        f"`-Prefix` are trusted; `{parse.UNIX_PEER}` for all clients of the Unix socket",
        "(empty: none)",
    )
    url_prefix: str = _setting(
        "CCM_URL_PREFIX",
        "",
        parse.url_prefix,
        "The path under which clients reach the service, such as `/agents`, for a proxy that sends no "
        "`X-Forwarded-Prefix`. The proxy may strip it from the request's path or not",
        "(empty)",
    )
    unix_socket: Path | None = _setting(
        "CCM_UNIX_SOCKET",
        None,
        parse.unix_socket,
        "Path of a Unix socket to listen on instead of `HOST` and `PORT`",
        "(empty)",
    )
    unix_socket_mode: int = _setting(
        "CCM_UNIX_SOCKET_MODE",
        0o600,
        parse.file_mode,
        "Who may open the socket: `0600` this user, `0660` its group as well. A socket requires no token",
        "0600",
    )
    max_concurrent_runs: int = _setting(
        "CCM_MAX_CONCURRENT_RUNS",
        8,
        parse.integer(1, 1000),
        "Concurrent runs. Each is a Claude Code process of 100-200 MB that takes a core while it starts",
    )
    max_queued_runs: int = _setting(
        "CCM_MAX_QUEUED_RUNS", 1000, parse.integer(0, 1_000_000), "Runs that may wait for a worker; beyond that 429"
    )
    max_held: int = _setting(
        "CCM_MAX_HELD",
        200,
        parse.integer(1, 4000),
        "Requests that may be held open at once: `?wait=`, streams, long lists of messages. Each has a thread of its "
        "own, about 60 KB, and up to 1 MB more while its client reads slowly",
    )
    max_body_bytes: int = _setting(
        "CCM_MAX_BODY_BYTES", 32 * 2**20, parse.integer(1024, 2**30), "Largest request body; beyond that 413"
    )
    max_message_bytes: int = _setting(
        "CCM_MAX_MESSAGE_BYTES",
        32 * 2**20,
        parse.integer(2**16, 2**29),
        "Largest single message of a run; a larger one ends it as `MESSAGE_TOO_LARGE`",
    )
    message_budget_bytes: int = _setting(
        "CCM_MESSAGE_BUDGET_BYTES",
        64 * 2**20,
        parse.integer(2**16, 2**34),
        "Messages that may wait in memory for the database; beyond that the agents have to wait",
    )
    allowed_roots: tuple[Path, ...] = _setting(
        "CCM_ALLOWED_ROOTS",
        (),
        parse.directories,
        f"Directories, separated by `{os.pathsep}`, one of which must contain the `cwd` of every run, resumed and "
        "forked ones included. It prevents mistakes; it is no sandbox",
        "(empty: any directory)",
    )
    privileged_options: tuple[str, ...] = _setting(
        "CCM_PRIVILEGED_OPTIONS",
        (),
        parse.some_of(*PRIVILEGED_OPTIONS, wildcard=True),
        "Options that clients may use although they run programs or widen access, separated by commas, or `*` for all. "
        "They are " + ", ".join(f"`{name}`" for name in PRIVILEGED_OPTIONS),
        "(empty: none)",
    )
    permission_mode: str = _setting(
        "CCM_PERMISSION_MODE",
        "acceptEdits",
        parse.one_of(*PERMISSION_MODES, *PRIVILEGED_PERMISSION_MODES),
        "Claude Code's permission mode for runs that name none: `default`, `acceptEdits`, `plan`, `dontAsk`, "
        "`bypassPermissions` (not as root) or `auto`",
    )
    setting_sources: tuple[str, ...] = _setting(
        "CCM_SETTING_SOURCES",
        SETTING_SOURCES,
        parse.some_of(*SETTING_SOURCES),
        "Which of the host's Claude Code settings runs load; `project` includes CLAUDE.md. Empty for none",
        ",".join(SETTING_SOURCES),
    )
    max_turns: int | None = _setting(
        "CCM_MAX_TURNS",
        None,
        parse.integer(1, 1_000_000),
        "Maximum turns of a run, and of each agent that its request defines; a request may set fewer with `maxTurns`",
        "(empty: no ceiling)",
    )
    max_budget_usd: float | None = _setting(
        "CCM_MAX_BUDGET_USD",
        None,
        parse.money,
        "Maximum cost of a single run, in US dollars; a request may set less with `maxBudgetUsd`",
        "(empty: no ceiling)",
    )
    run_timeout: int | None = _setting(
        "CCM_RUN_TIMEOUT",
        None,
        parse.duration,
        "Maximum time from a run's start to its end, in seconds or as `90s`, `30m`, `2h`, `3d`; a request may set less "
        "with `timeoutMs`",
        "(empty: no ceiling)",
    )
    approval_timeout: int = _setting(
        "CCM_APPROVAL_TIMEOUT",
        3600,
        parse.duration,
        "How long an approval waits for its answer if the request sets no `approvalTimeoutMs`, in seconds or as `90s`, "
        "`30m`, `2h`, `3d`; then it is denied",
        "1h",
    )
    webhook_url: str | None = _setting(
        "CCM_WEBHOOK_URL",
        None,
        web_address,
        "An http(s) address that gets the events of every run, in addition to the `webhookUrl` of a request",
        "(empty)",
    )
    webhook_secret: tuple[bytes, ...] = _setting(
        "CCM_WEBHOOK_SECRET",
        (),
        parse.signing_secrets,
        "Signs webhooks: `whsec_` and 24 to 64 random bytes in base64. Several, separated by spaces, during a rotation",
        "(empty: unsigned)",
    )
    webhook_allow: tuple[str, ...] = _setting(
        "CCM_WEBHOOK_ALLOW",
        (),
        parse.host_patterns,
        "Hosts, separated by commas, that a `webhookUrl` may have: `hooks.example.com` (any port), "
        "`hooks.example.com:8443`, `*.example.com`. `CCM_WEBHOOK_URL` is exempt",
        "(empty: any host)",
    )
    cli_path: Path | None = _setting(
        "CCM_CLI_PATH",
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
            variable = field.metadata["variable"]
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
        {"variable": f.metadata["variable"], "default": f.metadata["shown"], "about": f.metadata["about"]}
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
