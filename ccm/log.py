"""Logs on stderr: one line for each record, whatever it contains."""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings

# Werkzeug colours its log lines under `flask run`.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class OneLineFormatter(logging.Formatter):
    """A formatter that escapes control characters, because those from prompts, paths and headers could forge lines."""

    converter = staticmethod(time.gmtime)  # UTC, as everywhere
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = COLOUR.sub("", super().format(record)).strip()
        if text.isprintable():
            return text
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def configure(level: str) -> None:
    """Log records of `level` and above to stderr. For entry points only, because it replaces the process's handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("claude_agent_sdk").setLevel(logging.CRITICAL)  # the runs' own errors report them
    # The SDK warns that an option makes some permission questions unnecessary, which is why it was set.
    warnings.filterwarnings("ignore", "can_use_tool will not be invoked")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("werkzeug").setLevel(logging.INFO)
