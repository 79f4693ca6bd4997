"""The stored resources: one file each, with its list of fields and its possible states.

`stored` and `shape` derive columns, JSON, schema, export and import from those fields; `fields` has types that several
models and request bodies share. tests/models/test_adding_a_field.py shows what a new field takes.
"""

# Others import the resources from here.
# mypy: implicit-reexport
# ruff: noqa: F401

from __future__ import annotations

from ccm.models.approval import Answer, Approval, ApprovalStatus, Decision, Question, Resolution
from ccm.models.delivery import Attempt, Delivery, DeliveryStatus, DeliveryTarget
from ccm.models.event import RUN_ENDED, Event, EventRun, EventType
from ccm.models.message import Message, SDKMessage
from ccm.models.run import IdempotencyKey, Image, Run, RunErrorCode, RunMode, RunStatus, RunSummary
from ccm.models.session import ListedSession, Match, Session, SessionStatus, SessionSummary, Where
