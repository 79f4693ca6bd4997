"""The tour: start, resume and fork real runs over HTTP, told as curl lines with their answers."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ccm.errors import CommandRefused
from ccm.testing.messages_api import MessagesAPI

APP = Path(__file__).parents[2] / "app.py"
START_TIMEOUT = 60.0
SERVE_PORT = "3000"
SHOWN_FIELDS = ("runId", "sessionId", "mode", "status", "parentRunId", "parentSessionId", "messageCount", "costUsd")

# What the stand-in has Claude do (ccm/testing/script.py). A real model needs no such script.
WRITE_FILE = (
    'Write a haiku into haiku.txt. [[tool Write {"file_path": "%s/haiku.txt", "content": "a run becomes rows\\n'
    'every turn begins as fork\\nnothing is rewritten\\n"}]] [[text I wrote the haiku into haiku.txt.]]'
)
RESUME_PROMPT = "What did you just do? [[text In the turn before this one I wrote haiku.txt.]]"
FORK_PROMPT = 'Another way: read it out. [[tool Bash {"command": "cat haiku.txt"}]] [[text There it is.]]'


def credential_free_environment(messages_api: str, home: str) -> dict[str, str]:
    """An environment made from nothing, in which Claude Code runs whole, offline and without a login."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": home,
        "ANTHROPIC_BASE_URL": messages_api,
        "ANTHROPIC_API_KEY": "a-stand-in-asks-for-no-key",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


class ServiceProcess:
    """A service as a process of its own on a free port; a context manager.

    Args:
        environ: its environment, whole.
        on_line: called with each line of its log, in a thread of this object's own.
        through: a program that starts it, with its arguments.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        on_line: Callable[[str], None] | None = None,
        through: Sequence[str] = (),
    ) -> None:
        self.log: list[str] = []
        self.url = ""
        self._on_line = on_line
        self._settled = threading.Event()
        self.process = subprocess.Popen(
            [*through, sys.executable, str(APP)], env={"PORT": "0", **environ}, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, name="service-log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.log.append(line.rstrip())
            before, marker, url = self.log[-1].partition("listening on ")
            if before and marker:
                self.url = url
                self._settled.set()
            if self._on_line is not None:
                self._on_line(self.log[-1])
        self._settled.set()

    def __enter__(self) -> ServiceProcess:
        """
        Raises:
            RuntimeError: it did not start; with what it said.
        """
        if not self._settled.wait(START_TIMEOUT) or not self.url:
            self.process.kill()
            self.wait()
            raise RuntimeError("the service did not start:\n" + "\n".join(self.log))
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended and its log is read to the end."""
        code = self.process.wait()
        self._reader.join()
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code


class Tour:
    """Shows the main job, each step as the curl line that does it.

    Args:
        echo: prints a line.
    """

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self._url = ""

    def run(self, serve: bool) -> int:
        """Show it all; with `serve`, leave the service running until Ctrl-C. The exit code.

        Of the shell's environment it heeds PATH alone, and with `serve` PORT: a token that is set there would lock the
        tour out, and a webhook's address would be told of its runs.

        Raises:
            CommandRefused: the service did not start; with what it said.
        """
        # Left alone, SIGTERM and a closed terminal would end this process and leave the service behind.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cc-manager-demo-")))
            home, project = folder / "home", folder / "project"
            home.mkdir()
            project.mkdir()
            api = stack.enter_context(MessagesAPI())
            environ = credential_free_environment(api.url, str(home)) | {
                "DATABASE_PATH": str(folder / "db.sqlite"),
                "LOG_LEVEL": "info",
            }
            if serve:
                # The port of the README's samples, unless the shell names another.
                environ["PORT"] = os.environ.get("PORT") or SERVE_PORT
            try:
                service = stack.enter_context(ServiceProcess(environ, self._echo if serve else None))
            except RuntimeError as error:
                advice = "\nAnother port is taken with PORT=3001, a free one with PORT=0." if serve else ""
                raise CommandRefused(f"The demo ends: {error}{advice}") from None
            self._url = service.url
            self._echo("The real Claude Code, a stand-in for the model, no login. The service listens on " + self._url)
            self._tell(str(project))
            self._how_to_go_on()
            if serve:
                self._serve(service, project)
        return 0

    def _tell(self, project: str) -> None:
        self._echo("\n1. Start a run; it writes a file. ?wait= holds the answer until the run has ended.")
        first = self._request("POST", "/api/runs/start?wait=60", {"cwd": project, "prompt": WRITE_FILE % project})
        self._echo(f"\n   The file is really there:\n{_indent(Path(project, 'haiku.txt').read_text())}")

        self._echo("\n2. Read what happened: every message of the SDK, as the SDK gave it.")
        self._request("GET", f"/api/runs/{first['id']}/messages?type=assistant")

        self._echo("\n3. Resume: the session goes on, in a fork of its transcript.")
        body = {"sessionId": first["sessionId"], "prompt": RESUME_PROMPT}
        self._request("POST", "/api/runs/resume?wait=60", body)

        self._echo("\n4. Fork from the first run: a new session that knows nothing of the resume.")
        body = {"sessionId": first["sessionId"], "atRunId": first["id"], "prompt": FORK_PROMPT}
        self._request("POST", "/api/runs/fork?wait=60", body | {"title": "Another way"})

        self._echo("\n5. The tree of runs:\n")
        self._tree()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send it, print it as a curl line, print what matters of the answer."""
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
            self._echo(_indent(json.dumps(shown | {"...": "..."}, indent=2)))
        return answer

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy
        try:
            with opener.open(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.read().decode()}") from None

    def _tree(self) -> None:
        runs = sorted(self._send("GET", "/api/runs"), key=lambda run: str(run["createdAt"]))
        children: dict[str | None, list[dict[str, Any]]] = {}
        for run in runs:
            children.setdefault(run["parentRunId"], []).append(run)

        def branch(parent: str | None, depth: int) -> None:
            for run in children.get(parent, []):
                prompt = run["prompt"].partition(" [[")[0]
                line = f"{run['mode']:6}  run {run['id'][:8]}  session {run['sessionId'][:8]}  {prompt}"
                self._echo("   " + "  " * depth + ("└─ " if depth else "") + line)
                branch(run["id"], depth + 1)

        branch(None, 0)

    def _how_to_go_on(self) -> None:
        self._echo(
            "\nTo go on with a real login: log in once with Claude Code as this user (run `claude`, then /login), or\n"
            "set ANTHROPIC_API_KEY, and start the service with `python app.py`. The requests stay the same; the\n"
            "[[directives]] in the prompts above are for the stand-in only (ccm/testing/script.py has them all)."
        )

    def _serve(self, service: ServiceProcess, project: Path) -> None:
        self._echo(f"\nServing on {self._url} until Ctrl-C; {project} is there to work in.")
        try:
            service.wait()
        except KeyboardInterrupt:
            self._echo("\nStopping.")


def _indent(text: str) -> str:
    return "\n".join("   " + line for line in text.rstrip().splitlines())


def _shortened(message: Mapping[str, Any]) -> str:
    text = json.dumps(message)
    return text if len(text) <= 300 else text[:300] + " ..."
