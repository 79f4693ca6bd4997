"""Messages sent to a run in progress, with the real Claude Code."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ccm.testing.messages_api import MessagesAPI
from tests.client import Answer, Client
from tests.waiting import until

TOOL = '[[tool Bash {"command": "perl -e \\"sleep 2\\""}]] [[text After the tool.]]'


def put(client: Client, run_id: str, prompt: str) -> Answer:
    return client.post(f"/api/runs/{run_id}/input", {"prompt": prompt})


def plain_answer(prompt: str) -> str:
    """Return the stand-in model's answer to a prompt without a script."""
    return f"The stand-in for Claude heard: {prompt}"


def conversation(client: Client, run_id: str) -> list[str]:
    """Return a run's conversation in order: texts, and the types of all other blocks."""
    parts = []
    for message in client.messages(run_id):
        if message["type"] in ("system", "stream_event"):
            continue
        if message["type"] == "result":
            parts.append("RESULT")
            continue
        block = message["message"]["content"][-1]
        parts.append(block["text"] if block["type"] == "text" else block["type"])
    return parts


def test_a_message_during_text_gets_its_own_turn(client: Client, project: Path, messages_api: MessagesAPI) -> None:
    run = client.start(project, "[[slow 10 0.1]]", wait=0, options={"includePartialMessages": True})
    client.wait_for_message(run["id"], "stream_event")

    answer = put(client, run["id"], "And why is that?")

    assert answer.status == 202
    stored = client.messages(run["id"])[answer.json["messageIndex"]]
    assert [stored["type"], stored["uuid"]] == ["user", answer.json["messageUuid"]]
    ended = client.run(run["id"])
    assert [ended["status"], ended["result"]["result"]] == ["completed", plain_answer("And why is that?")]
    messages = client.messages(run["id"])
    assert [text for text in conversation(client, run["id"]) if text in ("[[slow 10 0.1]]", "And why is that?")] == [
        "[[slow 10 0.1]]",
        "And why is that?",
    ], "each must occur once, although Claude Code replays the prompt only after its answer"
    uuids = [message["uuid"] for message in messages if message["type"] == "user"]
    assert uuids.count(answer.json["messageUuid"]) == 1
    assert [message["type"] for message in messages].count("result") == 2
    assert messages[-1]["type"] == "result"
    assert messages_api.prompts(messages_api.requests[-1]) == ["[[slow 10 0.1]]", "And why is that?"]
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"
    assert messages_api.prompts(messages_api.requests[-1])[-3:] == ["[[slow 10 0.1]]", "And why is that?", "Go on."]


@pytest.mark.main_job
def test_messages_during_a_tool_join_the_turn(client: Client, project: Path) -> None:
    run = client.start(project, TOOL, wait=0, options={"allowedTools": ["Bash"]})
    client.wait_for_message(run["id"], "assistant")

    answers = [put(client, run["id"], text) for text in ("By the way.", "And another.")]

    assert [answer.status for answer in answers] == [202, 202]
    ended = client.run(run["id"])
    assert ended["result"]["user_message_uuids"][1:] == [answer.json["messageUuid"] for answer in answers]
    assert conversation(client, run["id"]) == [
        TOOL,
        "tool_use",
        "By the way.",
        "And another.",
        "tool_result",
        "After the tool.",
        "RESULT",
    ]


def test_a_message_during_api_retries_and_a_command_are_answered(client: Client, project: Path) -> None:
    run = client.start(project, "[[status 500 3]] [[text At last.]]", wait=0)
    until(lambda: "api_retry" in [message.get("subtype") for message in client.messages(run["id"])])
    for text in ("/context", "/nothing of the kind", "Are you there?"):
        assert put(client, run["id"], text).status == 202

    ended = client.run(run["id"])
    assert [ended["status"], ended["result"]["result"]] == ["completed", plain_answer("Are you there?")]
    messages = [message for message in client.messages(run["id"]) if message["type"] == "user"]
    assert len(messages) == 4


@pytest.mark.parametrize("max_turns", [1, 2])
def test_each_message_gets_the_full_number_of_turns(client: Client, project: Path, max_turns: int) -> None:
    run = client.start(project, TOOL, wait=0, options={"allowedTools": ["Bash"], "maxTurns": max_turns})
    client.wait_for_message(run["id"], "assistant")
    assert put(client, run["id"], "Say something.").status == 202

    assert client.run(run["id"])["status"] == "completed"


@pytest.mark.many_rounds
def test_a_message_at_the_end_of_a_turn_is_either_answered_or_refused(client: Client, project: Path) -> None:
    chance = random.Random(5)

    def race(number: int) -> int:
        run = client.start(project, "[[text Hello.]]", wait=0)
        client.wait_for_message(run["id"], "assistant" if number % 2 else "result")
        threading.Event().wait(chance.random() * 0.03)  # hits a random moment around the turn's end
        answer = put(client, run["id"], f"number {number}")
        ended: dict[str, Any] = client.run(run["id"])
        assert ended["status"] == "completed"
        taken = [f"number {number}", plain_answer(f"number {number}"), "RESULT"]
        expected = ["[[text Hello.]]", "Hello.", "RESULT"] + (taken if answer.status == 202 else [])
        # Compared without order: a message accepted before the first turn's end is stored before its result.
        assert sorted(conversation(client, run["id"])) == sorted(expected)
        if answer.status != 202:
            assert [answer.status, answer.error["code"]] in ([409, "RUN_ENDING"], [409, "RUN_ALREADY_ENDED"])
        return answer.status

    statuses: set[int] = set()
    with ThreadPoolExecutor(2) as pool:
        for batch in range(10):  # on a busy machine it takes longer to meet both
            statuses |= set(pool.map(race, range(16 * batch, 16 * (batch + 1))))
            if statuses == {202, 409}:
                break
    assert statuses == {202, 409}
