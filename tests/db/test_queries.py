"""Every query uses an index, according to the query planners of both databases."""

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
    """Collect the plans of all statements in the block."""
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
            # The tables are so small that scans would be cheapest. Disabled, they are used only if there is no index.
            transaction.execute("SET LOCAL enable_seqscan = off")
            transaction.execute("SET LOCAL enable_sort = off")
            if not name.startswith("search."):  # a GIN index has no other scans
                transaction.execute("SET LOCAL enable_bitmapscan = off")
        with explained(transaction, is_sqlite) as explained_plans:
            CALLS[name].function(transaction)
        plans.extend(explained_plans)

    with closing(Database(sample_url, writable=True, pool_size=1)) as database:
        is_sqlite = database.is_sqlite
        perform(database, explain)
    assert plans or CALLS[name].untouched
    for plan in plans:
        if is_sqlite:
            # FTS5 names the constraints that it uses after a colon.
            assert not re.search(r"SCAN (?!CONSTANT)(?!.*USING)(?!.*VIRTUAL TABLE INDEX \d+:.)", plan), plan
            assert "TEMP B-TREE" not in plan, plan
        else:
            assert "Seq Scan" not in plan, plan
            assert not re.search(r"^\s*(->\s*)?Sort ", plan, re.M), plan
