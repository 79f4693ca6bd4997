"""The options that a client may set for a run. All others are refused.

They are the SDK's options under their TypeScript names. Each one is accepted here, or privileged (it runs programs or
extends access, and must be listed in CCM_PRIVILEGED_OPTIONS), or set by the service. This prevents mistakes, but is no
sandbox: `allowedTools: ["Bash"]` is a shell.
"""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from ccm.models.fields import ARGUMENT_CHARACTERS, no_nul, plain_json

TEXT_CHARACTERS = 1_000_000

# The options that the service sets itself, and the reason or the alternative for clients.
SERVICE_OWNED = {
    "abortController": "DELETE /api/runs/{runId} cancels a run",
    "canUseTool": "it is a function, and a request carries none",
    "continue": "POST /api/runs/resume continues a session",
    "cwd": "it is a field of the request itself",
    "debug": "the service keeps Claude Code's messages on stderr for a run's error",
    "debugFile": "the service keeps Claude Code's messages on stderr for a run's error",
    "enableFileCheckpointing": "it cannot go with a stored transcript",
    "executable": "CCM_CLI_PATH names the Claude Code of this service",
    "executableArgs": "CCM_CLI_PATH names the Claude Code of this service",
    "forkSession": "every continuation is a fork",
    "hooks": "they are functions, and a request carries none; the project's settings may have hooks",
    "maxBufferSize": "CCM_MAX_MESSAGE_BYTES sets it",
    "maxThinkingTokens": "use thinking",
    "pathToClaudeCodeExecutable": "CCM_CLI_PATH names the Claude Code of this service",
    "permissionPromptToolName": "the service answers permission prompts",
    "persistSession": "a run without a transcript could not be resumed",
    "resume": "POST /api/runs/resume continues a session",
    "resumeDropsTurn": "POST /api/runs/fork with atMessage forks from an earlier message",
    "resumeSessionAt": "POST /api/runs/fork with atMessage forks from an earlier message",
    "sessionId": "the service gives every run its session id",
    "sessionStore": "the service stores what is to be stored",
    "spawnClaudeCodeProcess": "it is a function, and a request carries none",
    "stderr": "it is a function, and a request carries none",
    "user": "agents run as the service's user",
}
# Arguments of the CLI that the service sets, or that would override one of them.
OWNED_ARGUMENTS = (
    "continue",
    "fork-session",
    "from-pr",
    "input-format",
    "no-session-persistence",
    "output-format",
    "permission-prompt-tool",
    "print",
    "replay-user-messages",
    "resume",
    "resume-drops-turn",
    "resume-session-at",
    "session-id",
    "session-mirror",
    "verbose",
)
# Arguments of the CLI that would bypass the ceiling on an option, because the last argument wins.
ARGUMENTS_OF_OPTIONS = {
    "max-budget-usd": "maxBudgetUsd",
    "max-turns": "maxTurns",
    "setting-sources": "settingSources",
}
OWNED_VARIABLES = (
    "CLAUDECODE",
    "CLAUDE_AGENT_SDK_VERSION",
    "CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS",
    "CLAUDE_CODE_SDK_READS_SESSION_STATE",
    "CLAUDE_CODE_TMPDIR",
)


def not_a_flag(text: str) -> str:
    """Refuse text with a leading dash, because the CLI would read the argument as a flag."""
    if text.startswith("-"):
        raise ValueError("must not begin with a dash")
    return no_nul(text)


def _fits_an_argument(items: list[str]) -> list[str]:
    if sum(len(item.encode()) + 1 for item in items) > ARGUMENT_CHARACTERS:
        raise ValueError(f"must be at most {ARGUMENT_CHARACTERS} bytes together")
    return items


def _is_an_argument(text: str) -> str:
    _fits_an_argument([text])
    return text


def _own_flags(flags: dict[str, Any]) -> dict[str, Any]:
    for name in flags:
        if name in OWNED_ARGUMENTS:
            raise ValueError(f"--{name} is set by the service itself")
        if name in ARGUMENTS_OF_OPTIONS:
            raise ValueError(f"--{name} is set by the service itself; use the option {ARGUMENTS_OF_OPTIONS[name]}")
    return flags


def _is_settings(text: str) -> str:
    if text.startswith("/"):
        return text
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(text), dict):
            return text
    raise ValueError("must be a JSON object, or the absolute path of a file that holds one")


def _own_variables(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if name in OWNED_VARIABLES or name.startswith("CCM_"):
            raise ValueError(f"{name} is set by the service itself")
    return variables


Text = Annotated[str, Field(min_length=1, max_length=TEXT_CHARACTERS), AfterValidator(no_nul)]
ArgumentText = Annotated[str, Field(min_length=1, max_length=ARGUMENT_CHARACTERS // 4), AfterValidator(no_nul)]
Argument = Annotated[str, AfterValidator(no_nul), AfterValidator(_is_an_argument)]
Flag = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=100)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
# What not_a_flag checks, for JSON schemas.
NO_FLAG = {"pattern": "^[^-]"}
Word = Annotated[str, Field(min_length=1, max_length=200, json_schema_extra=NO_FLAG), AfterValidator(not_a_flag)]
Rule = Annotated[str, Field(min_length=1, max_length=2_000, json_schema_extra=NO_FLAG), AfterValidator(not_a_flag)]
Rules = Annotated[list[Rule], Field(max_length=1_000), AfterValidator(_fits_an_argument)]
SkillName = Annotated[str, Field(max_length=200, pattern=r"^\w[\w.-]*(:\w[\w.-]*)?$")]
Object = Annotated[dict[str, JsonValue], AfterValidator(plain_json)]
Directory = Annotated[str, Field(pattern=r"^/", max_length=4_096), AfterValidator(no_nul)]
Effort = Literal["low", "medium", "high", "xhigh", "max"]
SNAPSHOT = "Whether the session keeps the prompt of its first request, also when it is continued; without it, true."
DISPLAY = "Whether the messages have a summary of the thinking, or omit it."
PermissionMode = Literal["default", "acceptEdits", "plan", "dontAsk", "bypassPermissions", "auto"]


class Strict(BaseModel):
    """A model that refuses unknown fields and converts no values, so that no mistake goes unnoticed."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CustomPrompt(Strict):
    type: Literal["custom"]
    prompt: Text = Field(description="The prompt.")
    snapshot: bool | None = Field(default=None, description=SNAPSHOT)


class PresetPrompt(Strict):
    type: Literal["preset"]
    preset: Literal["claude_code"]
    append: Text | None = Field(default=None, description="A text behind Claude Code's own prompt.")
    excludeDynamicSections: bool | None = Field(
        default=None,
        description="Whether the directory, the git status and the like stand in the first message instead.",
    )
    snapshot: bool | None = Field(default=None, description=SNAPSHOT)


class ToolsPreset(Strict):
    type: Literal["preset"]
    preset: Literal["claude_code"]


class OutputFormat(Strict):
    type: Literal["json_schema"]
    # Not named `schema`, which is a method of pydantic's.
    json_schema: Object = Field(alias="schema", description="The JSON schema that the result follows.")


class AdaptiveThinking(Strict):
    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = Field(default=None, description=DISPLAY)


class EnabledThinking(Strict):
    type: Literal["enabled"]
    budgetTokens: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        description="The maximum number of tokens for thinking."
    )
    display: Literal["summarized", "omitted"] | None = Field(default=None, description=DISPLAY)


class DisabledThinking(Strict):
    type: Literal["disabled"]


Thinking = Annotated[AdaptiveThinking | EnabledThinking | DisabledThinking, Field(discriminator="type")]


class TaskBudget(Strict):
    total: Annotated[int, Field(ge=1, le=2**53)] = Field(description="Tokens.")


class Plugin(Strict):
    type: Literal["local"]
    path: Directory = Field(description="The plugin's directory.")


class Agent(Strict):
    """A subagent. `mcpServers` and the permissive values of `permissionMode` are privileged here too."""

    description: Text = Field(description="When Claude uses the agent.")
    prompt: Text = Field(description="The agent's system prompt.")
    tools: Rules | None = Field(default=None, description="The agent's tools; without it those of the run.")
    disallowedTools: Rules | None = Field(default=None, description="Tools that the agent does not have.")
    model: Word | None = Field(default=None, description="The agent's model; without it that of the run.")
    skills: Annotated[list[SkillName], Field(max_length=1_000)] | None = Field(
        default=None, description="Skills that are loaded for the agent."
    )
    memory: Literal["user", "project", "local"] | None = Field(
        default=None, description="Where the agent keeps a memory of its own."
    )
    mcpServers: Annotated[list[Word | Object], Field(max_length=100)] | None = Field(
        default=None, description="MCP servers of the agent: names of configured ones, or configurations."
    )
    initialPrompt: Text | None = Field(default=None, description="The first message, if the agent is the main one.")
    maxTurns: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="The maximum number of turns of the agent."
    )
    background: bool | None = Field(default=None, description="Whether the agent always works in the background.")
    effort: Effort | None = Field(default=None, description="How much the agent thinks.")
    permissionMode: PermissionMode | None = Field(default=None, description="The agent's permission mode.")


class Options(Strict):
    """The options of a run."""

    model: Word | None = Field(default=None, description="The model; without it that of Claude Code's settings.")
    fallbackModel: Word | None = Field(default=None, description="The model to use while the other one is overloaded.")
    systemPrompt: Text | Annotated[CustomPrompt | PresetPrompt, Field(discriminator="type")] | None = Field(
        default=None,
        description="A text instead of Claude Code's prompt, or that prompt with an addition.",
    )
    maxTurns: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="The maximum number of turns of the run."
    )
    maxBudgetUsd: Annotated[float, Field(gt=0, le=1_000_000)] | None = Field(
        default=None,
        description="The maximum cost of the run itself (USD). Claude Code checks it after each answer of the model.",
    )
    permissionMode: PermissionMode | None = Field(
        default=None,
        description="What Claude Code may do without asking. A run with approvals that names none gets `default`.",
    )
    strictMcpConfig: bool | None = Field(
        default=None, description="Whether only the MCP servers of `mcpServers` are used."
    )
    settingSources: Annotated[list[Literal["user", "project", "local"]], Field(max_length=3)] | None = Field(
        default=None, description="Which of the host's Claude Code settings are loaded; `project` includes CLAUDE.md."
    )
    tools: Rules | ToolsPreset | None = Field(
        default=None,
        description="The tools that the run has at all; without it Claude Code's own. An empty list: none.",
    )
    allowedTools: Rules | None = Field(
        default=None, description="Rules for tools that need no permission, such as `Read` or `Bash(git log *)`."
    )
    disallowedTools: Rules | None = Field(
        default=None, description="Tools that the run does not have, or rules for uses that are denied."
    )
    agents: Annotated[dict[Word, Agent], Field(max_length=100)] | None = Field(
        default=None, description="Subagents, each under its name."
    )
    skills: Annotated[list[SkillName], Field(max_length=500)] | Literal["all"] | None = Field(
        default=None, description="The names of the skills that the run may use, or `all`."
    )
    includePartialMessages: bool | None = Field(
        default=None, description="Whether messages of the type `stream_event` show the text while it is written."
    )
    includeHookEvents: bool | None = Field(
        default=None, description="Whether messages report all hooks, and not only `SessionStart` and `Setup`."
    )
    forwardSubagentText: bool | None = Field(
        default=None, description="Whether the texts and the thinking of subagents are among the messages."
    )
    outputFormat: OutputFormat | None = Field(
        default=None, description="The JSON schema of the result, which is then in `result.structured_output`."
    )
    thinking: Thinking | None = Field(default=None, description="Whether and how the model thinks before it answers.")
    effort: Effort | None = Field(default=None, description="How much the model thinks.")
    betas: Annotated[list[Word], Field(max_length=50)] | None = Field(
        default=None, description="Names of the Messages API's beta features."
    )
    taskBudget: TaskBudget | None = Field(
        default=None, description="The tokens that the model is told it has for the task."
    )
    verbatimPrompts: bool | None = Field(
        default=None,
        description="Whether prompts are delivered as written: without slash commands and without `@` for files.",
    )
    # Privileged.
    additionalDirectories: Annotated[list[Directory], Field(max_length=100)] | None = Field(
        default=None, description="Directories beside `cwd` that the run may work in."
    )
    env: Annotated[dict[Variable, Argument], Field(max_length=1_000), AfterValidator(_own_variables)] | None = Field(
        default=None, description="Environment variables of Claude Code."
    )
    extraArgs: Annotated[dict[Flag, Argument | None], Field(max_length=100), AfterValidator(_own_flags)] | None = Field(
        default=None, description="Further arguments of Claude Code, without the dashes; null for one without a value."
    )
    mcpServers: Annotated[dict[Word, Object], Field(max_length=100)] | None = Field(
        default=None, description="MCP servers, each under its name with its configuration."
    )
    plugins: Annotated[list[Plugin], Field(max_length=100)] | None = Field(default=None, description="Plugins to load.")
    sandbox: Object | None = Field(default=None, description="Claude Code's settings for its sandbox.")
    settings: Annotated[ArgumentText, AfterValidator(_is_settings)] | Object | None = Field(
        default=None,
        description="Claude Code's settings: an object, the same as JSON text, or the absolute path of a file.",
    )

    @model_validator(mode="after")
    def _fits_the_command_line(self) -> Options:
        """Check the length with the skills, because they become rules of the allowed tools."""
        skills = self.skills if isinstance(self.skills, list) else []
        _fits_an_argument([*(self.allowedTools or []), *(f"Skill({name})" for name in skills)])
        return self

    def given(self) -> dict[str, Any]:
        """Return the options that the client set. A null counts as not set."""
        return self.model_dump(by_alias=True, exclude_none=True)
