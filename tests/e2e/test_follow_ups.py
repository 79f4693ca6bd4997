"""Messages put into a run that goes on, with the real Claude Code."""

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


def heard(prompt: str) -> str:
    """What the model answers to a prompt that is no script."""
    return f"The stand-in for Claude heard: {prompt}"


def told(client: Client, run_id: str) -> list[str]:
    """What a run's messages say, in order: texts, and the kinds of all else."""
    said = []
    for message in client.messages(run_id):
        if message["type"] in ("system", "stream_event"):
            continue
        if message["type"] == "result":
            said.append("RESULT")
            continue
        block = message["message"]["content"][-1]
        said.append(block["text"] if block["type"] == "text" else block["type"])
    return said


def test_during_text_a_message_is_answered_in_a_turn_of_its_own(
    client: Client, project: Path, messages_api: MessagesAPI
) -> None:
    run = client.start(project, "[[slow 10 0.1]]", wait=0, options={"includePartialMessages": True})
    client.wait_for_message(run["id"], "stream_event")

    answer = put(client, run["id"], "And why is that?")

    assert answer.status == 202
    stored = client.messages(run["id"])[answer.json["messageIndex"]]
    assert [stored["type"], stored["uuid"]] == ["user", answer.json["messageUuid"]]
    ended = client.run(run["id"])
    assert [ended["status"], ended["result"]["result"]] == ["completed", heard("And why is that?")]
    messages = client.messages(run["id"])
    assert [text for text in told(client, run["id"]) if text in ("[[slow 10 0.1]]", "And why is that?")] == [
        "[[slow 10 0.1]]",
        "And why is that?",
    ], "each once, though Claude Code replays the prompt only after its answer"
    uuids = [message["uuid"] for message in messages if message["type"] == "user"]
    assert uuids.count(answer.json["messageUuid"]) == 1
    assert [message["type"] for message in messages].count("result") == 2
    assert messages[-1]["type"] == "result"
    assert messages_api.prompts(messages_api.requests[-1]) == ["[[slow 10 0.1]]", "And why is that?"]
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"
    assert messages_api.prompts(messages_api.requests[-1])[-3:] == ["[[slow 10 0.1]]", "And why is that?", "Go on."]


@pytest.mark.main_job
def test_during_a_tool_messages_become_part_of_the_turn(client: Client, project: Path) -> None:
    run = client.start(project, TOOL, wait=0, options={"allowedTools": ["Bash"]})
    client.wait_for_message(run["id"], "assistant")

    answers = [put(client, run["id"], text) for text in ("By the way.", "And another.")]

    assert [answer.status for answer in answers] == [202, 202]
    ended = client.run(run["id"])
    assert ended["result"]["user_message_uuids"][1:] == [answer.json["messageUuid"] for answer in answers]
    assert told(client, run["id"]) == [
        TOOL,
        "tool_use",
        "By the way.",
        "And another.",
        "tool_result",
        "After the tool.",
        "RESULT",
    ]


def test_a_message_while_the_api_is_retried_or_that_is_a_command_is_answered_too(client: Client, project: Path) -> None:
    run = client.start(project, "[[status 500 3]] [[text At last.]]", wait=0)
    until(lambda: "api_retry" in [message.get("subtype") for message in client.messages(run["id"])])
    for text in ("/context", "/nothing of the kind", "Are you there?"):
        assert put(client, run["id"], text).status == 202

    ended = client.run(run["id"])
    assert [ended["status"], ended["result"]["result"]] == ["completed", heard("Are you there?")]
    messages = [message for message in client.messages(run["id"]) if message["type"] == "user"]
    assert len(messages) == 4


@pytest.mark.parametrize("max_turns", [1, 2])
def test_each_message_has_all_turns_before_it(client: Client, project: Path, max_turns: int) -> None:
    run = client.start(project, TOOL, wait=0, options={"allowedTools": ["Bash"], "maxTurns": max_turns})
    client.wait_for_message(run["id"], "assistant")
    assert put(client, run["id"], "Say something.").status == 202

    assert client.run(run["id"])["status"] == "completed"


@pytest.mark.many_rounds
def test_at_the_end_of_a_turn_a_message_is_either_taken_in_and_answered_or_refused(
    client: Client, project: Path
) -> None:
    chance = random.Random(5)

    def race(number: int) -> int:
        run = client.start(project, "[[text Hello.]]", wait=0)
        client.wait_for_message(run["id"], "assistant" if number % 2 else "result")
        threading.Event().wait(chance.random() * 0.03)  # not to synchronise: to meet the end at any moment
        answer = put(client, run["id"], f"number {number}")
        ended: dict[str, Any] = client.run(run["id"])
        assert ended["status"] == "completed"
        taken = [f"number {number}", heard(f"number {number}"), "RESULT"]
        expected = ["[[text Hello.]]", "Hello.", "RESULT"] + (taken if answer.status == 202 else [])
        # Where it was taken in before the end of the first turn, its row is before that turn's result.
        assert sorted(told(client, run["id"])) == sorted(expected)
        if answer.status != 202:
            assert [answer.status, answer.error["code"]] in ([409, "RUN_ENDING"], [409, "RUN_ALREADY_ENDED"])
        return answer.status

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(race, range(16))) == {202, 409}
