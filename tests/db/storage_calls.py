"""Calls of every public function of `ccm.db`, on the database of tests/db/sample.py.

A name is `module.function`, followed by the variant if there are several calls. A function that is missing here fails
tests/db/test_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ccm.db import (
    approvals,
    archive,
    deliveries,
    events,
    heartbeat,
    messages,
    run_metadata,
    runs,
    search,
    sessions,
    transcripts,
    trees,
)
from ccm.db.driver import migrate
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.db.transcripts import Entry
from ccm.models import IdempotencyKey
from ccm.search_words import Search
from tests.db.sample import (
    ANSWER,
    AT,
    KEY,
    LATER,
    METADATA,
    OWNER,
    SUBAGENT,
    approval_row,
    message,
    run_row,
    session_row,
)

ANY: Final = object()
# Reasons why a statement may read a whole table.
SMALL = "the table has one row, or one for each table"
PRUNING = "`flask prune` reads everything that it deletes, and the tables that it clears"
COMBINED = "of several filters, the index of one is used, and its rows may be sorted"
FILLING = "a migration reads all runs"


@dataclass(frozen=True)
class Call:
    """One call of a function.

    Attributes:
        function: runs in a transaction. It may reduce the result for the comparison.
        result: the expected result on the sample; ANY if it depends on the time or is irrelevant.
        writes: whether it needs a writable database.
        scans: the reason why it may scan a table; empty if it must use an index.
        untouched: the dialects in which it reads no table, so neither a lock nor damage affects it.
    """

    function: Callable[[Transaction], object]
    result: object = ANY
    writes: bool = False
    scans: str = ""
    untouched: tuple[str, ...] = ()


def reads(function: Callable[[Transaction], object], result: object, *, scans: str = "") -> Call:
    return Call(function, result, scans=scans)


def writes(function: Callable[[Transaction], object], result: object = None, *, scans: str = "") -> Call:
    return Call(function, result, writes=True, scans=scans)


def then(
    write: Callable[[Transaction], object], read: Callable[[Transaction], object]
) -> Callable[[Transaction], object]:
    """Return a function that writes, then reads, and returns the result of the read."""

    def call(transaction: Transaction) -> object:
        write(transaction)
        return read(transaction)

    return call


def ids(resources: list[Any]) -> list[Any]:
    return [resource.id for resource in resources]


def session_ids(listed: list[Any]) -> list[Any]:
    return [session.shown["sessionId"] for session in listed]


def _beat(transaction: Transaction) -> object:
    heartbeat.beat(transaction, 3)
    return transaction.value("SELECT padding FROM ccr_heartbeat")


def _record_attempt(transaction: Transaction) -> object:
    deliveries.record_attempt(transaction, 1, "[]", status="failed", reason="x", next_attempt_at=None)
    delivery = deliveries.find(transaction, 1)
    return None if delivery is None else (delivery.status, delivery.reason, delivery.next_attempt_at)


def _transcript(transaction: Transaction, key: transcripts.TranscriptKey) -> list[str]:
    return transcripts.texts(transaction, key, -1, 10)


def _insert_delivery(transaction: Transaction) -> object:
    events.insert(transaction, "run.created", runs.get(transaction, "w"))
    deliveries.insert(transaction, "w", "run", "evt_9", "h:80", reason=None, now=AT)
    return len(deliveries.page(transaction, "w", limit=10, after=None))


def _make_next_due(transaction: Transaction) -> object:
    deliveries.record_attempt(transaction, 1, "[]", status="delivered", reason=None, next_attempt_at=None)
    deliveries.make_next_due(transaction, "r", "run", LATER)
    return [delivery.next_attempt_at for delivery in deliveries.page(transaction, "r", limit=10, after=2)]


def best(transaction: Transaction, text: str) -> list[int]:
    """Return the rowid of the best match of each session."""
    return next(search.best_texts(transaction, Search.parse(text), None, search.TOP))[0]


def found(transaction: Transaction, texts: str) -> list[int]:
    """Return how many sessions each of some words finds."""
    return [len(best(transaction, text)) for text in texts.split()]


def _refill_search(transaction: Transaction) -> object:
    transaction.execute("DELETE FROM ccr_search")
    search.fill(transaction)
    return found(transaction, "docs hello parrots")


def _refill_metadata(transaction: Transaction) -> object:
    transaction.execute("DELETE FROM ccr_run_metadata")
    run_metadata.fill(transaction)
    return transaction.value("SELECT COUNT(*) FROM ccr_run_metadata")


def _replace_metadata(transaction: Transaction) -> object:
    transaction.update("ccr_sessions", {"metadataJson": '{"team": "docs"}'}, "id = 's'")
    run_metadata.replace(transaction, "s")
    return transaction.value("SELECT COUNT(*) FROM ccr_run_metadata")


def _measure(transaction: Transaction) -> object:
    tree = trees.measure(transaction, "s")
    return sorted(tree.sessions), tree.runs, tree.messages, tree.transcripts, tree.not_ended


ENTRIES = [Entry("u1", "{}"), Entry("u3", '{"sessionId":"s-sdk","n":3}')]
RUN_FILTERS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["x", "w", "r", "e"]),
    ({"status": "running"}, ["x", "w", "r"]),
    ({"sessionId": "s"}, ["r", "e"]),
    ({"cwd": "/srv"}, ["x", "w", "r", "e"]),
    ({"mode": "fresh"}, ["x", "e"]),
    ({"status": "completed", "cwd": "/srv", "mode": "fresh"}, ["e"]),
    ({"createdBy": "ann"}, ["e"]),
    ({"errorCode": "TIMED_OUT"}, ["e"]),
    ({"waiting": True}, ["w"]),
    ({"working": True}, ["x", "r"]),
    ({"metadata": {"team": "docs"}}, ["r", "e"]),
    ({"metadata": {"team": "docs", "ticket": "7"}, "status": "running"}, ["r"]),
    ({"metadata": {"team": "7"}}, []),
]
RUN_TIMES: list[tuple[dict[str, Any], list[str]]] = [
    ({"since": AT}, ["x", "w", "r", "e"]),
    ({"since": AT, "until": LATER, "mode": "fresh"}, ["x", "e"]),
    ({"since": LATER}, []),
    ({"until": AT}, []),
]
APPROVAL_FILTERS: list[tuple[dict[str, str], list[str]]] = [
    ({}, ["a", "b"]),
    ({"runId": "r"}, ["a", "b"]),
    ({"sessionId": "s"}, ["a", "b"]),
    ({"status": "pending"}, ["a"]),
    ({"status": "denied"}, ["b"]),
    ({"sessionId": "s", "status": "pending"}, ["a"]),
]
SESSION_FILTERS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["o", "f", "s"]),
    ({"cwd": "/srv"}, ["o", "f", "s"]),
    ({"parentSessionId": "s"}, ["f"]),
    ({"createdBy": "ann"}, ["s"]),
    ({"metadata": {"ticket": "7", "team": "docs"}}, ["s"]),
]
RANKED: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("docs", {}, [("o", "TITLE"), ("f", "TITLE"), ("s", "TITLE")]),
    ("HELLO", {"metadata": {"team": "docs"}}, [("s", "PROMPT")]),
    ("live parr", {"cwd": "/srv", "since": AT, "createdBy": "ann"}, [("s", "MESSAGE")]),
    ("parrots docs", {}, []),
]

CALLS: dict[str, Call] = {
    # ---- runs
    "runs.find": reads(lambda t: [runs.find(t, "nobody"), runs.get(t, "r").session_id], [None, "s"]),
    "runs.get": reads(lambda t: (runs.get(t, "w").queue_position, runs.get(t, "r").message_count), (1, 2)),
    "runs.find_by_sdk_session": reads(lambda t: runs.find_by_sdk_session(t, "s-sdk") == runs.find(t, "e"), result=True),
    "runs.find_by_idempotency_key": reads(
        lambda t: runs.find_by_idempotency_key(t, IdempotencyKey("key", "digest")) == runs.find(t, "e"), result=True
    ),
    **{
        f"runs.page {filters} {after}": reads(
            lambda t, f=filters, a=after: ids(runs.page(t, f, limit=10, after=a)),  # type: ignore[misc]
            [run_id for run_id in found if after is None or run_id in "er"],
            scans=COMBINED * ("metadata" in filters and "status" in filters),
        )
        for filters, found in RUN_FILTERS
        for after in (None, 3)
    },
    **{
        f"runs.page {filters} {after} oldest first": reads(
            lambda t, f=filters, a=after: ids(runs.page(t, f, limit=10, after=a, oldest_first=True)),  # type: ignore[misc]
            [run_id for run_id in reversed(found) if after is None or run_id in "wx"],
            scans=COMBINED * ("metadata" in filters and "status" in filters),
        )
        for filters, found in RUN_FILTERS
        for after in (None, 2)
    },
    **{
        f"runs.page {filters} {after} of a time": reads(
            lambda t, f=filters, a=after: ids(runs.page(t, f, limit=10, after=a, summary=True)),  # type: ignore[misc]
            [run_id for run_id in found if after is None or run_id in "er"],
            scans=COMBINED * ("mode" in filters),
        )
        for filters, found in RUN_TIMES
        for after in (None, (AT, 3))
    },
    "runs.links": reads(lambda t: [(link.id, link.message_count) for link in runs.links(t, "s")], [("e", 3), ("r", 2)]),
    "runs.get_link": reads(
        lambda t: (runs.get_link(t, "w").parent_run_id, runs.get_link(t, "w").fork_at_index), ("e", 1)
    ),
    "runs.next_seq": reads(runs.next_seq, 5),
    "runs.insert": writes(
        then(lambda t: runs.insert(t, run_row("n", 9, "s"), "[]"), lambda t: runs.get(t, "n").seq), 9
    ),
    "runs.find_prompt": reads(lambda t: [runs.find_prompt(t, run_id, 2) for run_id in ("e", "no")], ["He", None]),
    "runs.find_images_json": reads(lambda t: [runs.find_images_json(t, run_id) for run_id in "re"], ["[]", None]),
    "runs.not_ended": reads(lambda t: ids(runs.not_ended(t, "s")), ["r"]),
    "runs.find_first_not_ended": reads(
        lambda t: [runs.find_first_not_ended(t, one) for one in ("s", "no")], ["r", None]
    ),
    "runs.count_started_and_find_next": reads(lambda t: runs.count_started_and_find_next(t, OWNER), (1, "w")),
    "runs.count_waiting": reads(runs.count_waiting, 1),
    "runs.start": writes(lambda t: runs.start(t, runs.get(t, "w"), "e", OWNER) == runs.get(t, "w"), result=True),
    "runs.end": writes(
        lambda t: [runs.end(t, runs.get(t, one), {"status": "cancelled"}) for one in "re"], [True, False]
    ),
    "runs.end_row_only": writes(
        then(lambda t: runs.end_row_only(t, "r", "EXECUTION_ERROR", "x"), lambda t: runs.get(t, "r").message_count), 2
    ),
    "runs.started": reads(lambda t: ids(runs.started(t, OWNER)), ["r"]),
    "runs.started_elsewhere": reads(lambda t: runs.started_elsewhere(t, OWNER), ["x"]),
    # ---- sessions
    "sessions.find": reads(lambda t: [sessions.find(t, "s-sdk"), sessions.find(t, "s") is not None], [None, True]),
    "sessions.get": reads(lambda t: [sessions.get(t, one).id for one in ("s", "s-sdk", "w-sdk")], ["s", "s", "f"]),
    **{
        f"sessions.page {filters} {after}": reads(
            lambda t, f=filters, a=after: session_ids(sessions.page(t, f, limit=10, after=a)),  # type: ignore[misc]
            [session_id for session_id in found if after is None or session_id != "o"],
        )
        for filters, found in SESSION_FILTERS
        for after in (None, 4)
    },
    **{
        f"sessions.page of a time {oldest_first}": reads(
            lambda t, first=oldest_first: session_ids(  # type: ignore[misc]
                sessions.page(
                    t, {"since": AT, "until": LATER}, limit=10, after=(AT, 3), oldest_first=first, summary=True
                )
            ),
            found,
        )
        for oldest_first, found in ((False, ["s"]), (True, ["o"]))
    },
    "sessions.forks": reads(lambda t: ids(sessions.forks(t, "s", limit=10, after=None)), ["f"]),
    **{
        f"sessions.ranked {text} {filters}": reads(
            lambda t, s=text, f=filters: [  # type: ignore[misc]
                (one.session_id, one.rank.kind.name) for one in sessions.ranked(t, best(t, s), f)
            ],
            found,
        )
        for text, filters, found in RANKED
    },
    "sessions.listed": reads(lambda t: list(sessions.listed(t, ["f", "no"], summary=True)), ["f"]),
    "sessions.insert": writes(
        then(lambda t: sessions.insert(t, session_row("n", 9)), lambda t: sessions.get(t, "n").run_count), 1
    ),
    "sessions.run_added": writes(
        then(lambda t: sessions.run_added(t, "o", 9, LATER), lambda t: sessions.get(t, "o").run_count), 2
    ),
    "sessions.run_ended": writes(
        then(lambda t: sessions.run_ended(t, "f", 7, 0.5, None), lambda t: sessions.get(t, "f").message_count), 7
    ),
    "sessions.update": writes(
        lambda t: [sessions.update(t, one, {"title": "x", "metadataJson": METADATA}) for one in ("s", "no")],
        [True, False],
    ),
    # ---- search and metadata
    "search.put_title": writes(
        then(lambda t: search.put_title(t, 1, "Owls"), lambda t: found(t, "owls docs owl")), [1, 2, 1]
    ),
    "search.replace_title": writes(
        then(lambda t: search.replace_title(t, "s", "Owls"), lambda t: found(t, "docs")), [2]
    ),
    "search.add_prompt": writes(then(lambda t: search.add_prompt(t, "x", 5, "Owls"), lambda t: found(t, "owls")), [1]),
    "search.add_messages": writes(
        then(
            lambda t: search.add_messages(t, [message("r", "s", 9, "assistant", ANSWER.replace("Parrots", "Owls"))]),
            lambda t: [(text.run_id, text.index, text.kind.name) for text in search.texts(t, best(t, "owls"))],
        ),
        [("r", 9, "MESSAGE")],
    ),
    "search.narrowed": reads(lambda t: search.narrowed(t, Search.parse("the parr")), Search(("the",), "parr")),
    "search.best_texts": reads(lambda t: [search.first_seq(rowid) for rowid in best(t, "docs")], [4, 3, 1]),
    "search.texts": reads(
        lambda t: [(text.run_id, text.index, text.kind.name) for text in search.texts(t, best(t, "parrot"))],
        [("e", 1, "MESSAGE")],
    ),
    "search.fill": writes(_refill_search, [3, 3, 1], scans=FILLING),
    "search.delete_of_session": writes(
        then(
            lambda t: [search.delete_of_session(t, one, 3) for one in ("s", "s", "no")],
            lambda t: found(t, "docs hello"),
        ),
        [2, 2],
    ),
    "run_metadata.add": writes(
        then(lambda t: run_metadata.add(t, "s", 4), lambda t: t.value("SELECT COUNT(*) FROM ccr_run_metadata")), 6
    ),
    "run_metadata.replace": writes(_replace_metadata, 2),
    "run_metadata.fill": writes(_refill_metadata, 4, scans=FILLING),
    # ---- messages
    "messages.insert_many": writes(
        then(
            lambda t: messages.insert_many(t, [message("r", "s", index, "user") for index in range(2, 120)]),
            lambda t: messages.last_index(t, "r"),
        ),
        119,
    ),
    "messages.last_index": reads(lambda t: [messages.last_index(t, one) for one in "erw"], [2, 1, -1]),
    "messages.indexes": reads(lambda t: messages.indexes(t, "e", -1, 10, types=[], limit=10), [0, 1, 2]),
    "messages.indexes of types": reads(
        lambda t: messages.indexes(t, "e", -1, 10, types=["system", "result"], limit=10), [0, 2]
    ),
    "messages.sizes": reads(lambda t: messages.sizes(t, "r", -1, 10, 10), [(0, 7), (1, 7)]),
    "messages.texts": reads(lambda t: messages.texts(t, "r", 0, 10), ['{"n":1}']),
    "messages.find": reads(
        lambda t: [messages.find(t, "r", index) for index in (0, 9)], [("assistant", '{"n":0}'), None]
    ),
    "messages.texts_before": reads(lambda t: messages.texts_before(t, "r", 1, "assistant", 5), ['{"n":0}']),
    "messages.holding": reads(lambda t: messages.holding(t, "r", '"n":1'), [(1, '{"n":1}')]),
    # ---- approvals
    "approvals.find": reads(lambda t: [approvals.find(t, "no"), approvals.find(t, "a") is not None], [None, True]),
    "approvals.get": reads(lambda t: [approvals.get(t, one).pending for one in "ab"], [True, False]),
    **{
        f"approvals.page {filters} {after}": reads(
            lambda t, f=filters, a=after: ids(approvals.page(t, f, limit=10, after=a)),  # type: ignore[misc]
            [approval_id for approval_id in found if after is None or approval_id == "b"],
        )
        for filters, found in APPROVAL_FILTERS
        for after in (None, 1)
    },
    "approvals.pending": reads(lambda t: ids(approvals.pending(t, "r")), ["a"]),
    "approvals.pending_or_resolved_since": reads(
        lambda t: ids(approvals.pending_or_resolved_since(t, "r", 0)), ["a", "b"]
    ),
    "approvals.count_other_waiting_runs": reads(
        lambda t: [approvals.count_other_waiting_runs(t, one) for one in "re"], [0, 1]
    ),
    "approvals.insert": writes(
        then(lambda t: approvals.insert(t, approval_row("n")), lambda t: approvals.get(t, "n").seq), ANY
    ),
    "approvals.resolve": writes(
        lambda t: [approvals.resolve(t, one, {"status": "denied", "message": "x"}) for one in "ab"], [True, False]
    ),
    "approvals.last_event": reads(lambda t: [approvals.last_event(t, one) for one in "re"], [2, 0]),
    "approvals.changes": reads(
        lambda t: [(number, shown["id"]) for number, shown in approvals.changes(t, "r", 0)], [(2, "b")]
    ),
    # ---- events and deliveries
    "events.insert": writes(
        then(lambda t: events.insert(t, "run.started", runs.get(t, "r")), lambda t: events.last_id(t) > 2), result=True
    ),
    "events.last_id": reads(events.last_id, 2),
    "events.last_given": Call(lambda t: events.last_given(t) >= 2, result=True, scans=SMALL, untouched=("postgresql",)),
    "events.sizes": reads(lambda t: [number for number, _ in events.sizes(t, 0, 10)], [1, 2]),
    "events.read": reads(
        lambda t: [event.type for event in events.read(t, 0, 10)], ["run.started", "approval.resolved"]
    ),
    "events.find_text": reads(lambda t: [events.find_text(t, 9), bool(events.find_text(t, 1))], [None, True]),
    "deliveries.insert": writes(_insert_delivery, 1),
    "deliveries.find": reads(lambda t: [deliveries.find(t, 9), deliveries.find(t, 1) is not None], [None, True]),
    "deliveries.page": reads(lambda t: ids(deliveries.page(t, "r", limit=10, after=None)), [1, 2, 4]),
    "deliveries.find_disabled_reason": reads(
        lambda t: [deliveries.find_disabled_reason(t, one, "service") for one in "er"], ["gone", None]
    ),
    **{
        f"deliveries.due {again} {without}": reads(
            lambda t, a=again, w=without: deliveries.due(t, LATER, again=a, without=w, limit=10),  # type: ignore[misc]
            [] if again else [(2, "")] if without else [(2, ""), (1, "h:80")],
        )
        for again in (False, True)
        for without in ((), ("h:80", "b:80"))
    },
    "deliveries.find_next_due": reads(lambda t: [deliveries.find_next_due(t, at) for at in ("", LATER)], [AT, None]),
    "deliveries.advance": writes(lambda t: deliveries.advance(t, "2026-01-01", AT), 2),
    "deliveries.record_attempt": writes(_record_attempt, ("failed", "x", None)),
    "deliveries.make_next_due": writes(_make_next_due, [LATER]),
    "deliveries.disable_run": writes(
        then(
            lambda t: deliveries.disable_run(t, "r", "run", "x"),
            lambda t: deliveries.find_disabled_reason(t, "r", "run"),
        ),
        "x",
    ),
    "deliveries.disable_service": writes(lambda t: deliveries.disable_service(t, "gone"), 1),
    # ---- transcripts
    "transcripts.append": writes(
        then(lambda t: transcripts.append(t, KEY, ENTRIES), lambda t: transcripts.length(t, KEY)), 3
    ),
    "transcripts.extend": writes(
        then(lambda t: transcripts.extend(t, KEY, 2, ENTRIES), lambda t: transcripts.length(t, KEY)), 4
    ),
    "transcripts.replace": writes(
        then(lambda t: transcripts.replace(t, KEY, ENTRIES), lambda t: _transcript(t, KEY)),
        [one.text for one in ENTRIES],
    ),
    "transcripts.insert_at": writes(
        then(lambda t: transcripts.insert_at(t, 2, "s-sdk", 1, ENTRIES), lambda t: transcripts.length(t, SUBAGENT)), 3
    ),
    "transcripts.insert": writes(lambda t: transcripts.insert(t, transcripts.TranscriptKey("n", "p"), 17), 3),
    "transcripts.length": reads(lambda t: transcripts.length(t, KEY), 2),
    "transcripts.uuids": reads(lambda t: transcripts.uuids(t, KEY), ["u1"]),
    "transcripts.of_session": reads(lambda t: list(transcripts.of_session(t, "s-sdk")), [KEY, SUBAGENT]),
    "transcripts.sizes": reads(lambda t: transcripts.sizes(t, KEY, -1, 10), [(0, 17), (1, 2)]),
    "transcripts.texts": reads(lambda t: _transcript(t, KEY), ['{"sessionId":"s-sdk"}', "{}"]),
    # ---- archive and trees
    "archive.find_first_seq": reads(archive.find_first_seq, 1),
    "archive.sessions_beyond": reads(lambda t: archive.sessions_beyond(t, 1, 10), [(3, "f"), (4, "o")]),
    "archive.dated_texts": reads(lambda t: archive.dated_texts(t, "r", 0, 10), [(1, AT, '{"n":1}')]),
    "archive.has_idempotency_key": reads(
        lambda t: [archive.has_idempotency_key(t, one) for one in ("key", "no")], [True, False]
    ),
    "archive.is_seq_usable": reads(
        lambda t: [archive.is_seq_usable(t, seq, "s", "w") for seq in (0, 1, 3, 5, 2**28)],
        [False, False, False, True, False],
    ),
    "archive.was_continued": reads(lambda t: archive.was_continued(t, "s", "e"), result=False),
    "archive.complete_run": writes(
        then(lambda t: archive.complete_run(t, "e", {"messageCount": 7}), lambda t: runs.get(t, "e").message_count), 7
    ),
    "heartbeat.beat": writes(_beat, "...", scans=SMALL),
    "trees.older_than": reads(lambda t: trees.older_than(t, LATER), ["s", "o"], scans=PRUNING),
    "trees.get_root": reads(lambda t: trees.get_root(t, "f"), "s", scans=PRUNING),
    "trees.measure": reads(
        _measure,
        (["f", "s"], 3, 5, 2, 2),
        scans=PRUNING,
    ),
}

# Functions that make their own transactions.
OPERATIONS: dict[str, Callable[[Database], object]] = {
    "trees.run_places": lambda database: list(trees.run_places(database, "s")),
    "trees.delete": lambda database: trees.delete(database, "s"),
    "trees.delete_unused_texts": trees.delete_unused_texts,
    "migrate.pending": migrate.pending,
    "migrate.migrate": migrate.migrate,
}
