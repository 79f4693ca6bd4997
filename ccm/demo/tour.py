"""The tour: starts, resumes and forks real runs over HTTP, and prints each step as a curl command with its answer."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from textwrap import indent
from typing import Any
from urllib.parse import urlencode

from ccm.demo.client import DemoClient, Refused
from ccm.errors import CommandRefused
from ccm.settings.settings import Settings, is_setting
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

    def run(self, serve: bool) -> None:
        """Run the tour. With `serve`, use the shell's settings, and keep the service running until Ctrl-C.

        Without it the service gets only PATH from the shell's environment, so that the tour neither changes a database
        nor calls a CCM_WEBHOOK_URL.

        Raises:
            BadSetting: a setting is invalid.
            CommandRefused: the service did not start; the message has its log.
        """
        given = settings_in(os.environ) if serve else {}
        settings = Settings.from_env(given)
        # Without handlers, SIGTERM or a closed terminal would end this process and leave the service behind.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        with ExitStack() as stack:
            folder = Path(stack.enter_context(_temporary_directory()))
            home, project = folder / "home", folder / "project"
            home.mkdir()
            project.mkdir()
            if settings.allowed_roots:
                project = Path(stack.enter_context(_temporary_directory(settings.allowed_roots[0])))
            api = stack.enter_context(MessagesAPI(keep_requests=False))
            own = credential_free_environment(api.url, str(home)) | {"DATABASE_PATH": str(folder / "db.sqlite")}
            try:
                service = stack.enter_context(ServiceProcess(own | given, self._echo if serve else None))
            except RuntimeError as error:
                advice = "\nSet PORT to use another port, such as PORT=3001, or a free one with PORT=0."
                raise CommandRefused(f"The demo ends: {error}{advice if serve else ''}") from None
            self._echo(
                "The real Claude Code, a stand-in for the model, no login. The service listens on " + service.url
            )
            client = DemoClient(service.url, settings)
            if serve:
                self._show_settings(given, client.notes)
            try:
                self._show_steps(client, project, settings)
            except Refused as refused:
                self._echo(f"   {refused}\n\nThe tour ends, because the service refused this step.")
            self._show_next_steps()
            if serve:
                self._echo(f"\nServing on {service.url} until Ctrl-C; use {project} as `cwd`.")
                try:
                    service.wait()
                except KeyboardInterrupt:
                    self._echo("\nStopping.")

    def _show_settings(self, given: Mapping[str, str], notes: Iterable[str]) -> None:
        """Say which settings the service has, by name only because some are secret, and what the demo sets itself."""
        self._echo(f"Its settings from your environment: {', '.join(sorted(given))}.")
        kept = given.keys() & {"DATABASE_PATH", "DATABASE_URL"}
        database = "" if kept else " and the database (DATABASE_PATH names one to keep)"
        self._echo(
            f"The demo's own, and deleted at its end: HOME and the login of the agents, their directory{database}."
        )
        for note in notes:
            self._echo(note)

    def _show_steps(self, client: DemoClient, project: Path, settings: Settings) -> None:
        """Show the steps.

        Raises:
            Refused: the service refused one, because of its settings.
        """
        cwd = str(project)
        self._echo("\n1. Start a run; it writes a file. ?wait= delays the answer until the run has ended.")
        body = {"cwd": cwd, "prompt": WRITE_FILE % cwd}
        first = self._request(client, "POST", "/api/runs/start?wait=60", body)
        haiku = project / "haiku.txt"
        if haiku.exists():  # without it the settings forbid the run to write
            self._echo(f"\n   The file exists:\n{indent(haiku.read_text().rstrip(), '   ')}")

        self._echo("\n2. Read what happened: every message of the SDK, unchanged.")
        self._request(client, "GET", f"/api/runs/{first['id']}/messages?type=assistant")

        self._echo("\n3. Resume: the session continues, in a fork of its transcript.")
        body = {"sessionId": first["sessionId"], "prompt": RESUME_PROMPT}
        self._request(client, "POST", "/api/runs/resume?wait=60", body)

        self._echo("\n4. Fork from the first run: a new session, without the resume.")
        body = {"sessionId": first["sessionId"], "atRunId": first["id"], "prompt": FORK_PROMPT}
        self._request(client, "POST", "/api/runs/fork?wait=60", body | {"title": "Another way"})

        waiting = " The service keeps a Claude Code waiting for the next one (CCM_SPARE_RUNS)."
        self._echo(f"\n5. Follow a run live.{waiting if settings.spare_runs else ''}")
        time.sleep(SPARE_TIME if settings.spare_runs else 0)
        self._follow(client, {"cwd": cwd, "prompt": FOLLOW_PROMPT})

        self._echo("\n6. The tree of runs:\n")
        self._tree(client, cwd)

    def _request(self, client: DemoClient, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request, print it as a curl command with the main fields of its answer, and return the answer."""
        self._echo("\n   $ " + client.command(method, path, body))
        answer = client.send(method, path, body)
        if isinstance(answer, list):
            for item in answer:
                self._echo("   " + _shortened(item))
        else:
            shown = {name: answer[name] for name in SHOWN_FIELDS}
            if answer["error"]:
                shown["error"] = answer["error"]
            if answer["result"]:
                shown["result"] = {"result": answer["result"].get("result"), "...": "..."}
            self._echo(indent(json.dumps(shown | {"...": "..."}, indent=2), "   "))
        return answer

    def _follow(self, client: DemoClient, body: Mapping[str, Any]) -> None:
        """Start a run and read its stream; say when the model's first message came, and show that."""
        begun = time.monotonic()
        run = self._request(client, "POST", "/api/runs/start", body)
        path = f"/api/runs/{run['id']}/stream"
        self._echo("\n   $ " + client.command("GET", path, stream=True))
        with client.open("GET", path) as lines:
            data = (line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: "))
            first = next((message for message in map(json.loads, data) if message.get("type") == "assistant"), None)
            if first is not None:  # without it the settings let the run end before the model's answer
                self._echo(f"   {_shortened(first)}\n   first message after {(time.monotonic() - begun) * 1000:.0f} ms")
            for _ in lines:
                pass  # until the run has ended

    def _tree(self, client: DemoClient, cwd: str) -> None:
        # Oldest first, which puts each run of the tour below its parent.
        depths: dict[str | None, int] = {None: -1}
        for run in reversed(client.send("GET", f"/api/runs?{urlencode({'cwd': cwd})}")):
            depth = depths[run["id"]] = depths[run["parentRunId"]] + 1
            prompt = run["prompt"].partition(" [[")[0]
            line = f"{run['mode']:6}  run {run['id'][:8]}  session {run['sessionId'][:8]}  {prompt}"
            self._echo("   " + "  " * depth + ("└─ " if depth else "") + line)

    def _show_next_steps(self) -> None:
        self._echo(
            "\nTo continue with a real login, log in to Claude Code once as this user: run\n"
            "`.venv/lib/python3*/site-packages/claude_agent_sdk/_bundled/claude`, then /login. Or set\n"
            "ANTHROPIC_API_KEY. Start the service with `.venv/bin/python app.py`. The requests stay the same; the\n"
            "[[directives]] in the prompts above are for the stand-in only (`flask stand-in --help` lists them all)."
        )


def settings_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of a service in an environment. PORT is 3000 unless it is set."""
    found = {name: value for name, value in environ.items() if is_setting(name)}
    given = {name: value for name, value in found.items() if value.strip() or name == "CCM_SETTING_SOURCES"}
    if "DATABASE_URL" in given:  # libpq's variables may complete it
        given |= {name: value for name, value in environ.items() if name.startswith("PG")}
    return {"PORT": SERVE_PORT} | given


def _temporary_directory(root: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="cc-manager-demo-", dir=root)
    except OSError as error:
        raise CommandRefused(
            f"The demo ends: it cannot make a directory: {error.strerror} ({error.filename})."
        ) from None


def _shortened(message: Mapping[str, Any]) -> str:
    text = json.dumps(message)
    return text if len(text) <= 300 else text[:300] + " ..."
