"""A message of a run, as the SDK gave it."""

from __future__ import annotations

from typing import Annotated, NamedTuple, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict


@with_config(ConfigDict(extra="allow"))
class SDKMessage(TypedDict):
    """A message of the Claude Agent SDK, unchanged. `type` tells its kind; all other fields are the SDK's own.

    Only describes the messages in the API: they are never parsed, so a field or type that is new in the SDK is shown.
    """

    # Not required, because imported messages may have none.
    type: NotRequired[
        Annotated[str, Field(description="The kind: `system`, `user`, `assistant`, `result` or another.")]
    ]
    subtype: NotRequired[Annotated[str, Field(description="The kind within the type, such as `init` or `success`.")]]
    uuid: NotRequired[Annotated[str, Field(description="The message's id, which a fork's `atMessage` takes.")]]


class Message(NamedTuple):
    """One SDK message of a run, as text. `index` counts from 0 within the run.

    A tuple, because there are thousands per second, and a frozen dataclass takes three times as long to create.

    Attributes:
        said: the text of it that a search finds; None if `json` has to be searched for it.
    """

    run_id: str
    session_id: str
    index: int  # type: ignore[assignment]  # hides the tuple's method
    type: str
    json: str
    created_at: str
    said: str | None = None

    @property
    def size(self) -> int:
        """How much of the message budget it takes: the bytes of `json`, which is ASCII, and `said`'s characters."""
        return len(self.json) + (0 if self.said is None else len(self.said))
