"""Stores the ends of runs, and retries until they are stored: a run must not stay `running` after it has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from ccm.core.claude.outcome import Outcome
from ccm.core.problems import Problems
from ccm.core.runs.transitions import UNSTORABLE, AfterCommit, RunTransitions, error_columns
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.copying import TranscriptEnd
from ccm.db.driver.transaction import Transaction
from ccm.errors import ShuttingDown, Unavailable
from ccm.json_text import storable, to_json_text
from ccm.models import Run, RunErrorCode

# Delays between attempts to store an end after a fault (seconds).
FIRST_DELAY = 0.1
MAX_DELAY = 10.0
# The number of attempts to store a run's full end. After that only its row is ended.
FULL_END_ATTEMPTS = 3
UNSTORED = "the end of a run cannot be stored"


class EndStore:
    """Stores the ends of runs through the writer.

    Args:
        perform: performs the side effects of a commit, in the writer's thread.
        problems: shows ends that cannot be stored at present.
    """

    def __init__(
        self, writer: Writer, transitions: RunTransitions, problems: Problems, perform: Callable[[AfterCommit], None]
    ) -> None:
        self._writer = writer
        self._transitions = transitions
        self._problems = problems
        self._perform = perform
        # Set when the service gives up. Ends that are not stored by then are left to the next start.
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """Stop retrying. Idempotent, from any thread."""
        self._given_up.set()

    def store(self, run: Run, values: Mapping[str, Any], transcript: TranscriptEnd) -> bool:
        """Store the end of a run and wait until it is committed, however long that takes.

        Args:
            transcript: stores the rest of its transcript with it.

        Returns:
            False if the service gives up before.
        """
        stored = False

        def perform(after_commit: AfterCommit) -> None:
            # Set first, because the end is stored even if a side effect fails.
            nonlocal stored
            stored = True
            self._perform(after_commit)

        pause = FIRST_DELAY
        key = f"run {run.id}"
        refused = 0
        while True:
            full = partial(self._end, run, values, transcript)
            end = full if refused < FULL_END_ATTEMPTS else partial(self._end_row_only, run)
            try:
                self._writer.submit(end, perform).future.result()
            except Exception as error:
                self._problems.report(key, UNSTORED, error)
                # Unavailable storage is no reason to give up the full end: nothing is wrong with the end itself.
                refused += not isinstance(error, Unavailable)
            if stored:
                self._problems.clear(key)
                return True
            if self._given_up.wait(pause):
                return False
            pause = min(pause * 2, MAX_DELAY)

    def submit(
        self, run: Run, values: Mapping[str, Any], settled: Callable[[str], None], failed_attempts: int = 0
    ) -> None:
        """Store the end of a run without waiting for it. Retried until it is stored.

        Args:
            settled: called with the run's id when its end is stored, or left to the next start.
        """

        def check(stored: Future[AfterCommit]) -> None:
            error = stored.exception()
            if error is None:
                self._problems.clear(key)
                settled(run.id)
            elif isinstance(error, ShuttingDown):
                settled(run.id)  # the next start reports it
            else:
                self._problems.report(key, UNSTORED, error)
                pause = min(FIRST_DELAY * 2 ** min(failed_attempts, 10), MAX_DELAY)
                self._writer.call_later(pause, lambda: self.submit(run, values, settled, failed_attempts + 1))

        key = f"run {run.id}"
        full = partial(self._end, run, values, no_transcript)
        end = full if failed_attempts < FULL_END_ATTEMPTS else partial(self._end_row_only, run)
        try:
            self._writer.submit(end, self._perform).future.add_done_callback(check)
        except Unavailable:
            settled(run.id)

    def _end(
        self, run: Run, values: Mapping[str, Any], transcript: TranscriptEnd, transaction: Transaction
    ) -> AfterCommit:
        """End a run and decide which starts next. A run of which a message was refused ends in error."""
        refusal = self._writer.broken.get(run.id)
        if refusal is not None:
            message = storable(f"A message of this run cannot be stored: {refusal}.")
            values = {**values, **error_columns(RunErrorCode.EXECUTION_ERROR, message)}
        values = {**values, **transcript(transaction)}
        return self._transitions.end_or_fail(transaction, run, values) | self._transitions.dispatch(transaction)

    def _end_row_only(self, run: Run, transaction: Transaction) -> AfterCommit:
        """End only the row of a run, because `_end` has failed. Which run starts next is decided separately."""
        ended = self._transitions.end_row_only(transaction, run.id, UNSTORABLE)
        return ended | AfterCommit(changed=(run.session_id,), dispatch_failed=True)


def no_transcript(_transaction: Transaction) -> dict[str, Any]:
    """End the transcript of a run of which none was copied: there is nothing to store."""
    return {}


def columns(outcome: Outcome) -> dict[str, Any]:
    """Return the columns of a run that ended with `outcome`."""
    return {
        "status": outcome.status,
        "errorCode": outcome.error_code,
        "errorMessage": storable(outcome.error_message),
        "resultType": None if outcome.result is None else storable(outcome.result.get("subtype")),
        "resultJson": None if outcome.result is None else to_json_text(outcome.result),
        "costUsd": outcome.cost_usd,
        "durationMs": outcome.duration_ms,
    }


def columns_of_fault(error: BaseException) -> dict[str, Any]:
    """Return the columns of a run that ended because of a fault."""
    return error_columns(RunErrorCode.EXECUTION_ERROR, storable(f"{type(error).__name__}: {error}"))
