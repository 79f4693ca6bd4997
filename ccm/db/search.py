"""The table ccr_search: the words of the sessions' titles, of their prompts and of what was said.

On SQLite it is an index of FTS5, on PostgreSQL a column of lexemes with a GIN index. Both get the words of
ccm/search_words.py.

The rowid of a text has three parts, so that the texts of a session are together and its best one is the last: the seq
of the session's first run, the kind of the text, and a number within the kind. A scan for the best matches of the
newest sessions therefore follows the index, and stops early.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from ccm.db.driver.transaction import Transaction, parameter_list
from ccm.models import Message
from ccm.search_words import INDEXED_CHARACTERS, Search, indexed_words, said

COLUMNS = ("rowid", "words", "runId", "index")
KIND_BITS, NUMBER_BITS = 2, 29
SESSION_BITS = KIND_BITS + NUMBER_BITS
# Above every rowid.
TOP = 2**62
# The difference between the seqs of two runs is a number within a kind.
HIGHEST_SEQ = 2 ** (NUMBER_BITS - 1) - 1
WORD_INDEX = "ccr_search_by_word"
# Merges the segments of FTS5's index, because the older ones still contain the words of deleted texts.
MERGE = "INSERT INTO ccr_search (ccr_search) VALUES ('optimize')"
# How many matches the first statement finds. Each further one finds twice as many, up to the second number, because
# each collects the matches of all longer words anew.
CHUNK, LARGEST_CHUNK = 2_500, 40_000
# The matches that are ranked together: of so many sessions, or so many.
SESSIONS, MATCHES = 500, 10_000
# So many matches are enough without longer words, of which there may be so many that finding them takes long.
PLENTY = 500
# Bounds of the memory of `fill`.
RUNS_AT_ONCE = 100
MESSAGES_AT_ONCE = 500
BYTES_AT_ONCE = 2**20

MATCHING = {
    "sqlite": "SELECT rowid FROM ccr_search WHERE ccr_search MATCH :words",
    "postgresql": "SELECT rowid FROM ccr_search WHERE words @@ CAST(:words AS TSQUERY)",
}
PAGE = " AND rowid >= :bottom AND rowid < :top ORDER BY rowid DESC LIMIT :limit"
FIRST_SEQS = """
SELECT r.id, s."firstRunSeq" FROM ccr_runs r JOIN ccr_sessions s ON s.id = r."sessionId" WHERE r.id IN ({})
"""


class Kind(IntEnum):
    """The kind of a text. A greater one is a better match."""

    # A message of a person or of Claude.
    MESSAGE = 0
    # The prompt of a run.
    PROMPT = 1
    # The title of a session.
    TITLE = 2

    @classmethod
    def of(cls, rowid: int) -> Kind:
        return cls(rowid >> NUMBER_BITS & 2**KIND_BITS - 1)


class Text(NamedTuple):
    """A text that was found. `run_id` is None for a title, `index` is None unless it is a message."""

    rowid: int
    run_id: str | None
    index: int | None  # type: ignore[assignment]  # hides the tuple's method

    @property
    def kind(self) -> Kind:
        return Kind.of(self.rowid)


class Window(NamedTuple):
    """A range of rowids whose matches are ranked together: from `bottom` up to, but not including, `top`."""

    bottom: int
    top: int


def first_seq(rowid: int) -> int:
    """Return the seq of the first run of the session that a text belongs to."""
    return rowid >> SESSION_BITS


# ---- writing


def put_title(transaction: Transaction, seq: int, title: str | None) -> None:
    """Replace the title of a session.

    Args:
        seq: that of the session's first run.
    """
    rowid = _rowid(seq, Kind.TITLE)
    transaction.execute("DELETE FROM ccr_search WHERE rowid = :rowid", rowid=rowid)
    _insert(transaction, [(rowid, title or "", None, None)])


def add_prompt(transaction: Transaction, run_id: str, seq: int, prompt: str) -> None:
    """Add the prompt of a stored run."""
    ((_, first),) = _first_seqs(transaction, [run_id])
    _insert(transaction, [(_rowid(first, Kind.PROMPT, seq - first), prompt, run_id, None)])


def add_messages(transaction: Transaction, messages: Iterable[Message]) -> None:
    """Add what is said in the messages of stored runs."""
    texts = [(message, text) for message in messages if (text := _said(message))]
    if texts:
        firsts = dict(_first_seqs(transaction, {message.run_id for message, _ in texts}))
        free = {first: _free_rowid(transaction, first) for first in set(firsts.values())}
        rows = []
        for message, text in texts:
            first = firsts[message.run_id]
            rows.append((free[first], text, message.run_id, message.index))
            free[first] += 1
        _insert(transaction, rows)


def fill(transaction: Transaction) -> None:
    """Add the texts of all sessions to the empty table, with a bounded amount of memory."""
    after = -(2**62)
    sql = (
        'SELECT r.seq, r.id, r."sessionId", SUBSTR(r.prompt, 1, :characters), s.title, s."firstRunSeq" '
        'FROM ccr_runs r JOIN ccr_sessions s ON s.id = r."sessionId" WHERE r.seq > :after ORDER BY r.seq LIMIT :limit'
    )
    while rows := transaction.tuples(sql, characters=INDEXED_CHARACTERS, after=after, limit=RUNS_AT_ONCE):
        for seq, run_id, session_id, prompt, title, first in rows:
            add_prompt(transaction, run_id, seq, prompt)
            if title and first == seq:
                put_title(transaction, seq, title)
            for part in _messages(transaction, run_id, session_id):
                add_messages(transaction, part)
        after = rows[-1][0]


def delete_of_session(transaction: Transaction, session_id: str, limit: int) -> bool:
    """Delete up to `limit` texts of a session. Return whether there may be more."""
    seq = _find_first_seq(transaction, session_id)
    if seq is None:
        return False
    texts = "SELECT rowid FROM ccr_search WHERE rowid >= :bottom AND rowid < :top ORDER BY rowid LIMIT :limit"
    rowids = transaction.column(texts, bottom=_rowid(seq), top=_rowid(seq + 1), limit=limit)
    if rowids:
        sql = "DELETE FROM ccr_search WHERE rowid >= :first AND rowid <= :last"
        transaction.execute(sql, first=rowids[0], last=rowids[-1])
    return len(rowids) == limit


def replace_title(transaction: Transaction, session_id: str, title: str | None) -> None:
    """Replace the title of a session with runs."""
    seq = _find_first_seq(transaction, session_id)
    if seq is not None:
        put_title(transaction, seq, title)


# ---- reading


def narrowed(transaction: Transaction, search: Search) -> Search:
    """Return a search that finds the last word only as it is, if that is enough. Call it first in a transaction."""
    exact = search.exact()
    if transaction.dialect == "postgresql":
        # A prepared statement would get one plan for all words, which reads the whole table for a rare one.
        transaction.script("SET LOCAL plan_cache_mode = force_custom_plan")
    sql = MATCHING[transaction.dialect] + " LIMIT :limit"
    words = QUERIES[transaction.dialect](exact)
    return exact if search.prefix and len(transaction.column(sql, words=words, limit=PLENTY)) == PLENTY else search


def best_texts(
    transaction: Transaction, search: Search, window: Window | None, top: int
) -> Iterator[tuple[list[int], Window]]:
    """Yield the rowid of the best match of each session in a window, of the newest session first, and the window.

    The windows follow one another downwards. Below the bottom of the last one, which is -TOP, there are no matches.

    Args:
        window: the first one, as this function yielded it before; None to begin with a new one.
        top: where a new first window begins.
    """
    if window is not None:
        # Twice as many, because sessions may have got matches since. A forged window may have any number.
        first = next(_windows(transaction, search, window, 2 * SESSIONS, 2 * MATCHES))
        yield first
        top = first[1].bottom
    yield from _windows(transaction, search, Window(-TOP, top), SESSIONS, MATCHES)


def _windows(
    transaction: Transaction, search: Search, span: Window, most_sessions: int, most_matches: int
) -> Iterator[tuple[list[int], Window]]:
    """Yield the windows of a range of rowids, as `best_texts`. The last one ends where the range does."""
    found: list[int] = []
    matches, top = 0, span.top
    for rowid in _matching(transaction, search, span):
        if not found or first_seq(rowid) != first_seq(found[-1]):
            if len(found) >= most_sessions or matches >= most_matches:
                yield found, Window(_rowid(first_seq(found[-1])), top)
                found, matches = [], 0
            if not found:
                # Not above the newest match, so that sessions that are added later stay out of this window.
                top = _rowid(first_seq(rowid) + 1)
            found.append(rowid)
        matches += 1
    yield found, Window(span.bottom, top)


def texts(transaction: Transaction, rowids: Collection[int]) -> list[Text]:
    """Return texts by their rowids, in any order."""
    if not rowids:
        return []
    names, parameters = parameter_list("rowid", rowids)
    sql = f'SELECT rowid, "runId", "index" FROM ccr_search WHERE rowid IN ({names})'
    return [Text._make(row) for row in transaction.tuples(sql, **parameters)]


def _matching(transaction: Transaction, search: Search, span: Window) -> Iterator[int]:
    """Yield the rowids of the matches in a range, in descending order: of each session the best, and some others."""
    sql = MATCHING[transaction.dialect] + PAGE
    words = QUERIES[transaction.dialect](search)
    top, limit = span.top, CHUNK
    while True:
        rowids = transaction.column(sql, words=words, bottom=span.bottom, top=top, limit=limit)
        yield from rowids
        if len(rowids) < limit:
            return
        # Below the other matches of the last session, of which the best has been found.
        top = _rowid(first_seq(rowids[-1]))
        limit = min(2 * limit, LARGEST_CHUNK)


def _fts5_query(search: Search) -> str:
    words = [f'"{word}"' for word in search.whole]
    return " ".join([*words, f'"{search.prefix}"*'] if search.prefix else words)


def _tsquery(search: Search) -> str:
    words = [f"'{word}'" for word in search.whole]
    return " & ".join([*words, f"'{search.prefix}':*"] if search.prefix else words)


# Words contain neither quotes nor operators.
QUERIES: dict[str, Callable[[Search], str]] = {"sqlite": _fts5_query, "postgresql": _tsquery}


# ---- parts of both


def _rowid(seq: int, kind: Kind = Kind.MESSAGE, number: int = 0) -> int:
    return (seq << SESSION_BITS) + (kind << NUMBER_BITS) + number


def _insert(transaction: Transaction, rows: Sequence[tuple[int, str, str | None, int | None]]) -> None:
    """Insert texts: rowid, text, run and index."""
    indexed = [(rowid, words, run_id, index) for rowid, text, run_id, index in rows if (words := indexed_words(text))]
    # In their order, because FTS5 ends a segment of its index at each smaller rowid.
    transaction.insert_many("ccr_search", COLUMNS, sorted(indexed))


def _first_seqs(transaction: Transaction, run_ids: Collection[str]) -> list[tuple[str, int]]:
    """Return the id of each of some runs with the seq of the first run of its session."""
    names, parameters = parameter_list("run", run_ids)
    return transaction.tuples(FIRST_SEQS.format(names), **parameters)


def _find_first_seq(transaction: Transaction, session_id: str) -> int | None:
    """Return the seq of a session's first run, or None."""
    seq: int | None = transaction.value('SELECT "firstRunSeq" FROM ccr_sessions WHERE id = :id', id=session_id)
    return seq


def _free_rowid(transaction: Transaction, seq: int) -> int:
    """Return the rowid after those of a session's messages."""
    bottom, top = _rowid(seq), _rowid(seq, Kind.PROMPT)
    sql = "SELECT rowid FROM ccr_search WHERE rowid >= :bottom AND rowid < :top ORDER BY rowid DESC LIMIT 1"
    last: int | None = transaction.value(sql, bottom=bottom, top=top)
    return bottom if last is None else last + 1


def _said(message: Message) -> str:
    return said(message.type, message.json) if message.said is None else message.said


def _messages(transaction: Transaction, run_id: str, session_id: str) -> Iterator[list[Message]]:
    """Yield the messages of a run that may have texts, a bounded number of bytes at a time."""
    sizes_sql = (
        'SELECT "index", size FROM ccr_run_messages WHERE "runId" = :run AND "index" > :after '
        'ORDER BY "index" LIMIT :limit'
    )
    texts_sql = (
        'SELECT "index", "messageType", "messageJson" FROM ccr_run_messages WHERE "runId" = :run AND "index" > :after '
        "AND \"index\" <= :through AND \"messageType\" IN ('assistant', 'result', 'user') ORDER BY \"index\""
    )
    after = -1
    while sizes := transaction.tuples(sizes_sql, run=run_id, after=after, limit=MESSAGES_AT_ONCE):
        through, total = after, 0
        for index, size in sizes:
            total += size
            if total > BYTES_AT_ONCE and through > after:
                break
            through = index
        rows: list[Any] = transaction.tuples(texts_sql, run=run_id, after=after, through=through)
        yield [Message(run_id, session_id, index, kind, text, "") for index, kind, text in rows]
        after = through
