"""The log of one run."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any


class RunLog(logging.LoggerAdapter[logging.Logger]):
    """Logs about one run: each line begins with its id. Every call passes `event`, the event of the record."""

    def __init__(self, logger: logging.Logger, run_id: str) -> None:
        super().__init__(logger, {"run_id": run_id})
        self._run_id = run_id

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the run's id to the text and to the record's fields."""
        fields = {"event": kwargs.pop("event"), "run_id": self._run_id}
        return f"run {self._run_id}: {msg}", {**kwargs, "extra": fields | kwargs.get("extra", {})}
