"""Prepares the execution of a run: whether it may still begin, the parent's transcript, and the SDK's inputs."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ccm.core.approvals.requests import Approvals
from ccm.core.claude.outcome import Outcome
from ccm.core.claude.run_context import CLIConfig, RunContext
from ccm.core.policy import workdir
from ccm.core.policy.permitted_options import check_options
from ccm.core.run_log import RunLog
from ccm.core.runs.prestarts import Prestarts
from ccm.core.runs.transitions import Start
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.copying import TranscriptCopy
from ccm.core.transcripts.files import TranscriptFiles
from ccm.errors import Forbidden, StorageError
from ccm.json_text import storable, to_json_text
from ccm.models import Image, Message, Run, RunErrorCode, RunStatus
from ccm.search_words import INDEXED_CHARACTERS, said
from ccm.settings.settings import Settings
from ccm.timestamps import timestamp

if TYPE_CHECKING:
    from ccm.core.claude.execution import Execution

log = logging.getLogger(__name__)


class Preparation:
    """Prepares executions. For the threads of runs.

    Args:
        cli_config: the Claude Code to run.
        settings: those of the service, which may have changed since a run was accepted.
        transcripts: the transcripts of runs, on this host and in the database.
        approvals: passes permission requests on to clients.
        writer: stores messages.
        prestarts: the Claude Codes that wait for a run.
    """

    def __init__(
        self,
        cli_config: CLIConfig,
        settings: Settings,
        *,
        transcripts: TranscriptFiles,
        approvals: Approvals,
        writer: Writer,
        prestarts: Prestarts,
    ) -> None:
        self._cli_config = cli_config
        self._settings = settings
        self._transcripts = transcripts
        self._approvals = approvals
        self._writer = writer
        self._prestarts = prestarts

    def check(self, start: Start) -> Outcome | None:
        """Put the parent's transcript in place. Return how the run ends if it cannot begin."""
        try:
            # A restart while the run was waiting may have changed the settings.
            check_options(start.run.options.value, self._settings)
            workdir.check_roots(start.run.cwd, self._settings.allowed_roots)
        except Forbidden as error:
            return Outcome(RunStatus.ERROR, RunErrorCode(error.code), error.message)
        return None if start.parent is None else self._provide_transcript(start.parent, start.run)

    def make_execution(self, start: Start, transcript: TranscriptCopy) -> Execution:
        # Imported here because the SDK takes longer to import than the rest of a start.
        from ccm.core.claude.execution import Execution  # noqa: PLC0415

        run, parent = start.run, start.parent
        context = RunContext(
            run_id=run.id,
            sdk_session_id=run.sdk_session_id,
            cwd=run.cwd,
            prompt=run.prompt,
            images=tuple(Image(image["mediaType"], image["data"]) for image in json.loads(start.images_json or "[]")),
            options=run.options.value,
            timeout_ms=run.timeout_ms,
            resume=parent.sdk_session_id if parent else None,
            resume_at=run.fork_at_message,
        )
        ask = partial(self._approvals.ask, run) if run.approvals else None
        prestarted = self._prestarts.take(run, parent)
        return Execution(context, self._cli_config, self._record(run), transcript, ask=ask, prestarted=prestarted)

    def _record(self, run: Run) -> Callable[[dict[str, Any]], Any]:
        """Return a function that numbers the messages of a run and hands them to the writer."""
        indexes = itertools.count()

        async def record(raw: dict[str, Any]) -> int:
            kind, text = storable(raw.get("type")) or "unknown", to_json_text(raw)
            spoken = said(kind, text, raw)[:INDEXED_CHARACTERS]
            index = next(indexes)
            # By position: by name it takes three times as long.
            await self._writer.append(Message(run.id, run.session_id, index, kind, text, timestamp(), spoken))
            return index

        return record

    def _provide_transcript(self, parent: Run, run: Run) -> Outcome | None:
        """Put the parent's transcript where Claude Code finds it. Return how the run ends if that is impossible."""
        try:
            if self._transcripts.make_available(parent, run):
                return None
            reason = "it is neither on this host nor complete in the database"
        except (OSError, StorageError) as error:
            RunLog(log, run.id).exception(
                "cannot write the transcript of run %s to a file", parent.id, event="transcript_restore_failed"
            )
            reason = f"it could not be written to a file: {error}"
        message = f"The transcript of run {parent.id}, which this run continues, is missing: {reason}."
        return Outcome(RunStatus.ERROR, RunErrorCode.SESSION_NOT_RESUMABLE, message)
