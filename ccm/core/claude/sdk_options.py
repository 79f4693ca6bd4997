"""Translates a client's options, under their TypeScript names, to the SDK's `ClaudeAgentOptions`.

The options were validated before (api/http/options_body.py). Values that may be long or secret reach Claude Code in
private files, because every user of the host can read a process's arguments, and Linux limits an argument to 128 KiB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ccm.core.claude.processes import RUN_MARK
from ccm.core.claude.run_context import Ask, CLIConfig, RunContext
from ccm.core.claude.sdk import AgentDefinition, ClaudeAgentOptions, permission_callback

CLAUDE_CODE_PROMPT = {"type": "preset", "preset": "claude_code"}

# Options whose value is passed on unchanged under another name.
RENAMED = {
    "model": "model",
    "fallbackModel": "fallback_model",
    "maxTurns": "max_turns",
    "maxBudgetUsd": "max_budget_usd",
    "permissionMode": "permission_mode",
    "strictMcpConfig": "strict_mcp_config",
    "settingSources": "setting_sources",
    "tools": "tools",
    "allowedTools": "allowed_tools",
    "disallowedTools": "disallowed_tools",
    "skills": "skills",
    "includePartialMessages": "include_partial_messages",
    "includeHookEvents": "include_hook_events",
    "forwardSubagentText": "forward_subagent_text",
    "outputFormat": "output_format",
    "effort": "effort",
    "betas": "betas",
    "taskBudget": "task_budget",
    "verbatimPrompts": "verbatim_prompts",
    "additionalDirectories": "add_dirs",
    "plugins": "plugins",
}


class UnusableOptionsError(Exception):
    """The options of a run turn out to be unusable when it starts; the message says why."""


def private_file(directory: Path, name: str, text: str) -> str:
    """Write `text` to a new file in `directory`, which only its owner can read, and return the file's path."""
    path = directory / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return str(path)


def sdk_arguments(
    options: Mapping[str, Any], *, permission_mode: str, setting_sources: tuple[str, ...], directory: Path
) -> dict[str, Any]:
    """Return the keyword arguments for a run's options.

    Args:
        options: the run's options as the client gave them.
        permission_mode: the default.
        setting_sources: the default. Always passed on, because the SDK's `skills` would otherwise widen it silently.
        directory: the run's own directory, for private files.

    Raises:
        UnusableOptionsError: the settings file cannot be read.
    """
    arguments: dict[str, Any] = {
        "permission_mode": permission_mode,
        "setting_sources": list(setting_sources),
        "extra_args": dict(options.get("extraArgs", {})),
        "env": dict(options.get("env", {})),
    }
    arguments |= {RENAMED[name]: value for name, value in options.items() if name in RENAMED}
    _system_prompt(options.get("systemPrompt"), arguments, directory)
    if "thinking" in options:
        thinking = dict(options["thinking"])
        if "budgetTokens" in thinking:
            thinking["budget_tokens"] = thinking.pop("budgetTokens")
        arguments["thinking"] = thinking
    if "agents" in options:
        arguments["agents"] = {name: AgentDefinition(**definition) for name, definition in options["agents"].items()}
    _settings(options, arguments, directory)
    if "mcpServers" in options:
        text = json.dumps({"mcpServers": options["mcpServers"]})
        arguments["mcp_servers"] = private_file(directory, "mcp.json", text)
    return arguments


def _settings(options: Mapping[str, Any], arguments: dict[str, Any], directory: Path) -> None:
    """Merge the sandbox into the settings, in a private file; the SDK would merge them in an argument."""
    settings = options.get("settings")
    if isinstance(settings, str) and settings.lstrip().startswith("{"):
        settings = json.loads(settings)
    if "sandbox" in options:
        if isinstance(settings, str):
            settings = _read_settings(Path(settings))
        settings = {**(settings or {}), "sandbox": options["sandbox"]}
    if isinstance(settings, dict):
        settings = private_file(directory, "settings.json", json.dumps(settings))
    if settings is not None:
        arguments["settings"] = settings


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it holds no JSON"
        raise UnusableOptionsError(f"options.settings: the file {file} cannot be used: {reason}.") from None
    if not isinstance(settings, dict):
        raise UnusableOptionsError(f"options.settings: the file {file} cannot be used: it holds no JSON object.")
    return settings


def _system_prompt(prompt: Any, arguments: dict[str, Any], directory: Path) -> None:
    if prompt is None:
        # The SDK's default is an empty prompt, with which the agent does not behave like Claude Code.
        prompt = CLAUDE_CODE_PROMPT
    elif isinstance(prompt, str):
        prompt = {"type": "custom", "prompt": prompt}
    if prompt["type"] == "custom":
        path = private_file(directory, "system-prompt.txt", prompt["prompt"])
        arguments["system_prompt"] = {"type": "file", "path": path}
        if "snapshot" in prompt:
            # The SDK passes `snapshot` on only with a preset, or with a prompt in an argument that every user can read.
            arguments["system_prompt"] = dict(CLAUDE_CODE_PROMPT) | {"snapshot": prompt["snapshot"]}
            arguments["extra_args"]["system-prompt-file"] = path
    else:
        preset = {"excludeDynamicSections": "exclude_dynamic_sections", "snapshot": "snapshot"}
        arguments["system_prompt"] = dict(CLAUDE_CODE_PROMPT) | {
            preset[name]: value for name, value in prompt.items() if name in preset
        }
        if "append" in prompt:
            path = private_file(directory, "append-system-prompt.txt", prompt["append"])
            arguments["extra_args"]["append-system-prompt-file"] = path


def sdk_options(
    context: RunContext, cli_config: CLIConfig, directory: Path, *, ask: Ask | None = None
) -> ClaudeAgentOptions:
    """Return the SDK's options of a run.

    Args:
        directory: the run's private directory.
        ask: answers permission requests; without it Claude Code does not send any.

    Raises:
        UnusableOptionsError: a value in the request cannot be used; the message says why.
    """
    arguments = sdk_arguments(
        cli_config.ceilings.lower(context.options),
        # With approvals, edits need approval too, so the configured mode does not apply.
        permission_mode=cli_config.permission_mode if ask is None else "default",
        setting_sources=cli_config.setting_sources,
        directory=directory,
    )
    # The recorded messages must include the user's, so that they form the whole conversation.
    arguments["extra_args"]["replay-user-messages"] = None
    arguments["env"] |= {
        RUN_MARK: context.run_id,
        # Shows when a run is over: the first result is not the end while agents work in the background.
        "CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS": "1",
        # Claude Code leaves files in its temporary directory; here they are removed with the run's.
        "CLAUDE_CODE_TMPDIR": str(directory),
    }
    return ClaudeAgentOptions(
        cwd=context.cwd,
        cli_path=cli_config.cli_path,
        session_id=context.sdk_session_id,
        resume=context.resume,
        fork_session=context.resume is not None,
        resume_session_at=context.resume_at,
        max_buffer_size=cli_config.max_message_bytes,
        can_use_tool=None if ask is None else permission_callback(ask),
        **arguments,
    )
