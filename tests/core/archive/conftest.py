"""Fixtures for the tests of export, import and prune: the commands, and a database with history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from tests.core.archive.history import fill
from tests.flask_commands import Flask


class LendingWriter(Database):
    """A writable database that closes its connection after each transaction, because commands under test write too."""

    @contextmanager
    def transaction(self, uncertain: bool = False) -> Iterator[Transaction]:
        with super().transaction(uncertain) as transaction:
            yield transaction
        self._pool.dispose()


@pytest.fixture
def writable(database_url: str) -> Iterator[Database]:
    """Yield a writable database with the current schema. Commands may write to it between its transactions."""
    database = LendingWriter(database_url, writable=True, pool_size=1)
    yield database
    database.close()


@pytest.fixture
def filled(writable: Database, database_url: str) -> str:
    """Return the URL of a database with the history of tests/core/archive/history.py."""
    fill(writable)
    return database_url


@pytest.fixture
def flask(home: Path) -> Flask:
    return Flask(home)


def of_type(lines: list[dict[str, Any]], *types: str) -> list[dict[str, Any]]:
    """Return the lines of an export that have one of the types."""
    return [line for line in lines if line["type"] in types]
