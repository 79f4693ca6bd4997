"""What filters, and the search, cost the lists and the writer. For the benchmark."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ccm.core.storage.notifier import Notifier
from ccm.core.storage.writer import Writer
from ccm.db import messages, runs, search, sessions
from ccm.db.driver import migrate, sqlite_file
from ccm.db.driver.database import Database
from ccm.models import Message
from ccm.search_words import said
from ccm.testing.service_process import ServiceProcess
from ccm.timestamps import timestamp
from tests.client import Client

MESSAGES = 10
# The kinds of a run's messages: Claude says something in one of ten, and its last one is the result.
SAID = (3,)
VOCABULARY = 20_000
# At this many sessions a scan would be noticed.
SESSIONS = 100_000
FILTERS = (
    "cwd=/bench/3",
    "createdBy=client-3",
    "since=2026-01-03",
    "until=2026-01-03",
    "metadata.team=t3",
    "order=asc",
    "fields=summary",
)
OF_RUNS = ("errorCode=TIMED_OUT", "status=completed", "mode=fresh")


class Texts:
    """Texts whose words are as unevenly frequent as those of a language: the first one is in nearly every text."""

    def __init__(self) -> None:
        self._random = random.Random(1)
        letters = "etaoinshrdlcumwfgypbvk"
        self.words = ["".join(self._random.choices(letters, k=self._random.randint(3, 10))) for _ in range(VOCABULARY)]
        self._weights = [1 / (rank + 1) for rank in range(VOCABULARY)]

    def of(self, count: int) -> str:
        return " ".join(self._random.choices(self.words, self._weights, k=count))

    def message(self, run_id: str, index: int, at: str, last: int = MESSAGES - 1) -> Message:
        """Return a message of 1.5 KB on average, as in runs of Claude Code that mostly use tools."""
        tool: dict[str, Any]
        fields: dict[str, Any]
        if index == last:
            fields = {"type": "result", "subtype": "success", "result": self.of(50)}
        elif index % MESSAGES in SAID:
            fields = {"type": "assistant", "message": {"content": [{"type": "text", "text": self.of(50)}]}}
        elif index % 2:
            tool = {"type": "tool_use", "name": "Write", "input": {"file_path": "/x", "content": "x = 1\n" * 200}}
            fields = {"type": "assistant", "message": {"content": [tool]}}
        else:
            tool = {"type": "tool_result", "content": [{"type": "text", "text": "x = 1\n" * 200}]}
            fields = {"type": "user", "message": {"content": [tool]}}
        kind, text = str(fields["type"]), json.dumps(fields, separators=(",", ":"))
        return Message(run_id, run_id, index, kind, text, at, said(kind, text, fields))  # as a run records it


def opened(path: Path) -> Database:
    url = f"sqlite:///{path}"
    sqlite_file.prepare(url)
    database = Database(url, writable=True, pool_size=1)
    migrate.migrate(database)
    return database


def fill(path: Path, count: int) -> Texts:
    """Create a database with `count` sessions of one run each. Return the source of their texts."""
    texts = Texts()
    with closing(opened(path)) as database:
        for first in range(1, count + 1, 500):
            with database.transaction() as transaction:
                batch: list[Message] = []
                for seq in range(first, min(first + 500, count + 1)):
                    run_id, at = f"r{seq}", f"2026-01-{1 + seq * 5 // count:02}T10:00:00.000Z"
                    session = {
                        "id": run_id,
                        "cwd": f"/bench/{seq % 10}",
                        "title": texts.of(4),
                        "createdBy": f"client-{seq % 10}",
                    }
                    metadata = {"metadataJson": json.dumps({"team": f"t{seq % 10}", "ticket": seq}), "lastRunSeq": seq}
                    times = {"firstRunAt": at, "lastRunAt": at}
                    sessions.insert(transaction, session | metadata | times | {"messageCount": MESSAGES})
                    run = {"id": run_id, "seq": seq, "cwd": session["cwd"], "sessionId": run_id, "sdkSessionId": run_id}
                    run |= {"mode": "fresh", "prompt": texts.of(20), "optionsJson": "{}", "imageCount": 0}
                    run |= {
                        "status": "completed" if seq % 4 else "error",
                        "errorCode": None if seq % 4 else "TIMED_OUT",
                    }
                    run |= {"createdBy": session["createdBy"], "createdAt": at, "messageCount": MESSAGES}
                    runs.insert(transaction, run, None)
                    batch += [texts.message(run_id, index, at) for index in range(MESSAGES)]
                messages.insert_many(transaction, batch)
    return texts


def milliseconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return (time.perf_counter() - begun) * 1000


class Lists:
    """The measures of lists and of the search."""

    folder: Path
    rounds: int
    scale: int
    service: Callable[..., AbstractContextManager[ServiceProcess]]

    def measure_lists(self) -> None:
        count = SESSIONS // self.scale
        path = self.folder / "lists.sqlite"
        words = fill(path, count).words
        with self.service(DATABASE_PATH=path) as service:
            client = Client(service.url, checks=False)
            for list_path in ("/api/runs", "/api/sessions"):
                for query in FILTERS if list_path.endswith("sessions") else FILTERS + OF_RUNS:
                    self._pair(client, list_path, query, count)
            for name, text in (
                ("a word in nearly every text", words[0] + " "),
                ("a word in one of 20 texts", words[20]),
                ("a rare word", words[-1]),
                ("two words", f"{words[10]} {words[500]}"),
                ("a prefix", words[200][:3]),
            ):
                times = [milliseconds(partial(client.get, "/api/sessions", q=text)) for _ in range(self.rounds)]
                print(
                    f"GET /api/sessions?q={name}, {count:,} sessions, {count * MESSAGES:,} messages: "
                    f"p50 {statistics.median(times):.1f} ms, least {min(times):.1f} ms"
                )

    def _pair(self, client: Client, path: str, query: str, count: int) -> None:
        plain, filtered = [], []
        for _ in range(self.rounds * 2):
            plain.append(milliseconds(partial(client.get, path)))
            filtered.append(milliseconds(partial(client.get, f"{path}?{query}")))
        ratio = statistics.median(filtered) / statistics.median(plain)
        print(
            f"GET {path}?{query}, {count:,} sessions: {statistics.median(filtered):.1f} ms, without "
            f"{statistics.median(plain):.1f} ms: {ratio:.2f}"
        )

    def measure_search_writes(self) -> None:
        rows = 30_000 // self.scale
        texts = Texts()
        recorded = [texts.message("r1", index, timestamp(), rows - 1) for index in range(rows)]
        with_index, without = [], []
        for _ in range(5):
            with patch.object(search, "add_messages", lambda *_: None):
                without.append(self._recorded(recorded))
            with_index.append(self._recorded(recorded))
        ours, bare = statistics.median(with_index), statistics.median(without)
        print(
            f"messages into the database, {len(SAID)} of {MESSAGES} said: writer {ours:,.0f} rows/s, without the "
            f"search index {bare:,.0f} rows/s: {ours / bare:.2f}"
        )

    def _recorded(self, recorded: list[Message]) -> float:
        path = self.folder / f"writes-{time.monotonic_ns()}.sqlite"
        fill(path, 1)
        with closing(opened(path)) as database, self._writer(database) as writer:
            with database.transaction() as transaction:
                transaction.execute("DELETE FROM ccr_run_messages")

            async def append() -> None:
                for message in recorded:
                    await writer.append(message)

            begun = time.perf_counter()
            writer.start()
            asyncio.run(append())
            writer.write(lambda transaction: None)
            return len(recorded) / (time.perf_counter() - begun)

    @contextmanager
    def _writer(self, database: Database) -> Iterator[Writer]:
        writer = Writer(database, Notifier(), 64 * 2**20, on_refused=print)
        try:
            yield writer
        finally:
            writer.stop(time.monotonic() + 10)
