"""Checks a run's options and webhook URL against the operator's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.errors import OptionForbidden, WebhookForbidden
from ccm.settings.settings import PERMISSION_MODES, PRIVILEGED_PERMISSION_MODES, Settings
from ccm.settings.webhook_urls import allowed, host_of

# The options that are privileged whatever their value. Of `permissionMode` and `settingSources` some values are.
ALWAYS_PRIVILEGED = ("additionalDirectories", "env", "extraArgs", "mcpServers", "plugins", "sandbox", "settings")


def check_options(options: Mapping[str, Any], settings: Settings) -> None:
    """Check that the settings permit every option of a run.

    Raises:
        OptionForbidden: names the setting that would permit it.
    """
    for name in ALWAYS_PRIVILEGED:
        if name in options:
            _require(settings, name, f"options.{name}", "it runs programs or widens access")
    wider = [name for name in options.get("settingSources", []) if name not in settings.setting_sources]
    if wider:
        _require(settings, "settingSources", "options.settingSources", f"CCM_SETTING_SOURCES leaves out {wider[0]!r}")
    _check_permission_mode(options.get("permissionMode"), settings, "options.permissionMode")
    for name, agent in options.get("agents", {}).items():
        _check_permission_mode(agent.get("permissionMode"), settings, f"options.agents.{name}.permissionMode")
        if "mcpServers" in agent:
            _require(settings, "mcpServers", f"options.agents.{name}.mcpServers", "it runs programs or widens access")


def check_webhook(url: str | None, settings: Settings) -> None:
    """Check that the settings permit the host of a webhook URL.

    Raises:
        WebhookForbidden: names the setting that would permit it.
    """
    if url is not None and not allowed(url, settings.webhook_allow):
        raise WebhookForbidden(
            f"webhookUrl: {host_of(url)} is not among the hosts that CCM_WEBHOOK_ALLOW names.", field="webhookUrl"
        )


def _check_permission_mode(mode: str | None, settings: Settings, field: str) -> None:
    if mode is not None and mode not in PERMISSION_MODES and mode != settings.permission_mode:
        _require(
            settings, "permissionMode", field, f"{' and '.join(PRIVILEGED_PERMISSION_MODES)} skip permission checks"
        )


def _require(settings: Settings, name: str, field: str, why: str) -> None:
    if name not in settings.privileged_options:
        raise OptionForbidden(
            f"{field} is not permitted for clients of this service: {why}. The operator can allow it by adding {name} "
            "to CCM_PRIVILEGED_OPTIONS.",
            field=field,
        )
