"""Every option of the SDK is accepted or refused on purpose, and every accepted one reaches Claude Code."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import stat
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import pytest
from claude_agent_sdk import AgentDefinition, ClaudeAgentOptions, ClaudeSDKClient, CLIConnectionError

from ccm.api.http.options_body import ARGUMENTS_OF_OPTIONS, OWNED_ARGUMENTS, SERVICE_OWNED, Agent, Options
from ccm.core.claude.sdk_options import RENAMED, sdk_arguments

# Options that are translated, and the SDK's options that carry them. (The SDK's own `sandbox` would put the settings
# beside it into an argument.)
TRANSLATED = {
    "systemPrompt": "system_prompt",
    "thinking": "thinking",
    "agents": "agents",
    "settings": "settings",
    "sandbox": "settings",
    "mcpServers": "mcp_servers",
    "env": "env",
    "extraArgs": "extra_args",
}
# The options that the service itself sets for every run.
SET_BY_THE_SERVICE = {
    "cwd",
    "cli_path",
    "session_id",
    "resume",
    "fork_session",
    "resume_session_at",
    "max_buffer_size",
    "stderr",
}
# Options that no run is given, with their names in the TypeScript SDK, which clients are refused.
REFUSED = {
    "can_use_tool": "canUseTool",
    "continue_conversation": "continue",
    "debug_stderr": "stderr",
    "enable_file_checkpointing": "enableFileCheckpointing",
    "hooks": "hooks",
    "max_thinking_tokens": "maxThinkingTokens",
    "permission_prompt_tool_name": "permissionPromptToolName",
    "resume_drops_turn": "resumeDropsTurn",
    "session_store": "sessionStore",
    "user": "user",
}
# Options without a name in the TypeScript SDK, or without a meaning unless a refused one is set.
NOT_OFFERED = {"client_app", "load_timeout_ms", "session_store_flush"}
# Options that a client's option reaches in another way.
NOT_USED = {"sandbox"}


# ---- every option is accepted or refused


def test_every_option_of_the_sdk_is_accepted_or_refused() -> None:
    judged = [*RENAMED.values(), *set(TRANSLATED.values())]
    judged += [*SET_BY_THE_SERVICE, *REFUSED, *NOT_OFFERED, *NOT_USED]

    assert len(judged) == len(set(judged))
    assert {field.name for field in dataclasses.fields(ClaudeAgentOptions)} == set(judged), (
        "the SDK's options have changed: accept, own or refuse what is new"
    )


def test_every_field_of_the_sdks_agents_is_accepted() -> None:
    assert {field.name for field in dataclasses.fields(AgentDefinition)} == set(Agent.model_fields), (
        "the SDK's agents have changed: accept or refuse what is new"
    )


def test_the_accepted_options_are_the_ones_passed_on() -> None:
    assert set(Options.model_fields) == {*RENAMED, *TRANSLATED}


def test_no_option_is_both_accepted_and_refused() -> None:
    assert not set(Options.model_fields) & set(SERVICE_OWNED)
    assert set(REFUSED.values()) <= set(SERVICE_OWNED)


def test_no_extra_argument_replaces_a_limited_option() -> None:
    """Each limits a run or names the settings that it loads. A second one at the end of the command line would win."""
    assert set(ARGUMENTS_OF_OPTIONS.values()) == {"maxTurns", "maxBudgetUsd", "settingSources"} <= set(RENAMED)
    assert not set(ARGUMENTS_OF_OPTIONS) & set(OWNED_ARGUMENTS)


# ---- accepted options reach Claude Code

SECRET = "sk-hush-hush"

# A program in the place of Claude Code that records its arguments, its environment and its input.
RECORDER = """#!{python} -IS
import json, os, sys
def write(name, value):
    with open({folder!r} + "/" + name, "a") as file:
        file.write(json.dumps(value) + "\\n")
write("arguments", sys.argv[1:])
write("environment", dict(os.environ))
for line in sys.stdin:
    message = json.loads(line)
    write("input", message)
    if message["type"] == "control_request":
        reply = {{"subtype": "success", "request_id": message["request_id"], "response": {{}}}}
        print(json.dumps({{"type": "control_response", "response": reply}}), flush=True)
"""


@dataclass(frozen=True)
class Received:
    """The arguments, environment and input of Claude Code."""

    arguments: list[str]
    environment: dict[str, str]
    initialize: dict[str, Any]
    message: dict[str, Any]

    def after(self, flag: str) -> str:
        """The value of a flag that is there once."""
        assert self.arguments.count(flag) == 1
        return self.arguments[self.arguments.index(flag) + 1]

    def read(self, flag: str) -> str:
        """The private file that a flag names."""
        path = Path(self.after(flag))
        assert path.is_absolute(), f"{flag} has the text itself, where every user of the host can read it"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        return path.read_text(encoding="utf-8")

    @property
    def settings(self) -> Any:
        given = self.after("--settings")
        return json.loads(given if given.startswith("{") else Path(given).read_text(encoding="utf-8"))

    @property
    def system_prompt(self) -> str:
        assert "--system-prompt" not in self.arguments, "an argument is readable to every user of the host"
        return self.read("--system-prompt-file")


Give = Callable[[Mapping[str, Any]], Received]


@pytest.fixture
def give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Give:
    """Validates a client's options as those of a request, and gives them to Claude Code through the real SDK."""
    for name in set(os.environ) - {"PATH"}:
        monkeypatch.delenv(name)  # so that nothing of the machine is recorded
    program = tmp_path / "claude"
    program.write_text(RECORDER.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)

    def given(options: Mapping[str, Any]) -> Received:
        arguments = sdk_arguments(
            Options.model_validate_json(json.dumps(options)).given(),
            permission_mode="acceptEdits",
            setting_sources=("project",),
            directory=tmp_path,
        )
        for name in ("arguments", "environment", "input"):
            (tmp_path / name).unlink(missing_ok=True)
        asyncio.run(_send(ClaudeAgentOptions(cli_path=program, cwd=tmp_path, **arguments)))
        lines = {name: (tmp_path / name).read_text().splitlines() for name in ("arguments", "environment", "input")}
        initialize, message = map(json.loads, lines["input"])
        return Received(
            arguments=json.loads(lines["arguments"][0]),
            environment=json.loads(lines["environment"][0]),
            initialize=initialize["request"],
            message=message,
        )

    return given


async def _send(options: ClaudeAgentOptions) -> None:
    async def prompt() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "user", "message": {"role": "user", "content": "Hello."}, "parent_tool_use_id": None}

    async with ClaudeSDKClient(options) as client:
        await client.query(prompt())


POET: dict[str, Any] = {
    "description": "Writes poems.",
    "prompt": "You are a poet.",
    "tools": ["Read", "Bash(git log:*)"],
    "disallowedTools": ["Write"],
    "model": "haiku",
    "skills": ["rhyme"],
    "memory": "project",
    "mcpServers": ["words", {"more": {"command": "true"}}],
    "initialPrompt": "Begin.",
    "maxTurns": 3,
    "background": False,
    "effort": "low",
    "permissionMode": "plan",
}
SCHEMA = {"type": "object", "properties": {"answer": {"type": ["integer", "null"], "default": None}}}
# An option, a value, and the arguments that they become.
ARGUMENTS: list[tuple[str, Any, list[str]]] = [
    ("model", "haiku", ["--model", "haiku"]),
    ("fallbackModel", "sonnet", ["--fallback-model", "sonnet"]),
    ("maxTurns", 3, ["--max-turns", "3"]),
    ("maxBudgetUsd", 0.5, ["--max-budget-usd", "0.5"]),
    ("permissionMode", "plan", ["--permission-mode", "plan"]),
    ("permissionMode", "bypassPermissions", ["--permission-mode", "bypassPermissions"]),
    ("strictMcpConfig", True, ["--strict-mcp-config"]),
    ("settingSources", ["user", "local"], ["--setting-sources=user,local"]),
    ("settingSources", [], ["--setting-sources="]),
    ("tools", ["Read", "Bash"], ["--tools", "Read,Bash"]),
    ("tools", [], ["--tools", ""]),
    ("tools", {"type": "preset", "preset": "claude_code"}, ["--tools", "default"]),
    ("allowedTools", ["Read", "Bash(ls:*)"], ["--allowedTools", "Read,Bash(ls:*)"]),
    ("disallowedTools", ["Write"], ["--disallowedTools", "Write"]),
    ("skills", ["rhyme"], ["--allowedTools", "Skill(rhyme)"]),
    ("skills", "all", ["--allowedTools", "Skill"]),
    ("includePartialMessages", True, ["--include-partial-messages"]),
    ("includeHookEvents", True, ["--include-hook-events"]),
    ("outputFormat", {"type": "json_schema", "schema": SCHEMA}, ["--json-schema", json.dumps(SCHEMA)]),
    ("thinking", {"type": "adaptive"}, ["--thinking", "adaptive"]),
    (
        "thinking",
        {"type": "adaptive", "display": "omitted"},
        ["--thinking", "adaptive", "--thinking-display", "omitted"],
    ),
    ("thinking", {"type": "enabled", "budgetTokens": 2000}, ["--max-thinking-tokens", "2000"]),
    ("thinking", {"type": "disabled"}, ["--thinking", "disabled"]),
    ("effort", "xhigh", ["--effort", "xhigh"]),
    ("betas", ["context-1m-2025-08-07"], ["--betas", "context-1m-2025-08-07"]),
    ("taskBudget", {"total": 1000}, ["--task-budget", "1000"]),
    ("additionalDirectories", ["/tmp", "/"], ["--add-dir", "/tmp", "--add-dir", "/"]),
    ("extraArgs", {"debug-to-stderr": None}, ["--debug-to-stderr"]),
    ("extraArgs", {"name": "a poem"}, ["--name", "a poem"]),
    ("extraArgs", {"name": "--help"}, ["--name=--help"]),
    ("plugins", [{"type": "local", "path": "/tmp"}], ["--plugin-dir", "/tmp"]),
    ("settings", "/tmp/settings.json", ["--settings", "/tmp/settings.json"]),
]
# An option, a value, and the fields of the initialize request that they become.
FIELDS: list[tuple[str, Any, dict[str, Any]]] = [
    ("agents", {"poet": POET}, {"agents": {"poet": POET}}),
    ("skills", ["rhyme"], {"skills": ["rhyme"]}),
    ("forwardSubagentText", True, {"forwardSubagentText": True}),
    ("systemPrompt", {"type": "custom", "prompt": "x", "snapshot": True}, {"systemPromptSnapshot": True}),
    (
        "systemPrompt",
        {"type": "preset", "preset": "claude_code", "excludeDynamicSections": True, "snapshot": False},
        {"excludeDynamicSections": True, "systemPromptSnapshot": False},
    ),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), ARGUMENTS, ids=[f"{name}={json.dumps(value)}"[:60] for name, value, _ in ARGUMENTS]
)
def test_an_option_becomes_arguments(give: Give, name: str, value: Any, expected: list[str]) -> None:
    arguments = give({name: value}).arguments
    places = [at for at in range(len(arguments)) if arguments[at : at + len(expected)] == expected]
    assert len(places) == 1, arguments


@pytest.mark.parametrize(
    ("name", "value", "expected"), FIELDS, ids=[f"{name}={json.dumps(value)}"[:60] for name, value, _ in FIELDS]
)
def test_an_option_becomes_fields_of_the_first_request(
    give: Give, name: str, value: Any, expected: Mapping[str, Any]
) -> None:
    initialize = give({name: value}).initialize
    assert {field: initialize.get(field) for field in expected} == expected


def test_verbatim_prompts_mark_the_message(give: Give) -> None:
    assert give({"verbatimPrompts": True}).message["client_composed"] is True


def test_a_prompt_is_not_verbatim_by_itself(give: Give) -> None:
    assert "client_composed" not in give({}).message


def test_env_becomes_the_environment(give: Give) -> None:
    environment = give({"env": {"GREETING": "-hello =\u00e9"}}).environment
    assert environment["GREETING"] == "-hello =\u00e9"


@pytest.mark.parametrize("prompt", ["x", "--help"])
def test_a_system_prompt_replaces_claude_codes_own(give: Give, prompt: str) -> None:
    assert give({"systemPrompt": prompt}).system_prompt == prompt
    assert give({"systemPrompt": {"type": "custom", "prompt": prompt}}).system_prompt == prompt
    assert give({"systemPrompt": {"type": "custom", "prompt": prompt, "snapshot": True}}).system_prompt == prompt


def test_a_sandbox_becomes_a_setting(give: Give) -> None:
    assert give({"sandbox": {"enabled": True, "x": None}}).settings == {"sandbox": {"enabled": True, "x": None}}


def test_confidential_options_go_into_private_files(give: Give) -> None:
    servers = {"s": {"command": "true", "env": {"TOKEN": SECRET}, "args": None}}
    settings = {"env": {"TOKEN": SECRET}, "x": None}
    received = give({"systemPrompt": f"--{SECRET}", "settings": settings, "mcpServers": servers})

    assert received.read("--system-prompt-file") == f"--{SECRET}"
    assert json.loads(received.read("--settings")) == settings
    assert json.loads(received.read("--mcp-config")) == {"mcpServers": servers}
    assert SECRET not in json.dumps([received.arguments, received.environment])


def test_settings_stay_private_beside_a_sandbox(give: Give) -> None:
    received = give({"settings": {"env": {"TOKEN": SECRET}}, "sandbox": {"enabled": True}})

    assert received.settings == {"env": {"TOKEN": SECRET}, "sandbox": {"enabled": True}}
    assert SECRET not in json.dumps(received.arguments), "an argument is readable to every user of the host"


def test_settings_may_be_given_as_json_text(give: Give) -> None:
    assert json.loads(give({"settings": ' {"model": "x"}'}).read("--settings")) == {"model": "x"}


def test_an_appended_prompt_goes_into_a_private_file_beside_claude_codes_own(give: Give) -> None:
    received = give({"systemPrompt": {"type": "preset", "preset": "claude_code", "append": "Rhyme."}})
    assert received.read("--append-system-prompt-file") == "Rhyme."
    assert not {"--system-prompt", "--system-prompt-file"} & set(received.arguments)


def test_without_options_claude_code_gets_only_the_services_defaults(give: Give) -> None:
    received = give({})
    assert not {"--system-prompt", "--system-prompt-file", "--tools", "--settings"} & set(received.arguments)
    assert received.after("--permission-mode") == "acceptEdits"
    assert "--setting-sources=project" in received.arguments


@pytest.mark.parametrize("skills", ["all", ["rhyme"]])
def test_skills_do_not_widen_the_setting_sources(give: Give, skills: Any) -> None:
    assert "--setting-sources=project" in give({"skills": skills}).arguments


def test_every_accepted_option_is_tried_here() -> None:
    tried = {name for name, _, _ in [*ARGUMENTS, *FIELDS]} | {"verbatimPrompts", "env", "mcpServers", "sandbox"}
    assert tried == set(Options.model_fields)
    assert set(POET) == set(Agent.model_fields)


# ---- lengths that Linux accepts

# The most bytes that Linux takes in one argument or one variable, with the NUL at its end.
MAX_ARG_STRLEN = 32 * 4096
LONGEST: dict[str, dict[str, Any]] = {
    "a system prompt": {"systemPrompt": "\u00e9" * 1_000_000},
    "an appended prompt": {"systemPrompt": {"type": "preset", "preset": "claude_code", "append": "\u00e9" * 1_000_000}},
    "a snapshot of a prompt": {"systemPrompt": {"type": "custom", "prompt": "\u00e9" * 1_000_000, "snapshot": True}},
    "tools": {"tools": ["\u00e9" * 999] * 50},
    "allowed tools": {"allowedTools": ["x" * 1_999] * 50},
    "allowed tools and skills": {"allowedTools": ["x" * 1_999] * 50, "skills": [f"{n:0200}" for n in range(500)]},
    "disallowed tools": {"disallowedTools": ["x" * 1_999] * 50},
    "skills": {"skills": [f"\u00e9{n:0199}" for n in range(500)]},
    "betas": {"betas": ["\u00e9" * 200] * 50},
    "agents": {"agents": {"poet": {"description": "x" * 1_000_000, "prompt": "\u00e9" * 1_000_000}}},
    "a schema": {"outputFormat": {"type": "json_schema", "schema": {"x": "y" * 99_990}}},
    "settings": {"settings": {"x": "y" * 99_990}},
    "settings as text": {"settings": json.dumps({"x": "y" * 24_900})},
    "settings and a sandbox": {"settings": {"x": "y" * 99_990}, "sandbox": {"x": "y" * 99_990}},
    "servers": {"mcpServers": {"s": {"x": "y" * 99_990}, "t": {"x": "y" * 99_990}}},
    "directories": {"additionalDirectories": ["/" + "\u00e9" * 4_095] * 10},
    "a plugin": {"plugins": [{"type": "local", "path": "/" * 4_096}]},
    "an extra argument": {"extraArgs": {"name": "x" * 100_000}},
    "an extra argument beyond ASCII": {"extraArgs": {"name": "\u00e9" * 100_000}},
    "a variable": {"env": {"GREETING": "x" * 100_000}},
    "a variable beyond ASCII": {"env": {"GREETING": "\u00e9" * 100_000}},
}


@pytest.mark.parametrize("options", LONGEST.values(), ids=list(LONGEST))
def test_accepted_options_are_not_too_long_to_start_claude_code(give: Give, options: Mapping[str, Any]) -> None:
    try:
        received = give(options)
    except pydantic.ValidationError:
        return  # then it is not accepted
    except CLIConnectionError as error:
        pytest.fail(f"the options are accepted, and Claude Code cannot be started with them: {error}")
    assert all(len(argument.encode()) < MAX_ARG_STRLEN for argument in received.arguments)
