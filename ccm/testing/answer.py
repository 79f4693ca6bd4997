"""The model's answers in the format of the Messages API: as one object, or as a stream of events.

Events follow https://docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from ccm.testing.script import Directive

# The type of a streamed piece, and the key of its text, by the type of its content block.
DELTAS = {"text": ("text_delta", "text"), "tool_use": ("input_json_delta", "partial_json")}
STRUCTURED_OUTPUT_TOOL = "StructuredOutput"


class Answer:
    """One answer of the model.

    Args:
        request: the body of `POST /v1/messages`.
        step: the directives that make up the answer.
    """

    def __init__(self, request: dict[str, Any], step: list[Directive]) -> None:
        self.pause = 0.0
        self.stalls = step[0].name == "stall"
        # Each content block as its start and the pieces that are streamed.
        self._blocks: list[tuple[dict[str, Any], list[str]]] = [self._block(directive) for directive in step]
        self._output_tokens = sum(max(1, len(piece) // 4) for _, pieces in self._blocks for piece in pieces)
        self._stop_reason = "tool_use" if any(start["type"] == "tool_use" for start, _ in self._blocks) else "end_turn"
        input_tokens = len(json.dumps(request["messages"])) // 4
        # The answer without its content.
        self._envelope = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": request.get("model", "stand-in"),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": input_tokens, "output_tokens": self._output_tokens},
        }

    def _block(self, directive: Directive) -> tuple[dict[str, Any], list[str]]:
        if directive.name == "json":
            directive = Directive("tool", f"{STRUCTURED_OUTPUT_TOOL} {directive.argument}")
        if directive.name == "tool":
            name, _, tool_input = directive.argument.partition(" ")
            start = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
            return start, [tool_input or "{}"]
        return {"type": "text", "text": ""}, self._pieces(directive)

    def _pieces(self, directive: Directive) -> list[str]:
        argument = directive.argument
        if directive.name == "chunks":
            return [f"{number} " for number in range(int(argument))]
        if directive.name == "slow":
            count, _, seconds = argument.partition(" ")
            self.pause = float(seconds or 0.1)
            return [f"piece {number} " for number in range(int(count))]
        if directive.name == "huge":
            return ["x" * int(argument)]
        if directive.name == "stall":
            return ["And then", " nothing."]
        return [argument or "Done."]

    def whole(self) -> dict[str, Any]:
        """Return the answer as one object."""
        content = [
            {**start, "text": "".join(pieces)}
            if start["type"] == "text"
            else {**start, "input": json.loads("".join(pieces))}
            for start, pieces in self._blocks
        ]
        return {**self._envelope, "content": content, "stop_reason": self._stop_reason}

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events that stream the answer."""
        yield {"type": "message_start", "message": self._envelope}
        for index, (start, pieces) in enumerate(self._blocks):
            yield {"type": "content_block_start", "index": index, "content_block": start}
            for piece in pieces:
                delta_type, key = DELTAS[start["type"]]
                yield {"type": "content_block_delta", "index": index, "delta": {"type": delta_type, key: piece}}
            yield {"type": "content_block_stop", "index": index}
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": self._stop_reason, "stop_sequence": None},
            "usage": {"output_tokens": self._output_tokens},
        }
        yield {"type": "message_stop"}
