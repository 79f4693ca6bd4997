"""Runs, sessions and approvals by the names that clients give them, within a transaction."""

from __future__ import annotations

from ccm.db import approvals, runs, sessions
from ccm.db.driver.database import Transaction
from ccm.errors import KeyReused, NotFound
from ccm.models import Approval, IdempotencyKey, Run, Session


def find_run(transaction: Transaction, run_id: str) -> Run:
    run = runs.find(transaction, run_id)
    if run is None:
        raise NotFound(f"There is no run {run_id}. GET /api/runs lists them.", code="RUN_NOT_FOUND")
    return run


def find_run_of_key(transaction: Transaction, key: IdempotencyKey) -> Run | None:
    found = runs.find_by_idempotency_key(transaction, key.text)
    if found is None:
        return None
    run, digest = found
    if digest != key.digest:
        raise KeyReused(
            f"This Idempotency-Key was used for another request, which made run {run.id}. Use a new key for a new "
            "request; a retry must have the same path and body."
        )
    return run


def find_session(transaction: Transaction, session_id: str) -> Session:
    """A session by its id, or by the SDK session id of any of its runs."""
    session = sessions.find(transaction, session_id)
    if session is None:
        run = runs.find_by_sdk_session(transaction, session_id)
        session = None if run is None else sessions.find(transaction, run.session_id)
    if session is None:
        raise NotFound(f"There is no session {session_id}. GET /api/sessions lists them.", code="SESSION_NOT_FOUND")
    return session


def find_approval(transaction: Transaction, approval_id: str) -> Approval:
    approval = approvals.find(transaction, approval_id)
    if approval is None:
        raise NotFound(f"There is no approval {approval_id}. GET /api/approvals lists them.", code="APPROVAL_NOT_FOUND")
    return approval
