"""The sample database on SQLite and PostgreSQL, for tests that leave it unchanged."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing

import psycopg
import pytest

from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.migrate import migrate
from ccm.db.driver.transaction import Transaction
from tests.db import sample


class RolledBack(Exception):
    """Rolls back a transaction, because all tests of a module share the sample."""


def perform(database: Database, function: Callable[[Transaction], object]) -> object:
    """Call a function, roll back its changes and return its result."""
    result: list[object] = []
    try:
        with database.transaction() as transaction:
            result.append(function(transaction))
            raise RolledBack
    except RolledBack:
        return result[0]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def sample_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of the sample on each kind of database. No test may change it permanently."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('sample')}/db.sqlite"
        sqlite_file.prepare(url)
    else:
        server: str = request.getfixturevalue("postgresql")
        name = f"contract_{uuid.uuid4().hex}"
        with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name}".encode())
        url = f"{server}/{name}"
    with closing(Database(url, writable=True, pool_size=1)) as database:
        migrate(database)
        sample.fill(database)
    return url
