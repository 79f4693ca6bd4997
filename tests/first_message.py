"""How soon the first message of a run comes, and what a Claude Code that waits for a run costs. For the benchmark."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from claude_agent_sdk import AssistantMessage, ClaudeAgentOptions, ClaudeSDKClient, ResultMessage

from ccm.core.claude.processes import RUN_MARK
from ccm.testing.service_process import ServiceProcess
from tests.client import Client
from tests.event_source import Stream
from tests.waiting import until

# How long a Claude Code that was started in advance is left to finish its start (seconds).
SETTLE_TIME = 2.5


class Times(NamedTuple):
    """Milliseconds from the request to the first message of the model, and to the end of the run."""

    first: float
    end: float


def of_sdk(options: ClaudeAgentOptions, prompt: str, settle_time: float | None = None) -> tuple[Times, str]:
    """Return the times of one run with the SDK alone, and its session's id.

    Args:
        settle_time: the seconds that a connected client waits before the request. The times then count from the
            request, and are what no service over this SDK can be below.
    """

    async def run() -> tuple[Times, str]:
        begun, first, session = time.perf_counter(), 0.0, ""
        async with ClaudeSDKClient(options) as client:
            if settle_time is not None:
                await asyncio.sleep(settle_time)
                begun = time.perf_counter()
            await client.query(prompt)
            async for message in client.receive_messages():
                if isinstance(message, AssistantMessage):
                    first = first or time.perf_counter() - begun
                if isinstance(message, ResultMessage):
                    session = message.session_id
                    break
        return Times(first * 1000, (time.perf_counter() - begun) * 1000), session

    return asyncio.run(run())


def of_service(client: Client, kind: str, body: dict[str, Any]) -> tuple[Times, dict[str, Any]]:
    """Return the times of one run of the service as its stream shows them, and the run."""
    begun, first = time.perf_counter(), 0.0
    run = client.post(f"/api/runs/{kind}", body).json
    with Stream(client, f"/api/runs/{run['id']}/stream") as stream:
        for event in stream:
            if event.type == "message" and event.json["type"] == "assistant":
                first = first or time.perf_counter() - begun
    return Times(first * 1000, (time.perf_counter() - begun) * 1000), client.run(run["id"])


def wait_for(service: ServiceProcess, kind: str, number: int) -> None:
    """Wait until the service has started `number` Claude Codes of a kind in advance, and the last one is idle."""
    until(lambda: sum(f"({kind}) was started in advance" in line for line in service.log) >= number)
    time.sleep(SETTLE_TIME)


def waiting_processes(home: Path) -> Iterator[Path]:
    """Yield the entries in /proc of Claude Codes with this HOME."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"HOME={home}\0".encode() in variables and f"{RUN_MARK}=".encode() in variables:
            yield process


def memory_and_cpu(process: Path, seconds: float) -> tuple[int, float]:
    """Return the proportional memory of a process (bytes), and the CPU that it takes (seconds a minute)."""

    def cpu() -> float:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    rollup = (process / "smaps_rollup").read_text().split()
    before = cpu()
    time.sleep(seconds)
    return int(rollup[rollup.index("Pss:") + 1]) * 1024, (cpu() - before) * 60 / seconds


class FirstMessages:
    """The measures of Claude Code that waits for a run; a part of the benchmark, which sets the attributes."""

    rounds: int
    seconds: float
    home: Path
    project: Path
    environ: dict[str, str]
    service: Callable[..., AbstractContextManager[ServiceProcess]]

    def measure_spare(self) -> None:
        """Compare starts that use a spare with the bare SDK, and show what a spare costs."""
        bare, connected, ours = [], [], []
        with self.service(CCM_SPARE_RUNS=1, LOG_LEVEL="debug") as service:
            client, body = Client(service.url, checks=False), {"cwd": str(self.project), "prompt": "hello"}
            for number in range(self.rounds):
                wait_for(service, "spare", number + 1)
                bare.append(of_sdk(self.sdk_options(), "hello")[0])
                connected.append(of_sdk(self.sdk_options(), "hello", SETTLE_TIME)[0])
                ours.append(of_service(client, "start", body)[0])
            self.show_first_messages("start with a spare, real CLI", bare, connected, ours)
            wait_for(service, "spare", self.rounds + 1)
            self.show_cost_of_waiting("a spare")

    def measure_warm(self) -> None:
        """Compare resumes and forks that use a warm session with forks of the bare SDK."""
        with self.service(CCM_WARM_SESSIONS=1, LOG_LEVEL="debug") as service:
            client = Client(service.url, checks=False)
            session = client.start(self.project, "hello")["sessionId"]
            _, head = of_sdk(self.sdk_options(), "hello")
            ready = 0
            for kind in ("resume", "fork"):
                bare, connected, ours = [], [], []
                for _ in range(self.rounds):
                    ready += 1
                    wait_for(service, "warm", ready)
                    options = self.sdk_options(resume=head, fork_session=True)
                    bare.append(of_sdk(options, "go on")[0])
                    connected.append(of_sdk(options, "go on", SETTLE_TIME)[0])
                    times, run = of_service(client, kind, {"sessionId": session, "prompt": "go on"})
                    ours.append(times)
                    session = run["sessionId"]
                self.show_first_messages(f"{kind} of a warm session, real CLI", bare, connected, ours)
            wait_for(service, "warm", ready + 1)
            self.show_cost_of_waiting("a warm session")

    def sdk_options(self, **options: Any) -> ClaudeAgentOptions:
        preset: Any = {"type": "preset", "preset": "claude_code"}
        return ClaudeAgentOptions(cwd=self.project, env=self.environ, system_prompt=preset, **options)

    def show_first_messages(self, name: str, bare: list[Times], connected: list[Times], ours: list[Times]) -> None:
        for what, place in (("first message", 0), ("end", 1)):
            sdk, floor, service = (
                statistics.median([times[place] for times in side]) for side in (bare, connected, ours)
            )
            print(
                f"{name}, {what}: SDK {sdk:.0f} ms, SDK connected before {floor:.0f} ms: {floor / sdk:.2f}x, "
                f"service {service:.0f} ms: {service / sdk:.2f}x"
            )

    def show_cost_of_waiting(self, name: str) -> None:
        (process,) = waiting_processes(self.home)
        memory, cpu = memory_and_cpu(process, self.seconds * 10)
        print(f"{name} takes {memory / 2**20:.0f} MiB (PSS) and {cpu:.2f} s of CPU a minute")
