"""SELECT statements for the models. Their columns derive from the models' fields."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from ccm.db import run_metadata
from ccm.db.driver.transaction import Transaction
from ccm.errors import NotFound
from ccm.models.stored import StoredModel

T = TypeVar("T")
M = TypeVar("M", bound=StoredModel)
Expressions = Mapping[str, str]
# The place of a row in the order of `Select.page`: its number, or its time and number.
Position = int | tuple[str, int]

NONE: Expressions = MappingProxyType({})


def existing(found: T | None, kind: str, id: str, missing: type[NotFound]) -> T:
    """Return what was found under an id.

    Raises:
        NotFound: nothing was found; an instance of `missing`.
    """
    if found is None:
        raise missing(f"There is no {kind} {id}. GET /api/{kind}s lists them.")
    return found


class Conditions(NamedTuple):
    """The parts of a statement that apply filters. `metadata` is the seq by which the metadata's index is ordered."""

    joins: str
    where: list[str]
    parameters: dict[str, Any]
    metadata: str | None


class Listed(NamedTuple):
    """A row of a list: its place in the order, and the JSON object that the API shows. Quicker to make than a model."""

    place: Position
    shown: Mapping[str, Any]

    def to_json(self) -> Mapping[str, Any]:
        """Return the JSON object that the API shows."""
        return self.shown


class Select(Generic[M]):
    """Reads rows as instances of a model.

    Args:
        tables: the FROM clause. It begins with the model's table and its alias.
        computed: expressions for columns that the table lacks or holds in another form.
        filters: the conditions that `page` accepts, by name. Each may have a parameter of that name.
        order: the unique column by which `page` orders the rows.
        time: the column of the filters `since` and `until`. If one of them is given, `page` orders the rows by it,
            because the order by `order` would need a scan.
        coarse: the filters whose values many rows share. SQLite, which does not know that, would sort all of these rows
            by their time rather than read the index of the times.
    """

    def __init__(
        self,
        model: type[M],
        tables: str,
        computed: Expressions = NONE,
        *,
        filters: Expressions = NONE,
        order: str = "seq",
        time: str | None = None,
        coarse: Collection[str] = (),
    ) -> None:
        unknown = computed.keys() - set(model.shape.columns)
        if unknown:
            raise TypeError(f"{model.__name__} has no column {', '.join(sorted(unknown))}.")
        alias = tables.split()[1]
        expressions = {column: f'{alias}."{column}"' for column in model.shape.columns} | dict(computed)
        selected = ", ".join(f'{expression} AS "{column}"' for column, expression in expressions.items())
        self.sql = f"SELECT {selected} FROM {tables} "
        self._model = model
        self._filters = dict(filters)
        self._order = f'{alias}."{order}"'
        self._time = f'{alias}."{time}"'
        self._coarse = frozenset(coarse)
        self._place = tuple(column for column in (time, order) if column is not None)
        if time is not None:
            self._filters |= {"since": f"{self._time} >= :since", "until": f"{self._time} < :until"}

    def rows(self, transaction: Transaction, clauses: str, **parameters: Any) -> list[M]:
        """Return the instances that the further clauses of the statement select."""
        # Tuples, because the columns of the statement are in the model's order.
        return [self._model.from_row(row) for row in transaction.tuples(self.sql + clauses, **parameters)]

    def find(self, transaction: Transaction, clauses: str, **parameters: Any) -> M | None:
        """Return the first instance that the further clauses of the statement select, or None."""
        return next(iter(self.rows(transaction, clauses, **parameters)), None)

    def conditions(self, values: Mapping[str, Any], unindexed: bool = False) -> Conditions:
        """Return the conditions for the values of filters.

        Args:
            values: by name. That of `metadata`, which every table ordered by the seq of runs has, is a mapping.
            unindexed: keep SQLite from using the indexes of the coarse filters.
        """
        plain = {name: value for name, value in values.items() if name != "metadata"}
        entries = {f"entry{n}": run_metadata.entry(*item) for n, item in enumerate(values.get("metadata", {}).items())}
        joins = "".join(
            f"JOIN ccr_run_metadata {name} ON {name}.entry = :{name} AND {name}.seq = {self._order} "
            for name in entries
        )
        where = [("+" if unindexed and name in self._coarse else "") + self._filters[name] for name in plain]
        return Conditions(joins, where, plain | entries, next((f"{name}.seq" for name in entries), None))

    def page(
        self,
        transaction: Transaction,
        values: Mapping[str, Any],
        limit: int,
        after: Position | None,
        newest_first: bool,
    ) -> list[M]:
        """Return the instances that meet some of the filters, in order.

        Args:
            values: values by the names of the filters to apply.
            after: the position that the page follows; None for the first page.
        """
        return [self._model.from_row(row) for row in self._page(transaction, values, limit, after, newest_first)]

    def listed(
        self,
        transaction: Transaction,
        values: Mapping[str, Any],
        limit: int,
        after: Position | None,
        newest_first: bool,
    ) -> list[Listed]:
        """Return what `page` returns without instances. The model must have no derived fields."""
        shape = self._model.shape
        columns = self._place if _by_time(values) else self._place[-1:]
        place: Callable[[Any], Position] = itemgetter(*map(shape.columns.index, columns))
        rows = self._page(transaction, values, limit, after, newest_first)
        return [Listed(place(row), shape.row_to_json(row)) for row in rows]

    def _page(
        self,
        transaction: Transaction,
        values: Mapping[str, Any],
        limit: int,
        after: Position | None,
        newest_first: bool,
    ) -> list[tuple[Any, ...]]:
        direction, comparison = ("DESC", "<") if newest_first else ("ASC", ">")
        by_time = _by_time(values)
        joins, where, parameters, metadata = self.conditions(
            values, unindexed=by_time and transaction.dialect == "sqlite"
        )
        order = [self._time, self._order] if by_time else [metadata or self._order]
        if after is not None:
            places = {f"after{n}": place for n, place in enumerate(after if isinstance(after, tuple) else (after,))}
            parameters |= places
            where.append(f"({', '.join(order)}) {comparison} ({', '.join(f':{name}' for name in places)})")
        condition = f"WHERE {' AND '.join(where)} " if where else ""
        ordered = ", ".join(f"{column} {direction}" for column in order)
        clauses = f"{joins}{condition}ORDER BY {ordered} LIMIT :limit"
        return transaction.tuples(self.sql + clauses, **parameters, limit=limit)


def _by_time(values: Mapping[str, Any]) -> bool:
    """Return whether a page with these filters is ordered by time."""
    return bool(values.keys() & {"since", "until"})
