"""The parts of claude-agent-sdk and its bundled Claude Code that ccm's module `sdk` and its neighbours use."""

from __future__ import annotations

import asyncio
import inspect
import json
import mmap
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import anyio
import claude_agent_sdk
import pytest
from claude_agent_sdk import (
    ClaudeAgentOptions,
    CLIConnectionError,
    CLIJSONDecodeError,
    CLINotFoundError,
    PermissionResultAllow,
    PermissionResultDeny,
    PermissionUpdate,
    ProcessError,
    ResultError,
    ToolPermissionContext,
    Transport,
)
from claude_agent_sdk._internal.query import Query
from claude_agent_sdk._internal.sessions import _sanitize_path
from claude_agent_sdk._internal.transport import subprocess_cli
from claude_agent_sdk._internal.transport.subprocess_cli import SubprocessCLITransport
from claude_agent_sdk.types import _configure_can_use_tool

from ccm.core.claude.locations import bundled_cli, project_name
from ccm.core.claude.run_context import user_message
from ccm.core.claude.sdk import Client, explain, permission_callback
from ccm.core.claude.sdk_options import RENAMED
from ccm.models import Answer, Question

SESSION = "6f3a0a5e-3a35-4a44-8b8e-0a1f4a3f1a11"


class Wire(Transport):
    """A transport without a CLI: answers control requests, yields `lines` and records the messages written."""

    def __init__(self, *lines: dict[str, Any], error: Exception | None = None) -> None:
        self.written: list[dict[str, Any]] = []
        self.input_ended = False
        self._lines = lines
        self._error = error
        self._answers = asyncio.Queue[dict[str, Any] | None]()

    async def connect(self) -> None: ...

    async def write(self, data: str) -> None:
        message = json.loads(data)
        self.written.append(message)
        if message["type"] == "control_request":
            response = {"subtype": "success", "request_id": message["request_id"], "response": {}}
            self._answers.put_nowait({"type": "control_response", "response": response})

    async def read_messages(self) -> AsyncIterator[dict[str, Any]]:
        initialized = await self._answers.get()
        assert initialized is not None
        yield initialized
        for line in self._lines:
            yield line
        while (answer := await self._answers.get()) is not None:
            yield answer
        if self._error is not None:
            raise self._error

    async def close(self) -> None: ...

    def is_ready(self) -> bool:
        return True

    async def end_input(self) -> None:
        self.input_ended = True
        self._answers.put_nowait(None)


def converse(wire: Wire, act: Callable[[Client], Coroutine[Any, Any, None]]) -> list[dict[str, Any]]:
    """Connect a client to the wire, call `act`, end the input, and return the messages received."""
    taken: list[dict[str, Any]] = []

    async def take(message: dict[str, Any]) -> None:
        taken.append(message)

    async def run() -> None:
        client = Client(ClaudeAgentOptions(), transport=wire)
        await client.connect()
        try:
            await act(client)
            await client.end_input()
            await client.receive_raw(take)
        finally:
            await client.disconnect()

    anyio.run(run)
    return taken


async def nothing(_client: Client) -> None: ...


# ---- private attributes that Client uses


@pytest.mark.parametrize("name", ["_query", "_transport"])
def test_the_client_has_the_attribute(name: str) -> None:
    attributes = vars(claude_agent_sdk.ClaudeSDKClient(ClaudeAgentOptions()))

    assert name in attributes, f"ClaudeSDKClient.{name} is missing: every method of Client reads it"
    assert attributes[name] is None, (
        f"ClaudeSDKClient.{name} is set before connect(): Client would consider it connected"
    )


@pytest.fixture
def query() -> Iterator[Query]:
    query = Query(transport=Wire(), is_streaming_mode=True)
    yield query
    for stream in (query._message_send, query._message_receive):
        stream.close()


@pytest.mark.parametrize(
    ("name", "kind", "used"),
    [
        ("_message_send", anyio.streams.memory.MemoryObjectSendStream, "Client.receive_raw replaces it with _Tap"),
        ("_message_receive", anyio.streams.memory.MemoryObjectReceiveStream, "Client.receive_raw empties it"),
        ("_send_control_request", Callable, "Client.interrupt and Client.claim call it"),
        ("_initialized", bool, "Client.is_connected reads it"),
    ],
)
def test_the_query_has_the_attribute(query: Query, name: str, kind: type, used: str) -> None:
    assert isinstance(getattr(query, name, None), kind), f"Query.{name} is missing or has another type: {used}"


def test_the_reader_uses_only_the_methods_of_the_tap() -> None:
    calls = set(re.findall(r"self\._message_send\.(\w+)", inspect.getsource(Query)))

    assert calls == {"send", "send_nowait", "close"}, "_Tap replaces the stream and has only these three methods"


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("_process", "Client signals and waits for it"),
        *((name, "_Transport.connect sets it") for name in ("_stdin_stream", "_stdout_stream", "_ready")),
        *((name, "_Transport.connect reads it") for name in ("_cwd", "_options")),
    ],
)
def test_the_transport_has_the_attribute(name: str, used: str) -> None:
    transport = SubprocessCLITransport(prompt="", options=ClaudeAgentOptions())

    assert name in vars(transport), f"SubprocessCLITransport.{name} is missing: {used}"


@pytest.mark.parametrize("name", ["CLAUDE_CODE_ENTRYPOINT", "CLAUDE_AGENT_SDK_VERSION", "PWD", "_ACTIVE_CHILDREN.add"])
def test_the_transport_starts_its_process_as_ours(name: str) -> None:
    assert name in inspect.getsource(SubprocessCLITransport.connect), f"_Transport.connect has {name}, as the SDK had"


def test_the_transport_sets_no_variable_that_ours_lacks() -> None:
    source = inspect.getsource(SubprocessCLITransport.connect)
    found = set(re.findall(r"process_env\[(\w+|\"\w+\")\]", source))

    assert found == {
        "EXPLICIT_CLIENT_APP_ENV",  # the option client_app, which is never set
        "DERIVED_CLIENT_APP_ENV",  # for a later CLI
        "key",  # OpenTelemetry, which is not installed
        "_SDK_READS_SESSION_STATE_ENV",
        '"CLAUDE_CODE_ENABLE_SDK_FILE_CHECKPOINTING"',  # an option that is never set
        '"PWD"',
    }, "_Transport.connect sets the variables of SubprocessCLITransport.connect: compare them"
    assert subprocess_cli._SDK_READS_SESSION_STATE_ENV == "CLAUDE_CODE_SDK_READS_SESSION_STATE"


async def refuse(_question: Question) -> Answer:
    return Answer(allow=False)


def test_the_client_gives_its_transport_the_permission_tool() -> None:
    configured = _configure_can_use_tool(ClaudeAgentOptions(can_use_tool=permission_callback(refuse)))

    assert configured.permission_prompt_tool_name == "stdio", "_Transport sets it, because the client no longer can"


def test_the_transport_uses_only_what_our_process_has() -> None:
    used = set(re.findall(r"self\._process\.(\w+)", inspect.getsource(SubprocessCLITransport)))
    streams = set(re.findall(r"self\._std(?:in|out)_stream\.(\w+)", inspect.getsource(SubprocessCLITransport)))

    # Its own `connect`, which ours replaces, uses anyio's streams of the process.
    assert used - {"stdin", "stdout", "stderr"} == {"returncode", "wait", "terminate", "kill"}, "CLIProcess has these"
    assert streams == {"send", "aclose"}, "the text streams of anyio around our pipes have these"


# ---- the wire


def test_messages_of_the_cli_arrive_unchanged() -> None:
    # They arrive with the answer to `initialize`, so the reader is about to send while _Tap replaces its stream.
    said: list[dict[str, Any]] = [
        {"type": "of_no_known_type", "n": 1},
        {"type": "system", "subtype": "x", "unknown_field": [None]},
    ]

    assert converse(Wire(*said), nothing) == said, "the SDK alters messages before _Tap gets them"


def test_messages_of_the_user_are_sent_unchanged() -> None:
    wire = Wire()
    message = {**user_message(SESSION, "Hello", ()), "uuid": SESSION}

    async def say(client: Client) -> None:
        async def messages() -> AsyncIterator[dict[str, Any]]:
            yield message

        await client.query(messages())

    converse(wire, say)
    written = next(line for line in wire.written if line["type"] == "user")
    assert message.items() <= written.items(), "the SDK drops fields of a user message: Execution needs its uuid"


def test_an_interrupt_can_drop_the_queue() -> None:
    wire = Wire()
    converse(wire, lambda client: client.interrupt())

    request = wire.written[-1]["request"]
    assert request == {"subtype": "interrupt", "cancel_queued": True}, "Client.interrupt sends another request"


def test_the_input_can_be_ended() -> None:
    wire = Wire()
    converse(wire, nothing)

    assert wire.input_ended, (
        "Client.end_input does not reach the transport: the CLI of a finished run would have to be killed"
    )


def test_an_error_of_the_reader_is_raised_unchanged() -> None:
    broken = ProcessError("broken", exit_code=7)
    with pytest.raises(ProcessError) as raised:
        converse(Wire(error=broken), nothing)

    assert raised.value is broken, "the reader's last message has no `exception`: _Tap looks for it"


def test_an_error_after_an_error_result_is_a_result_error() -> None:
    result = {"type": "result", "is_error": True, "subtype": "x", "errors": ["No conversation found with session ID"]}
    with pytest.raises(ResultError) as raised:
        converse(Wire(result, error=ProcessError("exit", exit_code=1)), nothing)

    assert raised.value.errors == result["errors"], "ResultError.errors is missing: explain() reports it to the client"
    code, _ = explain(raised.value, "", 0)
    assert code == "SESSION_NOT_RESUMABLE", "explain() does not recognise a session that cannot be resumed"


# ---- errors that explain() distinguishes


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [(CLINotFoundError, CLIConnectionError), (ResultError, ProcessError)],
    ids=["not found", "result"],
)
def test_an_error_is_a_subclass_of_another(narrow: type, wide: type) -> None:
    assert issubclass(narrow, wide), f"{narrow.__name__} is no {wide.__name__}: check the order in explain()"


def test_the_error_of_a_too_large_message_has_its_text() -> None:
    source = inspect.getsource(SubprocessCLITransport._read_messages_impl)

    assert "maximum buffer size" in source, "explain() searches CLIJSONDecodeError.line for these words"
    assert CLIJSONDecodeError("a line", ValueError()).line == "a line", "CLIJSONDecodeError.line is missing"


def test_the_error_of_a_silent_cli_has_its_text() -> None:
    source = inspect.getsource(Query._send_control_request)

    assert "Control request timeout" in source, (
        "explain() searches for these words because the SDK raises a plain Exception"
    )


def test_the_sdk_has_one_logger() -> None:
    names = {"claude_agent_sdk", Query.__module__.partition(".")[0]}

    assert names == {claude_agent_sdk.logger.name}, "ccm's module `log` silences this logger"


# ---- options and permissions


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            *RENAMED.values(),
            *("agents", "can_use_tool", "cli_path", "cwd", "env", "extra_args", "fork_session", "max_buffer_size"),
            *("mcp_servers", "resume", "resume_session_at", "session_id", "settings"),
            *("system_prompt", "thinking"),
        }
    ),
)
def test_the_options_have_the_field(name: str) -> None:
    assert name in {field.name for field in fields(ClaudeAgentOptions)}, f"sdk_options() or RENAMED sets {name}"


def command(**options: Any) -> list[str]:
    transport = SubprocessCLITransport(prompt="", options=ClaudeAgentOptions(cli_path="/cli", **options))
    transport._cli_path = "/cli"
    return transport._build_command()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extra_args": {"replay-user-messages": None}}, ["--replay-user-messages"]),
        ({"system_prompt": {"type": "file", "path": "/file"}}, ["--system-prompt-file", "/file"]),
        ({"settings": "/file"}, ["--settings", "/file"]),
        ({"mcp_servers": "/file"}, ["--mcp-config", "/file"]),
        ({"session_id": SESSION}, [f"--session-id={SESSION}"]),
        ({"resume": SESSION, "fork_session": True}, [f"--resume={SESSION}", "--fork-session"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_becomes_an_argument(options: dict[str, Any], words: list[str]) -> None:
    made = command(**options)

    assert [word for word in words if word in made] == words, f"sdk_options() relies on {words}; the SDK makes {made}"


def test_a_preset_prompt_does_not_replace_the_system_prompt() -> None:
    preset = {"type": "preset", "preset": "claude_code"}

    assert "--system-prompt" not in command(system_prompt=preset), (
        "CLAUDE_CODE_PROMPT no longer selects Claude Code's own prompt"
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            ToolPermissionContext,
            {
                *("tool_use_id", "suggestions", "title", "display_name", "description", "blocked_path"),
                *("decision_reason", "agent_id"),
            },
        ),
        (PermissionResultAllow, {"updated_input", "updated_permissions"}),
        (PermissionResultDeny, {"message", "interrupt"}),
        (PermissionUpdate, {"destination"}),
    ],
)
def test_the_permission_types_have_the_fields(kind: type, names: set[str]) -> None:
    assert is_dataclass(kind), f"{kind.__name__} is not a dataclass: permission_callback() uses replace()"
    assert names <= {field.name for field in fields(kind)}, f"permission_callback() uses {names} of {kind.__name__}"


# ---- locations of the program and its files


def test_the_bundled_cli_is_where_the_sdk_looks_for_it() -> None:
    found = SubprocessCLITransport(prompt="", options=ClaudeAgentOptions())._find_bundled_cli()

    assert str(bundled_cli()) == found, "bundled_cli() names another path"


@pytest.mark.parametrize("cwd", ["/", "/home/me/a project", "/x_y.z", "/" + "long/" * 60, "/ünï/" + "cödé" * 60])
def test_project_name_matches_the_sdk(cwd: str) -> None:
    assert project_name(cwd) == _sanitize_path(os.path.realpath(cwd)), "project_name() names another directory"


@pytest.fixture(scope="module")
def claude() -> Iterator[mmap.mmap]:
    with bundled_cli().open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        yield code


@pytest.mark.parametrize(
    ("name", "used"),
    [
        (
            "CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS",
            "sdk_options() sets it, and Execution ends runs on the events that it enables",
        ),
        ("session_state_changed", "Execution ends runs on it"),
        ("CLAUDE_CODE_TMPDIR", "sdk_options() sets it to the run's directory, which the service removes"),
        ("replay-user-messages", "sdk_options() passes it, or a run's messages lack those of the user"),
        ("system-prompt-file", "sdk_arguments() passes it, to keep prompts out of the list of processes"),
        ("append-system-prompt-file", "sdk_arguments() passes it, to keep prompts out of the list of processes"),
        ("cancel_queued", "Client.interrupt() sends it, or a run continues with its queue after a cancel"),
        ("command_lifecycle", "InputQueue learns the state of a message from it"),
        ("command_uuid", "Execution and InputQueue read it"),
        ("user_message_uuids", "InputQueue learns which messages a turn has answered from it"),
        ("model_usage_since_last_result", "cost() sums it: the total counts the resumed history too"),
        ("api_retry", "Execution counts refused logins by it"),
        ("No conversation found", "explain() derives SESSION_NOT_RESUMABLE from it"),
        ("The user sent a new message while you were working:", "the stand-in for the Messages API recognises it"),
    ],
)
def test_the_bundled_cli_knows_the_name(claude: mmap.mmap, name: str, used: str) -> None:
    assert claude.find(name.encode()) != -1, f"the bundled Claude Code does not contain {name!r}: {used}"
