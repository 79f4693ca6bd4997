"""The search index and the filters of lists at a size where they matter, on each kind of database."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from typing import Any

import psycopg
import pytest

from ccm.core.search import SEARCH_TIMEOUT, WINDOWS, SearchPage, SearchPosition, search_sessions
from ccm.db import messages, runs, search, sessions
from ccm.db.driver import migrate
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.db.run_metadata import entry
from ccm.db.search import TOP
from ccm.errors import DatabaseRefused
from ccm.search_words import Search
from tests.db.sample import AT, message, run_row, session_row
from tests.db.test_queries import explained
from tests.postgresql import new_database

SESSIONS = 20_000
NUMBERS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count) "
SECONDS, MILLISECONDS = "SUBSTR(CAST(100000 + i AS TEXT), 2, 2)", "SUBSTR(CAST(100000 + i AS TEXT), 4)"
TIME = f"'2026-01-01T00:00:' || {SECONDS} || '.' || {MILLISECONDS} || 'Z'"
WORDS = "'every w' || i || ' m' || (i % 50)"
FILL = (
    f"""
    INSERT INTO ccr_sessions (id, cwd, "metadataJson", "runCount", "messageCount", "costUsd", "firstRunAt", "lastRunAt",
        "lastRunSeq", "firstRunSeq", "createdBy")
    SELECT 's' || i, '/' || (i % 100), '{{}}', 1, 0, 0, {TIME}, {TIME}, i, i, 'c' || (i % 100) FROM n
    """,
    f"""
    INSERT INTO ccr_runs (id, seq, cwd, "sessionId", "sdkSessionId", mode, status, prompt, "optionsJson", "imageCount",
        "errorCode", "messageCount", "hasTranscript", "createdBy", "createdAt")
    SELECT 'r' || i, i, '/' || (i % 100), 's' || i, 'x' || i, 'fresh', 'error', 'prompt', '{{}}', 0,
        'E' || (i % 100), 0, 0, 'c' || (i % 100), {TIME} FROM n
    """,
)
PROMPTS = (
    "INSERT INTO ccr_search (rowid, words, \"runId\") SELECT (CAST(i AS BIGINT) << 31) + (1 << 29), {}, 'r' || i FROM n"
)
FILL_SEARCH = {"sqlite": PROMPTS.format(WORDS), "postgresql": PROMPTS.format(f"CAST({WORDS} AS TSVECTOR)")}
FILTERS: list[dict[str, Any]] = [
    {},
    {"cwd": "/7"},
    {"createdBy": "c7"},
    {"since": "2026-01-01T00:00:10.000Z"},
    {"until": "2026-01-01T00:00:10.000Z"},
    {"since": "2026-01-01T00:00:10.000Z", "until": "2026-01-01T00:00:11.000Z"},
    {"metadata": {"team": "t7"}},
    {"cwd": "/7", "since": "2026-01-01T00:00:10.000Z"},
    {"createdBy": "c7", "until": "2026-01-01T00:00:10.000Z"},
]
OF_RUNS: list[dict[str, Any]] = [
    {"errorCode": "E7"},
    {"mode": "fresh"},
    {"waiting": True},
    {"working": True},
    {"status": "error", "since": "2026-01-01T00:00:10.000Z"},
    {"mode": "fresh", "until": "2026-01-01T00:00:10.000Z"},
]


@pytest.fixture
def large(writable: Database) -> Database:
    """Return a database with many sessions."""
    with writable.transaction() as transaction:
        for statement in (*FILL, FILL_SEARCH[writable.dialect]):
            transaction.execute(NUMBERS + statement, count=SESSIONS)
        entries = [(entry("team", f"t{number % 100}"), number) for number in range(1, SESSIONS + 1)]
        transaction.insert_many("ccr_run_metadata", ("entry", "seq"), entries)
    if not writable.is_sqlite:  # as PostgreSQL does by itself, later
        with psycopg.connect(writable.url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")
    return writable


def plans(database: Database, read: Callable[[Transaction], object]) -> list[str]:
    with database.transaction() as transaction, explained(transaction, database.is_sqlite) as found:
        read(transaction)
    return found


def assert_follows_an_index(plan: str, is_sqlite: bool, *, sorts: bool = False) -> None:
    """Check that a plan neither scans nor, unless it may, sorts."""
    if is_sqlite:
        assert not re.search(r"SCAN (?!CONSTANT)(?!.*USING)(?!.*VIRTUAL TABLE INDEX \d+:.)", plan), plan
        assert sorts or "TEMP B-TREE" not in plan, plan
    else:
        # Of the tables that are not empty.
        assert not re.search(r"Seq Scan on ccr_(runs|sessions|search|run_metadata)", plan), plan
        assert sorts or not re.search(r"^\s*(->\s*)?(Incremental )?Sort ", plan, re.M), plan


def test_the_planner_uses_an_index_for_each_filter(large: Database) -> None:
    for filters in [*FILTERS, *OF_RUNS]:
        for oldest_first in (False, True):
            lists: list[Callable[..., object]] = [runs.page]
            if filters not in OF_RUNS:
                lists.append(sessions.page)
            for page in lists:
                (plan,) = plans(
                    large,
                    lambda t, page=page, f=filters, o=oldest_first: page(t, f, limit=100, after=None, oldest_first=o),  # type: ignore[misc]
                )
                # The few rows that meet two filters may be sorted, as PostgreSQL estimates.
                assert_follows_an_index(plan, large.is_sqlite, sorts=len(filters) > 1 and not large.is_sqlite)


@pytest.mark.parametrize("text", ["w77", "every", "m7", "every m7", "nothing", "w777"])
def test_the_planner_uses_an_index_for_a_search(large: Database, text: str) -> None:
    with large.transaction() as transaction:
        expected = [number for number in range(SESSIONS, 0, -1) if matches(text, number)][: search.SESSIONS]
        rowids, _ = next(search.best_texts(transaction, Search.parse(text), None, TOP))
        assert [search.first_seq(rowid) for rowid in rowids] == expected
    windows = plans(large, lambda t: list(search.best_texts(t, Search.parse(text), None, TOP)))
    for plan in windows + plans(large, lambda t: sessions.ranked(t, rowids, {})):
        # The few matches of a rare word are sorted.
        assert_follows_an_index(plan, large.is_sqlite, sorts=True)


def test_postgresql_plans_each_search_anew(postgresql: str) -> None:
    """A statement that has been executed often would get one plan for all words."""
    database = Database(new_database(postgresql), writable=True, pool_size=1)
    for _ in range(20):
        with database.transaction() as transaction:
            search_sessions(transaction, "a word", {}, limit=10, after=None, summary=False)
    sql = (
        "SELECT SUM(custom_plans) AS custom, SUM(generic_plans) AS generic FROM pg_prepared_statements "
        "WHERE statement LIKE '%@@%'"
    )
    (row,) = database.rows(sql)
    database.close()
    assert row["custom"] > 0
    assert row["generic"] == 0


def matches(text: str, number: int) -> bool:
    whole, prefix = Search.parse(text)
    words = {"every", f"w{number}", f"m{number % 50}"}
    return set(whole) <= words and any(word.startswith(prefix) for word in words)


# ---- windows


def add(transaction: Transaction, seq: int, title: str, prompt: str, *, said: int = 0, text: str = "kite") -> None:
    """Add a session with one run, in which a text is said several times."""
    sessions.insert(transaction, session_row(f"s{seq}", seq, title=title))
    runs.insert(transaction, run_row(f"r{seq}", seq, f"s{seq}", prompt=prompt), None)
    content = f'{{"message":{{"content":[{{"type":"text","text":"{text}"}}]}}}}'
    messages.insert_many(transaction, [message(f"r{seq}", f"s{seq}", n, "assistant", content) for n in range(said)])


def crawl(database: Database, text: str, limit: int, **filters: Any) -> list[list[str]]:
    """Return the ids on all pages of a search."""
    found: list[list[str]] = []
    after: SearchPosition | None = None
    while after is not None or not found:
        with database.transaction() as transaction:
            page: SearchPage = search_sessions(transaction, text, filters, limit=limit, after=after, summary=False)
        found.append([session.id for session in page.sessions])
        after = page.next
        if after is None:
            break
    return found


def test_more_matches_than_fit_a_window_are_found_once(writable: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CHUNK", 3)
    monkeypatch.setattr(search, "SESSIONS", 4)
    with writable.transaction() as transaction:
        for seq in range(-5, 15):
            add(transaction, seq, "kite" if seq % 4 == 0 else "no", "kite" if seq % 2 else "no", said=seq % 5 * 2)

    everything = {f"s{seq}" for seq in range(-5, 15) if seq % 4 == 0 or seq % 2 or seq % 5}
    for limit in (1, 2, 3, 5, 100):
        listed = [session_id for page in crawl(writable, "kite", limit) for session_id in page]
        assert sorted(listed) == sorted(everything), limit
    # In the first window the titles come first.
    assert crawl(writable, "kite", 100)[0][0] == "s12"


def test_a_session_with_many_matches_does_not_hide_the_others(writable: Database) -> None:
    with writable.transaction() as transaction:
        add(transaction, 1, "no", "no", said=1)
        add(transaction, 2, "no", "no", said=search.CHUNK * 2)
        add(transaction, 3, "no", "no", said=1)
    assert crawl(writable, "kite", 10) == [["s3", "s2", "s1"]]


def test_a_crawl_misses_nothing_and_repeats_nothing_while_sessions_are_added(
    writable: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "CHUNK", 2)
    monkeypatch.setattr(search, "SESSIONS", 3)
    with writable.transaction() as transaction:
        for seq in range(1, 13):
            add(transaction, seq, "no", "kite")
    listed: list[str] = []
    after: SearchPosition | None = None
    for seq in range(13, 100):
        with writable.transaction() as transaction:
            page = search_sessions(transaction, "kite", {}, limit=2, after=after, summary=True)
            listed += [session.id for session in page.sessions]
            add(transaction, seq, "kite", "kite")
        after = page.next
        if after is None:
            break
    assert listed == [f"s{seq}" for seq in range(12, 0, -1)]


def test_filters_that_few_sessions_meet_are_searched_beyond_the_first_window(
    writable: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "CHUNK", 2)
    monkeypatch.setattr(search, "SESSIONS", 2)
    with writable.transaction() as transaction:
        add(transaction, 1, "no", "kite")
        transaction.execute("UPDATE ccr_sessions SET cwd = '/other'")
        for seq in range(2, 12):
            add(transaction, seq, "no", "kite")
    assert crawl(writable, "kite", 10, cwd="/other") == [["s1"]]


def search_page(database: Database, after: SearchPosition | None = None, **arguments: Any) -> SearchPage:
    """Return a page of the sessions by "nobody", or by the client that is named, with the word "kite"."""
    filters = {"createdBy": arguments.pop("createdBy", "nobody")}
    with database.transaction() as transaction:
        return search_sessions(transaction, "kite", filters, limit=100, after=after, summary=True, **arguments)


@pytest.fixture
def kites(writable: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Return a database with 50 sessions that have the word "kite", of which two fit a window."""
    monkeypatch.setattr(search, "CHUNK", 2)
    monkeypatch.setattr(search, "SESSIONS", 2)
    with writable.transaction() as transaction:
        for seq in range(1, 51):
            add(transaction, seq, "no", "kite")
        transaction.execute("UPDATE ccr_sessions SET \"createdBy\" = 'somebody'")
    return writable


def test_many_windows_take_few_statements(kites: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each statement takes time for all texts that have a word."""
    limits: list[int] = []
    column = Transaction.column

    def counted(transaction: Transaction, sql: str, **parameters: Any) -> list[Any]:
        if "ccr_search" in sql:
            limits.append(parameters["limit"])
        return column(transaction, sql, **parameters)

    monkeypatch.setattr(Transaction, "column", counted)
    page = search_page(kites)
    assert page.sessions == []
    assert page.next is not None
    assert search.first_seq(page.next.bottom) == 50 + 1 - 2 * WINDOWS
    assert limits == [search.PLENTY, 2, 4, 8, 16, 32]


def test_a_search_ends_at_its_timeout(kites: Database) -> None:
    pages = 0
    page = None
    while page is None or page.next is not None:
        # The clock is read at the beginning and after each window, and the third window is beyond the timeout.
        page = search_page(kites, page and page.next, clock=count(step=SEARCH_TIMEOUT / 3).__next__)
        assert page.sessions == []
        pages += 1
        assert page.next is None or search.first_seq(page.next.bottom) == 51 - 6 * pages
    assert pages == 9


def test_a_forged_cursor_has_a_bounded_page(kites: Database) -> None:
    page = search_page(kites, SearchPosition(-TOP, TOP, 2, 99), createdBy="somebody")
    listed = [session.id for session in page.sessions]
    assert listed == [f"s{seq}" for seq in range(50, 46, -1)]
    while page.next is not None:
        page = search_page(kites, page.next, createdBy="somebody")
        listed += [session.id for session in page.sessions]
    assert listed == [f"s{seq}" for seq in range(50, 0, -1)]


def test_a_forged_cursor_reads_a_bounded_number_of_matches(writable: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CHUNK", 3)
    monkeypatch.setattr(search, "MATCHES", 3)
    with writable.transaction() as transaction:
        for seq in range(1, 7):
            add(transaction, seq, "no", "no", said=3)
        transaction.execute("UPDATE ccr_sessions SET \"createdBy\" = 'somebody'")
    page = search_page(writable, SearchPosition(-TOP, TOP, 2, 99), createdBy="somebody")
    assert [session.id for session in page.sessions] == ["s6", "s5"]


def test_a_common_last_word_does_not_find_longer_words(writable: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PLENTY", 2)
    with writable.transaction() as transaction:
        add(transaction, 1, "no", "kites")
        add(transaction, 2, "no", "kite")
    assert crawl(writable, "kite", 10) == [["s2", "s1"]]
    with writable.transaction() as transaction:
        add(transaction, 3, "no", "kite")
    assert crawl(writable, "kite", 10) == [["s3", "s2"]]


# ---- the index and the rows


def indexed(database: Database) -> list[tuple[Any, ...]]:
    with database.transaction() as transaction:
        return sorted(transaction.tuples('SELECT rowid, "runId", "index" FROM ccr_search'))


def test_the_migration_fills_the_index_as_the_writer_does(writable: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "RUNS_AT_ONCE", 2)
    monkeypatch.setattr(search, "MESSAGES_AT_ONCE", 3)
    monkeypatch.setattr(search, "BYTES_AT_ONCE", 100)
    with writable.transaction() as transaction:
        for seq in range(1, 6):
            add(transaction, seq, "A title", "A prompt", said=seq, text=f"word{seq}")
        runs.insert(transaction, run_row("later", 6, "s1", prompt="Another prompt", mode="resume"), None)
    before = indexed(writable)
    assert len(before) == 5 + 6 + 15
    with writable.transaction() as transaction:
        transaction.execute("DELETE FROM ccr_search")
        search.fill(transaction)

    assert indexed(writable) == before
    assert crawl(writable, "word3", 10) == [["s3"]]
    assert crawl(writable, "another", 10) == [["s1"]]


def test_a_run_whose_batch_rolls_back_leaves_nothing_in_the_index(writable: Database) -> None:
    with writable.transaction() as transaction:
        add(transaction, 1, "no", "no")
    before = indexed(writable)
    with pytest.raises(ZeroDivisionError), writable.transaction() as transaction:
        add(transaction, 2, "kite", "kite", said=3)
        raise ZeroDivisionError
    assert indexed(writable) == before
    assert crawl(writable, "kite", 10) == [[]]


def test_sqlite_without_fts5_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(f"sqlite:///{tmp_path}/db.sqlite", writable=True, pool_size=1)
    rows = database.rows

    def without_fts5(sql: str, **parameters: Any) -> object:
        return rows(sql.replace("fts5", "no_such_function"), **parameters)

    monkeypatch.setattr(database, "rows", without_fts5)
    with pytest.raises(DatabaseRefused, match=r"lacks FTS5.*DATABASE_URL"):
        migrate.migrate(database)
    database.close()


def test_times_of_the_sample_are_those_of_the_model(writable: Database) -> None:
    """The fill of this file writes its times by itself."""
    with writable.transaction() as transaction:
        transaction.execute(NUMBERS + FILL[0], count=1)
        assert len(transaction.column('SELECT "lastRunAt" FROM ccr_sessions')[0]) == len(AT)
