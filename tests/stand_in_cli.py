#!/usr/bin/env python3
"""A stand-in for the Claude Code CLI: answers at once, and says just what a test or a benchmark has it say.

It speaks the CLI's side of stream-json on its standard streams. The prompt is JSON:

    {"messages": [...], "count": N, "pad": BYTES, "raw": "...", "exit": CODE, "stderr": "...", "states": false,
     "hold": true, "ignore_interrupt": true, "tool": SECONDS, "server": SECONDS, "late": "...", "result": {...},
     "ask": [{"tool_name": "...", "input": {...}, ...}], "at_once": true}

`messages` are written as they are, then `count` assistant messages of `pad` bytes, then a result; `late` comes once the
input is closed. A `tool` holds the output open, a `server` does not. It asks whether it may do each thing in `ask`, one
after another or all `at_once`, and says each answer as a message of type `answered`. Anything else in the prompt makes
one short turn.
With STAND_IN_CLI_LOG in its environment it writes there each line that it writes.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # imports nothing that it does not need: it is to start fast
    from typing import Any

LOG = os.environ.get("STAND_IN_CLI_LOG")


def new_id() -> str:
    text = os.urandom(16).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"


def write(message: object) -> None:
    line = message if isinstance(message, str) else json.dumps(message)
    sys.stdout.write(line + "\n")
    if LOG:
        with open(LOG, "a", encoding="utf-8") as log:
            log.write(line + "\n")


SESSION = next((a.split("=", 1)[1] for a in sys.argv if a.startswith("--session-id=")), new_id())


def control(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def projects() -> str:
    home = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.join(os.environ["HOME"], ".claude")
    return os.path.join(home, "projects")


def argument(name: str) -> str | None:
    return next((a.split("=", 1)[1] for a in sys.argv if a.startswith(f"--{name}=")), None)


def transcript(*texts: str) -> None:
    """What the real CLI leaves behind, enough for a resume: a file, and its mirror on stdout where that is asked for.

    The first call copies the parent's, as every fork does.
    """
    key = "".join(char if char.isalnum() and char.isascii() else "-" for char in os.path.realpath(os.getcwd()))
    path = os.path.join(projects(), key, SESSION + ".jsonl")
    entries = [] if os.path.exists(path) else copied()
    entries += [{"type": "assistant", "uuid": new_id(), "sessionId": SESSION, "text": text} for text in texts]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    if "--session-mirror" in sys.argv:
        control({"type": "transcript_mirror", "filePath": path, "entries": entries})


def copied() -> list[Any]:
    parent = argument("resume")
    for folder in os.listdir(projects()) if parent else ():
        path = os.path.join(projects(), folder, f"{parent}.jsonl")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                return [json.loads(line) | {"sessionId": SESSION} for line in file]
    return []


def state(name: str) -> dict[str, object]:
    return {"type": "system", "subtype": "session_state_changed", "state": name, "session_id": SESSION}


def result(**fields: object) -> dict[str, object]:
    usage = {"stand-in": {"costUSD": 0.25}}
    return {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "result": "Done.",
        "session_id": SESSION,
        "num_turns": 1,
        "duration_ms": 1,
        "duration_api_ms": 1,
        "total_cost_usd": 0.25,
        "model_usage_since_last_result": usage,
        "uuid": new_id(),
        **fields,
    }


def assistant(text: str) -> dict[str, object]:
    content = [{"type": "text", "text": text}]
    return {
        "type": "assistant",
        "message": {"role": "assistant", "model": "stand-in", "content": content},
        "parent_tool_use_id": None,
        "session_id": SESSION,
        "uuid": new_id(),
    }


def ask_all(script: dict[str, Any]) -> bool:
    questions = script.get("ask", [])
    return all(ask(some) for some in ([questions] if script.get("at_once") else [[one] for one in questions]))


def ask(questions: list[dict[str, Any]]) -> bool:
    """Ask, and say each answer as it comes. False if the turn was interrupted meanwhile."""
    asked = {new_id(): question for question in questions}
    for request_id, question in asked.items():
        request = {"subtype": "can_use_tool", "input": {}, "tool_use_id": request_id, **question}
        control({"type": "control_request", "request_id": request_id, "request": request})
    while asked:
        message = json.loads(sys.stdin.readline() or "null")
        if message is None:
            return False
        if message["type"] == "control_response":
            response = message["response"]
            question = asked.pop(response["request_id"])
            write({"type": "answered", "asked": question, "answer": response.get("response") or response.get("error")})
            sys.stdout.flush()
        elif message["type"] == "control_request" and message["request"]["subtype"] == "interrupt":
            for request_id in asked:
                control({"type": "control_cancel_request", "request_id": request_id})
            interrupted(message)
            return False
    return True


def interrupted(message: dict[str, Any]) -> None:
    reply = {"subtype": "success", "request_id": message["request_id"], "response": {}}
    control({"type": "control_response", "response": reply})
    write(result(subtype="error_during_execution", is_error=True, result=None))
    control(state("idle"))


def turn(script: dict[str, Any]) -> None:
    states = script.get("states", True)
    if states:
        control(state("running"))
    for message in script.get("messages", []):
        write(message)
    said = ["x" * script.get("pad", 100)] * script.get("count", 0)
    for text in said:
        write(assistant(text))
    if "stderr" in script:
        sys.stderr.write(script["stderr"] + "\n")
        sys.stderr.flush()
    if "raw" in script:
        write(script["raw"])
    if script.get("tool") or script.get("server"):
        # Processes of the agent, in sessions of their own as the real CLI's are. Nobody but their mark ends them.
        import subprocess

        for name, output in (("tool", None), ("server", subprocess.DEVNULL)):
            if script.get(name):
                subprocess.Popen(["sleep", str(script[name])], start_new_session=True, stdout=output)
    sys.stdout.flush()
    asked = ask_all(script)
    if "exit" in script:
        os._exit(script["exit"])
    if script.get("hold") or not asked:
        return
    transcript(*said)
    write(result(**script.get("result", {})))
    if states:
        control(state("idle"))
    sys.stdout.flush()


def main() -> None:
    script: dict[str, Any] = {}
    for line in iter(sys.stdin.readline, ""):  # and not what it has read ahead
        message = json.loads(line)
        if message["type"] == "control_request":
            kind = message["request"]["subtype"]
            if kind == "interrupt" and script.get("ignore_interrupt"):
                continue
            if kind == "interrupt":
                interrupted(message)
                continue
            reply = {"subtype": "success", "request_id": message["request_id"], "response": {}}
            control({"type": "control_response", "response": reply})
        elif message["type"] == "user":
            content = message["message"]["content"]
            text = content if isinstance(content, str) else content[-1]["text"]
            try:
                script = dict(json.loads(text))
            except (TypeError, ValueError):
                script = {"messages": [assistant("heard: " + text)]}
            transcript(text)
            turn(script)
    if script.get("late"):
        transcript(script["late"])
        write(assistant(script["late"]))


main()
