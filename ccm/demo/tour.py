"""The tour: starts, resumes and forks real runs over HTTP, and prints each step as a curl command with its answer."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from textwrap import indent
from typing import Any

from ccm.errors import CommandRefused
from ccm.testing.messages_api import MessagesAPI
from ccm.testing.service_process import ServiceProcess, credential_free_environment

SERVE_PORT = "3000"
# How long the service takes to have a Claude Code ready again after a run (seconds). If it takes longer, the run starts
# its own.
SPARE_TIME = 4.0
SHOWN_FIELDS = ("runId", "sessionId", "mode", "status", "parentRunId", "parentSessionId", "messageCount", "costUsd")

# The [[directives]] tell the stand-in what to answer (ccm/testing/script.py). A real model needs none.
WRITE_FILE = (
    'Write a haiku into haiku.txt. [[tool Write {"file_path": "%s/haiku.txt", "content": "a run becomes rows\\n'
    'every turn begins as fork\\nnothing is rewritten\\n"}]] [[text I wrote the haiku into haiku.txt.]]'
)
RESUME_PROMPT = "What did you just do? [[text In the turn before this one I wrote haiku.txt.]]"
FORK_PROMPT = 'Another way: read it out. [[tool Bash {"command": "cat haiku.txt"}]] [[text There it is.]]'
FOLLOW_PROMPT = "Say hello. [[text Hello.]]"


class Tour:
    """The tour through the main features, each step shown as a curl command.

    Args:
        echo: prints a line.
    """

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self._url = ""

    def run(self, serve: bool) -> None:
        """Run the tour. With `serve`, keep the service running until Ctrl-C.

        The service gets only PATH from the shell's environment, and with `serve` PORT. Otherwise a CCM_API_TOKEN would
        lock the tour out, and a CCM_WEBHOOK_URL would get the events of its runs.

        Raises:
            CommandRefused: the service did not start; the message has its log.
        """
        # Without handlers, SIGTERM or a closed terminal would end this process and leave the service behind.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cc-manager-demo-")))
            home, project = folder / "home", folder / "project"
            home.mkdir()
            project.mkdir()
            api = stack.enter_context(MessagesAPI())
            environ = credential_free_environment(api.url, str(home)) | {"DATABASE_PATH": str(folder / "db.sqlite")}
            if serve:
                # The port of the README's samples, unless the shell sets another.
                environ["PORT"] = os.environ.get("PORT") or SERVE_PORT
            try:
                service = stack.enter_context(ServiceProcess(environ, self._echo if serve else None))
            except RuntimeError as error:
                advice = "\nSet PORT to use another port, such as PORT=3001, or a free one with PORT=0."
                raise CommandRefused(f"The demo ends: {error}{advice if serve else ''}") from None
            self._url = service.url
            self._echo("The real Claude Code, a stand-in for the model, no login. The service listens on " + self._url)
            self._show_steps(str(project))
            self._show_next_steps()
            if serve:
                self._echo(f"\nServing on {self._url} until Ctrl-C; use {project} as `cwd`.")
                try:
                    service.wait()
                except KeyboardInterrupt:
                    self._echo("\nStopping.")

    def _show_steps(self, project: str) -> None:
        self._echo("\n1. Start a run; it writes a file. ?wait= delays the answer until the run has ended.")
        first = self._request("POST", "/api/runs/start?wait=60", {"cwd": project, "prompt": WRITE_FILE % project})
        self._echo(f"\n   The file exists:\n{indent(Path(project, 'haiku.txt').read_text().rstrip(), '   ')}")

        self._echo("\n2. Read what happened: every message of the SDK, unchanged.")
        self._request("GET", f"/api/runs/{first['id']}/messages?type=assistant")

        self._echo("\n3. Resume: the session continues, in a fork of its transcript.")
        body = {"sessionId": first["sessionId"], "prompt": RESUME_PROMPT}
        self._request("POST", "/api/runs/resume?wait=60", body)

        self._echo("\n4. Fork from the first run: a new session, without the resume.")
        body = {"sessionId": first["sessionId"], "atRunId": first["id"], "prompt": FORK_PROMPT}
        self._request("POST", "/api/runs/fork?wait=60", body | {"title": "Another way"})

        self._echo("\n5. Follow a run live. The service keeps a Claude Code waiting for the next one (CCM_SPARE_RUNS).")
        time.sleep(SPARE_TIME)
        self._follow({"cwd": project, "prompt": FOLLOW_PROMPT})

        self._echo("\n6. The tree of runs:\n")
        self._tree()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request, print it as a curl command with the main fields of its answer, and return the answer."""
        words = ["curl", "-s"]
        if body is not None:
            words += ["-X", method, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
        self._echo("\n   $ " + shlex.join([*words, self._url + path]))
        answer = self._send(method, path, body)
        if isinstance(answer, list):
            for item in answer:
                self._echo("   " + _shortened(item))
        else:
            shown = {name: answer[name] for name in SHOWN_FIELDS}
            if answer["result"]:
                shown["result"] = {"result": answer["result"].get("result"), "...": "..."}
            self._echo(indent(json.dumps(shown | {"...": "..."}, indent=2), "   "))
        return answer

    def _follow(self, body: Mapping[str, Any]) -> None:
        """Start a run and read its stream; say when the model's first message came, and show that."""
        begun = time.monotonic()
        run = self._request("POST", "/api/runs/start", body)
        path = f"/api/runs/{run['id']}/stream"
        self._echo(f"\n   $ curl -sN {self._url}{path}")
        with self._open("GET", path) as lines:
            data = (line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: "))
            first = next(message for message in map(json.loads, data) if message.get("type") == "assistant")
            self._echo(f"   {_shortened(first)}\n   first message after {(time.monotonic() - begun) * 1000:.0f} ms")
            for _ in lines:
                pass  # until the run has ended

    def _open(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        response: HTTPResponse = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
        return response

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._open(method, path, body) as response:
            return json.load(response)

    def _tree(self) -> None:
        # Oldest first, which puts each run of the tour below its parent.
        depths: dict[str | None, int] = {None: -1}
        for run in reversed(self._send("GET", "/api/runs")):
            depth = depths[run["id"]] = depths[run["parentRunId"]] + 1
            prompt = run["prompt"].partition(" [[")[0]
            line = f"{run['mode']:6}  run {run['id'][:8]}  session {run['sessionId'][:8]}  {prompt}"
            self._echo("   " + "  " * depth + ("└─ " if depth else "") + line)

    def _show_next_steps(self) -> None:
        self._echo(
            "\nTo continue with a real login, log in to Claude Code once as this user (run `claude`, then /login)\n"
            "or set ANTHROPIC_API_KEY, and start the service with `python app.py`. The requests stay the same; the\n"
            "[[directives]] in the prompts above are for the stand-in only (ccm/testing/script.py lists them all)."
        )


def _shortened(message: Mapping[str, Any]) -> str:
    text = json.dumps(message)
    return text if len(text) <= 300 else text[:300] + " ..."
