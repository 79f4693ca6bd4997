"""The table ccr_run_messages. Its JSON texts are passed on unparsed."""

from __future__ import annotations

from collections.abc import Sequence

from ccm.db import search
from ccm.db.driver.transaction import Transaction, parameter_list
from ccm.models import Message

COLUMNS = ("runId", "index", "messageType", "createdAt", "size", "messageJson")
RANGE = '"runId" = :run AND "index" > :after AND "index" <= :through'


def _of_types(types: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return a condition that selects the given types, and its parameters; no types select all."""
    if not types:
        return "", {}
    names, parameters = parameter_list("type", types)
    return f' AND "messageType" IN ({names})', parameters


def insert_many(transaction: Transaction, messages: Sequence[Message]) -> None:
    """Insert messages of stored runs."""
    # Unpacked, because that takes half of the time of the names.
    rows = [(run_id, index, kind, at, len(json), json) for run_id, _, index, kind, json, at, _ in messages]
    transaction.insert_many("ccr_run_messages", COLUMNS, rows)
    search.add_messages(transaction, messages)


def last_index(transaction: Transaction, run_id: str) -> int:
    """Return the index of a run's newest message, -1 if it has none."""
    sql = 'SELECT COALESCE(MAX("index"), -1) FROM ccr_run_messages WHERE "runId" = :run'
    return int(transaction.value(sql, run=run_id))


def indexes(
    transaction: Transaction, run_id: str, after: int, through: int, *, types: Sequence[str], limit: int
) -> list[int]:
    """Return the indexes of the first `limit` messages of the given types in a range, without reading their texts."""
    condition, names = _of_types(types)
    sql = f'SELECT "index" FROM ccr_run_messages WHERE {RANGE}{condition} ORDER BY "index" LIMIT :limit'
    return transaction.column(sql, run=run_id, after=after, through=through, limit=limit, **names)


def sizes(transaction: Transaction, run_id: str, after: int, through: int, limit: int) -> list[tuple[int, int]]:
    """Return index and bytes of the first `limit` messages in a range."""
    sql = f'SELECT "index", size FROM ccr_run_messages WHERE {RANGE} ORDER BY "index" LIMIT :limit'
    return transaction.tuples(sql, run=run_id, after=after, through=through, limit=limit)


def texts(transaction: Transaction, run_id: str, after: int, through: int, types: Sequence[str] = ()) -> list[str]:
    """Return the JSON texts of the messages after one index and through another, in order."""
    condition, names = _of_types(types)
    sql = f'SELECT "messageJson" FROM ccr_run_messages WHERE {RANGE}{condition} ORDER BY "index"'
    return transaction.column(sql, run=run_id, after=after, through=through, **names)


def find(transaction: Transaction, run_id: str, index: int) -> tuple[str, str] | None:
    """Return type and JSON text of a message, or None."""
    sql = 'SELECT "messageType", "messageJson" FROM ccr_run_messages WHERE "runId" = :run AND "index" = :index'
    return next(iter(transaction.tuples(sql, run=run_id, index=index)), None)


def texts_before(transaction: Transaction, run_id: str, index: int, kind: str, limit: int) -> list[str]:
    """Return the JSON texts of the last `limit` messages of a type before an index, the nearest first."""
    sql = (
        'SELECT "messageJson" FROM ccr_run_messages WHERE "runId" = :run AND "index" < :index '
        'AND "messageType" = :kind ORDER BY "index" DESC LIMIT :limit'
    )
    return transaction.column(sql, run=run_id, index=index, kind=kind, limit=limit)


def holding(transaction: Transaction, run_id: str, words: str) -> list[tuple[int, str]]:
    """Return index and text of the messages of a run that contain `words`, which must not contain `%` or `_`."""
    sql = (
        'SELECT "index", "messageJson" FROM ccr_run_messages WHERE "runId" = :run AND "messageJson" LIKE :pattern '
        'ORDER BY "index"'
    )
    return transaction.tuples(sql, run=run_id, pattern=f"%{words}%")
