"""The transactions of queries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ccm.core.queries import Queries
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.errors import ShuttingDown, StorageDown, StorageUnavailable


def test_queries_share_a_transaction_within_the_block_only(reader: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Transaction] = []
    begin = reader.transaction

    @contextmanager
    def counted() -> Iterator[Transaction]:
        with begin() as transaction:
            begun.append(transaction)
            yield transaction

    monkeypatch.setattr(reader, "transaction", counted)
    with Queries(reader).together() as queries:
        assert [queries.last_event(), queries.last_event_ever()] == [0, 0]
    assert len(begun) == 1

    assert [queries.last_event(), queries.last_event_ever()] == [0, 0]
    assert len(begun) == 3


def test_a_failure_of_the_database_within_the_block_is_told_as_that_of_one_query(reader: Database) -> None:
    with pytest.raises(StorageUnavailable, match="cannot be read: gone"), Queries(reader).together():
        raise StorageDown("the file is gone", "gone")
    reader.close()
    with pytest.raises(ShuttingDown), Queries(reader).together():
        pass
