"""Where Claude Code's program is, and where it keeps its own files.

Nothing here imports the SDK: a start needs these paths, and the SDK takes longer to import than the rest of a start.
"""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import unicodedata
from collections.abc import Mapping
from pathlib import Path

# The longest name of a project that Claude Code does not shorten.
NAME_LENGTH = 200
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def bundled_cli() -> Path:
    """Return the path of the Claude Code that comes inside the SDK's wheel.

    Raises:
        ModuleNotFoundError: the SDK is not installed.
    """
    spec = importlib.util.find_spec("claude_agent_sdk")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'claude_agent_sdk'", name="claude_agent_sdk")
    return Path(spec.origin).parent / "_bundled" / "claude"


def config_directory(environ: Mapping[str, str]) -> Path:
    """Return the directory of Claude Code's own files; a relative path starts at the directory that it runs in."""
    home = environ.get("CLAUDE_CONFIG_DIR") or os.path.join(environ.get("HOME") or Path.home(), ".claude")
    return Path(unicodedata.normalize("NFC", str(home)))


def transcript_path(cwd: str, sdk_session_id: str, environ: Mapping[str, str]) -> Path:
    """Return the path at which Claude Code writes the transcript of a session that runs in `cwd`."""
    return Path(cwd, config_directory(environ), "projects", project_name(cwd), f"{sdk_session_id}.jsonl")


def find_transcript(cwd: str, sdk_session_id: str, environ: Mapping[str, str]) -> Path | None:
    """Find the transcript of a session in any of Claude Code's projects."""
    expected = transcript_path(cwd, sdk_session_id, environ)
    if expected.is_file():
        return expected
    return next(iter(sorted(expected.parent.parent.glob(f"*/{sdk_session_id}.jsonl"))), None)


def project_name(cwd: str) -> str:
    """Return the name of a directory's project.

    Claude Code replaces each UTF-16 unit that is no ASCII letter or digit, and shortens a long name with a hash.
    """
    units = [unit for (unit,) in struct.iter_unpack("<H", os.path.realpath(cwd).encode("utf-16-le", "surrogatepass"))]
    name = re.sub("[^a-zA-Z0-9]", "-", "".join(map(chr, units)))
    return name if len(name) <= NAME_LENGTH else f"{name[:NAME_LENGTH]}-{_hash(units)}"


def _hash(units: list[int]) -> str:
    """Hash as JavaScript's `h = h * 31 + unit | 0`, its absolute value in base 36."""
    value = 0
    for unit in units:
        value = (value * 31 + unit) & 0xFFFFFFFF
    value = min(value, 2**32 - value)
    digits = ""
    while value:
        value, digit = divmod(value, 36)
        digits = DIGITS[digit] + digits
    return digits or "0"
