"""The outcome of an attempt, and the pause before the next one.

The schedule follows https://github.com/standard-webhooks/standard-webhooks/blob/main/spec.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from ccm.core.webhooks.post import Answer
from ccm.models import DeliveryStatus

# Pauses after the first attempt that fails, the second, ... (seconds).
SCHEDULE = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
# The largest random extension of a pause, as a share of it, so that deliveries that failed together spread out.
JITTER = 0.2
# The largest Retry-After that is respected (seconds).
LONGEST_RETRY_AFTER = 86_400
# The longest possible pause (seconds).
MAX_DELAY = max(LONGEST_RETRY_AFTER, max(SCHEDULE) * (1 + JITTER))
# The statuses with which Retry-After is respected.
RETRY_AFTER_STATUSES = (429, 503)
GONE = 410


@dataclass(frozen=True)
class DeliveryOutcome:
    """The state of a delivery after an attempt, or after a refusal to make one.

    Args:
        error: why the attempt failed.
        reason: why there are no more attempts.
        pause: the seconds to the next attempt.
    """

    status: str
    error: str | None = None
    reason: str | None = None
    pause: float | None = None


def outcome_of(answer: Answer | str, attempts: int, schedule: Sequence[float]) -> DeliveryOutcome:
    """Return the state of a delivery after an attempt.

    Args:
        answer: the receiver's answer, or the reason why there is none.
        attempts: the number of attempts, including this one.
    """
    if isinstance(answer, str):
        error = answer
    elif 200 <= answer.status < 300:
        return DeliveryOutcome(DeliveryStatus.DELIVERED)
    elif answer.status == GONE:
        error = "the receiver answered 410 (Gone), so it gets no more events"
        return DeliveryOutcome(DeliveryStatus.DISABLED, error, error)
    elif 300 <= answer.status < 400:
        error = f"the receiver redirects ({answer.status}), which is not followed"
    else:
        error = f"the receiver answered {answer.status}"
    if attempts > len(schedule):
        return DeliveryOutcome(DeliveryStatus.FAILED, error, f"no success in {attempts} attempts")
    pause = schedule[attempts - 1] * random.uniform(1, 1 + JITTER)  # noqa: S311  # no secret
    if isinstance(answer, Answer) and answer.status in RETRY_AFTER_STATUSES:
        pause = max(pause, min(_parse_retry_after(answer.retry_after), LONGEST_RETRY_AFTER))
    return DeliveryOutcome(DeliveryStatus.PENDING, error, pause=pause)


def _parse_retry_after(retry_after: str | None) -> float:
    """Return the seconds of a `Retry-After`, which is a number or a date. 0 if it is missing or invalid."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
