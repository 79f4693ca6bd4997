"""Which runs a Claude Code that was started beforehand can serve. Nothing here imports the SDK."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from ccm.core.claude.run_context import CLIConfig

# What a spare can be given when it is claimed.
AT_CLAIM = ("additionalDirectories", "agents", "model", "permissionMode", "systemPrompt", "verbatimPrompts")
# What a spare has from its start: it serves only runs with the same values. A run with any other option starts cold.
AT_START = (
    *("allowedTools", "betas", "disallowedTools", "effort", "fallbackModel", "forwardSubagentText"),
    *("includeHookEvents", "includePartialMessages", "maxBudgetUsd", "maxTurns", "outputFormat", "settingSources"),
    *("strictMcpConfig", "taskBudget", "thinking", "tools"),
)
# What these name may change without being a part of a start's state: a run with one of them is not continued warm.
WITHOUT_STATE = ("additionalDirectories", "extraArgs", "mcpServers", "plugins", "settings")


class Ids(NamedTuple):
    """The ids of a run to come. A prestarted Claude Code already has them."""

    run_id: str
    sdk_session_id: str


def new_ids() -> Ids:
    """Return the ids of a run that no Claude Code has yet."""
    return Ids(str(uuid.uuid4()), str(uuid.uuid4()))


class Key(NamedTuple):
    """What a prestarted Claude Code cannot change any more: it serves only runs with an equal key.

    Args:
        options: as JSON with sorted names, after the operator's ceilings; only those of AT_START for a spare.
        approvals: whether it asks for permission.
        resume, cwd: the SDK session that it continues, and its directory; None for a spare.
    """

    options: str
    approvals: bool
    resume: str | None = None
    cwd: str | None = None


def spare_key(options: Mapping[str, Any], cli_config: CLIConfig, *, approvals: bool) -> Key | None:
    """Return the key of a spare for a fresh run with these options; None if no spare can serve it."""
    lowered = cli_config.ceilings.lower(options)
    prompt = lowered.get("systemPrompt")
    if (
        not set(lowered) <= {*AT_CLAIM, *AT_START}
        or lowered.get("permissionMode", cli_config.permission_mode) == "bypassPermissions"  # it refuses that mode
        or (isinstance(prompt, dict) and not set(prompt) <= {"type", "preset", "prompt", "append"})
    ):
        return None
    return Key(_text({name: value for name, value in lowered.items() if name in AT_START}), approvals)


def warm_key(
    options: Mapping[str, Any], cli_config: CLIConfig, *, approvals: bool, resume: str, cwd: str
) -> Key | None:
    """Return the key of a warm continuation for a run with these options; None if there can be none."""
    if not set(options).isdisjoint(WITHOUT_STATE):
        return None
    return Key(_text(cli_config.ceilings.lower(options)), approvals, resume, cwd)


def _text(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)
