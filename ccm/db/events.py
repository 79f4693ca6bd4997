"""The table ccr_events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ccm.db.database import Transaction
from ccm.models import Run, timestamp, to_json_text

# What an event leaves out of its run: who made the run has it, and it may be long.
LEFT_OUT = ("prompt", "options")


def add(transaction: Transaction, type: str, run: Run, approval: Mapping[str, Any] | None = None) -> None:
    """Tell of a state, in the transaction that stores it.

    Args:
        run: as it is now.
        approval: as the API shows it, where it is what the event is about.
    """
    now = timestamp()
    told = {name: value for name, value in run.to_json().items() if name not in LEFT_OUT}
    data = {"run": told} if approval is None else {"approval": approval, "run": told}
    transaction.insert(
        "ccr_events",
        {
            "type": type,
            "runId": run.id,
            "createdAt": now,
            "eventJson": to_json_text({"type": type, "timestamp": now, "data": data}),
        },
    )
