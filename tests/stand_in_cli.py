#!/usr/bin/env python3
"""A stand-in for the Claude Code CLI that answers at once with the messages that a test or benchmark scripts.

It speaks the CLI's side of stream-json on its standard streams. The prompt is JSON:

    {"messages": [...], "count": N, "pad": BYTES, "rate": N, "raw": "...", "exit": CODE, "stderr": "...",
     "states": false, "hold": true, "ignore_interrupt": true, "tool": SECONDS, "server": SECONDS, "late": "...",
     "result": {...}, "ask": [{"tool_name": "...", "input": {...}, ...}], "at_once": true,
     "seconds": N, "merges": true, "lifecycle": false, "deaf": true, "finishes": true}

It writes `messages` unchanged, then `count` assistant messages of `pad` bytes (`rate` of them a second, each with the
time at which it is written, as `sentAt`), then a result, and `late` once the input is closed. A `tool` process inherits
the output, a `server` process does not. The CLI requests permission for each item of `ask`, in turn or all `at_once`,
and writes each answer as a message of type `answered`. Any other prompt makes one short turn.

A turn lasts `seconds`, or until an interrupt if it is on `hold`. A message that arrives during a turn is queued for a
turn of its own; with `merges` it joins the current turn, as after a tool. The CLI replays each message and, if it has
a uuid, reports its states with `command_lifecycle`. With `deaf` it reads nothing after its prompt; with `finishes` an
interrupted turn succeeds, as if the interrupt had come at its very end.

With `--await-claim` it goes to the directory of its claim; STAND_IN_CLI_REFUSES names what it refuses then.

If STAND_IN_CLI_LOG is set, the CLI appends each line that it writes to that file.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # not imported at run time, for a fast start
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


# What the CLI refuses: `claim`, `start` (it exits at once if it is started in advance), `answer` (it says nothing).
REFUSED = os.environ.get("STAND_IN_CLI_REFUSES", "").split()
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
    """Write transcript entries to their file: enough for a resume.

    The first call copies the parent's transcript, as every fork does.
    """
    key = "".join(char if char.isalnum() and char.isascii() else "-" for char in os.path.realpath(os.getcwd()))
    path = os.path.join(projects(), key, SESSION + ".jsonl")
    entries = [] if os.path.exists(path) else copied()
    entries += [{"type": "assistant", "uuid": new_id(), "sessionId": SESSION, "text": text} for text in texts]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


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


class Lines:
    """The lines of the input, read with a timeout."""

    def __init__(self) -> None:
        self.ended = False
        self._bytes = b""

    def read(self, seconds: float | None) -> list[bytes]:
        """Return the complete lines that arrive within `seconds`; None waits indefinitely."""
        if self.ended:
            return []
        if select.select([0], [], [], seconds)[0]:
            received = os.read(0, 2**20)
            self.ended = not received
            self._bytes += received
        *lines, self._bytes = self._bytes.split(b"\n")
        return lines


class StandIn:
    def __init__(self) -> None:
        self._lines = Lines()
        self._queue: list[dict[str, Any]] = []
        # The script of the first prompt, which sets the CLI's behaviour, and that of the current turn.
        self._behaviour: dict[str, Any] | None = None
        self._script: dict[str, Any] = {}
        # The messages of the current turn.
        self._turn: list[dict[str, Any]] = []
        self._idle = True
        # Whether the first prompt has started.
        self._begun = False
        # The permission requests without an answer, by id.
        self._pending: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        while True:
            if self._queue and not self._turn:
                self._begin(self._queue.pop(0))
            elif self._lines.ended:
                break
            else:
                self._receive(None)
        if self._script.get("late"):
            transcript(self._script["late"])
            write(assistant(self._script["late"]))

    def _receive(self, seconds: float | None) -> None:
        if self._lines.ended or (self._behaviour or {}).get("deaf"):
            select.select([], [], [], seconds)
            return
        for line in self._lines.read(seconds):
            message = json.loads(line)
            if message["type"] == "control_request":
                self._control(message)
            elif message["type"] == "control_response":
                self._write_answer(message["response"])
            elif message["type"] == "user":
                if self._behaviour is None:
                    self._behaviour = script_of(message)
                self._state("running")
                self._report_state(message, "queued")
                self._queue.append(message)

    def _control(self, message: dict[str, Any]) -> None:
        kind = message["request"]["subtype"]
        if "answer" in REFUSED and "--await-claim" in sys.argv:
            return
        if kind == "interrupt" and self._script.get("ignore_interrupt"):
            return
        response = {}
        if kind == "claim_session":
            if "claim" in REFUSED:
                error = {"subtype": "error", "request_id": message["request_id"], "error": "not_a_spare: scripted"}
                control({"type": "control_response", "response": error})
                return
            os.chdir(message["request"]["cwd"])
        if kind == "interrupt":
            dropped = self._queue if message["request"].get("cancel_queued") else []
            for queued in dropped:
                self._report_state(queued, "cancelled")
            response = {"cancelled": [queued.get("uuid") for queued in dropped]}
            dropped.clear()
        reply = {"subtype": "success", "request_id": message["request_id"], "response": response}
        control({"type": "control_response", "response": reply})
        if kind == "interrupt" and self._turn:
            for request_id in self._pending:
                control({"type": "control_cancel_request", "request_id": request_id})
            self._pending.clear()
            if self._script.get("finishes"):
                self._end(result(), "completed")
            else:
                self._end(result(subtype="error_during_execution", is_error=True, result=None), "cancelled")

    def _state(self, name: str) -> None:
        idle = name == "idle"
        if (self._behaviour or {}).get("states", True) and idle != self._idle:
            control(state(name))
        self._idle = idle

    def _report_state(self, message: dict[str, Any], state: str) -> None:
        """Report the state of a message."""
        if "uuid" in message and (self._behaviour or {}).get("lifecycle", True):
            report = {"type": "command_lifecycle", "command_uuid": message["uuid"], "state": state}
            control({**report, "uuid": new_id(), "session_id": SESSION})

    def _replay(self, message: dict[str, Any]) -> None:
        """Replay a message, except the first, whose replay would only complicate the tests."""
        if self._begun:
            control({**message, "isReplay": True})

    def _begin(self, message: dict[str, Any]) -> None:
        """Start a turn and run it to its end, unless it is held."""
        self._script = script = script_of(message)
        self._turn = [message]
        self._report_state(message, "started")
        self._replay(message)
        self._begun = True
        transcript(text_of(message))
        write_messages(script)
        self._ask_all(script)
        if "exit" in script:
            os._exit(script["exit"])
        deadline = time.monotonic() + script.get("seconds", 0)
        while self._turn and (remaining := deadline - time.monotonic()) > 0:
            self._receive(remaining)
        if not self._turn or self._pending or script.get("hold"):
            return  # interrupted, without answers, or held
        if script.get("merges"):
            for merged in self._queue:
                self._replay(merged)
                self._report_state(merged, "started")
                self._report_state(merged, "completed")
                self._turn.append(merged)
            self._queue.clear()
        transcript(*["x" * script.get("pad", 100)] * script.get("count", 0))
        self._end(result(**script.get("result", {})), "completed")

    def _ask_all(self, script: dict[str, Any]) -> None:
        questions = script.get("ask", [])
        for together in [questions] if script.get("at_once") else [[question] for question in questions]:
            if self._turn and not self._lines.ended:
                self._ask(together)

    def _ask(self, questions: list[dict[str, Any]]) -> None:
        """Request permissions and wait for the answers; requests remain in `_pending` if the input ends first."""
        self._pending = {new_id(): question for question in questions}
        for request_id, question in self._pending.items():
            request = {"subtype": "can_use_tool", "input": {}, "tool_use_id": request_id, **question}
            control({"type": "control_request", "request_id": request_id, "request": request})
        while self._pending and not self._lines.ended:
            self._receive(None)

    def _write_answer(self, response: dict[str, Any]) -> None:
        question = self._pending.pop(response["request_id"])
        write({"type": "answered", "asked": question, "answer": response.get("response") or response.get("error")})
        sys.stdout.flush()

    def _end(self, result: dict[str, Any], state: str) -> None:
        """Write the turn's result and report the final state of its message."""
        first, self._turn = self._turn[0], []
        write(result)
        sys.stdout.flush()
        self._report_state(first, state)
        self._receive(0)
        if not self._queue:
            self._state("idle")


def text_of(message: dict[str, Any]) -> str:
    content = message["message"]["content"]
    return str(content if isinstance(content, str) else content[-1]["text"])


def script_of(message: dict[str, Any]) -> dict[str, Any]:
    text = text_of(message)
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        return {"messages": [assistant("heard: " + text)]}


def write_messages(script: dict[str, Any]) -> None:
    """Write a turn's messages, except the result."""
    for message in script.get("messages", []):
        write(message)
    begun = time.monotonic()
    for number in range(script.get("count", 0)):
        message = assistant("x" * script.get("pad", 100))
        if "rate" in script:
            time.sleep(max(0, begun + number / script["rate"] - time.monotonic()))
            message["sentAt"] = time.time()
        write(message)
        if "rate" in script:
            sys.stdout.flush()
    if "stderr" in script:
        sys.stderr.write(script["stderr"] + "\n")
        sys.stderr.flush()
    if "raw" in script:
        write(script["raw"])
    if script.get("tool") or script.get("server"):
        # The agent's processes, in sessions of their own as the real CLI's are: only the mark in their environment
        # lets the service find and end them.
        import subprocess

        for name, output in (("tool", None), ("server", subprocess.DEVNULL)):
            if script.get(name):
                subprocess.Popen(["sleep", str(script[name])], start_new_session=True, stdout=output)
    sys.stdout.flush()


if "start" in REFUSED and "--await-claim" in sys.argv:
    sys.exit("error: unknown option '--await-claim'")
StandIn().run()
