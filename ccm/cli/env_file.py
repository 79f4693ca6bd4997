"""Environment files: `flask --env-file PATH` reads the one that it is given, and no other may set a setting."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import click
from flask.cli import ScriptInfo

from ccm.errors import BadSetting
from ccm.settings.settings import is_setting

# The files that `flask` reads without being told, each from the working directory or the nearest one above that has it.
DEFAULT_FILES = (".flaskenv", ".env")
# The beginnings of variables that also decide on which database or transcripts a command works: libpq's, Claude Code's.
OTHERS = ("PG", "CLAUDE_")


def check_default_files() -> None:
    """Refuse settings from a file that the command line does not name.

    `python app.py` reads no such file. A command would work on another database than the service, in the directory of
    a project perhaps on that project's own.

    Raises:
        BadSetting: `flask` has read settings from one of DEFAULT_FILES.
    """
    context = click.get_current_context(silent=True)
    info = None if context is None else context.find_object(ScriptInfo)
    # Without python-dotenv `flask` reads no file.
    if info is None or not info.load_dotenv_defaults or importlib.util.find_spec("dotenv") is None:
        return
    named = {Path(word.rpartition("=")[2]).resolve() for word in sys.argv[1:]}
    for path in filter(None, map(_nearest, DEFAULT_FILES)):
        settings = [name for name in _variables(path) if is_setting(name) or name.startswith(OTHERS)]
        if settings and path.resolve() not in named:
            raise BadSetting(
                f"flask has read {', '.join(settings)} from {path}, which `python app.py` does not read. Name the file "
                "with `flask --env-file PATH` if it is the service's, or else set FLASK_SKIP_DOTENV=1."
            )


def _variables(path: Path) -> Iterable[str]:
    """Return the names of the variables in a file, as `flask` reads it."""
    from dotenv import dotenv_values  # noqa: PLC0415  # not necessarily installed

    return dotenv_values(path, interpolate=False)


def _nearest(name: str) -> Path | None:
    folder = Path.cwd()
    return next((path for above in (folder, *folder.parents) if (path := above / name).is_file()), None)
