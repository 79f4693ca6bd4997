"""What the service uses of Claude Code's hidden flag `--await-claim` and its control request `claim_session`.

An upgrade that changes it costs no run: every refusal leads to a start of its own. These tests say what has changed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.launch import Launch
from ccm.core.claude.locations import bundled_cli
from ccm.core.claude.sdk import CLAIM_SUBTYPES, ClaudeAgentOptions, Client

pytestmark = pytest.mark.claude

Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def parked(
    environ: dict[str, str], folder: Path, use: Callable[[Client, Ask], Awaitable[object]], **options: Any
) -> None:
    """Start a Claude Code that waits for a claim, connect to it, and pass it to `use`."""
    waiting = folder / "waiting"
    waiting.mkdir()

    async def run() -> None:
        chosen = ClaudeAgentOptions(
            cwd=waiting,
            cli_path=bundled_cli(),
            session_id=str(uuid.uuid4()),
            permission_mode="acceptEdits",
            extra_args={"await-claim": None, "replay-user-messages": None},
            **options,
        )
        client = Client.launching(chosen, Launch((), environ, folder / "stderr"))
        try:
            await client.connect()
            query = client._query
            assert query is not None
            await use(client, query._send_control_request)
        finally:
            await client.disconnect()

    asyncio.run(run())


def test_the_flag_exists(environ: dict[str, str], tmp_path: Path) -> None:
    async def use(_client: Client, _ask: Ask) -> None: ...

    parked(environ, tmp_path, use)

    assert (tmp_path / "stderr").read_text() == ""


def test_a_claim_has_our_fields_and_says_where_the_session_is(
    environ: dict[str, str], tmp_path: Path, project: Path
) -> None:
    async def use(_client: Client, ask: Ask) -> None:
        claim = {
            "cwd": str(project),
            "permission_mode": "plan",
            "additional_directories": ["/usr/share"],
            "append_system_prompt": "Be brief.",
        }
        answer = await ask({"subtype": "claim_session", **claim})
        assert answer["status"] == "ok"
        assert answer["cwd"] == str(project.resolve())
        await ask({"subtype": "set_model", "model": "claude-haiku-4-5"})
        with pytest.raises(Exception, match="not_a_spare"):
            await ask({"subtype": "claim_session", **claim})

    parked(environ, tmp_path, use)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ({"cwd": "/nowhere"}, "cwd_not_found"),
        ({"permission_mode": "bypassPermissions"}, "bypassPermissions|permission"),
        ({"permission_mode": "no such mode"}, "permission"),
    ],
    ids=["cwd", "bypass", "mode"],
)
def test_a_claim_that_cannot_be_served_is_refused(
    environ: dict[str, str], tmp_path: Path, project: Path, claim: dict[str, Any], reason: str
) -> None:
    async def use(_client: Client, ask: Ask) -> None:
        with pytest.raises(Exception, match=reason):
            await ask({"subtype": "claim_session", "cwd": str(project), **claim})

    parked(environ, tmp_path, use)


def test_only_the_messages_that_we_leave_out_come_before_the_prompt(
    environ: dict[str, str], tmp_path: Path, project: Path
) -> None:
    skill = project / ".claude" / "skills" / "greet"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text("---\nname: greet\ndescription: Greets.\n---\nSay hello.\n")

    async def use(client: Client, ask: Ask) -> None:
        await ask({"subtype": "claim_session", "cwd": str(project), "permission_mode": "plan"})
        query = client._query
        assert query is not None
        buffered = query._message_receive.statistics().current_buffer_used
        messages = [query._message_receive.receive_nowait() for _ in range(buffered)]
        assert {message["subtype"] for message in messages} == set(CLAIM_SUBTYPES)

    parked(environ, tmp_path, use)


def test_a_message_before_the_claim_is_refused(environ: dict[str, str], tmp_path: Path) -> None:
    async def use(client: Client, _ask: Ask) -> None:
        await client.query("too early")
        with pytest.raises(Exception, match="not_claimed"):
            await client.receive_raw(refuse_result)

    async def refuse_result(message: dict[str, Any]) -> None:
        if message.get("type") == "result":
            raise ValueError(str(message))

    parked(environ, tmp_path, use)
