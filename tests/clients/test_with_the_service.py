"""ccm/client.py with the real service, which is killed, slow or full, and behind a real nginx."""

from __future__ import annotations

import getpass
import json
import math
import os
import signal
import ssl
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import ccm.client
from ccm.client import Answer, APIError, Approval, Client, NoAnswer, Run
from ccm.testing.service_process import ServiceProcess
from tests import client as plain
from tests.certificates import write_certificate
from tests.clients.scripted_server import ScriptedServer, answer, losing_answers
from tests.conftest import ProgramFunction, ServeFunction, stand_in_cli
from tests.e2e.test_nginx import CONFIGURATION, location
from tests.programs import can_connect, free_port
from tests.waiting import until

EXAMPLE = Path(__file__).with_name("example.py")
TOKEN = "0123456789-a-token-of-the-tests"
HELD = json.dumps({"hold": True})
# So many messages a second that a service is killed in the midst of them. Such a run does not end before.
BUSY: dict[str, Any] = {"count": 3_000, "rate": 2_000}
BUSY_AND_HELD = json.dumps({**BUSY, "hold": True})


def asking(*tools: str) -> str:
    return json.dumps({"ask": [{"tool_name": tool, "input": {}} for tool in tools]})


class Following(threading.Thread):
    """A follower of one run: its messages so far, and the ended run."""

    def __init__(self, client: Client, run: Run) -> None:
        super().__init__()
        self.messages: list[Any] = []
        self._followed = client.follow(run["id"])
        self.start()

    def run(self) -> None:
        self.messages.extend(self._followed)

    def check(self, stored: plain.Client, run_id: str) -> Any:
        """Check that all messages came once and in order, and return the ended run."""
        self.join(120)
        assert not self.is_alive()
        assert self.messages == stored.messages(run_id)
        return stored.run(run_id, wait=0)


ServiceFunction = Callable[..., ServiceProcess]


@pytest.fixture
def service(serve: ServeFunction, home: Path) -> ServiceFunction:
    """Return a function that starts a service with the stand-in CLI, on the same port each time."""
    port = free_port()

    def start(**settings: object) -> ServiceProcess:
        return serve(CCM_CLI_PATH=stand_in_cli(home), **{"PORT": port} | settings)

    return start


def kill(service: ServiceProcess) -> None:
    service.process.kill()
    service.wait()


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.many_rounds)])
def test_following_through_kills_gives_each_message_once(service: ServiceFunction, project: Path, kills: int) -> None:
    served = service(CCM_MAX_CONCURRENT_RUNS=1)
    # The last run waits for all the others, and the kills may be too close for its stream to count as connected.
    client, stored = Client(served.url, retry_for=math.inf), plain.Client(served.url)
    runs = [client.start(project, prompt) for prompt in [BUSY_AND_HELD] * kills + [json.dumps(BUSY)]]
    followings = [Following(client, run) for run in runs]
    for following in followings[:-1]:
        until(lambda: len(following.messages) > 500)  # noqa: B023  # called at once
        kill(served)
        served = service(CCM_MAX_CONCURRENT_RUNS=1)

    ended = [following.check(stored, run["id"]) for following, run in zip(followings, runs, strict=True)]
    assert [run["status"] for run in ended] == ["error"] * kills + ["completed"]
    assert {run["error"]["code"] for run in ended[:-1]} == {"INTERRUPTED"}
    assert len(followings[-1].messages) > 3_000


def test_a_start_while_the_service_is_down_waits_for_it(service: ServiceFunction, project: Path) -> None:
    served = service()
    kill(served)
    started: list[Run] = []
    thread = threading.Thread(target=lambda: started.append(Client(served.url).start(project, "Hello.", wait=60)))
    thread.start()
    again = service()
    thread.join()

    assert [run["status"] for run in started] == ["completed"]
    assert [run["id"] for run in Client(again.url).list()] == [started[0]["id"]]


def test_lost_answers_start_no_second_run(quick: plain.Client, project: Path) -> None:
    def through(losses: int) -> ScriptedServer:
        return ScriptedServer(losing_answers(quick.url, losses))

    with through(2) as lossy:
        run = Client(lossy.url).start(project, "One.", wait=60)
    with through(1) as lossy:
        resumed = Client(lossy.url).resume(run["sessionId"], "Two.", wait=60)
    with through(1) as lossy:
        fork = Client(lossy.url).fork(run["sessionId"], "Three.", wait=60)

    assert [run["mode"], resumed["mode"], fork["mode"]] == ["fresh", "resume", "fork"]
    assert {found["id"] for found in Client(quick.url).list()} == {run["id"], resumed["id"], fork["id"]}


def test_lost_answers_to_approvals_and_cancels_are_no_errors(quick: plain.Client, project: Path) -> None:
    client = Client(quick.url)
    run = client.start(project, asking("Bash"), approvals=True)
    (approval,) = islice(client.approvals(wait=60, status="pending"), 1)
    with ScriptedServer(losing_answers(quick.url, 1)) as lossy:
        decided = Client(lossy.url).decide(approval["id"], {"decision": "deny", "message": "No."})
    assert (decided["decision"], decided["message"]) == ("deny", "No.")
    with pytest.raises(APIError, match="APPROVAL_ALREADY_RESOLVED"):
        client.decide(approval["id"], {"decision": "allow"})
    assert client.get(run["id"], wait=60)["status"] == "completed"

    held = client.start(project, HELD)
    with ScriptedServer(losing_answers(quick.url, 1)) as lossy:
        assert Client(lossy.url).cancel(held["id"])["status"] == "cancelled"


def test_a_rule_answers_the_approvals_of_a_run_while_it_is_followed(quick: plain.Client, project: Path) -> None:
    asked: list[str] = []

    def rule(approval: Approval) -> Answer:
        asked.append(approval["toolName"])
        if approval["toolName"] == "Bash":
            return {"decision": "deny", "message": "No shell."}
        return {"decision": "allow", "updatedInput": {"file_path": "x"}}

    client = Client(quick.url)
    run = client.start(project, asking("Write", "Bash"), approvals=True)
    answered = [m["answer"] for m in client.follow(run["id"], rule) if m["type"] == "answered"]

    assert asked == ["Write", "Bash"]
    assert [(one["behavior"], one.get("updatedInput"), one.get("message")) for one in answered] == [
        ("allow", {"file_path": "x"}, None),
        ("deny", None, "No shell."),
    ]
    assert [approval["decision"] for approval in client.approvals(runId=run["id"])] == ["allow", "deny"]


def test_a_rule_answers_the_approvals_of_all_runs(quick: plain.Client, project: Path) -> None:
    client = Client(quick.url)
    runs = [client.start(project, asking("Write"), approvals=True) for _ in range(2)]
    answering = client.answer(lambda _: {"decision": "allow"})
    answered = [next(answering), next(answering)]
    runs.append(client.start(project, asking("Write"), approvals=True))
    answered.append(next(answering))

    asking_runs = [approval["runId"] for approval in answered]
    assert [set(asking_runs[:2]), asking_runs[2]] == [{runs[0]["id"], runs[1]["id"]}, runs[2]["id"]]
    assert {client.get(run["id"], wait=60)["status"] for run in runs} == {"completed"}


def test_lists_have_everything_whatever_the_size_of_their_pages(quick: plain.Client, project: Path) -> None:
    client = Client(quick.url)
    runs = [client.start(project, f"Run {number}.", wait=60)["id"] for number in range(5)]

    assert [run["id"] for run in client.list(limit=2)] == runs[::-1]
    assert [run["id"] for run in client.list(limit=5, status="completed")] == runs[::-1]
    assert len(list(client.sessions(limit=1, cwd=project))) == 5
    assert list(client.list(status="error")) == []


def test_the_service_refuses_with_its_own_words(serve: ServeFunction, home: Path, project: Path) -> None:
    settings = {"CCM_MAX_CONCURRENT_RUNS": 1, "CCM_MAX_QUEUED_RUNS": 1, "CCM_MAX_BODY_BYTES": 100_000}
    service = serve(CCM_CLI_PATH=stand_in_cli(home), CCM_API_TOKEN=TOKEN, **settings)
    client = Client(service.url, TOKEN, retry_for=0)

    def refused(call: Callable[[], object]) -> tuple[int, str, str | None]:
        with pytest.raises(APIError) as raised:
            call()
        assert raised.value.message
        return raised.value.status, raised.value.code, raised.value.field

    run = client.start(project, HELD)
    client.resume(run["sessionId"], "Then.", ifBusy="enqueue")
    assert refused(lambda: next(Client(service.url).list())) == (401, "UNAUTHORIZED", None)
    assert refused(lambda: next(Client(service.url, "wrong").follow(run["id"]))) == (401, "UNAUTHORIZED", None)
    assert refused(lambda: client.get("nothing/here")) == (404, "NOT_FOUND", None)
    assert refused(lambda: next(client.follow("nothing"))) == (404, "RUN_NOT_FOUND", None)
    assert refused(lambda: client.resume(run["sessionId"], "Now.")) == (409, "SESSION_BUSY", None)
    assert refused(lambda: client.start(project, "One more.")) == (429, "QUEUE_FULL", None)
    assert refused(lambda: client.start("there is none", "Hello.")) == (400, "VALIDATION_ERROR", "cwd")
    assert refused(lambda: next(client.list(colour="red"))) == (400, "VALIDATION_ERROR", "colour")
    assert refused(lambda: next(client.follow(run["id"], after=10**6))) == (400, "VALIDATION_ERROR", "Last-Event-ID")
    assert refused(lambda: client.start(project, "x" * 30_000_000)) == (413, "BODY_TOO_LARGE", None)


def test_followers_that_find_no_place_wait_for_one(service: ServiceFunction, project: Path) -> None:
    served = service(CCM_MAX_HELD=1)
    client, stored = Client(served.url), plain.Client(served.url)
    run = client.start(project, json.dumps({"count": 3, "seconds": 1}))
    followings = [Following(client, run) for _ in range(2)]
    for following in followings:
        assert following.check(stored, run["id"])["status"] == "completed"


def test_a_unix_socket_and_a_token(serve: ServeFunction, home: Path, tmp_path: Path, project: Path) -> None:
    served = serve(CCM_CLI_PATH=stand_in_cli(home), CCM_UNIX_SOCKET=tmp_path / "socket", CCM_API_TOKEN=TOKEN)
    client = Client(served.url, TOKEN)
    run = client.start(project, "Hello over a socket.")

    assert [message["type"] for message in client.follow(run["id"])][-1] == "result"
    with pytest.raises(NoAnswer, match="No such file"):
        Client(f"unix:{tmp_path}/none", retry_for=0).get(run["id"])


def test_a_certificate_must_be_trusted(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path / "both.pem")
    trusting = ssl.create_default_context(cafile=certificate)
    with ScriptedServer(lambda _: answer(200, {"id": "a-run"}), certificate) as server:
        with pytest.raises(NoAnswer, match="CERTIFICATE_VERIFY_FAILED"):
            Client(server.url).get("a-run")
        with pytest.raises(NoAnswer, match="CERTIFICATE_VERIFY_FAILED"):
            Client(server.url.replace("localhost", "127.0.0.1"), context=trusting).get("a-run")
        assert server.requests == []
        assert Client(server.url, context=trusting).get("a-run")["id"] == "a-run"


class Nginx:
    """nginx with the sample of the docs, on one port; a context manager that can be started again."""

    def __init__(self, path: str, folder: Path, service: ServiceProcess) -> None:
        folder.mkdir()
        self.port = free_port()
        user = f"user {getpass.getuser()};" if os.getuid() == 0 else ""
        locations = textwrap.indent(location(service), " " * 8)
        configuration = folder / "nginx.conf"
        configuration.write_text(CONFIGURATION.format(user=user, folder=folder, port=self.port, locations=locations))
        self._words = [path, "-p", str(folder), "-c", str(configuration), "-e", str(folder / "error.log")]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Nginx:
        # A group of its own, because the workers outlive a killed nginx.
        self._process = subprocess.Popen(self._words, process_group=0)
        until(lambda: can_connect(self.port))
        return self

    def reload(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        self.kill()


def test_following_through_kills_of_nginx_and_of_the_service_behind_it(
    service: ServiceFunction, program: ProgramFunction, tmp_path: Path, project: Path
) -> None:
    settings = {"CCM_TRUSTED_PROXY": "127.0.0.1", "CCM_MAX_CONCURRENT_RUNS": 1}
    served = service(**settings)
    stored = plain.Client(served.url)
    with Nginx(program("nginx", "nginx"), tmp_path / "nginx", served) as nginx:
        client = Client(f"http://localhost:{nginx.port}/agents")
        runs = [client.start(project, prompt) for prompt in (BUSY_AND_HELD, json.dumps(BUSY))]
        followings = [Following(client, run) for run in runs]
        until(lambda: len(followings[0].messages) > 200)
        nginx.reload()
        until(lambda: len(followings[0].messages) > 500)
        nginx.kill()
        with nginx:
            until(lambda: len(followings[0].messages) > 1_000)
            kill(served)
            service(**settings)
            ended = [following.check(stored, run["id"]) for following, run in zip(followings, runs, strict=True)]
            assert [run["status"] for run in ended] == ["error", "completed"]
            assert [run["id"] for run in client.list(limit=1)] == [run["id"] for run in reversed(runs)]


# ---- the program of the docs


def test_the_example_runs_with_the_real_claude_code(client: plain.Client, project: Path) -> None:
    write = f'[[tool Write {{"file_path": "{project}/haiku.txt", "content": "a run becomes rows"}}]]'
    prompts = {
        "commit it.": f'commit it. {write} [[tool Bash {{"command": "git init"}}]] [[text I only wrote it.]]',
        "What did you just do?": "What did you just do? [[text I wrote a haiku.]]",
        "Make it a sonnet.": "[[hang]]",
    }
    source = EXAMPLE.read_text()
    for prompt, scripted in prompts.items():
        assert prompt in source
        source = source.replace(prompt, scripted.replace('"', '\\"'))
    ran = subprocess.run(
        [sys.executable, "-c", source, client.url, str(project)],
        capture_output=True, text=True, check=True, cwd=EXAMPLE.parents[2],
    )  # fmt: skip

    *types, completed, resumed, cancelled, refused = ran.stdout.splitlines()
    assert types[0] == "system"
    assert types[-1] == "result"
    assert completed.startswith("completed ")
    assert completed.endswith(" I only wrote it.")
    assert resumed == "completed I wrote a haiku."
    assert cancelled == "cancelled"
    assert refused.startswith("404 RUN_NOT_FOUND ")
    assert ran.stderr == ""
    assert (project / "haiku.txt").read_text() == "a run becomes rows"
    assert not (project / ".git").exists()
    newest = next(Client(client.url).list(mode="fresh"))
    decisions = [(one["toolName"], one["decision"]) for one in Client(client.url).approvals(runId=newest["id"])]
    assert decisions == [("Write", "allow"), ("Bash", "deny")]


def test_the_file_works_as_a_copy(tmp_path: Path, quick: plain.Client, project: Path) -> None:
    copy = tmp_path / "agents_client.py"
    copy.write_bytes(Path(ccm.client.__file__).read_bytes())
    script = f"import agents_client; print(agents_client.Client('{quick.url}').start('{project}', 'Hello.')['status'])"
    ran = subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", script],
        cwd=tmp_path, env={}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout == "running\n"
