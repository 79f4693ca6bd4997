"""The headers of a webhook: its id, time and signatures, by which a receiver verifies and deduplicates it."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

from ccm import __version__


def headers(webhook_id: str, seconds: int, body: bytes, keys: Sequence[bytes]) -> dict[str, str]:
    """Return the headers of an attempt.

    Args:
        seconds: the time of the attempt (seconds since 1970).
        keys: each adds a signature. Without keys the webhook is unsigned.
    """
    fields = {
        "Content-Type": "application/json",
        "User-Agent": f"cc-manager/{__version__}",
        "Connection": "close",
        "webhook-id": webhook_id,
        "webhook-timestamp": str(seconds),
    }
    signed = f"{webhook_id}.{seconds}.".encode("ascii") + body
    signatures = [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode("ascii") for key in keys]
    if signatures:
        fields["webhook-signature"] = " ".join(f"v1,{signature}" for signature in signatures)
    return fields
