"""The stored form of events: every body comes back byte for byte, old events stay readable, and most take few bytes."""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from ccm.db import approvals, events
from ccm.db.driver.database import Database
from ccm.db.event_bodies import COMPRESSED_LENGTH, DICTIONARY, body_of, columns_of
from ccm.json_text import to_json_text
from ccm.models import Run
from tests.db.sample import approval_row, fill
from tests.models.test_stored import GOLDEN, from_columns

ODD = "NUL \0, half a pair \ud83d, a whole one \U0001f600, \u00e9, \x7f"
RUNS = [example["row"] for example in GOLDEN if example["model"] == "Run"]


def stored(body: str) -> tuple[str, bytes | None]:
    """Return the columns of a body but for its size, as a row of `events` has them."""
    columns = columns_of(body)
    assert columns["size"] == len(body)
    return columns["eventJson"], columns["compressed"]  # type: ignore[return-value]


@pytest.mark.parametrize("length", [0, 1, 100, 4_095, 4_096, 4_097, COMPRESSED_LENGTH - 9, COMPRESSED_LENGTH, 10**6])
def test_a_body_of_any_length_comes_back(length: int) -> None:
    digits = random.Random(length).randbytes(length // 2).hex()
    for body in (to_json_text({"x": "x" * length}), to_json_text({"x": digits}), to_json_text({"x": ODD * length})):
        text, compressed = stored(body)
        assert body_of(text, compressed) == body
        # A long one would hold up the writer.
        assert (compressed is None) == (len(body) > COMPRESSED_LENGTH)
        assert text == ("" if compressed else body)


def test_compressed_bodies_of_earlier_versions_can_be_read() -> None:
    # If this fails, the dictionary has been edited, and the events of all databases are unreadable.
    assert hashlib.sha256(DICTIONARY).hexdigest() == "77deb2f665e3ac63f6b67ee3778f68de1f65b518e4844f502262e6516a303e07"
    body = bytes.fromhex(
        "bd97410e82301045af62d857a7a52dc2da23b832ba2814a3266082e8c678770b45698106428c2cc94c4ae89f37ff3f9d82ea"
        "ca047c04788b210212012cd576dd399483391c592c054a65421115418084e0219242fa82701a06716ca86b62b9a940963256"
        "5982b1165ba54c52d526c7ba6c48140886386149f9cb974172346abe158f95baae4b9a94ffd4f430abe64488be8bc7c43712"
        "c1e69aa78bfd5dae7de939fd7d63e45c8fcb06a94fae4c795ee74d4f59a7531d2bb44fd739a3fcbc39ebc4562d962c13797d"
        "8999725887d78469fec94106119a9f642301139b095c9bd88950d06b652613da2906638a7b3baa2dc34659676f0d114121e5"
        "0d"
    )
    assert json.loads(body_of("", body))["data"]["run"]["cwd"] == "/srv/project"


@pytest.mark.parametrize("row", RUNS)
def test_a_body_takes_a_third_of_its_bytes_at_most(row: dict[str, object], writable: Database) -> None:
    """Without the texts that only one run has."""
    own = {"prompt": "", "optionsJson": "{}", "resultJson": None, "errorMessage": None}
    fill(writable)
    with writable.transaction() as transaction:
        events.insert(transaction, "run.completed", from_columns(Run, {**row, **own, "id": "r"}))
        size, stored_size = transaction.tuples(
            'SELECT size, LENGTH("eventJson") + LENGTH(compressed) FROM ccr_events ORDER BY id DESC LIMIT 1'
        )[0]
    assert stored_size < size / 3


def test_events_from_before_the_compression_are_read(writable: Database) -> None:
    fill(writable)
    approval = {"id": "a", "text": ODD}
    body = to_json_text({"type": "approval.requested", "timestamp": "T", "data": {"approval": approval, "run": {}}})
    row = {"type": "approval.requested", "runId": "r", "createdAt": "T", "size": len(body), "eventJson": body}
    with writable.transaction() as transaction:
        before = events.last_id(transaction)
        transaction.insert("ccr_events", row)
        event_id = events.last_id(transaction)
        assert [event.json for event in events.read(transaction, before, event_id)] == [body]
        assert events.find_text(transaction, event_id) == body
        assert approvals.changes(transaction, "r", before) == [(event_id, approval)]


def test_an_approval_in_a_long_and_a_short_body_comes_back(writable: Database) -> None:
    fill(writable)
    with writable.transaction() as transaction:
        before = events.last_id(transaction)
        for approval_id, length in (("short", 1), ("long", COMPRESSED_LENGTH)):
            row = approval_row(approval_id, inputJson=to_json_text({"content": "x" * length, "odd": ODD}))
            approvals.insert(transaction, row)
            shown = approvals.get(transaction, approval_id).to_json()
            events.insert(transaction, "approval.requested", from_columns(Run, {**RUNS[0], "id": "r"}), shown)
            assert approvals.changes(transaction, "r", before)[-1][1] == shown
        forms = transaction.tuples("SELECT \"eventJson\" = '', compressed IS NULL FROM ccr_events ORDER BY id")[-2:]
        assert [tuple(map(bool, form)) for form in forms] == [(True, False), (False, True)]
