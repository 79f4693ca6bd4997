"""Every query of ours uses an index: the planner is asked, on both databases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from tests.db.conftest import perform
from tests.db.storage_calls import CALLS


@contextmanager
def explained(transaction: Transaction, is_sqlite: bool) -> Iterator[list[str]]:
    """The plans of all statements within."""
    plans: list[str] = []
    execute = transaction._execute

    def explain(sql: str, parameters: Any) -> None:
        execute(("EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN ") + sql, parameters)
        plans.append("\n".join(str(row[-1]) for row in transaction._cursor.fetchall()))
        execute(sql, parameters)

    transaction._execute = explain  # type: ignore[method-assign]
    yield plans


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if not call.scans])
def test_a_query_uses_an_index(sample_url: str, name: str) -> None:
    plans: list[str] = []

    def explain(transaction: Transaction) -> None:
        if not is_sqlite:
            # The tables are so small that a scan would be cheapest; forbidden, it is taken only for want of an index.
            transaction.execute("SET LOCAL enable_seqscan = off")
            transaction.execute("SET LOCAL enable_sort = off")
            transaction.execute("SET LOCAL enable_bitmapscan = off")
        with explained(transaction, is_sqlite) as found:
            CALLS[name].function(transaction)
        plans.extend(found)

    with closing(Database(sample_url, writable=True, pool_size=1)) as database:
        is_sqlite = database.is_sqlite
        perform(database, explain)
    assert plans or CALLS[name].untouched
    for plan in plans:
        if is_sqlite:
            assert not re.search(r"SCAN (?!CONSTANT)(?!.*USING)", plan), plan
            assert "TEMP B-TREE" not in plan, plan
        else:
            assert "Seq Scan" not in plan, plan
            assert not re.search(r"^\s*(->\s*)?Sort ", plan, re.M), plan
