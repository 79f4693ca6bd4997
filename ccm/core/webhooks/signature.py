"""The headers by which a receiver knows who calls, when, and whether it has had that before."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

from ccm import __version__


def headers(webhook_id: str, seconds: int, body: bytes, keys: Sequence[bytes]) -> dict[str, str]:
    """
    Args:
        seconds: the time of this attempt, since 1970.
        keys: each makes a signature; without any the webhook is unsigned.
    """
    named = {
        "Content-Type": "application/json",
        "User-Agent": f"cc-manager/{__version__}",
        "Connection": "close",
        "webhook-id": webhook_id,
        "webhook-timestamp": str(seconds),
    }
    signed = f"{webhook_id}.{seconds}.".encode("ascii") + body
    signatures = [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode("ascii") for key in keys]
    if signatures:
        named["webhook-signature"] = " ".join(f"v1,{signature}" for signature in signatures)
    return named
