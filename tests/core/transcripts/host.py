"""A run, the files of its Claude Code on a host, and what is stored of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ccm.core.transcripts.files import TranscriptFiles
from ccm.core.transcripts.store import TranscriptStore
from ccm.db.transcripts import TranscriptKey
from ccm.models import Run, RunMode, RunStatus
from ccm.models.json_field import JsonText

SESSION = "11111111-1111-4111-8111-111111111111"
ONE = TranscriptKey(SESSION, "-one")
RUN = Run(
    id="r",
    seq=1,
    session_id="s",
    sdk_session_id="s",
    parent_run_id=None,
    parent_session_id=None,
    mode=RunMode.FRESH,
    status=RunStatus.RUNNING,
    cwd="/",
    prompt="",
    options=JsonText("{}"),
    image_count=1,
    timeout_ms=86_400_000,
    approvals=True,
    approval_timeout_ms=1_000,
    webhook_url=None,
    fork_at_message=None,
    fork_at_index=None,
    result_type=None,
    result=None,
    error_code=None,
    error_message=None,
    cost_usd=None,
    message_count=0,
    duration_ms=None,
    queue_position=None,
    pending_approvals=0,
    has_transcript=False,
    transcript_stored=False,
    created_by=None,
    created_at="",
    started_at=None,
    ended_at=None,
)


def entry(uuid: str, session: str = SESSION, **fields: object) -> dict[str, Any]:
    return {"type": "assistant", "uuid": uuid, "sessionId": session, **fields}


def loaded(store: TranscriptStore, key: TranscriptKey = ONE) -> list[Any] | None:
    """The entries that a transcript has, None if there is none."""
    return [json.loads(text) for text in store.texts(key)] or None


class Host:
    """A host with a HOME of its own, and Claude Code's files of one run in it."""

    def __init__(self, folder: Path, store: TranscriptStore) -> None:
        self.home = folder
        self.store = store
        self.files = TranscriptFiles(store, {"HOME": str(folder)})

    def complete_copy(self) -> dict[str, Any]:
        """Complete the copy as the recovery of the run does, and return the columns that its end stores."""
        return self.store.submit(self.files.complete_copy(run())).result()

    def path(self, cwd: str) -> Path:
        return self.home / ".claude" / "projects" / cwd.replace("/", "-") / f"{SESSION}.jsonl"

    def write(self, cwd: str, *lines: object) -> Path:
        path = self.path(cwd)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return path


def run(**fields: Any) -> Run:
    values = {**vars(RUN), "sdk_session_id": SESSION, "cwd": "/one", "options": "{}", **fields}
    return Run(**values)
