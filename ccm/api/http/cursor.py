"""Places in what has been said: how far a client has read, in its own words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flask import request

from ccm.errors import ValidationError
from ccm.models import Run
from ccm.models.fields import RUN_ID

# What stands in an index's stead once a client has had the end of a run.
END = "end"
INDEX = re.compile(r"-1|\d{1,16}", re.ASCII)
IN_SESSION = re.compile(rf"({RUN_ID.pattern}):({INDEX.pattern})", re.ASCII)
AT_END = re.compile(rf"({RUN_ID.pattern}):{END}", re.ASCII)
# What the header is that a browser's EventSource comes back with.
HEADER = "Last-Event-ID"


@dataclass(frozen=True)
class Cursor:
    """What a client has read last, and the parameter or header in which it says so; None if it has read nothing."""

    field: str
    text: str | None

    def wrong(self, reason: str) -> ValidationError:
        return ValidationError(f"{self.field}: {reason}", field=self.field)

    def index(self) -> int:
        """The index of a message within a run, -1 for none.

        Raises:
            ValidationError: it is none.
        """
        if self.text is None:
            return -1
        if not INDEX.fullmatch(self.text):
            raise self.wrong("must be the index of a message: a whole number from 0, or -1 for all.")
        return int(self.text)

    def in_session(self) -> tuple[str, int] | None:
        """A run and the index of a message within it; None for nothing.

        Raises:
            ValidationError: it is no such place.
        """
        if self.text is None:
            return None
        match = IN_SESSION.fullmatch(self.text)
        if match is None:
            raise self.wrong("must be RUN_ID:INDEX, as it is given with each message or in the Link header.")
        return match[1], int(match[2])

    def ended_run(self) -> str | None:
        """The run whose end was the last that was read, None if it was something else."""
        match = None if self.text is None else AT_END.fullmatch(self.text)
        return None if match is None else match[1]

    def check(self, run: Run, index: int) -> int:
        """The index, if the run has stored it.

        Raises:
            ValidationError: nobody can have read that.
        """
        if index >= run.message_count:
            last = f"its last one is {run.message_count - 1}" if run.message_count else "it has none"
            raise self.wrong(f"run {run.id} has no message {index}; {last}.")
        return index


def after(text: str | None) -> Cursor:
    """`?after=`."""
    return Cursor("after", text)


def last_event(text: str | None) -> Cursor:
    """The `Last-Event-ID`, with which a browser comes back to the same address; without it `?after=`."""
    given = request.headers.get(HEADER)
    return after(text) if given is None else Cursor(HEADER, given)
