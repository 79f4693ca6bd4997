"""The launch environment of Claude Code, and the search for the processes of a run."""

from __future__ import annotations

import os
import subprocess
import uuid

from ccm.core.claude.processes import RUN_MARK, end_marked, inherited, marked


def test_marked_processes_are_found_and_ended_in_any_session() -> None:
    mine, other = str(uuid.uuid4()), str(uuid.uuid4())
    hidden = subprocess.Popen(
        ["sleep", "300"], env={RUN_MARK: mine, "PATH": os.environ["PATH"]}, start_new_session=True
    )
    spared = subprocess.Popen(["sleep", "300"], env={RUN_MARK: other, "PATH": os.environ["PATH"]})
    try:
        # Between fork and exec a child still shows its parent's environment.
        while hidden.pid not in marked(mine) or spared.pid not in marked(other):
            assert hidden.poll() is None
        end_marked(mine)
        assert marked(mine) == []
        assert hidden.wait() == -9
        assert marked(other) == [spared.pid]
    finally:
        for process in (hidden, spared):
            process.kill()
            process.wait()


def test_the_services_variables_are_hidden_from_the_agent() -> None:
    hidden = {
        "CCM_X": "1",
        "PGHOST": "h",
        "DATABASE_URL": "u",
        RUN_MARK: "outer",
        "CCM_BAD-NAME": "1",
        "CLAUDECODE": "1",
    }

    assert inherited(hidden | {"PATH": "/bin", "HOME": "/root"}) == {"PATH": "/bin", "HOME": "/root"}
