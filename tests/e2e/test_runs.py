"""Start, resume and fork with the real Claude Code: the recorded messages, and the requests to the model."""

from __future__ import annotations

import base64
import json
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.locations import bundled_cli, transcript_path
from ccm.testing.messages_api import MessagesAPI
from tests.client import Client
from tests.conftest import ServeFunction

# The control protocol between the CLI and the SDK.
NOT_MESSAGES = ("control_request", "control_response", "control_cancel_request")


def _png() -> str:
    """Return an image of one red pixel as base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")).decode()


PNG = _png()


def request_for(api: MessagesAPI, prompt: str) -> dict[str, Any]:
    """Return the first request to the model whose last user turn contains the prompt."""
    for request in api.requests:
        prompts = api.prompts(request)
        if prompts and prompt in prompts[-1]:
            return request
    raise AssertionError(f"no request to the model has the prompt {prompt!r}")


def prompts_sent(api: MessagesAPI, prompt: str) -> list[str]:
    """Return the user turns of that request, the oldest first."""
    return api.prompts(request_for(api, prompt))


@pytest.mark.main_job
def test_a_start_is_answered_at_once_and_the_run_completes(client: Client, project: Path) -> None:
    answer = client.post("/api/runs/start", {"cwd": str(project), "prompt": "Hello."})

    assert answer.status == 202
    accepted = answer.json
    assert answer.headers["Location"] == f"/api/runs/{accepted['id']}"
    assert accepted["status"] == "running"
    assert accepted["sessionId"] == accepted["sdkSessionId"]
    ended = client.run(accepted["id"])
    assert ended["status"] == "completed"
    assert ended["resultType"] == "success"
    assert ended["result"]["result"] == "The stand-in for Claude heard: Hello."
    assert ended["result"]["session_id"] == ended["sdkSessionId"]
    assert ended["costUsd"] == ended["result"]["total_cost_usd"] > 0
    assert ended["durationMs"] > 0
    assert ended["createdAt"] <= ended["startedAt"] <= ended["endedAt"]
    assert ended["messageCount"] == len(client.messages(ended["id"]))


@pytest.mark.main_job
def test_a_start_with_wait_answers_with_the_ended_run(client: Client, project: Path) -> None:
    answer = client.post("/api/runs/start", {"cwd": str(project), "prompt": "Hello again."}, wait=60)

    assert answer.status == 200
    assert answer.json["status"] == "completed"


def test_a_runs_messages_contain_the_whole_conversation(client: Client, project: Path) -> None:
    run = client.start(project, "How are you?")

    messages = client.messages(run["id"])
    assert [message["type"] for message in messages] == ["system", "user", "assistant", "result"]
    assert messages[1]["message"]["content"] == [{"type": "text", "text": "How are you?"}]
    assert messages[3] == run["result"]


def test_the_system_prompt_of_claude_code_is_the_default(
    client: Client, project: Path, messages_api: MessagesAPI
) -> None:
    client.start(project, "Which system prompt?")
    client.start(project, "Which other prompt?", options={"systemPrompt": "You are a parrot."})
    client.start(
        project,
        "Which appended prompt?",
        options={"systemPrompt": {"type": "preset", "preset": "claude_code", "append": "Like a parrot. " * 20_000}},
    )

    def system(prompt: str) -> str:
        return json.dumps(request_for(messages_api, prompt)["system"])

    assert "Claude Code" in system("Which system prompt?")
    assert "You are a parrot." in system("Which other prompt?")
    assert "interactive" not in system("Which other prompt?")
    assert system("Which appended prompt?").count("Like a parrot.") == 20_000


@pytest.mark.main_job
def test_a_tool_call_lists_a_file(client: Client, project: Path) -> None:
    run = client.start(project, '[[tool Bash {"command": "ls"}]] [[text Listed.]]')

    assert run["status"] == "completed"
    results = [m for m in client.messages(run["id"], type="user") if isinstance(m["message"]["content"][0], dict)]
    assert any("here-is-a-file.txt" in json.dumps(message) for message in results)


def test_without_options_a_run_may_create_a_file(client: Client, project: Path) -> None:
    path = project / "README.md"
    run = client.start(project, f'[[tool Write {{"file_path": "{path}", "content": "Read me."}}]]')

    assert run["status"] == "completed"
    assert path.read_text() == "Read me."
    assert run["permissionDenials"] == []


@pytest.mark.main_job
def test_a_run_shows_a_denied_tool(client: Client, project: Path) -> None:
    run = client.start(project, '[[tool Bash {"command": "touch denied"}]]', options={"permissionMode": "default"})

    assert run["status"] == "completed"
    assert [denial["tool_name"] for denial in run["permissionDenials"]] == ["Bash"]
    assert not (project / "denied").exists()


@pytest.mark.main_job
def test_a_resume_sends_the_earlier_turns(client: Client, project: Path, messages_api: MessagesAPI) -> None:
    first = client.start(project, "Remember the number 7.")
    second = client.resume(first["sessionId"], "Which number was it?")
    third = client.resume(second["sdkSessionId"], "And once more?")

    assert prompts_sent(messages_api, "And once more?") == [
        *(p for p in prompts_sent(messages_api, "Remember the number 7.")),
        "Which number was it?",
        "And once more?",
    ]
    assert {run["sessionId"] for run in (first, second, third)} == {first["sessionId"]}
    assert [second["mode"], second["parentRunId"]] == ["resume", first["id"]]
    assert [third["mode"], third["parentRunId"]] == ["resume", second["id"]]
    assert len({run["sdkSessionId"] for run in (first, second, third)}) == 3
    # The cost of each run alone, although the SDK's total includes the history.
    assert third["costUsd"] < third["result"]["total_cost_usd"]
    session = client.get(f"/api/sessions/{first['sessionId']}").json
    assert session["runCount"] == 3
    assert session["headRunId"] == third["id"]
    assert session["messageCount"] == sum(run["messageCount"] for run in (first, second, third))
    assert abs(session["costUsd"] - sum(run["costUsd"] for run in (first, second, third))) < 1e-9


@pytest.mark.main_job
def test_a_fork_from_the_head_has_the_whole_history_and_a_new_session(
    client: Client, project: Path, messages_api: MessagesAPI
) -> None:
    first = client.start(project, "Apples.")
    second = client.resume(first["sessionId"], "Pears.")
    fork = client.fork(first["sessionId"], "Plums.", title="Fruit", metadata={"basket": 1})

    sent = prompts_sent(messages_api, "Plums.")
    assert [text for text in ("Apples.", "Pears.", "Plums.") if any(text in prompt for prompt in sent)] == [
        "Apples.",
        "Pears.",
        "Plums.",
    ]
    assert fork["sessionId"] == fork["sdkSessionId"] != first["sessionId"]
    assert fork["parentSessionId"] == first["sessionId"]
    assert fork["parentRunId"] == second["id"]
    session = client.get(f"/api/sessions/{fork['sessionId']}").json
    assert session["forkedFromRunId"] == second["id"]
    assert [session["title"], session["metadata"]] == ["Fruit", {"basket": 1}]
    forks = client.get(f"/api/sessions/{first['sessionId']}/forks").json
    assert [s["sessionId"] for s in forks] == [fork["sessionId"]]


@pytest.mark.main_job
def test_a_fork_from_an_earlier_run_or_message_lacks_the_later_turns(
    client: Client, project: Path, messages_api: MessagesAPI
) -> None:
    first = client.start(project, "Red. [[text Red it is.]]")
    client.resume(first["sessionId"], "Green. [[text Green it is.]]")
    through = client.messages(first["id"], type="assistant")[-1]["uuid"]

    at_run = client.fork(first["sessionId"], "Blue by run.", atRunId=first["id"])
    at_message = client.fork(first["sessionId"], "Blue by message.", atMessage=through)

    for run, prompt in ((at_run, "Blue by run."), (at_message, "Blue by message.")):
        assert run["status"] == "completed"
        assert run["parentRunId"] == first["id"]
        request = request_for(messages_api, prompt)
        assert "Red it is." in json.dumps(request["messages"])
        assert "Green" not in json.dumps(request["messages"])


def test_a_fork_from_the_middle_of_a_run_drops_the_rest_of_it(
    client: Client, project: Path, messages_api: MessagesAPI
) -> None:
    first = client.start(project, "One. [[text First.]]")
    second = client.resume(first["sessionId"], '[[tool Bash {"command": "ls"}]] [[text Second.]]')
    history = client.get(f"/api/sessions/{first['sessionId']}/messages").json
    tool_use = next(m for m in history if m["type"] == "assistant" and m["message"]["content"][0]["type"] == "tool_use")

    fork = client.fork(first["sessionId"], "After the call.", atRunId=second["id"], atMessage=tool_use["uuid"])

    assert fork["status"] == "completed"
    request = request_for(messages_api, "After the call.")
    assert "Second." not in [block.get("text") for m in request["messages"] for block in _blocks(m)]
    full = client.get(f"/api/sessions/{fork['sessionId']}/messages", history="full").json
    assert full[: len(full) - fork["messageCount"]] == history[: history.index(tool_use) + 1]


def _blocks(message: dict[str, object]) -> list[dict[str, object]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content  # type: ignore[return-value]


def test_a_fork_needs_an_assistant_message_of_the_main_thread(client: Client, project: Path) -> None:
    run = client.start(project, "Hello.")
    user, assistant = (client.messages(run["id"], type=kind)[0]["uuid"] for kind in ("user", "assistant"))
    result = run["result"]["uuid"]

    def fork(message: str) -> dict[str, str]:
        body = {"sessionId": run["sessionId"], "prompt": "x", "atMessage": message}
        answer = client.post("/api/runs/fork", body)
        assert answer.status == 400
        return answer.error

    assert fork(user)["field"] == "atMessage"
    assert assistant in fork(result)["message"]
    assert "no message" in fork("00000000-0000-4000-8000-000000000000")["message"]


def test_a_fork_may_use_another_directory(
    client: Client, project: Path, tmp_path: Path, messages_api: MessagesAPI
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = client.start(project, "Home.")
    fork = client.fork(first["sessionId"], 'Away. [[tool Bash {"command": "pwd"}]]', cwd=str(elsewhere))

    assert fork["status"] == "completed"
    assert fork["cwd"] == str(elsewhere)
    assert str(elsewhere) in json.dumps(client.messages(fork["id"], type="user"))
    again = client.resume(fork["sessionId"], "Still away?")
    assert [again["status"], again["cwd"]] == ["completed", str(elsewhere)]
    assert "Home." in prompts_sent(messages_api, "Still away?")[0]


@pytest.mark.main_job
def test_concurrent_forks_do_not_change_the_parents_transcript(client: Client, project: Path, home: Path) -> None:
    first = client.start(project, "The root.")
    transcript = transcript_path(first["cwd"], first["sdkSessionId"], {"HOME": str(home)})
    before, written = transcript.read_bytes(), transcript.stat().st_mtime_ns

    with ThreadPoolExecutor(3) as pool:
        forks = [pool.submit(client.fork, first["sessionId"], f"Branch {n}.") for n in range(2)]
        forks.append(pool.submit(client.resume, first["sessionId"], "The trunk."))
        runs = [fork.result() for fork in forks]

    assert [run["status"] for run in runs] == ["completed"] * 3
    assert len({run["sdkSessionId"] for run in runs}) == 3
    assert transcript.read_bytes() == before
    assert transcript.stat().st_mtime_ns == written


@pytest.mark.main_job
def test_images_reach_the_model_and_survive_a_fork(client: Client, project: Path, messages_api: MessagesAPI) -> None:
    run = client.start(project, "What is this?", images=[{"mediaType": "image/png", "data": PNG}])
    client.fork(run["sessionId"], "And what was that?")

    assert run["imageCount"] == 1
    for prompt in ("What is this?", "And what was that?"):
        request = request_for(messages_api, prompt)
        sources = [b["source"] for m in request["messages"] for b in _blocks(m) if b["type"] == "image"]
        assert [source["media_type"] for source in sources] == ["image/png"]  # type: ignore[index]


@pytest.mark.main_job
def test_the_result_contains_structured_output(client: Client, project: Path) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    run = client.start(
        project,
        'How many? [[json {"answer": 42}]] [[text Told.]]',
        options={"outputFormat": {"type": "json_schema", "schema": schema}},
    )

    assert run["status"] == "completed"
    assert run["result"]["structured_output"] == {"answer": 42}


@pytest.mark.main_job
def test_partial_messages_are_recorded_on_request(client: Client, project: Path) -> None:
    run = client.start(project, "[[chunks 20]]", options={"includePartialMessages": True})

    deltas = [
        m["event"]["delta"]["text"]
        for m in client.messages(run["id"], type="stream_event")
        if m["event"]["type"] == "content_block_delta"
    ]
    assert "".join(deltas) == "".join(f"{n} " for n in range(20))


def test_five_thousand_partial_messages_are_recorded(client: Client, project: Path) -> None:
    run = client.start(project, "[[chunks 5000]]", options={"includePartialMessages": True})

    messages = client.messages(run["id"])
    assert run["messageCount"] == len(messages) > 5_000
    text = "".join(
        m["event"]["delta"]["text"]
        for m in messages
        if m["type"] == "stream_event" and m["event"]["type"] == "content_block_delta"
    )
    assert text == "".join(f"{n} " for n in range(5000))


def test_a_message_of_ten_megabytes_is_stored_whole(client: Client, project: Path) -> None:
    run = client.start(project, "[[huge 10000000]]")

    assert run["status"] == "completed"
    assistant = client.messages(run["id"], type="assistant")[0]
    assert assistant["message"]["content"][0]["text"] == "x" * 10_000_000


def test_a_background_agent_belongs_to_the_run(client: Client, project: Path) -> None:
    agent = json.dumps({"description": "sub", "prompt": "[[slow 4 0.2]]", "subagent_type": "general-purpose"})
    run = client.start(project, f"[[tool Task {agent}]] [[text Started it.]]")

    results = client.messages(run["id"], type="result")
    assert len(results) == 2
    assert run["result"] == results[-1]
    assert run["result"]["origin"]["kind"] == "task-notification"
    assert client.messages(run["id"])[-1] == results[-1]
    assert run["costUsd"] > results[0]["total_cost_usd"]


def test_custom_agents_reach_claude_code(client: Client, project: Path) -> None:
    agent = json.dumps({"description": "sub", "prompt": "[[text I am the poet.]]", "subagent_type": "poet"})
    run = client.start(
        project,
        f"[[tool Task {agent}]] [[text Asked.]]",
        options={"agents": {"poet": {"description": "Writes poems.", "prompt": "You are a poet.", "model": "haiku"}}},
    )

    assert run["status"] == "completed"
    assert "I am the poet." in json.dumps(client.messages(run["id"]))


def test_four_workers_complete_twenty_concurrent_runs(client: Client, project: Path) -> None:
    with ThreadPoolExecutor(20) as pool:
        jobs = [pool.submit(client.start, project, f"Number {n}. [[text Heard {n}.]]", 300) for n in range(20)]
        runs = [job.result() for job in jobs]

    assert [run["status"] for run in runs] == ["completed"] * 20
    assert [run["result"]["result"] for run in runs] == [f"Heard {n}." for n in range(20)]
    assert len({run["sessionId"] for run in runs}) == 20
    spans = sorted((run["startedAt"], run["endedAt"]) for run in runs)
    for started, _ in spans:
        assert sum(1 for begun, ended in spans if begun <= started < ended) <= 4


@pytest.mark.main_job
def test_messages_are_stored_as_the_cli_wrote_them(serve: ServeFunction, project: Path, tmp_path: Path) -> None:
    written = tmp_path / "written.jsonl"
    tee = tmp_path / "claude"
    tee.write_text(
        f"#!{sys.executable} -IS\n"
        "import subprocess, sys\n"
        f"claude = subprocess.Popen([{str(bundled_cli())!r}, *sys.argv[1:]], stdout=subprocess.PIPE)\n"
        f"with open({str(written)!r}, 'ab') as log:\n"
        "    for line in claude.stdout:\n"
        "        log.write(line)\n"
        "        sys.stdout.buffer.write(line)\n"
        "        sys.stdout.buffer.flush()\n"
        "sys.exit(claude.wait())\n"
    )
    tee.chmod(0o755)
    client = Client(serve(CCM_CLI_PATH=tee).url)
    agent = json.dumps({"description": "sub", "prompt": "[[text Hi.]]", "subagent_type": "general-purpose"})
    run = client.start(
        project,
        f'[[tool Bash {{"command": "ls"}}]] [[tool Task {agent}]] [[text Smile: \U0001f600 \\u0000.]]',
        options={"includePartialMessages": True, "includeHookEvents": True},
    )

    lines = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    # Messages that only report the state of the run and of its prompt to the service are not recorded.
    states = [line for line in lines if line.get("subtype") == "session_state_changed"]
    of_prompt = [line for line in lines if line["type"] == "command_lifecycle"]
    expected = [line for line in lines if line["type"] not in NOT_MESSAGES and line not in states + of_prompt]
    assert client.messages(run["id"]) == expected
    # On a busy machine the agent ends after the turn, and Claude Code replays the notice of that too.
    prompt = next(line for line in expected if line.get("isReplay"))
    assert {line["command_uuid"] for line in of_prompt} == {prompt["uuid"]}
    assert len(expected) > 20
