"""A message of a run, as the SDK gave it."""

from __future__ import annotations

from typing import NamedTuple


class Message(NamedTuple):
    """One SDK message of a run, as text. `index` counts from 0 within the run.

    A tuple, because there are thousands per second, and a frozen dataclass takes three times as long to create.
    """

    run_id: str
    session_id: str
    index: int  # type: ignore[assignment]  # hides the tuple's method
    type: str
    json: str
    created_at: str

    @property
    def size(self) -> int:
        """The length in bytes, since the text is ASCII."""
        return len(self.json)
