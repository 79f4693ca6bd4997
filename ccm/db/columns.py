"""Column lists of SELECT statements, derived from the models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ccm.models.stored import StoredModel

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
