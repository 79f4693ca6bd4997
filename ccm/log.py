"""Logs on stderr: one line a record, whatever is in it."""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


# Werkzeug colours what `flask run` says.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class OneLine(logging.Formatter):
    """Escapes what would end or forge a line: control characters come from prompts, paths and headers."""

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
    """Send everything of `level` and above to stderr. Called by programs, never by a library or a test."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)
    logging.getLogger("claude_agent_sdk").setLevel(logging.CRITICAL)  # its errors come back as the run's own
    # That an option makes some questions needless is no news to who has set it.
    warnings.filterwarnings("ignore", "can_use_tool will not be invoked")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("werkzeug").setLevel(logging.INFO)
