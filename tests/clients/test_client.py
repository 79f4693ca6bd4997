"""ccm/client.py against scripted answers: what it repeats, for how long, and what it raises."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import ccm.client
from ccm.client import (
    Answer,
    APIError,
    Approval,
    Client,
    Message,
    NoAnswer,
    Run,
)
from tests.clients.scripted_server import (
    CHUNKED_STREAM,
    Request,
    Script,
    ScriptedServer,
    answer,
    chunk,
    error,
    one_after_another,
    raw_answer,
)

RUN: Any = {"id": "a-run", "status": "completed"}
BUSY = error(409, "SESSION_BUSY", "A run of the session has not ended; see ifBusy.")
UNAVAILABLE = error(503, "STORAGE_UNAVAILABLE", "The database is full; nothing was stored.")


class Time:
    """A clock that only pauses move."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return sum(self.pauses)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture(autouse=True)
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(ccm.client, "time", time)
    return time


ServerFunction = Callable[..., ScriptedServer]


@contextmanager
def serving(*scripts: Script) -> Iterator[ScriptedServer]:
    with ScriptedServer(one_after_another(*scripts)) as server:
        yield server


# ---- what is repeated


@pytest.mark.parametrize("failure", [Script(), raw_answer(502, b"<h1>Bad Gateway</h1>"), UNAVAILABLE])
def test_a_start_is_repeated_with_the_same_key_and_body(failure: Script) -> None:
    with serving(failure, failure, answer(202, RUN)) as server:
        assert Client(server.url).start(Path("/tmp"), "Say hello.", title="Hello") == RUN

    assert len(server.requests) == 3
    assert len({(request.body, request.headers["Idempotency-Key"]) for request in server.requests}) == 1
    assert json.loads(server.requests[0].body) == {"cwd": "/tmp", "prompt": "Say hello.", "title": "Hello"}


def test_each_call_has_its_own_key_or_the_given_one() -> None:
    with serving(answer(202, RUN)) as server:
        client = Client(server.url)
        client.start("/tmp", "One.")
        client.resume("s", "Two.", ifBusy="enqueue")
        client.fork("s", "Three.", key="mine", cwd=Path("/tmp"))

    keys = [request.headers["Idempotency-Key"] for request in server.requests]
    assert len({*keys}) == 3
    assert keys[2] == "mine"
    assert [request.target for request in server.requests] == [f"/api/runs/{a}" for a in ("start", "resume", "fork")]


def test_pauses_grow_up_to_a_bound(time: Time) -> None:
    with serving(UNAVAILABLE) as server, pytest.raises(APIError):
        Client(server.url, retry_for=300).get("a-run")

    bounds = [min(10, 2.0**number) for number in range(len(time.pauses))]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(time.pauses, bounds, strict=True))
    assert 280 <= sum(time.pauses) <= 300


def test_retry_after_is_heeded(time: Time) -> None:
    busy = error(429, "QUEUE_FULL", "The queue is full.", Retry_After="7")
    with serving(busy, busy, answer(202, RUN)) as server:
        Client(server.url).start("/tmp", "Say hello.")

    assert len(time.pauses) == 2
    assert all(7 <= pause <= 9 for pause in time.pauses)


def test_no_pause_outlasts_the_time_for_repeating(time: Time) -> None:
    full = error(429, "QUEUE_FULL", "The queue is full.", Retry_After="61")
    with serving(full) as server, pytest.raises(APIError, match="429 QUEUE_FULL: The queue is full") as raised:
        Client(server.url).start("/tmp", "Say hello.")

    assert (raised.value.retry_after, time.pauses, len(server.requests)) == (61, [], 1)


def test_an_input_is_not_repeated(time: Time) -> None:
    with serving(Script(), answer(202, {})) as server, pytest.raises(NoAnswer):
        Client(server.url).request("POST", "/api/runs/a-run/input", {"prompt": "Stop."}, repeat=False)

    assert len(server.requests) == 1


def test_a_service_that_is_not_there_is_reported_with_its_address(time: Time) -> None:
    with serving(Script()) as server:
        pass
    with pytest.raises(NoAnswer, match=f"no answer from {server.url}: .*refused"):
        Client(server.url, retry_for=10).get("a-run")
    assert time.pauses


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_silent_server_is_given_up(sent: bytes) -> None:
    with serving(Script(sent, stays=True)) as server, pytest.raises(NoAnswer) as raised:
        Client(server.url, timeout=0.05, retry_for=0).get("a-run")

    assert isinstance(raised.value.__cause__, TimeoutError)


def test_an_answer_that_is_cut_off_is_asked_for_again() -> None:
    whole = answer(200, RUN)
    with serving(Script(whole.sent[:-1]), Script(whole.sent[:20]), whole) as server:
        assert Client(server.url).get("a-run") == RUN


# ---- errors


def test_an_error_answer_is_raised_at_once(time: Time) -> None:
    invalid = error(400, "VALIDATION_ERROR", "cwd: must be absolute.", "cwd")
    with serving(invalid) as server, pytest.raises(APIError) as raised:
        Client(server.url).start("tmp", "Say hello.")

    refused = raised.value
    assert (refused.status, refused.code, refused.field) == (400, "VALIDATION_ERROR", "cwd")
    assert (refused.message, str(refused)) == ("cwd: must be absolute.", "400 VALIDATION_ERROR: cwd: must be absolute.")
    assert (time.pauses, len(server.requests)) == ([], 1)


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        (raw_answer(401, b"<h1>Login</h1>", Content_Type="text/html"), "HTTP_401", "Unauthorized <h1>Login</h1>"),
        (raw_answer(301, b"", Location="https://agents.example.com/"), "HTTP_301", "https://agents.example.com/"),
        (raw_answer(200, b"<h1>Hello</h1>", Content_Type="text/html"), "HTTP_200", "is the url right?"),
        (raw_answer(404, b'{"error": "no such page"}', Content_Type="application/json"), "HTTP_404", "no such page"),
        (raw_answer(404, b'["error"]', Content_Type="application/json"), "HTTP_404", "is the url right?"),
        (raw_answer(403, b"\xff\xfe", Content_Type="text/plain"), "HTTP_403", "Forbidden"),
        (raw_answer(404, b"[" * 100_000, Content_Type="application/json"), "HTTP_404", "is the url right?"),
        (raw_answer(400, b"a-token\n\x1b[1m", Content_Type="text/plain"), "HTTP_400", r"Bad Request ***\n\x1b[1m"),
    ],
)
@pytest.mark.parametrize("ask", [lambda client: client.get("a-run"), lambda client: next(client.follow("a-run"))])
def test_an_answer_of_another_server_is_an_error_that_shows_it(
    script: Script, code: str, message: str, ask: Callable[[Client], object]
) -> None:
    with serving(script) as server, pytest.raises(APIError) as raised:
        ask(Client(server.url, "a-token"))

    assert raised.value.code == code
    assert message in raised.value.message
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "url",
    ["localhost:3000", "http://", "ftp://host", "http://me:secret@host", "http://:secret@host", "http://h?a", "x"],
)
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"url must be http://HOST:PORT"):
        Client(url)


@pytest.mark.parametrize("token", ["a token", "token\n", "tökén"])
def test_an_invalid_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="token must be") as raised:
        Client("http://localhost", token)
    assert token not in str(raised.value)


# ---- lists


def test_a_list_follows_the_pages_but_never_to_another_address() -> None:
    pages = [
        answer(
            200, [{"id": "1"}, {"id": "2"}], Link='<https://evil.example/x?limit=2&metadata.x=&cursor=abc>; rel="next"'
        ),
        answer(200, [{"id": "3"}]),
    ]
    with serving(*pages) as server:
        found = list(Client(f"{server.url}/agents/", "secret").list(limit=2, waiting=True, cwd=None, cursor="a b"))

    assert [run["id"] for run in found] == ["1", "2", "3"]
    assert [request.target for request in server.requests] == [
        "/agents/api/runs?limit=2&waiting=true&cursor=a+b",
        "/agents/api/runs?limit=2&metadata.x=&cursor=abc",
    ]
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer secret"}


def test_metadata_is_one_parameter_for_each_key() -> None:
    with serving(answer(200, [])) as server:
        assert list(Client(server.url).list(metadata={"ticket": 4711, "a.b": True, "c": None}, limit=5)) == []

    target = "/api/runs?limit=5&metadata.ticket=4711&metadata.a.b=true&metadata.c=null"
    assert [request.target for request in server.requests] == [target]


def test_a_page_is_asked_for_only_when_it_is_needed() -> None:
    page = answer(200, [{"sessionId": "1"}, {"sessionId": "2"}], Link='</x?cursor=abc>; rel="next"')
    with serving(page) as server:
        assert len(list(islice(Client(server.url).sessions(), 2))) == 2

    assert len(server.requests) == 1


def test_waiting_for_approvals_pauses_when_the_service_does_not_wait(time: Time) -> None:
    empty = answer(200, [], Link='</x?wait=30>; rel="next"')
    with serving(empty, empty, answer(200, [{"id": "1"}], Link='</x?cursor=a>; rel="next"')) as server:
        assert next(Client(server.url).approvals(30, status="pending"))["id"] == "1"

    assert time.pauses == [1, 1]
    assert server.requests[0].target == "/api/approvals?status=pending&wait=30"


# ---- approvals


ALLOWED: Any = {"id": "q", "decision": "allow", "updatedInput": {"command": "ls"}, "remember": False, "message": None}
LATE = {"error": {"code": "APPROVAL_ALREADY_RESOLVED", "message": "It is allowed already."}, "approval": ALLOWED}


def test_an_answer_whose_reply_was_lost_is_no_error() -> None:
    with serving(Script(), answer(409, LATE)) as server:
        decided = Client(server.url).decide("q", {"decision": "allow", "updatedInput": {"command": "ls"}})
    assert decided == ALLOWED


@pytest.mark.parametrize("mine", [Answer(decision="deny"), Answer(decision="allow", updatedInput={"command": "rm x"})])
def test_an_answer_after_another_one_is_an_error_with_the_approval(mine: Answer) -> None:
    with serving(answer(409, LATE)) as server, pytest.raises(APIError, match="It is allowed already") as raised:
        Client(server.url).decide("q", mine)
    assert raised.value.body["approval"] == ALLOWED


def test_a_rule_leaves_approvals_and_comes_too_late_without_an_error() -> None:
    asked = [{"id": name, "toolName": name} for name in ("left", "late", "mine")]
    decided = {**ALLOWED, "id": "mine"}

    def reply(request: Request) -> Script:
        if request.method == "GET":
            return answer(200, asked, Link='</x?cursor=a>; rel="next"')
        return answer(409, LATE) if request.target.endswith("late") else answer(200, decided)

    def rule(approval: Approval) -> Answer | None:
        return None if approval["toolName"] == "left" else {"decision": "deny"}

    with ScriptedServer(reply) as server:
        assert next(Client(server.url).answer(rule, runId="r")) == decided
    assert [request.target.rpartition("/")[2] for request in server.requests[1:]] == ["late", "mine"]
    assert "status=pending&runId=r" in server.requests[0].target


# ---- streams


def frame(name: str, data: Any, event_id: object = None) -> bytes:
    identified = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {name}\n:\n: a comment\n{identified}data: {json.dumps(data)}\n\n".encode()


def stream_of(messages: list[Any], after: int) -> bytes:
    """Return a whole stream as the service sends it."""
    frames = [frame("message", message, number) for number, message in enumerate(messages)][after + 1 :]
    opening = (
        b": connected\nretry: 1000\n\n" + frame("approval", {"id": "q", "status": "allowed"}) + b": still here\n\n"
    )
    return opening + b"".join(frames) + frame("end", RUN, "end")


def followed(client: Client, after: int = -1) -> tuple[list[Message], Run]:
    """Return the messages of a run and the ended run."""
    messages = []
    following = client.follow("a-run", after=after)
    while True:
        try:
            messages.append(next(following))
        except StopIteration as end:
            return messages, end.value


MESSAGES = [
    {"type": "assistant", "text": text} for text in ("one", "two\r\nthree", "", "ünï\u2028cödé", "x" * 5_000)
] * 4


@pytest.mark.parametrize("seed", range(20))
def test_streams_cut_anywhere_give_each_message_once(seed: int, time: Time) -> None:
    chance = random.Random(seed)

    def reply(request: Request) -> Script:
        stream = stream_of(MESSAGES, int(request.headers["Last-Event-ID"]))
        sizes = [chance.randrange(1, 4_000) for _ in range(200)]
        chunks = b"".join(
            chunk(stream[sum(sizes[:n]) : sum(sizes[: n + 1])]) for n in range(200) if sum(sizes[:n]) < len(stream)
        )
        whole = CHUNKED_STREAM + chunks + b"0\r\n\r\n"
        return Script(whole[: chance.randrange(len(whole) + len(whole) // 8)])

    with ScriptedServer(reply) as server:
        assert followed(Client(server.url, retry_for=math.inf)) == (MESSAGES, RUN)
    assert len(time.pauses) == len(server.requests) - 1


@pytest.mark.parametrize(
    "broken",
    [
        CHUNKED_STREAM + b"zz\r\nhello\r\n",
        CHUNKED_STREAM + b"-5\r\nhello\r\n",
        CHUNKED_STREAM + chunk(frame("message", MESSAGES[3], 3)),  # out of order
        CHUNKED_STREAM + chunk(frame("message", MESSAGES[0], 0)),  # once more
        CHUNKED_STREAM + chunk(frame("message", MESSAGES[2], 2)[:-1]) + b"0\r\n\r\n",  # incomplete
        CHUNKED_STREAM + chunk(b": connected\n\n") + b"0\r\n\r\n",
        CHUNKED_STREAM + chunk(frame("message", MESSAGES[2], 2).replace(b"}", b"")),  # no JSON
        UNAVAILABLE.sent,
        b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        + frame("approval", {"id": "q", "status": "denied"}),
        b"garbage",
    ],
)
def test_a_broken_stream_is_continued_after_the_last_whole_message(broken: bytes) -> None:
    first = CHUNKED_STREAM + chunk(frame("message", MESSAGES[0], 0) + frame("message", MESSAGES[1], 1))
    last = CHUNKED_STREAM + chunk(stream_of(MESSAGES, 1)) + b"0\r\n\r\n"
    with serving(Script(first), Script(broken), Script(last)) as server:
        assert followed(Client(server.url)) == (MESSAGES, RUN)
    assert [request.headers["Last-Event-ID"] for request in server.requests] == ["-1", "1", "1"]


def test_a_silent_stream_is_connected_to_again() -> None:
    first = CHUNKED_STREAM + chunk(frame("message", MESSAGES[0], 0))
    last = CHUNKED_STREAM + chunk(stream_of(MESSAGES, 0)) + b"0\r\n\r\n"
    with serving(Script(first, stays=True), Script(last)) as server:
        assert followed(Client(server.url, timeout=0.05)) == (MESSAGES, RUN)


def test_following_begins_after_a_message() -> None:
    with serving(Script(CHUNKED_STREAM + chunk(stream_of(MESSAGES, 4)) + b"0\r\n\r\n")) as server:
        assert followed(Client(server.url), after=4) == (MESSAGES[5:], RUN)
    assert server.requests[0].headers["Last-Event-ID"] == "4"


def test_a_message_starts_the_time_for_repeating_anew(time: Time) -> None:
    scripts: list[Script] = []
    for index in range(5):
        scripts += [UNAVAILABLE] * 4 + [Script(CHUNKED_STREAM + chunk(frame("message", MESSAGES[index], index)))]
    last = Script(CHUNKED_STREAM + chunk(stream_of(MESSAGES, 4)) + b"0\r\n\r\n")
    with serving(*scripts, last) as server:
        assert followed(Client(server.url, retry_for=40)) == (MESSAGES, RUN)
    assert sum(time.pauses) > 40


def test_a_stream_that_has_lasted_starts_the_time_for_repeating_anew(
    time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ccm.client, "LASTING", -1)
    silent = Script(CHUNKED_STREAM + chunk(b": connected\n\n"))
    last = Script(CHUNKED_STREAM + chunk(stream_of(MESSAGES, -1)) + b"0\r\n\r\n")
    with serving(*[silent] * 50, last) as server:
        assert followed(Client(server.url, retry_for=10)) == (MESSAGES, RUN)


def test_streams_that_break_at_once_are_given_up(time: Time) -> None:
    pending = frame("approval", {"id": "q", "status": "pending"})
    with (
        serving(Script(CHUNKED_STREAM + chunk(b": connected\n\n" + pending))) as server,
        pytest.raises(NoAnswer),
    ):
        followed(Client(server.url, retry_for=40))
    assert sum(time.pauses) <= 40


def test_a_run_that_is_gone_ends_the_following() -> None:
    first = CHUNKED_STREAM + chunk(frame("message", MESSAGES[0], 0))
    gone = error(404, "RUN_NOT_FOUND", "There is no run a-run.")
    with serving(Script(first), gone) as server, pytest.raises(APIError, match="There is no run a-run"):
        list(Client(server.url).follow("a-run"))


def test_an_error_of_a_rule_reaches_the_reader_and_is_not_repeated() -> None:
    def rule(_: Approval) -> Answer:
        raise ConnectionError("the rule's own")

    stream = CHUNKED_STREAM + chunk(frame("approval", {"id": "q", "status": "pending"}))
    with serving(Script(stream)) as server, pytest.raises(ConnectionError, match="the rule's own"):
        list(Client(server.url).follow("a-run", rule))
    assert len(server.requests) == 1
