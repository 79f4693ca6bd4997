"""The statements of ccm/docs/options.md on permissions, compared with the real Claude Code's changes on disk."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.client import Client
from tests.conftest import ProgramFunction, ServeFunction
from tests.docs import page, text_of

DIRECTORY = "a directory"
NOTEBOOK = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
# The changes that a run tries, for options that permit fewer or more of them.
CHANGES = ("remove", "redirect", "write", "edit", "write outside")


class Call(NamedTuple):
    """A tool call. `{cwd}` and `{out}` in its input stand for the two directories."""

    tool: str
    input: Mapping[str, Any]


class Permitted(NamedTuple):
    """A call that is executed, and the content afterwards of a path that it changes; None if the path is gone."""

    call: Call
    path: str
    after: str | None


class Folders(NamedTuple):
    cwd: Path
    out: Path


class Outcome(NamedTuple):
    """The calls of a run in order, as (refused, the result's text), and the disk before and after."""

    calls: list[tuple[bool, str]]
    before: dict[str, str]
    after: dict[str, str]


def bash(command: str) -> Call:
    return Call("Bash", {"command": command})


def write(path: str, content: str = "new\n") -> Call:
    return Call("Write", {"file_path": path, "content": content})


def edit(path: str) -> Call:
    return Call("Edit", {"file_path": path, "old_string": "old", "new_string": "new"})


def read(path: str) -> Call:
    return Call("Read", {"file_path": path})


PERMITTED = [
    Permitted(bash("mkdir -p made/in/here"), "made/in/here", DIRECTORY),
    Permitted(bash("touch touched"), "touched", ""),
    Permitted(bash("rm f1"), "f1", None),
    Permitted(bash("rm -rf d1"), "d1", None),
    Permitted(bash("rmdir empty"), "empty", None),
    Permitted(bash("mv f2 moved"), "moved", "old\n"),
    Permitted(bash("mv f3 d2/"), "f3", None),
    Permitted(bash("cp f4 copied"), "copied", "old\n"),
    Permitted(bash("sed -i s/old/new/ f5"), "f5", "new\n"),
    Permitted(bash("echo new > f6"), "f6", "new\n"),
    Permitted(bash("echo new >> f7"), "f7", "old\nnew\n"),
    Permitted(bash("mkdir both && rm f8"), "f8", None),
    Permitted(bash("timeout 5 rm f9"), "f9", None),
    Permitted(bash("if true; then rm f10; fi"), "f10", None),
    Permitted(bash("cat f11"), "f11", "old\n"),
    Permitted(bash("ls -la"), "f11", "old\n"),
    Permitted(bash("find . -name f11"), "f11", "old\n"),
    Permitted(bash("grep old f11"), "f11", "old\n"),
    Permitted(bash("git status"), "f11", "old\n"),
    Permitted(bash("ps aux"), "f11", "old\n"),
    Permitted(write("{cwd}/written"), "written", "new\n"),
    Permitted(write("{cwd}/CLAUDE.md"), "CLAUDE.md", "new\n"),
    Permitted(read("{cwd}/f12"), "f12", "new\n"),  # Claude Code edits only files that it has read
    Permitted(edit("{cwd}/f12"), "f12", "new\n"),
]

REFUSED = [
    bash("ln -s f20 linked"),
    bash("chmod 777 f20"),
    bash("tee teed < f20"),
    bash("find . -name f20 -delete"),
    bash("find . -name f20 -exec rm {{}} ;"),
    bash("rm f2*"),
    bash("rm $(echo f20)"),
    bash("X=1 rm f20"),
    bash("truncate -s 0 f20"),
    bash("touch first && python3 -V"),
    bash('python3 -c \'open("opened", "w")\''),
    bash("sh -c 'rm f20'"),
    bash("make"),
    bash("git add f20"),
    bash("git commit --allow-empty -m x"),
    bash("git rm f20"),
    bash("curl http://127.0.0.1:9/"),
    bash("kill 999999"),
    bash("env"),
    bash("rm -rf ."),
    bash("rm -rf .git"),
    bash("echo x > .git/hooks/pre-commit"),
    bash("mkdir .claude"),
    bash("cp f20 .claude/settings.json"),
    write("{cwd}/.claude/settings.json", "{{}}"),
    write("{cwd}/.mcp.json", "{{}}"),
    write("{cwd}/.git/hooks/pre-commit"),
    # Outside the cwd
    bash("rm {out}/f1"),
    bash("rm -rf ../out/d1"),
    bash("rm link/f1"),
    bash("mv f20 {out}/moved"),
    bash("cp {out}/f1 stolen"),
    bash("echo x > {out}/f1"),
    bash("echo x > link/f1"),
    bash("cd .. && rm out/f1"),
    bash("cd {out} && cat f1"),
    bash("cat {out}/f1"),
    bash("cat < {out}/f1"),
    bash("cat ~/.ssh/id_ed25519"),
    bash("ls .."),
    bash("cat /proc/self/environ"),
    write("{out}/written"),
    write("../out/written"),
    write("{cwd}/link/written"),
    read("{out}/f1"),
    read("{cwd}/link/f1"),
    read("/etc/passwd"),
    Call("WebFetch", {"url": "http://127.0.0.1:9/", "prompt": "Read it."}),
]


def lay_out(folder: Path) -> Folders:
    """Create a run's directory and one beside it, both with files, and a link from the first to the second."""
    folders = Folders(folder / "cwd", folder / "out")
    for place in folders:
        for directory in ("d1", "d2"):
            (place / directory).mkdir(parents=True)
            (place / directory / "inside").write_text("old\n")
        for number in range(1, 21):
            (place / f"f{number}").write_text("old\n")
    (folders.cwd / "empty").mkdir()
    (folders.cwd / ".git" / "hooks").mkdir(parents=True)
    (folders.cwd / "link").symlink_to(folders.out)
    return folders


def disk(folder: Path) -> dict[str, str]:
    """Return the contents of a directory by path, without following links."""
    return {
        str(path.relative_to(folder)): DIRECTORY if path.is_dir() else f"{path.stat().st_mode:o} {path.read_text()}"
        for path in folder.rglob("*")
    }


def carry_out(client: Client, folder: Path, calls: Sequence[Call], options: Mapping[str, Any] | None = None) -> Outcome:
    """Run the tool calls in one run, one after another."""
    folders = lay_out(folder)
    before = disk(folder)
    script = []
    for call in calls:
        filled = {key: text.format(cwd=folders.cwd, out=folders.out) for key, text in call.input.items()}
        script.append(f"[[tool {call.tool} {json.dumps(filled)}]]")
    fields: dict[str, Any] = {} if options is None else {"options": options}
    run = client.start(folders.cwd, " ".join(script), **fields)
    assert run["status"] == "completed", run["error"]
    denied = {denial["tool_use_id"] for denial in run["permissionDenials"]}
    blocks = [
        block
        for message in client.messages(run["id"], type="assistant,user")
        for block in message["message"]["content"]
    ]
    results = {block["tool_use_id"]: str(block["content"]) for block in blocks if block["type"] == "tool_result"}
    made = [block["id"] for block in blocks if block["type"] == "tool_use"]
    assert len(made) == len(calls)
    return Outcome([(use in denied, results[use]) for use in made], before, disk(folder))


@pytest.fixture(scope="module")
def without_options(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Run all calls of both tables in one run without options."""
    return carry_out(client, tmp_path_factory.mktemp("permissions"), [*(row.call for row in PERMITTED), *REFUSED])


@pytest.mark.parametrize("row", PERMITTED, ids=lambda row: " ".join(map(str, row.call.input.values()))[:40])
def test_without_options_the_call_is_executed(without_options: Outcome, row: Permitted) -> None:
    refused, result = without_options.calls[PERMITTED.index(row)]
    after = without_options.after.get(f"cwd/{row.path}")

    assert not refused, result
    assert (after.partition(" ")[2] if after not in (None, DIRECTORY) else after) == row.after


@pytest.mark.parametrize("call", REFUSED, ids=lambda call: " ".join(map(str, call.input.values()))[:40])
def test_without_options_the_call_is_refused(without_options: Outcome, call: Call) -> None:
    refused, result = without_options.calls[len(PERMITTED) + REFUSED.index(call)]

    assert refused, result


def test_without_options_nothing_else_changes(without_options: Outcome) -> None:
    before, after = without_options.before, without_options.after
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    expected = {f"cwd/{row.path}" for row in PERMITTED if row.path != "f11"}

    assert changed - expected == {"cwd/both", "cwd/d1/inside", "cwd/d2/f3", "cwd/f2", "cwd/made", "cwd/made/in"}


def test_the_page_lists_the_executed_commands() -> None:
    (sentence,) = re.findall(r"the shell commands (.*?) with paths in\s", text_of(page("options")), re.DOTALL)
    listed = {command.split()[0] for command in re.findall(r"`([^`]+)`", sentence)}
    executed = {row.call.input["command"].split()[0] for row in PERMITTED if row.call.tool == "Bash"}

    assert listed == executed & {"cp", "mkdir", "mv", "rm", "rmdir", "sed", "touch"}


def changes_under(client: Client, folder: Path, options: Mapping[str, Any] | None) -> list[str]:
    """Return those of CHANGES that a run with these options makes."""
    calls = [
        bash("rm f1"),
        bash("echo new > f2"),
        write("{cwd}/written"),
        read("{cwd}/f3"),
        edit("{cwd}/f3"),
        write("{out}/written"),
    ]
    outcome = carry_out(client, folder, calls, options)
    # Reading in the cwd is always permitted.
    assert outcome.calls[3] == (False, "1\told\n2\t")
    paths = ("cwd/f1", "cwd/f2", "cwd/written", "cwd/f3", "out/written")
    before, after = outcome.before, outcome.after
    return [change for change, path in zip(CHANGES, paths, strict=True) if before.get(path) != after.get(path)]


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        pytest.param({}, ["remove", "redirect", "write", "edit"], marks=pytest.mark.main_job),
        ({"permissionMode": "dontAsk"}, []),
        ({"permissionMode": "default"}, []),
        ({"disallowedTools": ["Bash"]}, ["write", "edit"]),
        ({"tools": ["Read", "Edit", "Write"]}, ["write", "edit"]),
        ({"allowedTools": ["Edit", "Write"]}, list(CHANGES)),
    ],
    ids=str,
)
def test_options_permit_fewer_or_more_changes(
    client: Client, tmp_path: Path, options: dict[str, Any], changes: list[str]
) -> None:
    assert changes_under(client, tmp_path, options) == changes


def test_the_services_permission_mode_is_a_default_not_a_limit(serve: ServeFunction, tmp_path: Path) -> None:
    client = Client(serve(CCM_PERMISSION_MODE="dontAsk").url)

    assert changes_under(client, tmp_path / "1", None) == []
    assert changes_under(client, tmp_path / "2", {"permissionMode": "acceptEdits"}) == list(CHANGES[:4])


@pytest.mark.parametrize(
    ("options", "made"),
    [({}, True), ({"permissionMode": "dontAsk"}, True), ({"disallowedTools": ["EnterWorktree"]}, False)],
    ids=str,
)
def test_a_worktree_needs_no_permission_in_any_mode(
    client: Client, program: ProgramFunction, project: Path, options: dict[str, Any], made: bool
) -> None:
    git = [program("git", "git"), "-C", str(project), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True, timeout=60)
    run = client.start(project, "[[tool EnterWorktree {}]]", options=options)

    assert run["permissionDenials"] == []
    assert bool(list(project.glob(".claude/worktrees/*"))) == made
