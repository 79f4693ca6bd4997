"""Imports dataset without alembic."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

# The names that dataset imports from alembic. It uses them only in `Database.op`, to alter tables, which we never do.
NAMES = {"alembic.migration": "MigrationContext", "alembic.operations": "Operations"}


@contextmanager
def without_alembic() -> Iterator[None]:
    """Replace alembic by stand-ins within the block: it imports every dialect of SQLAlchemy, a tenth of the startup.

    A later import gets the real alembic. If it has been imported already, nothing is replaced.
    """
    if "alembic" in sys.modules:
        yield
        return
    stand_ins = {name: ModuleType(name) for name in ("alembic", *NAMES)}
    for module, name in NAMES.items():
        setattr(stand_ins[module], name, None)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
