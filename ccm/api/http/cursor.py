"""Positions in the messages of a run or a session, as clients send them in `after` or `Last-Event-ID`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flask import request

from ccm.errors import ValidationError
from ccm.models.fields import RUN_ID

# Replaces the index once a client has received the end of a run.
END = "end"
INDEX = re.compile(r"-1|\d{1,16}", re.ASCII)
IN_SESSION = re.compile(rf"({RUN_ID.pattern}):({INDEX.pattern})", re.ASCII)
AT_END = re.compile(rf"({RUN_ID.pattern}):{END}", re.ASCII)
# The header with which a browser's EventSource reconnects.
HEADER = "Last-Event-ID"


@dataclass(frozen=True)
class Cursor:
    """The position that a client has read up to (None: nothing), and the name of the parameter or header with it."""

    field: str
    text: str | None

    def error(self, reason: str) -> ValidationError:
        """Return an error that names the parameter or header."""
        return ValidationError(f"{self.field}: {reason}", field=self.field)

    def index(self) -> int:
        """Return the index of a message of a run, -1 for none.

        Raises:
            ValidationError: the cursor is not an index.
        """
        if self.text is None:
            return -1
        if not INDEX.fullmatch(self.text):
            raise self.error("must be the index of a message: a whole number from 0, or -1 for all.")
        return int(self.text)

    def in_session(self) -> tuple[str, int] | None:
        """Return a run id and the index of a message of that run, None for no position.

        Raises:
            ValidationError: the cursor is not a position in a session.
        """
        if self.text is None:
            return None
        match = IN_SESSION.fullmatch(self.text)
        if match is None:
            raise self.error("must be RUN_ID:INDEX, as it is given with each message or in the Link header.")
        return match[1], int(match[2])

    def ended_run(self) -> str | None:
        """Return the id of the run whose end was read last, None if the cursor is another position."""
        match = None if self.text is None else AT_END.fullmatch(self.text)
        return None if match is None else match[1]

    def check(self, run_id: str, message_count: int, index: int) -> int:
        """Return the index if the run, with so many messages, has that message.

        Raises:
            ValidationError: it does not, so the client cannot have read it.
        """
        if index >= message_count:
            last = f"its last one is {message_count - 1}" if message_count else "it has none"
            raise self.error(f"run {run_id} has no message {index}; {last}.")
        return index


def last_event(text: str | None) -> Cursor:
    """Return the cursor of `Last-Event-ID`, with which a browser reconnects to the same URL, or else of `?after=`."""
    given = request.headers.get(HEADER)
    return Cursor("after", text) if given is None else Cursor(HEADER, given)
