"""What is to be told, stored with the state that it tells of, and what becomes of it. For the writer's thread."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ccm.core.webhooks.retry import MAX_DELAY, RetryDecision
from ccm.db import deliveries, events
from ccm.db.driver.transaction import Transaction
from ccm.json_text import to_json_text
from ccm.models import RUN_ENDED, Delivery, DeliveryStatus, DeliveryTarget, EventType, Run
from ccm.settings.webhook_urls import host_of
from ccm.timestamps import timestamp

log = logging.getLogger(__name__)

# What is delivered; the feed of /api/events has more.
TOLD = frozenset((EventType.RUN_STARTED, *RUN_ENDED.values(), EventType.APPROVAL_REQUESTED))


class Outbox:
    """
    Args:
        service: whether the service has an address of its own that is told of every run.
    """

    def __init__(self, *, service: bool) -> None:
        self._service = service
        # Why nothing goes to that address any more.
        self._gone: str | None = None

    def enqueue(self, transaction: Transaction, type: str, run: Run, approval: Mapping[str, Any] | None = None) -> None:
        """Tell of a state, in the transaction that stores it; ring EVENTS after its commit.

        Args:
            run: as it is now.
            approval: as the API shows it, where it is what the event is about.
        """
        events.insert(transaction, type, run, approval)
        if type not in TOLD:
            return
        now = timestamp()
        webhook_id = f"evt_{uuid.uuid4().hex}"
        if run.webhook_url is not None:
            reason = deliveries.find_disabled_reason(transaction, run.id, DeliveryTarget.RUN)
            host = host_of(run.webhook_url)
            deliveries.insert(transaction, run.id, DeliveryTarget.RUN, webhook_id, host, reason=reason, now=now)
        if self._service:
            host = deliveries.SERVICE_HOST
            deliveries.insert(transaction, run.id, DeliveryTarget.SERVICE, webhook_id, host, reason=self._gone, now=now)

    def begin(self, transaction: Transaction) -> None:
        """At a start: what was for the service's address has none any more, if the setting is gone.

        What is to be sent later than it can be was put off while the clock was ahead: it would never be sent.
        """
        late = deliveries.advance(transaction, timestamp(MAX_DELAY), timestamp())
        if late:
            log.warning("%d webhooks were put off while the clock was ahead, and are sent now", late)
        if not self._service:
            left = deliveries.disable_service(transaction, "CCM_WEBHOOK_URL is not set any more")
            if left:
                log.warning("%d webhooks are given up: CCM_WEBHOOK_URL is not set any more", left)

    def tried(
        self,
        transaction: Transaction,
        delivery: Delivery,
        attempts: Sequence[Mapping[str, object]],
        decision: RetryDecision,
    ) -> None:
        """Store an attempt and what follows from it; ring EVENTS after the commit."""
        next_at = None if decision.pause is None else timestamp(decision.pause)
        attempts_json = to_json_text(list(attempts))
        deliveries.record_attempt(
            transaction,
            delivery.id,
            attempts_json,
            status=decision.status,
            reason=decision.reason,
            next_attempt_at=next_at,
        )
        if decision.status == DeliveryStatus.DISABLED:
            self._disable(transaction, delivery, decision.reason or "")
        elif decision.status != DeliveryStatus.PENDING:
            deliveries.make_next_due(transaction, delivery.run_id, delivery.target, timestamp())

    def _disable(self, transaction: Transaction, delivery: Delivery, reason: str) -> None:
        if delivery.target == DeliveryTarget.RUN:
            deliveries.disable_run(transaction, delivery.run_id, DeliveryTarget.RUN, reason)
        else:
            self._gone = reason
            deliveries.disable_service(transaction, reason)
