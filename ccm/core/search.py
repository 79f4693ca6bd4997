"""Searches the texts of sessions, and shows what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from ccm.db import messages, runs, search, sessions
from ccm.db.driver.transaction import Transaction
from ccm.db.search import TOP, Kind, Text, Window
from ccm.db.select import Position
from ccm.db.sessions import Found, Rank
from ccm.models import ListedSession, Match, Where
from ccm.search_words import INDEXED_CHARACTERS, Search, said

WHERE = {Kind.TITLE: Where.TITLE, Kind.PROMPT: Where.PROMPT, Kind.MESSAGE: Where.MESSAGE}
# How many windows are searched for the first session that meets the filters, and for how many seconds.
WINDOWS = 20
SEARCH_TIMEOUT = 2.0


class SearchPosition(NamedTuple):
    """A place in the results: a window, and the rank of the last session that was shown.

    A window that begins and ends at the same place has not been searched yet.
    """

    bottom: int
    top: int
    kind: int
    last_run_seq: int


# A place in a list of runs or sessions.
Place = Position | SearchPosition


class SearchPage(NamedTuple):
    """Some of the results. `next` is None if there are no more."""

    sessions: list[ListedSession]
    next: SearchPosition | None


def search_sessions(
    transaction: Transaction,
    text: str,
    filters: Mapping[str, Any],
    *,
    limit: int,
    after: SearchPosition | None,
    summary: bool,
    clock: Callable[[], float] = time.monotonic,
) -> SearchPage:
    """Return sessions that have all words of a text in one of their own texts, the best first.

    The best are found in a title, then those in a prompt, then those in a message; in each, those with the latest
    activity come first. So many sessions may have a common word that ranking all of them would take long. Therefore
    the newest sessions are ranked first, a bounded number at a time. A page may be shorter than `limit` where the next
    ones begin, or empty if few sessions meet the filters.

    Args:
        filters: values by the names of the filters of sessions.
        after: the `next` of the page before; None for the first page.
        summary: return the sessions as SessionSummary.
    """
    words = Search.parse(text)
    if not words:
        return SearchPage([], None)
    deadline = clock() + SEARCH_TIMEOUT
    words = search.narrowed(transaction, words)
    window = None if after is None or after.bottom == after.top else Window(after.bottom, after.top)
    windows = search.best_texts(transaction, words, window, TOP if after is None else after.top)
    for rowids, searched in islice(windows, WINDOWS):
        found = sessions.ranked(transaction, rowids, filters)
        if window is not None and after is not None:
            found = [one for one in found if one.rank < Rank(Kind(after.kind), after.last_run_seq)]
        window, top = None, searched.bottom
        if found or top == -TOP or clock() >= deadline:
            break
    shown = found[:limit]
    if len(found) > limit:
        last = shown[-1].rank
        position: SearchPosition | None = SearchPosition(*searched, last.kind, last.last_run_seq)
    else:
        position = None if top == -TOP else SearchPosition(top, top, 0, 0)
    return SearchPage(_listed(transaction, words, shown, summary), position)


def _listed(transaction: Transaction, words: Search, found: Sequence[Found], summary: bool) -> list[ListedSession]:
    by_id = sessions.listed(transaction, [one.session_id for one in found], summary=summary)
    texts = {text.rowid: text for text in search.texts(transaction, [one.rowid for one in found])}
    return [
        session.model_copy(update={"match": _match(transaction, words, session, texts[one.rowid])})
        for one in found
        for session in (by_id[one.session_id],)
    ]


def _match(transaction: Transaction, words: Search, session: ListedSession, text: Text) -> Match:
    run_id, index = text.run_id, text.index
    content: str | None = session.title
    if run_id is not None and index is not None:
        message = messages.find(transaction, run_id, index)
        content = None if message is None else said(*message)
    elif run_id is not None:
        content = runs.find_prompt(transaction, run_id, INDEXED_CHARACTERS)
    return {"where": WHERE[text.kind], "runId": run_id, "index": index, "snippet": words.snippet(content or "")}
