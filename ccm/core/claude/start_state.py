"""What decides, apart from its command line and environment, how a new Claude Code begins a conversation.

Claude Code reads instructions, settings, agents, skills, plugins, its memory and the state of the git repository when
it starts, and does not notice most of their later changes. A process that was started in advance may therefore be used
only while the state is what it was before the process started: then it sends what a new process would send.

The state covers more than what Claude Code reads, never less: a needless difference costs a cold start, a missed one
gives the model an outdated context. It is unknown (None) where files do not tell all: when programs take part in the
start (hooks, MCP servers, helpers that print keys), when git is slow, when there is too much to read. That of a
conversation is also unknown where hooks run at its end: Claude Code would run them even if it is never used.
"""

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ccm.core.claude.file_digest import FileDigest, UnknownStateError, signature
from ccm.core.claude.git_facts import git_facts
from ccm.core.claude.locations import config_directory, project_name
from ccm.core.claude.regular_file import open_regular

MANAGED = ("/etc/claude-code", "/Library/Application Support/ClaudeCode")
INSTRUCTIONS = ("CLAUDE.md", "AGENTS.md", "CLAUDE.local.md")
# In ~/.claude and in the .claude of a project.
SETTINGS = ("settings.json", "settings.local.json", "scheduled_tasks.json")
TREES = ("agents", "skills", "commands", "output-styles", "workflows")
USER_FILES = (
    ".credentials.json",
    ".config.json",
    "remote-settings.json",
    "policy-limits.json",
    "state/hybrid-settings.json",
    "plugins/installed_plugins.json",
    "plugins/installed_plugins_v2.json",
    "plugins/known_marketplaces_claudeai.json",
    "plugins/flagged-plugins.json",
)
MARKETPLACES = "plugins/known_marketplaces.json"
MAX_CONFIG_BYTES = 4 * 1024 * 1024

# Settings through which a start depends on something else than the files that are read here.
NOT_EMPTY = rb'\s*:\s*(?!\s|null|""|\{\s*\}|\[\s*\])'
UNKNOWABLE = re.compile(
    rb'"(?:SessionStart|Setup|mcpServers|\w+Helper|awsAuthRefresh|awsCredentialExport|autoMemoryDirectory)"' + NOT_EMPTY
)
# A Claude Code that has loaded a conversation runs these hooks when it ends, a spare does not.
AT_END = re.compile(rb'"SessionEnd"' + NOT_EMPTY)
DENIES = re.compile(rb'"deny"' + NOT_EMPTY)
# A plugin's .mcp.json may name its servers without `mcpServers`.
MCP_SERVER = re.compile(rb'"(?:command|url)"\s*:')

# What runs of Claude Code change in .claude.json without an effect on the next: counters, times, notices, measurements.
# The use of skills is not among them: it decides which of too many skills are described to the model.
COUNTERS = re.compile(
    r"^(?:last|seen|example|tip|metricsStatusCache|projectOnboarding|devIntents|pluginUsage)"
    r"|(?:At|Time|Date|Startups|Counts?|Utilization|Shown|StatusCache|[hH]istory|Onboarding)$"
)


def user_state(environ: Mapping[str, str], program: str | None = None) -> str | None:
    """Return the state that holds for every directory: the user's, the administrator's, the program's and the date.

    Args:
        environ: Claude Code's environment.
        program: the path of Claude Code, whose file an update may replace.

    Returns:
        A digest; None if the state is unknown.
    """
    state = _State(environ)
    try:
        state.add_user(program)
        state.add_config(())
    except (OSError, UnknownStateError):
        return None
    return state.files.hexdigest()


def start_state(cwd: str, environ: Mapping[str, str], program: str | None = None) -> str | None:
    """Return the state for a conversation in `cwd`, which includes the user's.

    It takes some milliseconds, and at most about a second where git is slow. Arguments and value: see `user_state`.
    """
    state = _State(environ, cwd)
    try:
        state.add_user(program)
        folders = state.add_project(Path(os.path.abspath(cwd)))
        state.add_config(folders)
    except (OSError, UnknownStateError):
        return None
    return state.files.hexdigest()


def denies_tools(cwd: str, environ: Mapping[str, str]) -> bool:
    """Return whether the settings of a directory, or of one above it, may deny whole tools; not the user's.

    A spare offers them to the model all the same, and only refuses their use: it has its tools from its start.
    """
    folders = {folder / ".claude" for folder in (Path(cwd), *Path(cwd).parents)} - {config_directory(environ)}
    return any(_matches(folder / name, DENIES) for folder in folders for name in SETTINGS[:2])


def _matches(path: Path, pattern: re.Pattern[bytes]) -> bool:
    try:
        with open_regular(path) as file:
            return pattern.search(file.read(MAX_CONFIG_BYTES)) is not None
    except FileNotFoundError:
        return False
    except OSError:
        return True  # whatever it says


class _State:
    def __init__(self, environ: Mapping[str, str], cwd: str = "") -> None:
        self._environ = environ
        self._home = Path(environ.get("HOME") or Path.home())
        self._config = Path(cwd, config_directory(environ))
        self.files = FileDigest(self._home, _is_telling_of_conversation if cwd else _is_telling)

    def add_user(self, program: str | None) -> None:
        if not self._config.is_absolute():
            raise UnknownStateError("the directory decides where the configuration is")
        self.files.add(_date(self._environ.get("TZ")))
        self.files.add_file(Path("/etc/localtime"))
        if program is not None:
            self.files.add(os.path.realpath(program), signature(os.stat(program)))
        for managed in MANAGED:
            self.files.add_tree(Path(managed))
        self.files.add_tree(self._home / ".config" / "anthropic")
        self._add_folder(self._config)
        for name in USER_FILES:
            self.files.add_file(self._config / name, whole=True)
        self._add_plugins()

    def add_project(self, cwd: Path) -> list[Path]:
        """Add what Claude Code reads in a directory, above it, and in the main worktree of its repository.

        Returns:
            These directories.
        """
        real = Path(os.path.realpath(cwd))
        self.files.add(str(cwd), str(real), os.stat(real).st_ino)
        folders = list(dict.fromkeys((cwd, *cwd.parents, real, *real.parents)))
        repositories = [folder for folder in folders if self._is_repository(folder)]
        folders += filter(None, map(self._main_worktree, repositories))
        for folder in dict.fromkeys(folders):
            for name in INSTRUCTIONS:
                self.files.add_instructions(folder / name)
            self.files.add_file(folder / ".mcp.json", whole=True)
            self._add_folder(folder / ".claude")
            memory = self._config / "projects" / project_name(str(folder)) / "memory"
            self.files.add_file(memory / "MEMORY.md")
        if repositories or "GIT_DIR" in self._environ:
            facts = git_facts(str(cwd), self._environ)
            if facts is None:
                raise UnknownStateError("git does not tell")
            self.files.add(facts)
        return folders

    def add_config(self, folders: Iterable[Path]) -> None:
        """Add .claude.json, which every run rewrites: what matters for all projects and for those of `folders`."""
        above = self._config if self._environ.get("CLAUDE_CONFIG_DIR") else self._home
        try:
            with open_regular(above / ".claude.json") as file:
                text = file.read(MAX_CONFIG_BYTES + 1)
        except FileNotFoundError:
            return
        config = _json_object(text) if len(text) <= MAX_CONFIG_BYTES else None
        if config is None:
            raise UnknownStateError(".claude.json is too large, or not an object")
        projects = config.pop("projects", None)
        if not isinstance(projects, dict):
            projects = {}
        paths = {str(folder) for folder in folders}
        paths |= {unicodedata.normalize("NFC", path) for path in paths}
        # A project's values are empty by default, and absent before Claude Code has written any of them.
        own = {path: {k: v for k, v in _lasting(projects.get(path)).items() if v} for path in paths}
        lasting = json.dumps([_lasting(config), own], sort_keys=True).encode()
        if UNKNOWABLE.search(lasting):
            raise UnknownStateError(".claude.json does not tell all")
        self.files.add(lasting)

    def _add_folder(self, folder: Path) -> None:
        """Add a directory named .claude."""
        try:
            os.stat(folder)
        except OSError as error:
            self.files.add(str(folder), error.errno)
            return
        for name in INSTRUCTIONS:
            self.files.add_instructions(folder / name)
        self.files.add_tree(folder / "rules", imports=True)
        for name in SETTINGS:
            self.files.add_file(folder / name, whole=True)
        for name in TREES:
            self.files.add_tree(folder / name)

    def _add_plugins(self) -> None:
        """Add the copies of installed plugins, and marketplaces in directories: Claude Code reads those in place."""
        self.files.add_tree(self._config / "plugins" / "cache")
        known = _json_object(self.files.add_file(self._config / MARKETPLACES, whole=True) or b"{}")
        try:
            sources = [(m["installLocation"], m["source"]["source"]) for m in known.values()] if known else []
        except (KeyError, TypeError) as error:
            raise UnknownStateError(f"{MARKETPLACES} is in another form") from error
        for location, source in sources:
            self.files.add_tree(Path(location), check=source in ("directory", "file"))

    def _is_repository(self, folder: Path) -> bool:
        exists = os.path.lexists(folder / ".git")
        self.files.add(exists)
        return exists

    def _main_worktree(self, folder: Path) -> Path | None:
        """Return the main worktree of the repository whose linked worktree `folder` is."""
        if not stat.S_ISREG(os.stat(folder / ".git").st_mode):
            return None
        link = os.fsdecode(self.files.add_file(folder / ".git")).removeprefix("gitdir:").strip()
        directory = folder / link
        common = os.fsdecode(self.files.add_file(directory / "commondir")).strip()
        return Path(os.path.realpath(directory / common)).parent if common else None


def _date(zone: str | None) -> str:
    try:
        return datetime.now(None if zone is None else ZoneInfo(zone)).date().isoformat()
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UnknownStateError(f"the time zone {zone!r} is not known") from error


def _is_telling(path: Path, content: bytes) -> bool:
    """Return whether a file's content tells all that it does to a start of Claude Code."""
    if path.suffix != ".json":
        return True
    return not UNKNOWABLE.search(content) and not (path.name == ".mcp.json" and MCP_SERVER.search(content))


def _is_telling_of_conversation(path: Path, content: bytes) -> bool:
    return _is_telling(path, content) and (path.suffix != ".json" or not AT_END.search(content))


def _json_object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _lasting(values: Any) -> dict[str, Any]:
    """Return an object of .claude.json without the counters; an empty one for what is no object."""
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if not COUNTERS.search(name)}
