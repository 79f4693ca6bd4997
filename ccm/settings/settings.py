"""The settings, read from the environment. Each is defined once, with its default.

ccm/docs/configuration.md describes them. `max_held` is read from the variable CCM_MAX_HELD, and so is each other
setting, except for those in UNPREFIXED.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ccm.errors import BadSetting
from ccm.settings import parsers as parse
from ccm.settings.webhook_urls import host_pattern, web_address

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


def _setting(default: Any, parser: Callable[..., Any], **limits: Any) -> Any:
    """Return a field of Settings. `limits` are the parser's further arguments."""
    return dataclasses.field(default=default, metadata={"parse": partial(parser, **limits)})


def variable_of(setting: str) -> str:
    """Return the name of the environment variable of a setting."""
    name = setting.upper()
    return name if name in UNPREFIXED else f"CCM_{name}"


@dataclass(frozen=True)
class Settings:
    """The configuration of one service."""

    port: int = _setting(3000, parse.integer, lowest=0, highest=65535)
    host: str = _setting("127.0.0.1", parse.address)
    database_path: Path = _setting(Path("db.sqlite"), parse.sqlite_path)
    database_url: str | None = _setting(None, parse.database_url)
    log_level: str = _setting("info", parse.log_level)
    api_token: str | None = _setting(None, parse.token)
    api_token_file: Path | None = _setting(None, parse.file)
    # In the Host header, with any port.
    allowed_hosts: tuple[str, ...] = _setting(("localhost", "127.0.0.1", "[::1]"), parse.each, item=parse.host)
    # The addresses whose `X-Forwarded-*` headers count.
    trusted_proxy: tuple[str, ...] = _setting((), parse.each, item=parse.peer)
    url_prefix: str = _setting("", parse.url_prefix)
    unix_socket: Path | None = _setting(None, parse.unix_socket)
    unix_socket_mode: int = _setting(0o600, parse.file_mode)
    # Each is a Claude Code process of 100-200 MB that takes a core while it starts.
    max_concurrent_runs: int = _setting(8, parse.integer, lowest=1, highest=1000)
    # Claude Codes that wait for a fresh run, and sessions for whose next run one waits. Each takes about 150 MB.
    spare_runs: int = _setting(1, parse.integer, lowest=0, highest=100)
    warm_sessions: int = _setting(0, parse.integer, lowest=0, highest=100)
    max_queued_runs: int = _setting(1000, parse.integer, lowest=0, highest=1_000_000)
    # Each request that is held open has a thread of about 60 KB, and up to 1 MB more while its client reads slowly.
    max_held: int = _setting(200, parse.integer, lowest=1, highest=4000)
    max_body_bytes: int = _setting(32 * 2**20, parse.integer, lowest=1024, highest=2**30)
    max_message_bytes: int = _setting(32 * 2**20, parse.integer, lowest=2**16, highest=2**29)
    # Messages that may wait in memory for the database, of all runs together.
    message_budget_bytes: int = _setting(64 * 2**20, parse.integer, lowest=2**16, highest=2**34)
    # Empty: any directory.
    allowed_roots: tuple[Path, ...] = _setting((), parse.each, item=parse.directory, separator=os.pathsep)
    privileged_options: tuple[str, ...] = _setting((), parse.some_of, allowed=PRIVILEGED_OPTIONS, wildcard=True)
    permission_mode: str = _setting("acceptEdits", parse.one_of, allowed=PERMISSION_MODES + PRIVILEGED_PERMISSION_MODES)
    setting_sources: tuple[str, ...] = _setting(SETTING_SOURCES, parse.some_of, allowed=SETTING_SOURCES)
    # The ceilings of a run; a request may set less. `run_timeout` is in seconds.
    max_turns: int | None = _setting(None, parse.integer, lowest=1, highest=1_000_000)
    max_budget_usd: float | None = _setting(None, parse.money)
    run_timeout: int | None = _setting(None, parse.duration)
    # Seconds.
    approval_timeout: int = _setting(3600, parse.duration)
    webhook_url: str | None = _setting(None, web_address)
    # The keys that sign webhooks, several during a rotation. Empty: unsigned.
    webhook_secret: tuple[bytes, ...] = _setting((), parse.each, item=parse.signing_key, separator=None)
    # The hosts that a request's `webhookUrl` may have. Empty: any host.
    webhook_allow: tuple[str, ...] = _setting((), parse.each, item=host_pattern)
    cli_path: Path | None = _setting(None, parse.file)

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


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for each `CCM_` variable that is no setting, because it is probably misspelled."""
    known = [variable_of(field.name) for field in dataclasses.fields(Settings)]
    sentences = []
    for name in sorted(environ):
        if name.startswith("CCM_") and name not in known and name not in RUN_VARIABLES:
            near = difflib.get_close_matches(name, known, n=1)
            sentences.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else "."))
    return sentences
