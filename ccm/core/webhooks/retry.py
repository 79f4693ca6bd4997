"""What follows from an attempt to deliver: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec"""

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
# By how much of itself a pause may be longer, so that what failed together does not come back together.
JITTER = 0.2
# The most that a receiver may ask for in Retry-After (seconds).
LONGEST_RETRY_AFTER = 86_400
# The longest pause that there can be (seconds).
MAX_DELAY = max(LONGEST_RETRY_AFTER, max(SCHEDULE) * (1 + JITTER))
RETRY_AFTER = (429, 503)
GONE = 410


@dataclass(frozen=True)
class RetryDecision:
    """What a delivery is now.

    `error` is what was wrong with the attempt, `reason` why it is given up, `pause` the seconds to the next attempt.
    """

    status: str
    error: str | None = None
    reason: str | None = None
    pause: float | None = None


def decide(answer: Answer | str, attempts: int, schedule: Sequence[float]) -> RetryDecision:
    """
    Args:
        answer: of the receiver; or why there was none.
        attempts: how many were made, this one included.
    """
    if isinstance(answer, str):
        error = answer
    elif 200 <= answer.status < 300:
        return RetryDecision(DeliveryStatus.DELIVERED)
    elif answer.status == GONE:
        error = "the receiver answered 410: it wants no more"
        return RetryDecision(DeliveryStatus.DISABLED, error, error)
    elif 300 <= answer.status < 400:
        error = f"the receiver redirects ({answer.status}), which is not followed"
    else:
        error = f"the receiver answered {answer.status}"
    if attempts > len(schedule):
        return RetryDecision(DeliveryStatus.FAILED, error, f"no success in {attempts} attempts")
    pause = schedule[attempts - 1] * random.uniform(1, 1 + JITTER)  # noqa: S311  # no secret
    if isinstance(answer, Answer) and answer.status in RETRY_AFTER:
        pause = max(pause, min(_seconds(answer.retry_after), LONGEST_RETRY_AFTER))
    return RetryDecision(DeliveryStatus.PENDING, error, pause=pause)


def _seconds(retry_after: str | None) -> float:
    """What `Retry-After` says, a number of seconds or a date; 0 if it says nothing that can be used."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
