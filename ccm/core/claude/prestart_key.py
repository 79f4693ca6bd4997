"""Which runs a Claude Code that was started beforehand can serve, and how long. Nothing here imports the SDK."""

from __future__ import annotations

import json
import uuid
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from ccm.core.claude.file_digest import signature
from ccm.core.claude.locations import find_transcript
from ccm.core.claude.processes import inherited
from ccm.core.claude.run_context import CLIConfig
from ccm.core.claude.start_state import denies_tools, start_state, user_state

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

    @property
    def kind(self) -> str:
        """The name of its kind in the log."""
        return "spare" if self.resume is None else "warm"


def spare_key(
    options: Mapping[str, Any], cli_config: CLIConfig, *, approvals: bool, cwd: str | None = None
) -> Key | None:
    """Return the key of a spare for a fresh run with these options; None if no spare can serve it.

    Args:
        cwd: the run's directory; None if it is not known yet.
    """
    lowered = cli_config.ceilings.lower(options)
    prompt = lowered.get("systemPrompt")
    if (
        not set(lowered) <= {*AT_CLAIM, *AT_START}
        or lowered.get("permissionMode", cli_config.permission_mode) == "bypassPermissions"  # it refuses that mode
        or (isinstance(prompt, dict) and not set(prompt) <= {"type", "preset", "prompt", "append"})
        or (cwd is not None and denies_tools(cwd, cli_config.environ))
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


def start_state_of(key: Key, cli_config: CLIConfig) -> Hashable:
    """Return the state of what a Claude Code with this key reads when it starts; None if it is unknown.

    The environment is the agent's, not the service's: the programs that are asked for the state (git) may be configured
    by the agent's repository.
    """
    program = str(cli_config.cli_path)
    environ = {**inherited(cli_config.environ), **json.loads(key.options).get("env", {})}
    if key.cwd is None or key.resume is None:
        return user_state(environ, program)
    transcript = find_transcript(key.cwd, key.resume, environ)
    state = start_state(key.cwd, environ, program)
    try:
        return None if transcript is None or state is None else (state, signature(transcript.stat()))
    except OSError:
        return None  # deleted meanwhile


def _text(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)
