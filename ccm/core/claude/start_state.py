"""A stub."""

from collections.abc import Mapping


def user_state(_environ: Mapping[str, str], _program: str | None = None) -> str | None:
    return ""


def start_state(_cwd: str, _environ: Mapping[str, str], _program: str | None = None) -> str | None:
    return ""
