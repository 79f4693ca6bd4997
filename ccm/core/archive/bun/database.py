"""The database of the original service, which ran on Bun: two tables in a SQLite file. It is opened read-only."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ccm.db.driver.sqlite_file import APPLICATION_ID, APPLICATION_ID_AT, HEADER_SIZE
from ccm.errors import CommandRefused

# The columns of a run that are read in addition to those of its BunLink.
RUN_COLUMNS = ("cwd", "status", "prompt", "result_type", "result_json", "duration_ms", "created_at")
# https://www.sqlite.org/fileformat.html#file_format_version_numbers
WRITE_VERSION_AT = slice(18, 19)
WAL_VERSION = b"\x02"
# A database without these columns is another program's.
NEEDED = {"ccr_runs": ("id", "cwd", "session_id"), "ccr_run_messages": ("run_id", "message_json")}


class BunLink(NamedTuple):
    """A run's stored values without its long texts, for the assignment of sessions."""

    rowid: int
    id: Any
    session_id: Any
    parent_session_id: Any
    mode: Any
    created_at: Any


class BunMessage(NamedTuple):
    message_type: Any
    message_json: Any
    created_at: Any


class BunDatabase:
    """A snapshot of the file, opened read-only.

    Raises:
        CommandRefused: the file is not the original service's.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            header = file.read(HEADER_SIZE)
        if int.from_bytes(header[APPLICATION_ID_AT]) == APPLICATION_ID:
            raise CommandRefused(
                f"{path} is a database of CC Manager itself; write it out with flask export, and import that."
            )
        # If the file uses a log and has none, no process has it open. Then it is opened as immutable: SQLite would
        # otherwise create a log, which, owned by another user, locks the original service out of its database.
        log = path.with_name(path.name + "-wal")
        unused = header[WRITE_VERSION_AT] == WAL_VERSION and not log.exists()
        options = "mode=ro&immutable=1" if unused else "mode=ro"
        self._path = path
        self._connection = sqlite3.connect(f"file:{quote(str(path))}?{options}", uri=True, isolation_level=None)
        self._connection.text_factory = lambda data: data.decode("utf-8", "replace")
        try:
            self._begin()
        except CommandRefused:
            self.close()
            raise

    def _begin(self) -> None:
        for statement in ("BEGIN", "SELECT COUNT(*) FROM sqlite_master"):
            list(self._rows(statement))
        self._columns = {table: {row[1] for row in self._rows(f"PRAGMA table_info({table})")} for table in NEEDED}
        for table, needed in NEEDED.items():
            for column in needed:
                if column not in self._columns[table]:
                    raise CommandRefused(
                        f"{self._path} is a SQLite database, and not the original service's: it has no column {column} "
                        f"in a table {table}."
                    )

    def close(self) -> None:
        self._connection.close()

    def _rows(self, sql: str, *parameters: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query.

        Raises:
            CommandRefused: the file is damaged. A driver's error would look like one of the service's own database.
        """
        try:
            with closing(self._connection.execute(sql, parameters)) as rows:
                yield from rows
        except sqlite3.Error as error:
            raise CommandRefused(f"{self._path} cannot be read: {error}.") from None

    def _selected(self, table: str, columns: tuple[str, ...]) -> str:
        """Return the expressions of a SELECT: NULL for a column that the table lacks."""
        existing = {*self._columns[table], "rowid"}
        return ", ".join(f'"{column}"' if column in existing else f'NULL AS "{column}"' for column in columns)

    def links(self) -> Iterator[BunLink]:
        """Return all runs in the order of their rowids."""
        sql = f"SELECT {self._selected('ccr_runs', BunLink._fields)} FROM ccr_runs ORDER BY rowid"
        return (BunLink(*row) for row in self._rows(sql))

    def run(self, rowid: int) -> Mapping[str, Any]:
        """Return the columns RUN_COLUMNS of a run."""
        sql = f"SELECT {self._selected('ccr_runs', RUN_COLUMNS)} FROM ccr_runs WHERE rowid = ?"
        return dict(zip(RUN_COLUMNS, next(self._rows(sql, rowid)), strict=True))

    def order_messages(self) -> None:
        """Build a temporary index of messages by run, because the table may have none."""
        existing = self._columns["ccr_run_messages"]
        place, message_id = (f'"{column}"' if column in existing else "NULL" for column in ("index", "id"))
        for statement in (
            "PRAGMA temp_store = FILE",
            f"CREATE TEMP TABLE places AS SELECT run_id, {place} AS place, {message_id} AS nth, rowid AS at "
            "FROM main.ccr_run_messages",
            "CREATE INDEX temp.places_by_run ON places (run_id, place, nth, at)",
        ):
            list(self._rows(statement))

    def messages(self, run_id: Any) -> Iterator[BunMessage]:
        """Return a run's messages in the order of their indexes, or else of their ids. Call `order_messages` first."""
        columns = self._selected("ccr_run_messages", BunMessage._fields)
        sql = (
            f"SELECT {columns} FROM (SELECT place, nth, at FROM temp.places WHERE run_id = ?) "
            "CROSS JOIN main.ccr_run_messages m ON m.rowid = at ORDER BY place, nth, at"
        )
        return (BunMessage(*row) for row in self._rows(sql, run_id))

    def orphans(self) -> int:
        """Return the number of messages without a run."""
        sql = "SELECT COUNT(*) FROM temp.places WHERE run_id IS NULL OR run_id NOT IN (SELECT id FROM main.ccr_runs)"
        return int(next(self._rows(sql))[0])
