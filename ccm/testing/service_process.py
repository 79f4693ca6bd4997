"""The service as a process, and an environment in which Claude Code needs no login."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

APP = Path(__file__).parents[2] / "app.py"
# Seconds; a generous bound for busy machines.
START_TIMEOUT = 60.0


def stand_in_variables(messages_api: str) -> dict[str, str]:
    """Return the variables with which Claude Code calls the stand-in and nothing else."""
    return {
        "ANTHROPIC_BASE_URL": messages_api,
        "ANTHROPIC_API_KEY": "a-stand-in-asks-for-no-key",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def credential_free_environment(messages_api: str, home: str) -> dict[str, str]:
    """Return an environment, built from scratch, in which Claude Code runs offline and without a login."""
    own = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": home}
    return own | stand_in_variables(messages_api)


class ServiceProcess:
    """A service as a process on a free port; a context manager.

    Args:
        environ: the complete environment of the process.
        on_line: called with each line of its log, in a separate thread.
        through: a command that the service's command line is appended to.

    Attributes:
        log: the lines of the log so far.
        url: the address of the service, once it listens.
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
        """Wait until the service listens.

        Raises:
            RuntimeError: it did not start; the message has its log.
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
        """Wait until the process has ended and its log is complete. Return the exit code."""
        code = self.process.wait()
        self._reader.join()
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code
