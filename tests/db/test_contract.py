"""The contract of `ccm.db` on each kind of database: the result of each function, and its behaviour during a fault.

During a fault a function raises the documented error, changes nothing, and leaves the database usable for the thread.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from contextlib import closing

import pytest

import ccm.db
from ccm.db import trees
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.errors import DatabaseDamaged, DatabaseRefused, NotFound, StorageDown
from ccm.models import IdempotencyKey
from tests.db.conftest import perform
from tests.db.storage_calls import ANY, CALLS, OPERATIONS, Call
from tests.storage_faults import content, cut_off, damaged, impatient, locked, path_of

GONE = "the database server cannot be reached"
LOCKED = "another program has locked the database"

on_sqlite = pytest.mark.parametrize("sample_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("sample_url", ["postgresql"], indirect=True)


@pytest.fixture
def before(sample_url: str) -> Iterator[dict[str, list[object]]]:
    """Return the content of the sample, and check after the test that it is the same."""
    stored = content(sample_url)
    yield stored
    assert content(sample_url) == stored


def database_of(sample_url: str, call: Call) -> Database:
    return Database(sample_url, writable=call.writes, pool_size=1)


def assert_works(database: Database, call: Call) -> None:
    result = perform(database, call.function)
    if call.result is not ANY:
        assert result == call.result


# ---- completeness of the calls


def public_functions() -> set[str]:
    """Return every function of `ccm.db` that takes a transaction or a database, as `module.function`."""
    names = set()
    for module_info in pkgutil.walk_packages(ccm.db.__path__, "ccm.db."):
        module = importlib.import_module(module_info.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            first = next(iter(inspect.signature(function).parameters), None)
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and first in ("transaction", "database"):
                names.add(f"{module.__name__.rpartition('.')[2]}.{name}")
    return names


def test_every_function_of_db_is_called() -> None:
    assert {name.partition(" ")[0] for name in (*CALLS, *OPERATIONS)} == public_functions()


@on_sqlite
def test_calls_marked_as_writing_are_those_that_write(sample_url: str) -> None:
    """SQLite counts the changed rows of a connection. On PostgreSQL a reader's writes fail anyway."""
    with closing(Database(sample_url, writable=True, pool_size=1)) as database:
        for name, call in CALLS.items():

            def changed(transaction: Transaction, call: Call = call) -> bool:
                changes = transaction.value("SELECT total_changes()")
                call.function(transaction)
                return bool(transaction.value("SELECT total_changes()") != changes)

            assert perform(database, changed) == call.writes, name


# ---- without faults


@pytest.mark.parametrize("name", CALLS)
def test_a_function_returns_the_same_on_each_kind_of_database(sample_url: str, name: str) -> None:
    with closing(database_of(sample_url, CALLS[name])) as database:
        assert_works(database, CALLS[name])


def test_get_raises_where_find_returns_none(sample_url: str) -> None:
    """Each function is asked for a missing row."""
    # Except those for the first and last seq, which the sample always has.
    names = [name for name in public_functions() if re.search(r"\.(get|find)(?!_(last|first)_seq)", name)]
    extra: dict[str, tuple[object, ...]] = {
        "runs.find_by_idempotency_key": (IdempotencyKey("none", "digest"),),
        "deliveries.find": (0,),
        "messages.find": ("nobody", 0),
        "runs.find_prompt": ("nobody", 1),
        "events.find_text": (0,),
        "deliveries.find_disabled_reason": ("nobody", "run"),
        "deliveries.find_next_due": ("9",),
    }
    with closing(Database(sample_url)) as database:
        for name in names:
            module, _, function_name = name.partition(".")
            function = getattr(importlib.import_module(f"ccm.db.{module}"), function_name)
            arguments = extra.get(name, ("nobody",))
            with database.transaction() as transaction:
                if function_name.startswith("find"):
                    assert function(transaction, *arguments) is None, name
                else:
                    with pytest.raises(NotFound, match=r"There is no (run|session|approval) nobody"):
                        function(transaction, *arguments)


# ---- another program has locked the database


@pytest.mark.parametrize("name", CALLS)
def test_a_function_on_a_locked_database(
    sample_url: str, before: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CALLS[name]
    with closing(database_of(impatient(sample_url, monkeypatch), call)) as database:
        assert_works(database, call)
        with locked(sample_url):
            if database.dialect in call.untouched or (database.is_sqlite and not call.writes):
                assert_works(database, call)  # the lock does not affect it
            else:
                with pytest.raises(StorageDown) as fault, database.transaction() as transaction:
                    call.function(transaction)
                assert (type(fault.value), fault.value.summary) == (StorageDown, LOCKED)
                assert not fault.value.may_be_committed
        assert_works(database, call)


@on_postgresql
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.writes])
def test_a_transaction_that_meets_a_lock_is_rolled_back(
    sample_url: str, before: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SQLite this cannot happen, because a writer holds the lock from the beginning of its transaction."""
    with closing(database_of(impatient(sample_url, monkeypatch), CALLS[name])) as database:
        with pytest.raises(StorageDown) as fault, database.transaction() as transaction:
            transaction.execute("UPDATE ccr_migrations SET name = 'half-written' WHERE number = 1")
            with locked(sample_url, spared="ccr_migrations"):
                CALLS[name].function(transaction)
        assert fault.value.summary == LOCKED
        assert_works(database, CALLS[name])


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_a_locked_database(
    sample_url: str, before: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Database(impatient(sample_url, monkeypatch), writable=True, pool_size=1)) as database:
        database.rows("SELECT 1")
        refusal = DatabaseRefused if name.startswith("migrate.") else StorageDown
        with locked(sample_url), pytest.raises(refusal):
            OPERATIONS[name](database)
        assert database.rows("SELECT COUNT(*) AS n FROM ccr_runs") == [{"n": 4}]


def test_a_locked_database_is_not_cleared(sample_url: str, before: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "CLEAR_TIMEOUT", 0.02)
    with locked(sample_url), pytest.raises(StorageDown):
        trees.clear(impatient(sample_url, monkeypatch), deleted=True)
    trees.clear(sample_url, deleted=True)


# ---- the file is damaged, or the connection to the server is lost


@on_sqlite
@pytest.mark.parametrize("name", CALLS)
def test_a_function_on_a_damaged_file(sample_url: str, before: object, name: str) -> None:
    call = CALLS[name]
    with damaged(path_of(sample_url)), closing(database_of(sample_url, call)) as database:
        if database.dialect in call.untouched:
            assert_works(database, call)
        else:
            with pytest.raises(DatabaseDamaged), database.transaction() as transaction:
                call.function(transaction)
            with pytest.raises(DatabaseDamaged):  # the thread can use the database again and gets the same error
                perform(database, call.function)
    with closing(database_of(sample_url, call)) as database:
        assert_works(database, call)


@on_sqlite
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_a_damaged_file(sample_url: str, before: object, name: str) -> None:
    refusal = DatabaseRefused if name.startswith("migrate.") else DatabaseDamaged
    with damaged(path_of(sample_url)), closing(Database(sample_url, writable=True, pool_size=1)) as database:
        for _ in range(2):
            with pytest.raises(refusal):
                OPERATIONS[name](database)


@on_sqlite
def test_a_damaged_file_is_not_cleared(sample_url: str, before: object) -> None:
    with damaged(path_of(sample_url)), pytest.raises(DatabaseDamaged):
        trees.clear(sample_url, deleted=True)


@on_postgresql
@pytest.mark.parametrize("name", CALLS)
def test_a_function_whose_connection_is_lost(sample_url: str, before: object, name: str) -> None:
    call = CALLS[name]
    with closing(database_of(sample_url, call)) as database:
        with cut_off(database), pytest.raises(StorageDown) as fault, database.transaction() as transaction:
            call.function(transaction)
        assert (type(fault.value), fault.value.summary) == (StorageDown, GONE)
        assert not fault.value.may_be_committed
        assert_works(database, call)


@on_postgresql
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_whose_connection_is_lost(sample_url: str, before: object, name: str) -> None:
    refusal = DatabaseRefused if name.startswith("migrate.") else StorageDown
    with closing(Database(sample_url, writable=True, pool_size=1)) as database:
        with cut_off(database), pytest.raises(refusal):
            OPERATIONS[name](database)
        assert database.rows("SELECT COUNT(*) AS n FROM ccr_runs") == [{"n": 4}]


def test_a_server_out_of_reach_is_not_cleared() -> None:
    with pytest.raises(StorageDown) as fault:
        trees.clear("postgresql://u@127.0.0.1:1/db", deleted=True)
    assert fault.value.summary == GONE
