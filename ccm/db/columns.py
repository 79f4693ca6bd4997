"""Lists of columns, taken from the models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ccm.models.stored import StoredModel

NONE: Mapping[str, str] = MappingProxyType({})


def select_list(model: type[StoredModel], table: str, computed: Mapping[str, str] = NONE) -> str:
    """What a SELECT reads for a model: each of its columns, of the table or computed.

    Args:
        table: its name in the statement.
        computed: expressions for columns that the table does not have, or not as they are wanted.
    """
    unknown = computed.keys() - set(model.shape.columns)
    if unknown:
        raise TypeError(f"{model.__name__} has no column {', '.join(sorted(unknown))}.")
    own = {column: f'{table}."{column}"' for column in model.shape.columns}
    return ", ".join(f'{expression} AS "{column}"' for column, expression in (own | dict(computed)).items())
