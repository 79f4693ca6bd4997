"""SELECT statements for the models. Their columns derive from the models' fields."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from ccm.db.driver.transaction import Transaction
from ccm.models.stored import StoredModel

M = TypeVar("M", bound=StoredModel)

NO_EXPRESSIONS: Mapping[str, str] = MappingProxyType({})


def select_list(model: type[StoredModel], table: str, computed: Mapping[str, str] = NO_EXPRESSIONS) -> str:
    """Return the expressions that a SELECT needs for a model: each of its columns, stored or computed.

    Args:
        table: the table's alias in the statement.
        computed: expressions for columns that the table lacks or holds in another form.
    """
    unknown = computed.keys() - set(model.shape.columns)
    if unknown:
        raise TypeError(f"{model.__name__} has no column {', '.join(sorted(unknown))}.")
    stored = {column: f'{table}."{column}"' for column in model.shape.columns}
    return ", ".join(f'{expression} AS "{column}"' for column, expression in (stored | dict(computed)).items())


class Select(Generic[M]):
    """Reads rows as instances of a model.

    Args:
        tables: the FROM clause. It begins with the model's table and its alias.
        computed: expressions for columns that the table lacks or holds in another form.
        filters: the conditions that `page` accepts, by name. Each has a parameter of that name.
        order: the unique column by which `page` orders the rows.
    """

    def __init__(
        self,
        model: type[M],
        tables: str,
        computed: Mapping[str, str] = NO_EXPRESSIONS,
        *,
        filters: Mapping[str, str] = NO_EXPRESSIONS,
        order: str = "seq",
    ) -> None:
        alias = tables.split()[1]
        self.sql = f"SELECT {select_list(model, alias, computed)} FROM {tables} "
        self._model = model
        self._filters = filters
        self._order = f'{alias}."{order}"'

    def rows(self, transaction: Transaction, clauses: str, **parameters: Any) -> list[M]:
        """Return the instances that the further clauses of the statement select."""
        return [self._model.from_row(row) for row in transaction.rows(self.sql + clauses, **parameters)]

    def find(self, transaction: Transaction, clauses: str, **parameters: Any) -> M | None:
        """Return the first instance that the further clauses of the statement select, or None."""
        return next(iter(self.rows(transaction, clauses, **parameters)), None)

    def page(
        self,
        transaction: Transaction,
        filters: Mapping[str, str],
        *,
        limit: int,
        after: int | None,
        descending: bool = False,
    ) -> list[M]:
        """Return the instances that meet all filters, in order.

        Args:
            filters: values by the names of the filters.
            after: the value of the ordering column that the page follows; None for the first page.
        """
        direction, comparison = ("DESC", "<") if descending else ("ASC", ">")
        conditions = [self._filters[name] for name in filters]
        if after is not None:
            conditions.append(f"{self._order} {comparison} :after")
        where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
        clauses = f"{where}ORDER BY {self._order} {direction} LIMIT :limit"
        return self.rows(transaction, clauses, **filters, limit=limit, after=after)
