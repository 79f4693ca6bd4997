"""A check and a hook for schemathesis: some valid requests are refused rightly, and each request needs its own key."""

from __future__ import annotations

import itertools
import re
from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response
from schemathesis.specs.openapi.checks import positive_data_acceptance

# The answers to requests that follow the description and break a rule that JSON Schema cannot express.
RULES = re.compile(
    "|".join(
        [
            # The database cannot store it.
            "must not contain the character NUL",
            # JSON Schema takes 1.0 for an integer.
            "input should be a valid integer",
            # One field decides on another.
            "goes with the decision",
            "is for runs with approvals",
            # A text with a form of its own, or a directory of the host.
            '"field": "cwd"',
            "after: must be",
            "type: must be message types",
            "webhookUrl: must be an absolute URL",
            "data must be base64",
            "data is not of the type",
            "options.settings: must be a JSON object",
            "is set by the service itself",
            # It depends on what was sent before, and with which parameters.
            "cursor: is not one that this service gave",
            "there is no message",
        ]
    )
)

KEY = "Idempotency-Key"
numbers = itertools.count(1)


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], arguments: dict[str, Any]) -> None:
    """Give each valid request its own key, because another request with the same key is refused."""
    if case.meta is not None and case.meta.generation.mode.is_positive and KEY in case.headers:
        case.headers[KEY] = str(next(numbers))


@schemathesis.check
def valid_requests_are_accepted(ctx: CheckContext, response: Response, case: Case[Any]) -> bool | None:
    """Let schemathesis decide, except about requests that break one of the rules."""
    return None if RULES.search(response.text) else positive_data_acceptance(ctx, response, case)
