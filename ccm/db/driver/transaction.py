"""Statements within one transaction, on the driver's own cursor.

SQLAlchemy takes seven times as long for a short statement, without detecting more errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from ccm.db.driver.errors import storage_error
from ccm.errors import StorageDown

# How many rows go to SQLite in one call. `Database.last_answer` is updated after each call.
ROWS_AT_ONCE = 50
NAMED_PARAMETER = re.compile(r"(?<![:\w]):([A-Za-z]\w*)")


@cache
def _driver_sql(sql: str, is_sqlite: bool) -> str:
    """Return a statement in the driver's form: SQLite accepts `:name`, psycopg needs `%(name)s`."""
    return sql if is_sqlite else NAMED_PARAMETER.sub(r"%(\1)s", sql.replace("%", "%%"))


def parameter_list(name: str, values: Iterable[Any]) -> tuple[str, dict[str, Any]]:
    """Return the parameters of an `IN (...)` list: their names, comma-separated, and the values by name."""
    parameters = {f"{name}{number}": value for number, value in enumerate(values)}
    return ", ".join(f":{parameter}" for parameter in parameters), parameters


class Transaction:
    """Statements that are committed together. Valid only within `Database.transaction`.

    Args:
        cursor: the driver's.
        dialect: `sqlite` or `postgresql`.
        uncertain: an earlier attempt at the same work may have been committed.
        answered: called when the database has answered a statement.
    """

    def __init__(self, cursor: Any, dialect: str, uncertain: bool, answered: Callable[[], None]) -> None:
        self.dialect = dialect
        self.uncertain = uncertain
        self._cursor = cursor
        self._is_sqlite = dialect == "sqlite"
        self._answered = answered

    def _execute(self, sql: str, parameters: Mapping[str, Any]) -> None:
        self._cursor.execute(_driver_sql(sql, self._is_sqlite), parameters)
        self._answered()

    # ---- reading

    def rows(self, sql: str, **parameters: Any) -> list[Mapping[str, Any]]:
        """Return all rows of a query: a half-read cursor would block SQLite's checkpoints."""
        self._execute(sql, parameters)
        names = [column[0] for column in self._cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in self._cursor.fetchall()]

    def tuples(self, sql: str, **parameters: Any) -> list[Any]:
        """Return all rows of a query as tuples, without column names."""
        self._execute(sql, parameters)
        found: list[Any] = self._cursor.fetchall()
        return found

    def column(self, sql: str, **parameters: Any) -> list[Any]:
        """Return the first column of a query."""
        return [row[0] for row in self.tuples(sql, **parameters)]

    def value(self, sql: str, **parameters: Any) -> Any:
        """Return the first column of the first row, or None."""
        return next(iter(self.column(sql, **parameters)), None)

    # ---- writing

    def execute(self, sql: str, **parameters: Any) -> int:
        """Execute a statement, and return how many rows it changed."""
        self._execute(sql, parameters)
        return int(self._cursor.rowcount)

    def script(self, sql: str) -> None:
        """Execute one statement unchanged, without parameters: a colon in a comment does not start one."""
        self._cursor.execute(sql)
        self._answered()

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        """Insert one row."""
        columns = ", ".join(f'"{column}"' for column in row)
        values = ", ".join(f":{column}" for column in row)
        self._execute(f"INSERT INTO {table} ({columns}) VALUES ({values})", row)

    def insert_many(
        self, table: str, columns: Sequence[str], rows: list[tuple[Any, ...]], *, known_ignored: bool = False
    ) -> None:
        """Insert rows in a few statements.

        dataset's own insert_many iterates over the keys of every row three times, and SQLAlchemy over its values twice,
        which takes longer than the insertion itself.

        Args:
            known_ignored: skip rows whose key exists already; otherwise they are refused.
        """
        names = ", ".join(f'"{column}"' for column in columns)
        marks = ", ".join(["?" if self._is_sqlite else "%s"] * len(columns))
        end = " ON CONFLICT DO NOTHING" if known_ignored else ""
        sql = f"INSERT INTO {table} ({names}) VALUES ({marks}){end}"
        # The sqlite3 module releases the interpreter for each row, so many rows may take long.
        at_once = ROWS_AT_ONCE if self._is_sqlite else len(rows)
        for first in range(0, len(rows), at_once or 1):
            self._cursor.executemany(sql, rows[first : first + at_once])
            self._answered()

    def update(self, table: str, values: Mapping[str, Any], where: str, **parameters: Any) -> int:
        """Set columns of the rows that a condition selects, and return how many there are.

        Args:
            parameters: those of the condition. Their names must differ from the columns in `values`.
        """
        assignments = ", ".join(f'"{column}" = :{column}' for column in values)
        return self.execute(f"UPDATE {table} SET {assignments} WHERE {where}", **values, **parameters)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Roll back the statements of the block if it raises; the transaction itself continues.

        Raises:
            StorageError: as `Database.transaction`.
        """
        self.script("SAVEPOINT part")
        try:
            yield
        except BaseException as error:
            fault = storage_error(error)
            if not isinstance(fault, StorageDown):
                self.script("ROLLBACK TO SAVEPOINT part")
                self.script("RELEASE SAVEPOINT part")
            if fault is None:
                raise
            raise fault from error
        self.script("RELEASE SAVEPOINT part")
