"""Makes one attempt at a delivery: reads it, sends it, and stores the outcome."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from ccm.core.storage.writer import Writer
from ccm.core.webhooks.outbox import URL_UNSET, Outbox
from ccm.core.webhooks.post import Answer, NoAnswer, Post
from ccm.core.webhooks.retry import SCHEDULE, DeliveryOutcome, outcome_of
from ccm.core.webhooks.signature import headers
from ccm.db import deliveries, events, runs
from ccm.db.driver.database import Database
from ccm.models import Attempt, Delivery, DeliveryStatus, DeliveryTarget
from ccm.settings.webhook_urls import allowed, host_of
from ccm.timestamps import timestamp

log = logging.getLogger(__name__)

# The time for one attempt (seconds).
ATTEMPT_TIMEOUT = 15.0


@dataclass(frozen=True)
class Addresses:
    """The configured addresses and keys.

    Args:
        service: the service's own address, which gets the events of all runs.
        allow: the hosts that a run's own address may have.
        keys: the keys that sign.
    """

    service: str | None = None
    allow: Sequence[str] = ()
    keys: Sequence[bytes] = ()


class DeliveryExecutor:
    """Executes deliveries in the calling thread. Thread-safe.

    Args:
        writer: stores the outcomes.
        database: for reads.
        outbox: schedules what follows an outcome.
        attempt_seconds: the time for one attempt.
        schedule: the pauses between attempts (seconds).
    """

    def __init__(
        self,
        writer: Writer,
        database: Database,
        outbox: Outbox,
        addresses: Addresses,
        *,
        attempt_seconds: float = ATTEMPT_TIMEOUT,
        schedule: Sequence[float] = SCHEDULE,
    ) -> None:
        self._writer = writer
        self._database = database
        self._outbox = outbox
        self._addresses = addresses
        self._attempt_seconds = attempt_seconds
        self._schedule = schedule
        self._lock = threading.Lock()
        # The requests in flight, by delivery id.
        self._posts: dict[int, Post] = {}
        self._closed = threading.Event()
        self._warned_unsigned = False

    def start(self) -> None:
        """Correct the stored deliveries. Called before the first delivery.

        Raises:
            Unavailable: the database is not writable.
        """
        self._writer.write(self._outbox.recover)
        if self._addresses.service is not None:
            self._warn_unsigned()

    def close(self) -> None:
        """Abort the requests in flight, and refuse new ones. An aborted request does not count as an attempt."""
        with self._lock:
            self._closed.set()
            posts = list(self._posts.values())
        for post in posts:
            post.abort()

    def deliver(self, delivery_id: int) -> bool | None:
        """Make one attempt, and store its outcome. Return whether the receiver answered, None if nothing was sent.

        Raises:
            StorageDown: the delivery cannot be read. Nothing was sent.
            Exception: the outcome cannot be stored.
        """
        due = None if self._closed.is_set() else self._read_due(delivery_id)
        if due is None:
            return None
        delivery, text, url = due
        refusal = self._refusal(delivery, url)
        if url is None or refusal is not None:
            self._store(delivery, delivery.attempts.value, DeliveryOutcome(DeliveryStatus.DISABLED, reason=refusal))
            return None
        at, start = timestamp(), time.monotonic()
        answer = self._post(delivery, url, text.encode("ascii"))
        duration_ms = round((time.monotonic() - start) * 1_000)
        if self._closed.is_set() and not isinstance(answer, Answer):
            return None  # aborted by `close`, so it does not count as a failure of the receiver
        outcome = outcome_of(answer, len(delivery.attempts.value) + 1, self._schedule)
        code = answer.status if isinstance(answer, Answer) else None
        attempt: Attempt = {"at": at, "durationMs": duration_ms, "statusCode": code, "error": outcome.error}
        self._store(delivery, [*delivery.attempts.value, attempt], outcome)
        return isinstance(answer, Answer)

    def _read_due(self, delivery_id: int) -> tuple[Delivery, str, str | None] | None:
        """Return a delivery, the text of its event and its address; None if it is not due any more."""
        with self._database.transaction() as transaction:
            delivery = deliveries.find(transaction, delivery_id)
            # It may have been disabled or attempted after the dispatcher had read it.
            if delivery is None or (delivery.next_attempt_at or "~") > timestamp():
                return None
            run = runs.find(transaction, delivery.run_id) if delivery.target == DeliveryTarget.RUN else None
            text = events.find_text(transaction, delivery.event_id)
        # Deleted with its run by `flask prune`, which on PostgreSQL can happen between two statements.
        if text is None or (run is None and delivery.target == DeliveryTarget.RUN):
            return None
        return delivery, text, self._addresses.service if run is None else run.webhook_url

    def _refusal(self, delivery: Delivery, url: str | None) -> str | None:
        """Return the reason why the current settings forbid a delivery, None if they allow it."""
        if url is None:
            return URL_UNSET
        if delivery.target == DeliveryTarget.RUN and not allowed(url, self._addresses.allow):
            return f"CCM_WEBHOOK_ALLOW does not name {host_of(url)} any more"
        return None

    def _post(self, delivery: Delivery, url: str, body: bytes) -> Answer | str:
        """Send a delivery. Return the receiver's answer, or the reason why there is none."""
        try:
            self._warn_unsigned()
            signed = headers(delivery.webhook_id, int(time.time()), body, self._addresses.keys)
            post = Post(url, signed, body, self._attempt_seconds, self._tls)
            with self._lock:
                if self._closed.is_set():
                    return "the service has stopped"
                self._posts[delivery.id] = post
            try:
                return post.send()
            finally:
                with self._lock:
                    del self._posts[delivery.id]
        except NoAnswer as reason:
            return str(reason)
        except Exception as error:
            # Counted as a failed attempt, or a delivery that always fails this way would be retried without end.
            log.exception("delivery %d cannot be sent", delivery.id, extra=_log_fields("delivery_errored", delivery))
            return f"a fault of the service: {type(error).__name__}"

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def _store(self, delivery: Delivery, attempts: Sequence[Attempt], outcome: DeliveryOutcome) -> None:
        """Store an outcome, and wait for the commit without a timeout, because an earlier retry would send it twice.

        Raises:
            CCMError: the writer has stopped.
        """
        work = partial(self._outbox.record_attempt, delivery=delivery, attempts=attempts, outcome=outcome)
        self._writer.submit(work).future.result()
        _log_outcome(delivery, outcome)

    def _warn_unsigned(self) -> None:
        """Warn once if there are no keys."""
        if not self._addresses.keys and not self._warned_unsigned:
            self._warned_unsigned = True
            log.warning(
                "webhooks are not signed, so receivers cannot verify their sender: set CCM_WEBHOOK_SECRET",
                extra={"event": "webhooks_unsigned"},
            )


def _log_fields(event: str, delivery: Delivery) -> dict[str, object]:
    return {"event": event, "delivery_id": delivery.id, "run_id": delivery.run_id}


def _log_outcome(delivery: Delivery, outcome: DeliveryOutcome) -> None:
    name = f"run {delivery.run_id}: {delivery.event_type} for {delivery.host or 'CCM_WEBHOOK_URL'}"
    if outcome.status == DeliveryStatus.DELIVERED:
        log.info("%s delivered", name, extra=_log_fields("delivery_succeeded", delivery))
    elif outcome.status == DeliveryStatus.PENDING:
        extra = _log_fields("delivery_postponed", delivery)
        log.warning("%s not delivered, next attempt in %.0f s: %s", name, outcome.pause, outcome.error, extra=extra)
    elif outcome.status == DeliveryStatus.FAILED:
        extra = _log_fields("delivery_failed", delivery)
        log.error("%s given up: %s; the last error: %s", name, outcome.reason, outcome.error, extra=extra)
    else:
        extra = _log_fields("delivery_disabled", delivery)
        if delivery.target == DeliveryTarget.RUN:
            log.warning("%s disabled, with all later ones of this run: %s", name, outcome.reason, extra=extra)
        else:
            log.error("%s disabled, with all others for it until the next start: %s", name, outcome.reason, extra=extra)
