"""SELECT statements for the models. Their columns derive from the models' fields."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from ccm.db.driver.transaction import Transaction
from ccm.errors import NotFound
from ccm.models.stored import StoredModel

T = TypeVar("T")
M = TypeVar("M", bound=StoredModel)
Expressions = Mapping[str, str]

NONE: Expressions = MappingProxyType({})


def existing(found: T | None, kind: str, id: str, missing: type[NotFound]) -> T:
    """Return what was found under an id.

    Raises:
        NotFound: nothing was found; an instance of `missing`.
    """
    if found is None:
        raise missing(f"There is no {kind} {id}. GET /api/{kind}s lists them.")
    return found


class Select(Generic[M]):
    """Reads rows as instances of a model.

    Args:
        tables: the FROM clause. It begins with the model's table and its alias.
        computed: expressions for columns that the table lacks or holds in another form.
        filters: the conditions that `page` accepts, by name. Each has a parameter of that name.
        order: the unique column by which `page` orders the rows.
    """

    def __init__(
        self, model: type[M], tables: str, computed: Expressions = NONE, filters: Expressions = NONE, order: str = "seq"
    ) -> None:
        unknown = computed.keys() - set(model.shape.columns)
        if unknown:
            raise TypeError(f"{model.__name__} has no column {', '.join(sorted(unknown))}.")
        alias = tables.split()[1]
        expressions = {column: f'{alias}."{column}"' for column in model.shape.columns} | dict(computed)
        selected = ", ".join(f'{expression} AS "{column}"' for column, expression in expressions.items())
        self.sql = f"SELECT {selected} FROM {tables} "
        self._model = model
        self._filters = filters
        self._order = f'{alias}."{order}"'

    def rows(self, transaction: Transaction, clauses: str, **parameters: Any) -> list[M]:
        """Return the instances that the further clauses of the statement select."""
        # Tuples, because the columns of the statement are in the model's order.
        return [self._model.from_row(row) for row in transaction.tuples(self.sql + clauses, **parameters)]

    def find(self, transaction: Transaction, clauses: str, **parameters: Any) -> M | None:
        """Return the first instance that the further clauses of the statement select, or None."""
        return next(iter(self.rows(transaction, clauses, **parameters)), None)

    def page(
        self, transaction: Transaction, values: Mapping[str, str], limit: int, after: int | None, newest_first: bool
    ) -> list[M]:
        """Return the instances that meet some of the filters, in order.

        Args:
            values: values by the names of the filters to apply.
            after: the value of the ordering column that the page follows; None for the first page.
        """
        direction, comparison = ("DESC", "<") if newest_first else ("ASC", ">")
        conditions = [self._filters[name] for name in values]
        if after is not None:
            conditions.append(f"{self._order} {comparison} :after")
        where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
        clauses = f"{where}ORDER BY {self._order} {direction} LIMIT :limit"
        return self.rows(transaction, clauses, **values, limit=limit, after=after)
