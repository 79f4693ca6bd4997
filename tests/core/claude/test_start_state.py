"""The state on which a start of Claude Code depends: what changes it, what does not, and when it is unknown."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude import file_digest, git_facts, start_state
from ccm.core.claude.start_state import user_state
from tests.programs import program


class World:
    """A home, and a git repository in it with a subdirectory for agents to work in."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.above = self.home / "code"
        self.repository = self.above / "repository"
        self.cwd = self.repository / "part"
        self.user = self.home / ".claude"
        self.program = folder / "claude"
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(self.home), "GIT_CONFIG_NOSYSTEM": "1"}
        self.cwd.mkdir(parents=True)
        self.user.mkdir()
        self.write(self.program, "#!/bin/sh")
        self.write(self.cwd / "tracked", "one")
        self.write(self.home / ".claude.json", json.dumps({"numStartups": 1, "userID": "me", "projects": {}}))
        self.git("init -q -b main")
        self.git("config user.name Ada")
        self.git("config user.email ada@example.org")
        self.git("add .")
        self.git("commit -q -m first")

    def state(self) -> str | None:
        return start_state.start_state(str(self.cwd), self.environ, str(self.program))

    def git(self, arguments: str) -> int:
        return subprocess.run(["git", *arguments.split()], cwd=self.repository, env=self.environ, check=True).returncode

    def write(self, path: Path, text: str = "text") -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.write_text(text)

    def configure(self, **values: Any) -> None:
        """Change .claude.json as Claude Code does: the file is replaced."""
        path = self.home / ".claude.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(json.loads(path.read_text()) | values))
        new.rename(path)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    program("git", "git")
    monkeypatch.setattr(start_state, "MANAGED", (str(tmp_path / "managed"),))
    return World(tmp_path)


Change = Callable[[World], object]

IN_FOLDERS: dict[str, Change] = {
    f"{name} {place}": lambda w, name=name, place=place: w.write(getattr(w, place) / name)  # type: ignore[misc]
    for place in ("cwd", "repository", "above", "home")
    for name in (
        "CLAUDE.md",
        "CLAUDE.local.md",
        "AGENTS.md",
        ".claude/CLAUDE.md",
        ".claude/rules/deep/a.md",
        ".mcp.json",
    )
}
IN_CLAUDE: dict[str, Change] = {
    f"{name} {place}": lambda w, name=name, place=place: w.write(getattr(w, place) / name)  # type: ignore[misc]
    for place in ("cwd", "repository")
    for name in (
        ".claude/settings.json",
        ".claude/settings.local.json",
        ".claude/agents/a.md",
        ".claude/skills/a/SKILL.md",
        ".claude/commands/a.md",
        ".claude/output-styles/a.md",
        ".claude/workflows/a.js",
    )
}
OF_USER: dict[str, Change] = {
    f"user {name}": lambda w, name=name: w.write(w.user / name, "{}")
    for name in (
        "CLAUDE.md",
        "rules/a.md",
        "settings.json",
        ".credentials.json",
        "agents/a.md",
        "skills/a/SKILL.md",
        "commands/a.md",
        "output-styles/a.md",
        "workflows/a.js",
        "plugins/installed_plugins.json",
        "plugins/known_marketplaces.json",
        "plugins/cache/market/plugin/1.0/skills/a/SKILL.md",
    )
} | {
    "managed settings": lambda w: w.write(w.home.parent / "managed" / "managed-settings.json", "{}"),
    "managed instructions": lambda w: w.write(w.home.parent / "managed" / "CLAUDE.md"),
    "program": lambda w: w.write(w.program, "#!/bin/bash"),
    "account": lambda w: w.configure(userID="someone else"),
    "features": lambda w: w.configure(cachedFeatureFlags={"new": True}),
}
IN_GIT: dict[str, Change] = {
    "branch": lambda w: w.git("checkout -q -b topic"),
    "detached": lambda w: w.git("checkout -q --detach"),
    "commit": lambda w: w.git("commit -q --allow-empty -m second"),
    "amended": lambda w: w.git("commit -q --amend --no-edit --date=2001-01-01T00:00:00"),
    "untracked": lambda w: w.write(w.repository / "untracked"),
    "changed": lambda w: w.write(w.cwd / "tracked", "two"),
    "staged": lambda w: (w.write(w.cwd / "tracked", "two"), w.git("add .")),
    "mode": lambda w: (w.cwd / "tracked").chmod(0o755),
    "user": lambda w: w.git("config user.name Grace"),
    "global user": lambda w: w.write(w.home / ".gitconfig", "[user]\nemail = x@example.org"),
    "main branch": lambda w: w.git("update-ref refs/remotes/origin/master HEAD"),
    "no repository": lambda w: (w.repository / ".git").rename(w.home / "gone"),
}
OF_PROJECT: dict[str, Change] = {
    "trust": lambda w: w.configure(projects={str(w.repository): {"hasTrustDialogAccepted": True}}),
    "memory": lambda w: w.write(w.user / "projects" / _name(w.repository) / "memory" / "MEMORY.md"),
    "directory replaced": lambda w: (w.cwd.rename(w.home / "old"), w.write(w.cwd / "tracked", "one")),
}

CHANGES = IN_FOLDERS | IN_CLAUDE | OF_USER | IN_GIT | OF_PROJECT


def _name(folder: Path) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in str(folder))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_changes_the_state(world: World, change: Change) -> None:
    before = world.state()
    change(world)

    assert before
    assert world.state() not in (before, None)


@pytest.mark.parametrize("change", OF_USER.values(), ids=OF_USER)
def test_a_change_for_all_directories_changes_the_users_state(world: World, change: Change) -> None:
    before = user_state(world.environ, str(world.program))
    change(world)

    assert before
    assert user_state(world.environ, str(world.program)) not in (before, None)


@pytest.mark.parametrize("change", (IN_GIT | OF_PROJECT).values(), ids=(IN_GIT | OF_PROJECT))
def test_a_change_of_a_project_does_not_change_the_users_state(world: World, change: Change) -> None:
    before = user_state(world.environ)
    world.git("status --short")
    if change is not IN_GIT["global user"]:
        change(world)

    assert user_state(world.environ) == before


def test_without_a_change_the_state_stays(world: World) -> None:
    world.write(world.cwd / "CLAUDE.md", "@~/shared.md @missing.md")
    before = world.state()

    assert before
    assert world.state() == before


def test_what_a_run_writes_does_not_change_the_state(world: World) -> None:
    before = world.state()
    world.configure(
        numStartups=2,
        tipsHistory={"a": 3},
        pluginUsage={"a": {"usageCount": 1}},
        cachedFeatureFlagsAt=5,
        projects={
            str(world.cwd): {"lastCost": 1.5, "history": ["hello"], "exampleFilesGeneratedAt": 7},
            "/else": {"a": 1},
        },
    )
    for name in ("backups/.claude.json.backup.1", "sessions/1.json", "projects/-code/a.jsonl", "plugins/store/a.json"):
        world.write(world.user / name)

    assert world.state() == before


def test_two_changes_within_a_tick_of_the_clock_change_the_state(world: World) -> None:
    path = world.cwd / "CLAUDE.md"
    world.write(path, "one")
    os.utime(path, ns=(1, 1))
    before = world.state()
    world.write(path, "two")
    os.utime(path, ns=(1, 1))

    assert world.state() != before


def test_a_change_that_was_undone_changes_the_state(world: World) -> None:
    path = world.cwd / "CLAUDE.md"
    world.write(path, "one")
    before = world.state()
    world.write(path, "two")
    world.write(path, "one")

    assert world.state() != before


@pytest.mark.parametrize(
    ("text", "imported"),
    [
        ("See @docs/a.md.", "part/docs/a.md."),
        ("- **@a.md**", "part/a.md"),
        ("@../../b.md, please", "b.md"),
        ("(@~/c.md)", "../c.md"),
        ("@with\\ space.md", "part/with space.md"),
        ("`@code.md`", "part/code.md"),
    ],
)
def test_an_imported_file_belongs_to_the_state(world: World, text: str, imported: str) -> None:
    folder = world.above if imported in ("b.md", "../c.md") else world.repository
    world.write(world.cwd / "CLAUDE.md", text)
    path = folder / imported
    world.write(path, "@next.md")
    if path.is_relative_to(world.repository):
        world.git("add .")
    first = world.state()
    path.write_text("@other.md")
    second = world.state()
    world.write(path.parent / "other.md", "the import of an import")
    third = world.state()

    assert None not in (first, second, third)
    assert len({first, second, third}) == 3


def test_imports_are_followed_in_a_file_that_was_read_before(world: World) -> None:
    world.write(world.user / "skills" / "a" / "SKILL.md", "@further.md")
    world.write(world.cwd / "CLAUDE.md", "@~/.claude/skills/a/SKILL.md")
    before = world.state()
    world.write(world.home / "unrelated.md")
    assert world.state() == before
    (world.user / "skills" / "a" / "further.md").symlink_to(world.home / "unrelated.md")
    assert world.state() != before


def test_imports_in_a_circle_end(world: World) -> None:
    world.write(world.cwd / "CLAUDE.md", "@a.md")
    world.write(world.cwd / "a.md", "@CLAUDE.md @a.md @./a.md @.")

    assert world.state()


def test_the_target_of_a_symbolic_link_belongs_to_the_state(world: World) -> None:
    world.write(world.home / "shared" / "SKILL.md", "one")
    (world.cwd / ".claude" / "skills").mkdir(parents=True)
    (world.cwd / ".claude" / "skills" / "linked").symlink_to(world.home / "shared")
    (world.home / "shared" / "loop").symlink_to(world.cwd / ".claude" / "skills")
    (world.home / "shared" / "self").symlink_to("self")
    before = world.state()
    world.write(world.home / "shared" / "SKILL.md", "two")

    assert before
    assert world.state() not in (before, None)


def test_a_fifo_does_not_block(world: World) -> None:
    before = world.state()
    os.mkfifo(world.cwd / "CLAUDE.md")
    (world.cwd / ".claude" / "skills").mkdir(parents=True)
    os.mkfifo(world.cwd / ".claude" / "skills" / "a")

    assert world.state() not in (before, None)


def test_the_date_changes_the_state(world: World) -> None:
    # Their clocks are 26 hours apart, so that they never have the same date.
    states = []
    for zone in ("Pacific/Kiritimati", "Etc/GMT+12"):
        world.environ["TZ"] = zone
        states.append(world.state())

    assert None not in states
    assert states[0] != states[1]


def test_the_main_worktree_belongs_to_the_state_of_a_linked_one(world: World) -> None:
    world.git("worktree add -q ../linked")
    main, world.cwd = world.repository, world.above / "linked" / "part"
    before = world.state()
    world.write(main / ".claude" / "skills" / "a" / "SKILL.md")
    second = world.state()
    world.write(world.user / "projects" / _name(main) / "memory" / "MEMORY.md")

    assert before
    assert len({before, second, world.state()}) == 3


def test_a_marketplace_in_a_directory_belongs_to_the_state(world: World) -> None:
    market = {"source": {"source": "directory", "path": "x"}, "installLocation": str(world.home / "market")}
    world.write(world.user / "plugins" / "known_marketplaces.json", json.dumps({"mine": market}))
    before = world.state()
    world.write(world.home / "market" / "plugin" / "skills" / "a" / "SKILL.md")
    second = world.state()
    world.write(world.home / "market" / "plugin" / ".mcp.json", '{"server": {"command": "x"}}')

    assert second not in (before, None)
    assert world.state() is None


def test_a_configuration_directory_is_where_the_environment_says(world: World) -> None:
    world.environ["CLAUDE_CONFIG_DIR"] = str(world.home / "other")
    before = world.state()
    world.write(world.user / "rules" / "a.md")
    world.configure(userID="someone else")
    unrelated = world.state()
    world.write(world.home / "other" / ".claude.json", '{"userID": "me"}')

    assert before
    assert world.state() not in (before, unrelated, None)


def test_a_relative_configuration_directory_starts_at_the_directory(world: World) -> None:
    world.environ["CLAUDE_CONFIG_DIR"] = "config"
    world.write(world.repository / ".git" / "info" / "exclude", "config")
    before = world.state()
    world.write(world.cwd / "config" / ".claude.json", '{"userID": "me"}')

    assert before
    assert world.state() not in (before, None)
    assert user_state(world.environ) is None


HOOK = {"hooks": {"SessionStart": [{"hooks": [{"type": "command", "command": "date"}]}]}}
SERVER = {"mcpServers": {"mine": {"command": "serve"}}}

END_HOOK = {"hooks": {"SessionEnd": HOOK["hooks"]["SessionStart"]}}

UNKNOWN: dict[str, Change] = {
    "hook at the start": lambda w: w.write(w.user / "settings.json", json.dumps(HOOK)),
    "key from a program": lambda w: w.write(w.user / "settings.json", '{"apiKeyHelper": "print-key"}'),
    "memory elsewhere": lambda w: w.write(w.user / "settings.json", '{"autoMemoryDirectory": "~/memory"}'),
    "hook at the end": lambda w: w.write(w.user / "settings.json", json.dumps(END_HOOK)),
    "hook of a project": lambda w: w.write(w.cwd / ".claude" / "settings.local.json", json.dumps(HOOK)),
    "hook of a plugin": lambda w: w.write(w.user / "plugins/cache/m/p/1/hooks/hooks.json", json.dumps(HOOK)),
    "MCP server": lambda w: w.write(w.repository / ".mcp.json", json.dumps(SERVER)),
    "imported MCP server": lambda w: (
        w.write(w.cwd / "CLAUDE.md", "See @.mcp.json"),
        w.write(w.cwd / ".mcp.json", json.dumps(SERVER)),
    ),
    "user's MCP server": lambda w: w.configure(**SERVER),
    "project's MCP server": lambda w: w.configure(projects={str(w.cwd): SERVER}),
    "damaged configuration": lambda w: w.write(w.home / ".claude.json", "[" * 100_000),
    "another form": lambda w: w.write(w.user / "plugins" / "known_marketplaces.json", '{"a": 1}'),
    "no directory": lambda w: setattr(w, "cwd", w.home / "missing"),
    "no program": lambda w: w.program.unlink(),
    "no git": lambda w: w.environ.update(PATH="/nowhere"),
    "own filter": lambda w: w.git("config filter.mine.clean cat"),
    "strange time zone": lambda w: w.environ.update(TZ="CET-1CEST,M3.5.0,M10.5.0/3"),
    "large instructions": lambda w: w.write(w.cwd / "CLAUDE.md", "x" * (file_digest.MAX_FILE_BYTES + 1)),
}


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_the_state_is_unknown(world: World, change: Change) -> None:
    assert world.state()
    change(world)

    assert world.state() is None


def test_a_hook_at_the_end_leaves_the_state_of_a_spare_known(world: World) -> None:
    world.write(world.user / "settings.json", json.dumps(END_HOOK))

    assert world.state() is None
    assert user_state(world.environ)


def test_empty_settings_for_programs_leave_the_state_known(world: World) -> None:
    world.write(world.user / "settings.json", '{"hooks": {"SessionStart": [ ], "SessionEnd": []}, "apiKeyHelper": ""}')
    world.write(world.cwd / ".mcp.json", '{"mcpServers": { }}')
    world.configure(mcpServers={}, projects={str(world.cwd): {"mcpServers": {}}, "/else": SERVER})

    assert world.state()


def test_a_large_file_counts_by_its_status(world: World) -> None:
    path = world.cwd / ".claude" / "skills" / "a" / "model.bin"
    world.write(path, "x" * (file_digest.MAX_FILE_BYTES + 1))
    before = world.state()
    path.touch()

    assert before
    assert world.state() not in (before, None)


@pytest.mark.parametrize("limit", ["MAX_FILES", "MAX_BYTES"])
def test_too_much_to_read_makes_the_state_unknown(world: World, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    for number in range(10):
        world.write(world.cwd / ".claude" / "skills" / str(number) / "SKILL.md", "x" * 100)
    assert world.state()
    monkeypatch.setattr(file_digest, limit, 20)

    assert world.state() is None


@pytest.mark.parametrize(
    "script", ["exec sleep 600", "sleep 600 & exec sleep 600", "exec yes", "exec >&-; exec sleep 600"], ids=str
)
def test_a_git_that_is_slow_or_says_too_much_makes_the_state_unknown(world: World, tmp_path: Path, script: str) -> None:
    world.write(tmp_path / "bin" / "git", f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    world.environ["PATH"] = f"{tmp_path}/bin:{world.environ['PATH']}"

    assert git_facts.git_facts(str(world.cwd), world.environ, timeout=0.5) is None


def test_git_runs_no_program_of_the_repository(world: World, tmp_path: Path) -> None:
    world.write(tmp_path / "program", f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "program").chmod(0o755)
    world.git(f"config core.fsmonitor {tmp_path}/program")
    world.write(world.cwd / "tracked", "two")

    assert world.state()
    assert not (tmp_path / "ran").exists()


def test_git_leaves_the_index_as_it_is(world: World) -> None:
    os.utime(world.cwd / "tracked", (1, 1))
    index = world.repository / ".git" / "index"
    before = index.stat().st_mtime_ns, index.stat().st_ino

    assert world.state()
    assert (index.stat().st_mtime_ns, index.stat().st_ino) == before
