"""The state of a start against the real Claude Code: whatever changes its first request changes the state too."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ccm.core.claude import start_state
from ccm.core.claude.locations import bundled_cli, transcript_path
from ccm.testing.messages_api import MessagesAPI
from ccm.testing.service_process import credential_free_environment
from tests.programs import program

PROMPT = {
    "type": "user",
    "message": {"role": "user", "content": "Hello."},
    "session_id": "",
    "parent_tool_use_id": None,
}


class Starts:
    """Cold starts of Claude Code, in a subdirectory of a git repository in a home of its own."""

    def __init__(self, folder: Path, api: MessagesAPI) -> None:
        self.api = api
        self.home = folder / "home"
        self.above = self.home / "code"
        self.repository = self.above / "repository"
        self.cwd = self.repository / "part"
        self.user = self.home / ".claude"
        self.environ = credential_free_environment(api.url, str(self.home)) | {
            "IS_SANDBOX": "1",
            "CLAUDE_CODE_TMPDIR": str(folder / "tmp"),
        }
        self.prefix: tuple[str, ...] = ()
        (folder / "tmp").mkdir()
        self.cwd.mkdir(parents=True)
        self.write(self.repository / "tracked", "one\n")
        # Files that come into the repository would change its status, and so every request.
        self.write(self.repository / ".gitignore", "*.md\n.claude\n.mcp.json\n")
        self.git("init -q -b main")
        self.git("config user.name Ada")
        self.git("config user.email ada@example.org")
        self.git("add .")
        self.git("commit -q -m first")

    def request(self, resume: str | None = None) -> dict[str, Any]:
        """Start Claude Code, and return its first request to the model, without the id of the session."""
        session = str(uuid4())
        command = [str(bundled_cli()), "--output-format", "stream-json", "--input-format", "stream-json", "--verbose"]
        command += ["--permission-mode", "acceptEdits", "--session-id", session]
        command += [] if resume is None else ["--resume", resume, "--fork-session"]
        seen = len(self.api.requests)
        process = subprocess.run(
            [*self.prefix, *command],
            input=json.dumps(PROMPT | {"uuid": str(uuid4())}) + "\n",
            cwd=self.cwd,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        requests = self.api.requests[seen:]
        assert requests, process.stdout + process.stderr
        self.session = session
        found: dict[str, Any] = json.loads(json.dumps(requests[0]).replace(session, "SESSION"))
        return found

    def state(self) -> str | None:
        return start_state.start_state(str(self.cwd), self.environ, str(bundled_cli()))

    def git(self, arguments: str, folder: Path | None = None) -> int:
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        command = ["git", "-c", "user.name=Ada", "-c", "user.email=a@example.org", *arguments.split()]
        if arguments.startswith(("init", "config")):
            command = ["git", *arguments.split()]
        return subprocess.run(command, cwd=folder or self.repository, env=environ, check=True).returncode

    def claude(self, *arguments: str) -> int:
        command = [str(bundled_cli()), *arguments]
        return subprocess.run(command, cwd=self.cwd, env=self.environ, check=True, capture_output=True).returncode

    def write(self, path: Path, text: str) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.write_text(text)

    def described(self, path: Path, description: str = "Does it.") -> int:
        """Write an agent, a skill, a command or an output style."""
        name = path.parent.name if path.name == "SKILL.md" else path.stem
        return self.write(path, f"---\nname: {name}\ndescription: {description}\n---\nText {description}\n")

    def configure(self, file: Path, **values: Any) -> int:
        return self.write(file, json.dumps(json.loads(file.read_text() if file.exists() else "{}") | values))


@pytest.fixture(scope="module")
def api() -> Iterator[MessagesAPI]:
    with MessagesAPI() as api:
        yield api


@pytest.fixture
def starts(tmp_path: Path, api: MessagesAPI) -> Starts:
    program("git", "git")
    starts = Starts(tmp_path, api)
    starts.request()  # the first one in a home creates files
    return starts


Change = Callable[[Starts], object]


def _style(s: Starts) -> None:
    s.described(s.cwd / ".claude" / "output-styles" / "terse.md")
    s.configure(s.user / "settings.json", outputStyle="terse")


def _plugin(s: Starts) -> None:
    market = s.home / "market"
    plugin = {"name": "tools", "source": "./tools", "description": "Tools."}
    s.configure(market / ".claude-plugin" / "marketplace.json", name="mine", owner={"name": "Ada"}, plugins=[plugin])
    s.configure(market / "tools" / ".claude-plugin" / "plugin.json", name="tools", description="T", version="1.0.0")
    s.described(market / "tools" / "skills" / "hammer" / "SKILL.md")
    s.claude("plugin", "marketplace", "add", str(market))
    s.claude("plugin", "install", "tools@mine")


def _memory(s: Starts, text: str = "- [Fact](fact.md)") -> int:
    (folder,) = (s.user / "projects").glob("*/memory")
    return s.write(folder / "MEMORY.md", text)


def _many_skills(s: Starts) -> None:
    for number in range(60):
        s.described(s.user / "skills" / f"skill-{number}" / "SKILL.md", "Describes itself. " * 60)


def _worktree(s: Starts) -> None:
    s.git("worktree add -q ../linked")
    s.cwd = s.above / "linked"


def _submodule(s: Starts) -> None:
    module = s.home / "module"
    module.mkdir()
    s.git("init -q", module)
    s.git("commit -q --allow-empty -m first", module)
    s.git(f"-c protocol.file.allow=always submodule --quiet add {module} module")


def _approve_imports(s: Starts) -> int:
    return s.configure(
        s.home / ".claude.json", projects={str(s.repository): {"hasClaudeMdExternalIncludesApproved": True}}
    )


def _none(s: Starts) -> None:
    """Prepare nothing."""


# What was there before, and what changes.
MATTERS: dict[str, tuple[Change, Change]] = {
    "CLAUDE.md": (_none, lambda s: s.write(s.cwd / "CLAUDE.md", "one")),
    "CLAUDE.md edited": (lambda s: s.write(s.cwd / "CLAUDE.md", "1"), lambda s: s.write(s.cwd / "CLAUDE.md", "2")),
    "CLAUDE.md of the repository": (_none, lambda s: s.write(s.repository / "CLAUDE.md", "one")),
    "CLAUDE.md above the repository": (_none, lambda s: s.write(s.above / "CLAUDE.md", "one")),
    "CLAUDE.md of the user": (_none, lambda s: s.write(s.user / "CLAUDE.md", "one")),
    "CLAUDE.md linked": (
        lambda s: (s.write(s.home / "x.md", "1"), (s.cwd / "CLAUDE.md").symlink_to(s.home / "x.md")),  # type: ignore[func-returns-value]
        lambda s: s.write(s.home / "x.md", "2"),
    ),
    "CLAUDE.local.md": (_none, lambda s: s.write(s.cwd / "CLAUDE.local.md", "one")),
    "CLAUDE.local.md above": (_none, lambda s: s.write(s.above / "CLAUDE.local.md", "one")),
    ".claude/CLAUDE.md": (_none, lambda s: s.write(s.cwd / ".claude" / "CLAUDE.md", "one")),
    ".claude/CLAUDE.md above": (_none, lambda s: s.write(s.above / ".claude" / "CLAUDE.md", "one")),
    "rule": (_none, lambda s: s.write(s.cwd / ".claude" / "rules" / "deep" / "a.md", "one")),
    "rule above": (_none, lambda s: s.write(s.above / ".claude" / "rules" / "a.md", "one")),
    "rule of the user": (_none, lambda s: s.write(s.user / "rules" / "a.md", "one")),
    "import": (lambda s: s.write(s.cwd / "CLAUDE.md", "@docs/a.md"), lambda s: s.write(s.cwd / "docs" / "a.md", "A")),
    "import in bold": (lambda s: s.write(s.cwd / "CLAUDE.md", "**@a.md**"), lambda s: s.write(s.cwd / "a.md", "A")),
    "import with a space": (
        lambda s: s.write(s.cwd / "CLAUDE.md", "@a\\ b.md"),
        lambda s: s.write(s.cwd / "a b.md", "A"),
    ),
    "import with an anchor": (
        lambda s: s.write(s.cwd / "CLAUDE.md", "@a.md#x"),
        lambda s: s.write(s.cwd / "a.md", "A"),
    ),
    "import of an import": (
        lambda s: [s.write(s.cwd / a, f"@{b}") for a, b in (("CLAUDE.md", "b.md"), ("b.md", "c.md"), ("c.md", "d.md"))],
        lambda s: s.write(s.cwd / "d.md", "deep"),
    ),
    "import of the user": (
        lambda s: s.write(s.user / "CLAUDE.md", "@~/notes.md"),
        lambda s: s.write(s.home / "notes.md", "A"),
    ),
    "import from outside, approved": (
        lambda s: (s.write(s.cwd / "CLAUDE.md", "@~/notes.md"), _approve_imports(s)),
        lambda s: s.write(s.home / "notes.md", "A"),
    ),
    "approval of imports": (
        lambda s: (s.write(s.cwd / "CLAUDE.md", "@~/notes.md"), s.write(s.home / "notes.md", "A")),
        _approve_imports,
    ),
    "agent": (_none, lambda s: s.described(s.cwd / ".claude" / "agents" / "deep" / "a.md")),
    "agent of the user": (_none, lambda s: s.described(s.user / "agents" / "a.md")),
    "skill": (_none, lambda s: s.described(s.cwd / ".claude" / "skills" / "a" / "SKILL.md")),
    "skill of the repository": (_none, lambda s: s.described(s.repository / ".claude" / "skills" / "a" / "SKILL.md")),
    "skill of the user": (_none, lambda s: s.described(s.user / "skills" / "a" / "SKILL.md")),
    "use of skills": (
        _many_skills,
        lambda s: s.configure(s.home / ".claude.json", skillUsage={"skill-50": {"usageCount": 9, "lastUsedAt": 2e12}}),
    ),
    "command": (_none, lambda s: s.described(s.cwd / ".claude" / "commands" / "deep" / "a.md")),
    "command of the user": (_none, lambda s: s.described(s.user / "commands" / "a.md")),
    "workflow": (
        _none,
        lambda s: s.write(
            s.cwd / ".claude" / "workflows" / "a.js", "export const meta = {name: 'a', description: 'Does it.'}\n"
        ),
    ),
    "output style": (_style, lambda s: s.described(s.cwd / ".claude" / "output-styles" / "terse.md", "Changed.")),
    "plugin": (_none, _plugin),
    "plugin edited": (_plugin, lambda s: s.described(s.home / "market" / "tools" / "skills" / "saw" / "SKILL.md")),
    "settings": (_none, lambda s: s.configure(s.cwd / ".claude" / "settings.json", language="French")),
    "local settings": (_none, lambda s: s.configure(s.cwd / ".claude" / "settings.local.json", language="French")),
    "settings of the user": (_none, lambda s: s.configure(s.user / "settings.json", model="claude-haiku-4-5")),
    "denied tool": (_none, lambda s: s.configure(s.user / "settings.json", permissions={"deny": ["WebFetch"]})),
    "memory": (_none, _memory),
    "account": (_none, lambda s: s.configure(s.home / ".claude.json", userID="f" * 64)),
    "status": (_none, lambda s: s.write(s.repository / "new", "one")),
    "status of a linked worktree": (_worktree, lambda s: s.write(s.cwd / "new", "one")),
    "status of a submodule": (
        _submodule,
        lambda s: s.git("commit -q --allow-empty -m second", s.repository / "module"),
    ),
    "edit": (_none, lambda s: s.write(s.repository / "tracked", "two\n")),
    "staged": (lambda s: s.write(s.repository / "tracked", "two\n"), lambda s: s.git("add .")),
    "mode": (_none, lambda s: (s.repository / "tracked").chmod(0o755)),
    "ignored": (
        lambda s: s.write(s.repository / "new", "one"),
        lambda s: s.write(s.home / ".config" / "git" / "ignore", "new"),
    ),
    "commit": (_none, lambda s: s.git("commit -q --allow-empty -m second")),
    "commit amended": (_none, lambda s: s.git("commit -q --amend --no-edit --date=2001-01-01T00:00:00")),
    "branch": (_none, lambda s: s.git("checkout -q -b topic")),
    "detached": (_none, lambda s: s.git("checkout -q --detach")),
    "main branch": (
        _none,
        lambda s: (
            s.git("update-ref refs/remotes/origin/trunk HEAD"),
            s.git("symbolic-ref refs/remotes/origin/HEAD refs/remotes/origin/trunk"),
        ),
    ),
    "git user": (_none, lambda s: s.git("config user.name Grace")),
    "git configuration": (_none, lambda s: s.git("config core.abbrev 20")),
    "no repository": (_none, lambda s: (s.repository / ".git").rename(s.home / "gone")),
    "date": (
        lambda s: s.environ.update(TZ="Pacific/Kiritimati"),
        lambda s: s.environ.update(TZ="Etc/GMT+12"),  # 26 hours behind
    ),
}


@pytest.mark.parametrize(("prepare", "change"), MATTERS.values(), ids=MATTERS)
def test_a_change_of_the_first_request_changes_the_state(starts: Starts, prepare: Change, change: Change) -> None:
    prepare(starts)
    state, request = starts.state(), starts.request()
    assert state
    assert starts.state() == state
    change(starts)

    assert starts.request() != request
    assert starts.state() not in (state, None)


@pytest.mark.root
def test_a_change_of_the_administrator_changes_the_state(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    program("unshare", "util-linux")
    managed = starts.home / "etc" / "claude-code"
    managed.mkdir(parents=True)
    mount = 'mount -t overlay overlay -o lowerdir="$0":/etc /etc && exec "$@"'
    # Only in a view of its own does Claude Code see these files in /etc.
    starts.prefix = ("unshare", "--mount", "sh", "-c", mount, str(managed.parent))
    monkeypatch.setattr(start_state, "MANAGED", (str(managed),))
    known = [(starts.state(), json.dumps(starts.request()))]
    changes: tuple[Callable[[], int], ...] = (
        lambda: starts.configure(managed / "managed-settings.json", language="French"),
        lambda: starts.configure(managed / "managed-settings.d" / "10.json", language="Greek"),
        lambda: starts.write(managed / "CLAUDE.md", "one"),
        lambda: starts.write(managed / ".claude" / "rules" / "a.md", "one"),
        lambda: starts.described(managed / ".claude" / "skills" / "a" / "SKILL.md"),
        lambda: starts.described(managed / ".claude" / "agents" / "a.md"),
    )
    for change in changes:
        change()
        known.append((starts.state(), json.dumps(starts.request())))

    states, requests = zip(*known, strict=True)
    assert None not in states
    assert len(set(states)) == len(set(requests)) == len(known)


def _hook(s: Starts) -> None:
    s.write(s.home / "told", "one")
    command = {"type": "command", "command": f"cat {s.home}/told"}
    s.configure(s.user / "settings.json", hooks={"SessionStart": [{"hooks": [command]}]})


def _memory_elsewhere(s: Starts) -> None:
    s.configure(s.user / "settings.json", autoMemoryDirectory=str(s.home / "memory"))


UNKNOWABLE: dict[str, tuple[Change, Change]] = {
    "hook": (_hook, lambda s: s.write(s.home / "told", "two")),
    "memory": (_memory_elsewhere, lambda s: s.write(s.home / "memory" / "MEMORY.md", "- one")),
}


@pytest.mark.parametrize(("prepare", "change"), UNKNOWABLE.values(), ids=UNKNOWABLE)
def test_the_state_is_unknown_where_the_request_depends_on_more(
    starts: Starts, prepare: Change, change: Change
) -> None:
    prepare(starts)
    request = starts.request()
    assert starts.state() is None
    change(starts)

    assert starts.request() != request


@pytest.mark.main_job
def test_two_starts_from_the_same_state_send_the_same_request(starts: Starts) -> None:
    starts.write(starts.cwd / "CLAUDE.md", "one")
    state, request = starts.state(), starts.request()

    assert state
    assert starts.state() == state
    assert starts.request() == request
    assert starts.state() == state


def test_two_resumes_from_the_same_state_send_the_same_request(starts: Starts) -> None:
    first = starts.session
    state, request = starts.state(), starts.request(resume=first)
    assert starts.state() == state
    assert starts.request(resume=first) == request
    starts.write(starts.cwd / "CLAUDE.md", "one")

    assert transcript_path(str(starts.cwd), first, starts.environ).exists()
    assert starts.request(resume=first) != request
    assert starts.state() not in (state, None)
