"""Wires the parts of the service together, starts them and stops them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing

from ccm import file_limits
from ccm.core.approvals.requests import Approvals
from ccm.core.approvals.transitions import ApprovalTransitions
from ccm.core.claude.locations import bundled_cli
from ccm.core.claude.reaper import Reaper
from ccm.core.claude.run_context import CLIConfig
from ccm.core.policy.ceilings import Ceilings
from ccm.core.problems import Problems
from ccm.core.queries import Queries
from ccm.core.runs.input import Input
from ccm.core.runs.manager import RunManager
from ccm.core.runs.preparation import Preparation
from ccm.core.runs.prestarts import Prestarts
from ccm.core.runs.runner import Runner
from ccm.core.runs.transitions import RunTransitions
from ccm.core.storage.health import StorageHealth
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.shared_reads import SharedReads
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.files import TranscriptFiles
from ccm.core.transcripts.store import TranscriptStore
from ccm.core.webhooks.delivery_executor import Addresses, DeliveryExecutor
from ccm.core.webhooks.dispatcher import Dispatcher
from ccm.core.webhooks.outbox import Outbox
from ccm.db import heartbeat
from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.lock import service_lock
from ccm.db.driver.migrate import migrate
from ccm.errors import DatabaseRefused, Unavailable
from ccm.settings.settings import Settings, unknown_variables

log = logging.getLogger(__name__)

# How long interrupting all runs and storing their ends may take (seconds).
STOP_TIMEOUT = 25.0
# How long sending the webhooks of these ends may take (seconds). The rest is sent after the next start.
SEND_TIMEOUT = 1.5
# How long PostgreSQL may take for one statement (seconds). Our longest inserts 8 MiB.
ANSWER_TIMEOUT = 12.0


class Service:
    """One CC Manager. It opens nothing and runs no thread before `start`.

    Args:
        environ: the environment that agents inherit.

    Attributes:
        queries, runs, approvals, input: what clients ask for, once the service has been started.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str] | None = None) -> None:
        self.settings = settings
        self._environ = dict(os.environ if environ is None else environ)
        self._lock = threading.Lock()
        self._started = False
        self._stopped = False
        self._deadline: float | None = None
        self.ceilings = Ceilings(settings.max_turns, settings.max_budget_usd, settings.run_timeout)
        self._cli_config = CLIConfig(
            cli_path=settings.cli_path or bundled_cli(),
            environ=self._environ,
            permission_mode=settings.permission_mode,
            setting_sources=settings.setting_sources,
            max_message_bytes=settings.max_message_bytes,
            ceilings=self.ceilings,
            open_files=file_limits.limit(),  # before the server raises it
        )
        self.notifier = Notifier()
        self.shared_reads = SharedReads(self.notifier)
        self.problems = Problems()
        # Closes what a start has opened, the last part first.
        self._parts = ExitStack()

    def start(self) -> None:
        """Lock and migrate the database, recover runs, and begin to accept new ones. Idempotent and thread-safe.

        Raises:
            StartRefused: the database cannot be used. It is left unchanged.
        """
        if not self._started:  # read without the lock, which a stopping service holds for a long time
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._started:
                return
            for sentence in unknown_variables(self._environ):
                log.warning("%s", sentence)
            sqlite_file.prepare(self.settings.url)
            self._parts.enter_context(service_lock(self.settings.url))
            with ExitStack() as undo:
                undo.callback(self._parts.close)
                if not sqlite_file.check(self.settings.url):
                    log.warning(
                        "the database is too large to be checked whole in %.0f seconds; no damage was found so far",
                        sqlite_file.CHECK_TIMEOUT,
                        extra={"event": "database_check_incomplete"},
                    )
                try:
                    self._open(undo)
                except Unavailable as error:
                    raise DatabaseRefused(f"The database cannot be written: {error.message}") from None
                undo.pop_all()  # from now on `end_runs` stops the parts
            self._started = True

    def _open(self, undo: ExitStack) -> None:
        """Create the parts and start them.

        Args:
            undo: receives a callback for each started part, which stops it if a later part fails to start.
        """
        settings = self.settings
        # A connection of its own, because a migration has no time limit.
        with closing(Database(settings.url, writable=True, pool_size=1)) as database:
            log.info("database %s", database)
            for migration in migrate(database):
                log.info("migration %s applied", migration, extra={"event": "migration_applied"})
        writable = Database(settings.url, writable=True, pool_size=1, answer_seconds=ANSWER_TIMEOUT)
        self._parts.callback(writable.close)
        reader = Database(settings.url, answer_seconds=ANSWER_TIMEOUT, watch=writable.watch)
        self._parts.callback(reader.close)
        self.queries = Queries(reader)
        self._writer = Writer(
            writable, self.notifier, settings.message_budget_bytes, on_refused=self._refused, problems=self.problems
        )
        transcripts = TranscriptFiles(TranscriptStore(self._writer, reader), self._environ)
        outbox = Outbox(service=settings.webhook_url is not None)
        approvals = ApprovalTransitions(outbox, settings.max_concurrent_runs)
        transitions = RunTransitions(settings.max_concurrent_runs, settings.max_queued_runs, outbox, approvals)
        self.approvals = Approvals(self._writer, self.notifier, approvals, timeout=settings.approval_timeout)
        reaper = Reaper()
        self._prestarts = Prestarts(
            self._cli_config,
            reaper,
            spares=settings.spare_runs,
            warm=settings.warm_sessions,
        )
        preparation = Preparation(
            self._cli_config,
            settings,
            transcripts=transcripts,
            approvals=self.approvals,
            writer=self._writer,
            prestarts=self._prestarts,
        )
        self._runner = Runner(
            self._writer,
            self.notifier,
            transcripts,
            transitions,
            preparation=preparation,
            prestarts=self._prestarts,
            reaper=reaper,
            problems=self.problems,
            workers=settings.max_concurrent_runs,
        )
        self.runs = RunManager(
            self._writer, transitions, self._runner, transcripts, prestarts=self._prestarts, problems=self.problems
        )
        addresses = Addresses(settings.webhook_url, settings.webhook_allow, settings.webhook_secret)
        delivery_executor = DeliveryExecutor(self._writer, reader, outbox, addresses)
        self._dispatcher = Dispatcher(reader, self.notifier, delivery_executor, self.problems)
        self.input = Input(self._writer, self._runner, settings.max_message_bytes)
        self._writer.on_unfollowed = self._catch_up
        self._writer.start()
        undo.callback(self._stop, "writer", lambda: self._writer.stop(time.monotonic()))
        # If a later part fails to start, runs may have started already: end them and store their ends.
        undo.callback(self._stop, "runs", lambda: self._runner.stop(time.monotonic() + STOP_TIMEOUT))
        self._storage_health = StorageHealth(self._writer, writable)
        self._writer.write(heartbeat.beat)  # refuses a database that cannot be written
        self.runs.recover()
        undo.callback(self._stop, "webhooks", lambda: self._dispatcher.stop(time.monotonic()))
        self._dispatcher.start()
        undo.callback(self._stop, "prestarts", self._prestarts.close)
        self._prestarts.start()
        missing = self._cli_config.missing()
        if missing is not None:
            log.error("%s Runs will fail until then.", missing, extra={"event": "cli_missing"})

    @staticmethod
    def import_sdk() -> None:
        """Import the SDK and its users. Otherwise the first run does, and takes a second longer.

        Raises:
            ImportError: the SDK is not installed correctly, so no run can be executed.
        """
        try:
            import ccm.core.claude.execution  # noqa: F401, PLC0415
        except OSError as error:
            # A temporary condition, such as a lack of file descriptors, must not end the service.
            log.warning(
                "the Claude Agent SDK cannot be imported at present, the first run imports it: %s",
                error,
                extra={"event": "sdk_import_failed"},
            )
        else:
            log.debug("the Claude Agent SDK is imported")

    def _refused(self, run_id: str, error: BaseException) -> None:
        self._runner.fail_unrecorded(run_id, error)

    def _catch_up(self) -> None:
        """Redo from the database what follows a commit, after a fault has interrupted it."""
        try:
            self.approvals.catch_up()
        finally:
            self._runner.catch_up()

    def end_runs(self) -> bool:
        """End the runs, send the webhooks of their ends, then stop the writer, then wake all waiting clients.

        Reads still work afterwards. Idempotent.

        Returns: False if something had to be given up.
        """
        with self._lock:
            if not self._started or self._stopped:
                return True
            self._stopped = True
            self._stop("prestarts", self._prestarts.close)
            ended = self._stop("runs", lambda: self._runner.stop(self._stop_by()))
            self._stop("prestarts", self._prestarts.stop)
            self._stop("webhooks", lambda: self._dispatcher.stop(time.monotonic() + SEND_TIMEOUT))
            written = self._stop("writer", lambda: self._writer.stop(max(self._stop_by(), time.monotonic() + 1)))
            self._stop("waits", self.notifier.close)
            if not ended:
                self._stop("processes", self._runner.give_up)
                log.error(
                    "some runs could not be ended; the next start reports them as INTERRUPTED",
                    extra={"event": "runs_left_running"},
                )
            return ended and written

    def _stop_by(self) -> float:
        """Return the `time.monotonic()` by which runs and writer must have stopped, counted from the first call."""
        if self._deadline is None:
            self._deadline = time.monotonic() + STOP_TIMEOUT
        return self._deadline

    def _stop(self, part: str, stop: Callable[[], bool | None]) -> bool:
        """Stop one part of the service. A fault in it must not prevent the other parts from being stopped.

        Returns: False if something had to be given up.
        """
        for _ in range(2):  # retry, because a single fault must not leave a run behind
            try:
                return stop() is not False
            except Exception:
                log.exception("cannot stop the service's %s", part, extra={"event": "stop_failed", "part": part})
        return False

    def close(self) -> None:
        """End the runs unless that is done, close the database and release its lock. Idempotent."""
        self.end_runs()
        with self._lock:
            self._parts.close()

    def last_error(self) -> str | None:
        """Return why the service cannot do its job at present, or None."""
        if not self._started:
            return "starting"
        if self._stopped or self._runner.stopping:
            return "shutting down"
        storage = self._storage_health.last_error()
        if storage is not None:
            return f"storage is not writable: {storage}"
        if self._cli_config.missing() is not None:
            return "Claude Code is missing"
        return None
