"""Benchmarks of the service against the libraries it is built on: `python -m tests.bench [--quick] [--only NAME]`.

Each measure is paired: both sides run in turn on the same machine, and the medians and their ratio are printed. A
stand-in CLI that answers at once (tests/stand_in_cli.py) removes the real CLI's half second and its noise; the real CLI
is measured as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, ResultMessage

from ccm.core.claude.locations import bundled_cli
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.writer import Writer
from ccm.db.driver import migrate, sqlite_file
from ccm.db.driver.database import Database
from ccm.models import Message
from ccm.testing.messages_api import MessagesAPI
from ccm.testing.service_process import ServiceProcess, credential_free_environment
from ccm.timestamps import timestamp
from tests.bench_lists import Lists
from tests.client import Client
from tests.conftest import stand_in_cli
from tests.first_message import FirstMessages
from tests.followers import Followed, Readers, cpu_seconds
from tests.programs import resident_memory

MESSAGE = json.dumps({"type": "assistant", "uuid": str(uuid.uuid4()), "message": {"content": "x" * 1400}})
BARE_FLASK = """
import socket
from flask import Flask
from waitress.server import create_server
app = Flask("bare", static_folder=None)
@app.get("/health")
def health():
    return {"status": "ok"}
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
server = create_server(app, sockets=[listener], threads=216, asyncore_use_poll=True)
print(listener.getsockname()[1], flush=True)
server.run()
"""


def median(values: list[float]) -> float:
    return statistics.median(values)


def timed(action: Callable[[], object]) -> float:
    """Return the milliseconds that an action takes."""
    begun = time.perf_counter()
    action()
    return (time.perf_counter() - begun) * 1000


def wait_for_imports(service: ServiceProcess) -> None:
    """Wait until a service has imported the SDK, which its main thread does after it listens.

    Requests of the first second are slow otherwise. Where there is no /proc, wait for longer than that takes.
    """
    stat = Path(f"/proc/{service.process.pid}/stat")
    if not stat.exists():
        time.sleep(5)
        return
    asleep = 0
    while asleep < 20:
        time.sleep(0.025)
        asleep = asleep + 1 if stat.read_text().rpartition(")")[2].split()[0] == "S" else 0


class Bench(FirstMessages, Lists):
    """The measures; each method named `measure_*` prints its results."""

    def __init__(self, folder: Path, quick: bool, api: MessagesAPI) -> None:
        self.folder = folder
        self.rounds = 5 if quick else 25
        self.seconds = 0.5 if quick else 3.0
        self.scale = 10 if quick else 1
        self.home = folder / "home"
        self.project = folder / "project"
        self.home.mkdir()
        self.project.mkdir()
        self.cli = stand_in_cli(folder)
        self.environ = credential_free_environment(api.url, str(self.home)) | {"LOG_LEVEL": "error"}

    @contextmanager
    def service(self, **settings: object) -> Iterator[ServiceProcess]:
        own = {"DATABASE_PATH": str(self.folder / f"{uuid.uuid4()}.sqlite"), "LOG_LEVEL": "info", "CCM_SPARE_RUNS": "0"}
        own |= {name: str(value) for name, value in settings.items()}
        with ServiceProcess(self.environ | own) as service:
            wait_for_imports(service)
            yield service

    # ---- runs

    def bare_run(self, cli: Path, prompt: str) -> float:
        """Return the milliseconds of one run with the SDK alone, as its documentation shows it."""

        async def run() -> None:
            options = ClaudeAgentOptions(cli_path=cli, cwd=self.project, env=self.environ, max_buffer_size=2**25)
            async with ClaudeSDKClient(options) as client:
                await client.query(prompt)
                async for message in client.receive_messages():
                    if isinstance(message, ResultMessage):
                        break

        return timed(lambda: asyncio.run(run()))

    def service_run(self, client: Client, prompt: str) -> float:
        def run() -> None:
            ended = client.start(self.project, prompt, wait=120)
            assert ended["status"] == "completed", ended

        return timed(run)

    def pair(self, name: str, cli: Path, prompt: str, rounds: int) -> None:
        with self.service(CCM_CLI_PATH=cli) as service:
            client = Client(service.url, checks=False)
            self.bare_run(cli, prompt), self.service_run(client, prompt)
            bare, ours = [], []
            for _ in range(rounds):
                bare.append(self.bare_run(cli, prompt))
                ours.append(self.service_run(client, prompt))
        extra = median(ours) - median(bare)
        ratio = median(ours) / median(bare)
        print(f"{name}: SDK {median(bare):.1f} ms, service {median(ours):.1f} ms: {extra:+.1f} ms, {ratio:.2f}x")

    def measure_trivial_run(self) -> None:
        self.pair("trivial run, stand-in CLI", self.cli, "hello", self.rounds)
        self.pair("trivial run, real CLI", bundled_cli(), "hello", self.rounds // 2)

    def measure_long_run(self) -> None:
        self.pair("run of 2,003 messages, stand-in CLI", self.cli, json.dumps({"count": 2000}), self.rounds)

    def measure_sixteen_at_once(self) -> None:
        for name, cli, rounds in (("stand-in", self.cli, 5), ("real", bundled_cli(), 2)):
            with self.service(CCM_CLI_PATH=cli, CCM_MAX_CONCURRENT_RUNS=16) as service:
                client = Client(service.url, checks=False)
                bare, ours = [], []
                with ThreadPoolExecutor(16) as pool:

                    def all_at_once(run: Callable[..., float], *words: Any, pool: ThreadPoolExecutor = pool) -> float:
                        return 16_000 / timed(
                            lambda: [job.result() for job in [pool.submit(run, *words) for _ in range(16)]]
                        )

                    all_at_once(self.service_run, client, "hello")
                    for _ in range(rounds):
                        bare.append(all_at_once(self.bare_run, cli, "hello"))
                        ours.append(all_at_once(self.service_run, client, "hello"))
            print(
                f"16 runs at once, {name} CLI: SDK {median(bare):.1f} runs/s, service {median(ours):.1f} runs/s: "
                f"{median(ours) / median(bare):.2f}"
            )

    def measure_accept(self) -> None:
        with self.service(CCM_CLI_PATH=self.cli) as service:
            client = Client(service.url, checks=False)
            client.start(self.project, "hello")
            idle = []
            for _ in range(self.rounds * 2):
                begun = time.perf_counter()
                run = client.start(self.project, "hello", wait=0)
                idle.append((time.perf_counter() - begun) * 1000)
                client.run(run["id"])
            busy = [timed(lambda: client.start(self.project, "hello", wait=0)) for _ in range(self.rounds * 4)]
        print(f"POST to 202: p50 {median(idle):.1f} ms idle, {median(busy):.1f} ms with 8 runs in progress and a queue")

    # ---- followers

    def measure_followers(self, clients: int = 150, rate: int = 500) -> None:
        with self.service(CCM_CLI_PATH=self.cli) as service:
            nobody = self.follow(service, 0, rate)
            followed = self.follow(service, clients, rate)
        print(
            f"{clients} clients on one run of {rate} messages/s: lag p50 {median(followed.lags):.0f} ms, "
            f"max {max(followed.lags):.0f} ms; service CPU {followed.cpu:.0%} of a core, {nobody.cpu:.0%} without "
            f"them; plain request p99 {followed.plain:.1f} ms, {nobody.plain:.1f} ms without them"
        )

    def follow(self, service: ServiceProcess, clients: int, rate: int) -> Followed:
        """Follow a run, and send plain requests meanwhile."""
        client = Client(service.url, checks=False)
        count = int(rate * self.seconds * 4)
        before = client.start(self.project, json.dumps({"hold": True, "count": 1}), wait=0)
        while not client.run(before["id"], wait=0)["messageCount"]:
            time.sleep(0.01)
        script = json.dumps({"count": count, "rate": rate, "pad": 200})
        run = client.resume(before["sessionId"], script, wait=0, ifBusy="enqueue")
        readers = Readers(service.url, f"/api/runs/{run['id']}/stream", clients)
        client.delete(f"/api/runs/{before['id']}")
        plain = []
        begun, cpu = time.monotonic(), cpu_seconds(service.process.pid)
        readers.start()
        while (ended := client.run(run["id"], wait=0))["status"] == "running":
            plain.append(timed(lambda: client.get("/api/runs", limit=1)))
            time.sleep(0.05)  # so that they hardly count in the CPU time
        readers.join()
        seconds, cpu = time.monotonic() - begun, cpu_seconds(service.process.pid) - cpu
        assert ended["status"] == "completed", ended
        readers.check(ended["messageCount"])
        return Followed(readers.lags, cpu / seconds, statistics.quantiles(plain, n=100)[-1])

    # ---- reads

    def measure_messages_of_a_run(self) -> None:
        for runs in (3_000 // self.scale, 30_000 // self.scale):
            path = self.filled(runs, 50)
            with self.service(DATABASE_PATH=path) as service:
                run = Client(service.url, checks=False).get("/api/runs", limit=2).json[1]["id"]
                rate = self.rate(service.url, f"/api/runs/{run}/messages")
            print(f"GET /api/runs/:id/messages, 50 messages, {runs * 50:,} stored: {rate:.0f} requests/s")

    def measure_messages_of_a_session(self) -> None:
        path = self.filled(10, 1_000, one_session=True)
        with self.service(DATABASE_PATH=path) as service:
            client = Client(service.url, checks=False)
            session = client.get("/api/sessions").json[0]["sessionId"]
            path_and_query = f"/api/sessions/{session}/messages"
            client.get(path_and_query)
            before = resident_memory(service.process.pid)
            rate = self.rate(service.url, path_and_query)
            after = resident_memory(service.process.pid)
        print(
            f"GET /api/sessions/:id/messages, 10,000 messages: {rate:.1f} requests/s, "
            f"memory {before:.0f} MiB after one, {after:.0f} MiB after all"
        )

    def measure_sessions(self) -> None:
        for count in (1_000, 10_000):
            path = self.filled(count, 2)
            with self.service(DATABASE_PATH=path) as service:
                rate = self.rate(service.url, "/api/sessions")
            print(f"GET /api/sessions, first page of 100, {count:,} sessions: {rate:.0f} requests/s")

    def measure_health(self) -> None:
        bare = subprocess.Popen([sys.executable, "-c", BARE_FLASK], stdout=subprocess.PIPE, text=True)
        try:
            assert bare.stdout is not None
            url = f"http://127.0.0.1:{bare.stdout.readline().strip()}"
            with self.service() as service:
                rates: tuple[list[float], list[float]] = ([], [])
                for _ in range(5):
                    rates[0].append(self.rate(url, "/health"))
                    rates[1].append(self.rate(service.url, "/health"))
        finally:
            bare.kill()
            bare.communicate()
        theirs, ours = median(rates[0]), median(rates[1])
        print(f"GET /health: bare Flask route {theirs:.0f}, service {ours:.0f} requests/s: {ours / theirs:.2f}")

    def rate(self, url: str, path: str) -> float:
        """Return the requests per second of two clients, each on a persistent connection if the server allows it."""
        host, port = url.removeprefix("http://").split(":")
        request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
        done = [0, 0]
        stop = threading.Event()

        def load(number: int) -> None:
            kept = False
            while not stop.is_set():
                if not kept:
                    connection = socket.create_connection((host, int(port)))
                connection.sendall(request)
                kept = read_response(connection)
                done[number] += 1
                if not kept:
                    connection.close()
            connection.close()

        threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        time.sleep(self.seconds)
        stop.set()
        for thread in threads:
            thread.join()
        return sum(done) / (time.perf_counter() - begun)

    def filled(self, runs: int, messages_each: int, one_session: bool = False) -> Path:
        """Create a database with `runs` ended runs of `messages_each` messages."""
        path = self.folder / f"{uuid.uuid4()}.sqlite"
        url = f"sqlite:///{path}"
        sqlite_file.prepare(url)
        database = Database(url, writable=True, pool_size=1)
        migrate.migrate(database)
        database.close()
        result = json.dumps({"type": "result", "subtype": "success", "result": "Done.", "permission_denials": []})
        connection = sqlite3.connect(path)
        with connection:
            for seq in range(1, runs + 1):
                run_id, now = str(uuid.uuid4()), timestamp()
                if seq == 1 or not one_session:
                    session_id = run_id
                    connection.execute(
                        "INSERT INTO ccr_sessions VALUES "
                        "(?, NULL, NULL, '/tmp', 'a title', '{}', ?, ?, ?, 0.1, ?, ?, ?, NULL, ?)",
                        (session_id, run_id, runs if one_session else 1, messages_each, now, now, seq, seq),
                    )
                connection.execute(
                    'INSERT INTO ccr_runs (id, seq, cwd, "sessionId", "sdkSessionId", mode, status, prompt, '
                    '"optionsJson", "imageCount", "resultType", "resultJson", "messageCount", "hasTranscript", '
                    "\"createdAt\") VALUES (?, ?, '/tmp', ?, ?, 'fresh', 'completed', 'a prompt', '{}', 0, 'success', "
                    "?, ?, 1, ?)",
                    (run_id, seq, session_id, run_id, result, messages_each, now),
                )
                connection.executemany(
                    'INSERT INTO ccr_run_messages ("runId", "index", "messageType", "createdAt", size, "messageJson") '
                    "VALUES (?, ?, 'assistant', ?, ?, ?)",
                    [(run_id, index, now, len(MESSAGE), MESSAGE) for index in range(messages_each)],
                )
        connection.close()
        return path

    # ---- writes

    def measure_stored_bytes(self) -> None:
        path = self.folder / "stored.sqlite"
        count = 1_000 // self.scale
        with self.service(DATABASE_PATH=path, CCM_CLI_PATH=self.cli, CCM_MAX_QUEUED_RUNS=count) as service:
            client = Client(service.url, checks=False)
            for run_id in [client.start(self.project, "hello", wait=0)["id"] for _ in range(count)]:
                assert client.run(run_id)["status"] == "completed"
        connection = sqlite3.connect(path)
        connection.execute("VACUUM")
        # Without the unused parts of pages, so that a few runs are enough.
        used = dict(connection.execute("SELECT name, SUM(pgsize - unused) FROM dbstat GROUP BY name").fetchall())
        connection.close()
        total, events = sum(used.values()) / count, used["ccr_events"] / count
        print(f"a trivial run, stand-in CLI, in the database: {total:,.0f} bytes, {events:.0f} of them its events")

    def measure_writes(self) -> None:
        rows = 50_000 // self.scale
        raw, ours = [], []
        for _ in range(3):
            raw.append(self.raw_writes(rows))
            ours.append(self.recorded(rows))
        print(
            f"messages into the database (WAL, synchronous=FULL, 1.5 KB): executemany {median(raw):,.0f} rows/s, "
            f"writer {median(ours):,.0f} rows/s: {median(ours) / median(raw):.2f}"
        )

    def raw_writes(self, rows: int, batch: int = 1_000) -> float:
        path = self.filled(1, 0)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        run_id = connection.execute("SELECT id FROM ccr_runs").fetchone()[0]
        begun = time.perf_counter()
        for first in range(0, rows, batch):
            with connection:
                connection.executemany(
                    'INSERT INTO ccr_run_messages ("runId", "index", "messageType", "createdAt", size, "messageJson") '
                    "VALUES (?, ?, 'assistant', ?, ?, ?)",
                    [(run_id, index, timestamp(), len(MESSAGE), MESSAGE) for index in range(first, first + batch)],
                )
        seconds = time.perf_counter() - begun
        connection.close()
        return rows / seconds

    def recorded(self, rows: int) -> float:
        path = self.filled(1, 0)
        database = Database(f"sqlite:///{path}", writable=True, pool_size=1)
        run_id = database.rows("SELECT id FROM ccr_runs")[0]["id"]
        writer = Writer(database, Notifier(), 64 * 2**20, on_refused=print)
        writer.start()

        async def append() -> None:
            for index in range(rows):
                await writer.append(Message(run_id, run_id, index, "assistant", MESSAGE, timestamp(), ""))

        begun = time.perf_counter()
        asyncio.run(append())
        writer.write(lambda transaction: None)
        seconds = time.perf_counter() - begun
        writer.stop(time.monotonic() + 10)
        database.close()
        return rows / seconds


def read_response(connection: socket.socket) -> bool:
    """Read one answer, with a length or in chunks; return whether the connection stays open."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(2**18)
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b": ")
        if name.lower() == b"content-length":
            missing = int(value) - len(body)
            while missing > 0:
                missing -= len(connection.recv(2**18))
            return True
    tail = body[-7:]
    while not tail.endswith(b"\r\n0\r\n\r\n"):
        tail = (tail + connection.recv(2**18))[-7:]
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and less data, as a check that it works")
    names = [name.removeprefix("measure_") for name in dir(Bench) if name.startswith("measure_")]
    parser.add_argument(
        "--only",
        action="append",
        choices=names,
        metavar="NAME",
        help=f"only this measure; may be repeated: {', '.join(names)}",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ccm-bench-") as folder, MessagesAPI() as api:
        bench = Bench(Path(folder), arguments.quick, api)
        for name in arguments.only or names:
            getattr(bench, f"measure_{name}")()


if __name__ == "__main__":
    main()
