"""A writer, and the store of transcripts that uses it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ccm.core.storage.notifier import Notifier
from ccm.core.storage.writer import Writer
from ccm.core.transcripts.store import TranscriptStore
from ccm.db.driver.database import Database


@pytest.fixture
def writer(writable: Database) -> Iterator[Writer]:
    writer = Writer(writable, Notifier(), 2**20, lambda run, error: None)
    writer.start()
    yield writer
    writer.stop(time.monotonic() + 30)


@pytest.fixture
def store(writer: Writer, reader: Database) -> TranscriptStore:
    return TranscriptStore(writer, reader)
