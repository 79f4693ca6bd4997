"""Stores deliveries together with the states that they report, and the outcomes of their attempts.

All methods run in the writer's thread, inside a transaction. Each commit is followed by a notification of `keys`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ccm.core.storage.notifier import DELIVERIES, EVENTS
from ccm.core.webhooks.retry import MAX_DELAY, DeliveryOutcome
from ccm.db import deliveries, events
from ccm.db.driver.transaction import Transaction
from ccm.json_text import to_json_text
from ccm.models import RUN_ENDED, Delivery, DeliveryStatus, DeliveryTarget, EventType, Run
from ccm.settings.webhook_urls import host_of
from ccm.timestamps import timestamp

log = logging.getLogger(__name__)

# The events that are delivered. /api/events shows more.
DELIVERED_EVENTS = frozenset((EventType.RUN_STARTED, *RUN_ENDED.values(), EventType.APPROVAL_REQUESTED))
URL_UNSET = "CCM_WEBHOOK_URL is not set any more"


class Outbox:
    """The events and their deliveries.

    Args:
        service: whether the service has its own address, which gets the events of all runs.
    """

    def __init__(self, *, service: bool) -> None:
        self._service = service
        # The reason why the service's address was disabled, None while it is not.
        self._disabled_reason: str | None = None

    def keys(self, run: Run) -> tuple[str, ...]:
        """Return the keys to notify after the commit of a run's event. Without a webhook nothing can be due."""
        return (EVENTS,) if run.webhook_url is None and not self._service else (EVENTS, DELIVERIES)

    def enqueue(self, transaction: Transaction, type: str, run: Run, approval: Mapping[str, Any] | None = None) -> None:
        """Store an event, and its deliveries if events of this type are delivered.

        Args:
            run: its current state.
            approval: the JSON of the approval that the event is about.
        """
        events.insert(transaction, type, run, approval)
        if type not in DELIVERED_EVENTS:
            return
        now = timestamp()
        webhook_id = f"evt_{uuid.uuid4().hex}"
        if run.webhook_url is not None:
            reason = deliveries.find_disabled_reason(transaction, run.id, DeliveryTarget.RUN)
            host = host_of(run.webhook_url)
            deliveries.insert(transaction, run.id, DeliveryTarget.RUN, webhook_id, host, reason=reason, now=now)
        if self._service:
            host, reason = deliveries.SERVICE_HOST, self._disabled_reason
            deliveries.insert(transaction, run.id, DeliveryTarget.SERVICE, webhook_id, host, reason=reason, now=now)

    def recover(self, transaction: Transaction) -> None:
        """Correct the stored deliveries at a start.

        Those that are due later than any pause allows were postponed while the clock was ahead, and would never be
        sent. Those for the service's address are disabled if it is not set any more.
        """
        postponed = deliveries.advance(transaction, timestamp(MAX_DELAY), timestamp())
        if postponed:
            extra = {"event": "deliveries_rescheduled", "count": postponed}
            log.warning(
                "%d webhooks were postponed while the clock was ahead, and are sent now", postponed, extra=extra
            )
        disabled = 0 if self._service else deliveries.disable_service(transaction, URL_UNSET)
        if disabled:
            extra = {"event": "deliveries_disabled", "count": disabled}
            log.warning("%d webhooks are not sent: %s", disabled, URL_UNSET, extra=extra)

    def record_attempt(
        self,
        transaction: Transaction,
        delivery: Delivery,
        attempts: Sequence[Mapping[str, object]],
        outcome: DeliveryOutcome,
    ) -> None:
        """Store the attempts of a delivery and its new state, and schedule or disable the deliveries after it."""
        deliveries.record_attempt(
            transaction,
            delivery.id,
            to_json_text(list(attempts)),
            status=outcome.status,
            reason=outcome.reason,
            next_attempt_at=None if outcome.pause is None else timestamp(outcome.pause),
        )
        if outcome.status in (DeliveryStatus.DELIVERED, DeliveryStatus.FAILED):
            deliveries.make_next_due(transaction, delivery.run_id, delivery.target, timestamp())
        elif outcome.status == DeliveryStatus.DISABLED:
            reason = outcome.reason or ""
            if delivery.target == DeliveryTarget.RUN:
                deliveries.disable_run(transaction, delivery.run_id, DeliveryTarget.RUN, reason)
            else:
                self._disabled_reason = reason
                deliveries.disable_service(transaction, reason)
