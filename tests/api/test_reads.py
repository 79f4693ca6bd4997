"""Reads: lists with their order, filters and pages, recorded messages, and waits."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import (
    NOWHERE,
    connect,
    folder_of,
    held,
    ids,
    ids_of,
    kinds,
    letters,
    link,
    pages,
    read_all,
    refused,
    script,
)
from tests.client import Answer, Client
from tests.conftest import ServeFunction
from tests.waiting import until

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UUID = "10000000-0000-4000-8000-00000000000"
# The timeout of waits (seconds). An immediate response takes milliseconds, a wait in vain takes all of it.
LONG = 60


# ---- the run and the session themselves

RUN_FIELDS = [
    *("id", "runId", "sessionId", "sdkSessionId", "parentRunId", "parentSessionId", "mode", "status", "cwd", "prompt"),
    *("options", "imageCount", "resultType", "result", "error", "permissionDenials", "costUsd", "messageCount"),
    *("durationMs", "queuePosition", "transcriptStored", "createdBy", "pendingApprovals", "timeoutMs"),
    *("approvals", "approvalTimeoutMs", "webhookUrl"),
    *("createdAt", "startedAt", "endedAt"),
]


def test_a_run_has_every_field_from_its_beginning_to_its_end(api: Client, project: Path) -> None:
    running = held(api, project)
    for run in (running, api.get(f"/api/runs/{running['id']}").json, api.delete(f"/api/runs/{running['id']}").json):
        assert set(RUN_FIELDS) <= set(run)
        assert run["id"] == run["runId"]
        assert all(TIME.fullmatch(run[name]) for name in ("createdAt", "startedAt", "endedAt") if run[name])
    assert run["endedAt"] is not None
    assert isinstance(run["durationMs"], int)


def test_a_session_has_every_field(api: Client, project: Path) -> None:
    run = api.start(project, "Hello.", title="Greeting", metadata={"a": None})

    answer = api.get(f"/api/sessions/{run['sessionId']}")
    assert answer.status == 200, answer.body
    assert answer.json == {
        "sessionId": run["sessionId"],
        "parentSessionId": None,
        "forkedFromRunId": None,
        "cwd": str(project),
        "title": "Greeting",
        "metadata": {"a": None},
        "status": "idle",
        "headRunId": run["id"],
        "runCount": 1,
        "messageCount": run["messageCount"],
        "costUsd": run["costUsd"],
        "firstRunAt": run["createdAt"],
        "lastRunAt": run["createdAt"],
    }


def test_a_session_is_running_while_one_of_its_runs_is(api: Client, project: Path) -> None:
    run = held(api, project, "ab")
    session = api.get(f"/api/sessions/{run['sessionId']}").json
    assert [session["status"], session["messageCount"], session["headRunId"]] == ["running", 2, None]

    api.delete(f"/api/runs/{run['id']}")
    session = api.get(f"/api/sessions/{run['sessionId']}").json
    assert [session["status"], session["messageCount"], session["headRunId"]] == ["idle", 3, run["id"]]


# ---- the list of runs


def test_runs_are_listed_newest_first(api: Client, project: Path) -> None:
    runs = [api.start(project, f"Number {number}.", wait=0) for number in range(3)]

    newest_first = [run["id"] for run in reversed(runs)]
    assert ids(api.get("/api/runs", limit=3)) == newest_first
    assert ids(api.get("/api/runs", cwd=project)) == newest_first
    for run in runs:
        api.run(run["id"])
    assert api.get("/api/runs", cwd=project).json == [api.run(run) for run in newest_first]


def test_runs_are_filtered_by_status(api: Client, project: Path) -> None:
    completed = api.start(project, "Hello.")
    error = api.start(project, script(result={"is_error": True, "subtype": "error_during_execution"}))
    cancelled = held(api, project)
    api.delete(f"/api/runs/{cancelled['id']}")
    running = held(api, project)

    expected = {"completed": completed, "error": error, "cancelled": cancelled, "running": running}
    for status, run in expected.items():
        answer = api.get("/api/runs", status=status, cwd=project)
        assert ids(answer) == [run["id"]]
        assert answer.json[0]["status"] == status
    api.delete(f"/api/runs/{running['id']}")


def test_runs_are_filtered_by_session_and_mode(api: Client, project: Path) -> None:
    first = api.start(project, "Hello.")
    second = api.resume(first["sessionId"], "Again.")
    fork = api.fork(first["sessionId"], "Otherwise.")

    line = [second["id"], first["id"]]
    assert ids(api.get("/api/runs", sessionId=first["sessionId"])) == line
    assert ids(api.get("/api/runs", sessionId=second["sdkSessionId"])) == line
    assert ids(api.get("/api/runs", sessionId=fork["sessionId"])) == [fork["id"]]
    for mode, run in (("fresh", first), ("resume", second), ("fork", fork)):
        assert ids(api.get("/api/runs", mode=mode, cwd=project)) == [run["id"]]
    assert ids(api.get("/api/runs", sessionId=first["sessionId"], mode="fresh", status="completed")) == [first["id"]]
    assert ids(api.get("/api/runs", sessionId=first["sessionId"], mode="fork")) == []


def test_the_directory_filter_accepts_any_spelling_of_the_path(api: Client, project: Path) -> None:
    link_to_it = project.parent / "link"
    link_to_it.symlink_to(project)
    inside = folder_of(project, "inside")
    run = api.start(link_to_it, "Hello.")
    api.start(inside, "Hello.")

    for spelling in (project, link_to_it, f"{project}/", f"{inside}/.."):
        assert ids(api.get("/api/runs", cwd=spelling)) == [run["id"]]
        assert ids(api.get("/api/sessions", cwd=spelling), "sessionId") == [run["sessionId"]]
    assert ids(api.get("/api/runs", cwd=project.parent)) == []


# ---- pages


@pytest.fixture(scope="module")
def one_worker(serve_all: ServeFunction, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Return a client of a service whose only worker is occupied, so that further runs wait and cost nothing.

    It also holds no more than one request open.
    """
    client = Client(serve_all(CCM_MAX_CONCURRENT_RUNS=1, CCM_MAX_HELD=1).url)
    held(client, folder_of(tmp_path_factory.mktemp("one_worker")))
    return client


def waiting(client: Client, cwd: Path, count: int) -> list[dict[str, Any]]:
    """Start waiting runs, each in a session of its own. Return them, newest first."""
    return [client.start(cwd, f"Number {number}.", wait=0) for number in range(count)][::-1]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 6, 7])
def test_pages_have_every_item_once(one_worker: Client, project: Path, count: int) -> None:
    runs = waiting(one_worker, project, count)
    cuts = range(0, max(count, 1), 3)

    found = pages(one_worker, f"/api/runs?limit=3&cwd={project}")
    assert [ids_of(page) for page in found] == [ids_of(runs[cut : cut + 3]) for cut in cuts]
    found = pages(one_worker, f"/api/sessions?limit=3&cwd={project}")
    assert [ids_of(page, "sessionId") for page in found] == [ids_of(runs[cut : cut + 3], "sessionId") for cut in cuts]


def test_new_runs_do_not_shift_the_pages(one_worker: Client, project: Path) -> None:
    runs = waiting(one_worker, project, 5)
    first = one_worker.get("/api/runs", limit=2, cwd=project)
    waiting(one_worker, project, 3)

    assert ids(first) + [run["id"] for page in pages(one_worker, first.next) for run in page] == ids_of(runs)


def test_a_next_page_keeps_the_filters(one_worker: Client, project: Path) -> None:
    waiting(one_worker, project, 3)
    answer = one_worker.get("/api/runs", limit=1, cwd=project, status="running", mode="fresh")

    assert link(answer).items() >= {"limit": "1", "cwd": str(project), "status": "running", "mode": "fresh"}.items()
    match = re.fullmatch(r'<(http://[^>]*)>; rel="next"', answer.headers["Link"])
    assert match is not None
    assert match[1].startswith(f"{one_worker.url}/api/runs?")


def test_the_default_page_size_is_a_hundred(one_worker: Client, project: Path) -> None:
    runs = waiting(one_worker, project, 101)

    for path, name in (("/api/runs", "id"), ("/api/sessions", "sessionId")):
        assert ids(one_worker.get(path, cwd=project), name) == ids_of(runs[:100], name)
        whole = one_worker.get(path, cwd=project, limit=1000)
        assert ids(whole, name) == ids_of(runs, name)
        assert whole.next is None


def test_the_runs_of_a_session_are_listed_oldest_first(one_worker: Client, project: Path) -> None:
    first = waiting(one_worker, project, 1)[0]
    runs = [first, *(one_worker.resume(first["sessionId"], "x", wait=0, ifBusy="enqueue") for _ in range(4))]

    path = f"/api/sessions/{first['sessionId']}/runs"
    assert ids(one_worker.get(path)) == ids_of(runs)
    assert [ids_of(page) for page in pages(one_worker, f"{path}?limit=2")] == [
        ids_of(runs[cut : cut + 2]) for cut in (0, 2, 4)
    ]
    assert ids(one_worker.get(f"/api/sessions/{runs[-1]['sdkSessionId']}/runs")) == ids_of(runs)


# ---- the list of sessions


def test_sessions_are_listed_by_their_latest_activity(api: Client, project: Path) -> None:
    first, second = api.start(project, "First."), api.start(project, "Second.")
    assert ids(api.get("/api/sessions", cwd=project), "sessionId") == [second["sessionId"], first["sessionId"]]

    api.resume(first["sessionId"], "Again.")
    assert ids(api.get("/api/sessions", cwd=project), "sessionId") == [first["sessionId"], second["sessionId"]]
    assert ids(api.get("/api/sessions", limit=2), "sessionId") == [first["sessionId"], second["sessionId"]]
    api.patch(f"/api/sessions/{second['sessionId']}", {"title": "Changed."})
    assert ids(api.get("/api/sessions", limit=2), "sessionId") == [first["sessionId"], second["sessionId"]]


def test_forks_are_listed_by_their_latest_activity(api: Client, project: Path) -> None:
    root = api.start(project, "The root.")
    forks = [api.fork(root["sessionId"], f"Branch {number}.") for number in range(3)]
    twig = api.fork(forks[0]["sessionId"], "A twig.")
    api.resume(forks[1]["sessionId"], "More.")

    path = f"/api/sessions/{root['sessionId']}/forks"
    expected = [forks[number]["sessionId"] for number in (1, 2, 0)]
    assert ids(api.get(path), "sessionId") == expected
    assert [ids_of(page, "sessionId") for page in pages(api, f"{path}?limit=2")] == [expected[:2], expected[2:]]
    assert ids(api.get(f"/api/sessions/{forks[0]['sessionId']}/forks"), "sessionId") == [twig["sessionId"]]
    assert ids(api.get(f"/api/sessions/{twig['sessionId']}/forks"), "sessionId") == []


# ---- changing a session


def test_title_and_metadata_are_changed_separately(api: Client, project: Path) -> None:
    run = api.start(project, "Hello.", title="Old", metadata={"a": 1})
    path = f"/api/sessions/{run['sessionId']}"

    def patched(body: dict[str, Any]) -> list[Any]:
        answer = api.patch(path, body)
        assert answer.status == 200, answer.body
        assert answer.json == api.get(path).json
        return [answer.json["title"], answer.json["metadata"]]

    assert patched({}) == ["Old", {"a": 1}]
    assert patched({"title": "New"}) == ["New", {"a": 1}]
    assert patched({"metadata": {"b": {"c": [None, 1.5, "\u00e9\0\U0001f600"]}}}) == [
        "New",
        {"b": {"c": [None, 1.5, "\u00e9\0\U0001f600"]}},
    ]
    assert patched({"title": None}) == [None, {"b": {"c": [None, 1.5, "\u00e9\0\U0001f600"]}}]
    assert patched({"title": "", "metadata": None}) == ["", {}]


def test_a_session_is_found_by_every_sdk_session_id_of_its_runs(api: Client, project: Path) -> None:
    first = api.start(project, "Hello.")
    second = api.resume(first["sessionId"], "Again.")
    fork = api.fork(second["sdkSessionId"], "Otherwise.")

    for path in ("", "/messages", "/runs", "/forks"):
        one, other = (api.get(f"/api/sessions/{run['sdkSessionId']}{path}") for run in (first, second))
        assert one.status == 200
        assert one.json == other.json
    assert ids(other, "sessionId") == [fork["sessionId"]]
    assert api.patch(f"/api/sessions/{second['sdkSessionId']}", {"title": "x"}).json["sessionId"] == first["sessionId"]


# ---- the messages of a run

STRANGE: list[dict[str, Any]] = [
    {"type": "system", "subtype": "init", "tools": [], "nothing": None, "": {"": [[], {}]}},
    {"type": "never_seen_before", "numbers": [0, -0.0, 1.0, 1e300, 5e-324, 10**30, 2**53 + 1, True]},
    {"type": "assistant", "text": 'NUL \0 lone \ud800 \udc00 pair \U0001f600 \u2028 \x7f "quoted" \\ </script>'},
    {"type": "a,b", "uuid": "not one"},
    {"type": "", "lone \ud800": "in a name"},
    {"no": "type"},
]


def test_messages_are_returned_unchanged(api: Client, project: Path) -> None:
    run = api.start(project, script(*STRANGE))

    answer = api.get(f"/api/runs/{run['id']}/messages")
    assert answer.headers["Content-Type"] == "application/json"
    assert repr(answer.json) == repr([*STRANGE, run["result"]])
    assert run["messageCount"] == len(STRANGE) + 1
    assert api.get(f"/api/sessions/{run['sessionId']}/messages").body == answer.body


@pytest.fixture(scope="module")
def ended(api: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return an ended run whose messages are abacaba."""
    return api.start(folder_of(tmp_path_factory.mktemp("ended")), script(*kinds("abacaba")))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, "abacabar"),
        ({"after": -1}, "abacabar"),
        ({"after": 0}, "bacabar"),
        ({"after": 6}, "r"),
        ({"after": 7}, ""),
        ({"limit": 3}, "aba"),
        ({"limit": 1000}, "abacabar"),
        ({"after": 2, "limit": 2}, "ca"),
        ({"type": "a"}, "aaaa"),
        ({"type": "a,c"}, "aacaa"),
        ({"type": " c , result "}, "cr"),
        ({"type": "A"}, ""),
        ({"type": "%"}, ""),
        ({"type": "b", "limit": 1}, "b"),
        ({"type": "b", "limit": 1, "after": 1}, "b"),
        ({"type": "b", "limit": 1, "after": 5}, ""),
    ],
)
def test_messages_are_read_by_position_limit_and_type(
    api: Client, ended: dict[str, Any], query: dict[str, Any], expected: str
) -> None:
    assert letters(api.messages(ended["id"], **query)) == expected


def test_a_position_that_was_never_stored_is_refused(api: Client, ended: dict[str, Any]) -> None:
    """A client with such a position has read another database, and would miss the messages stored next."""
    fork = api.fork(ended["sessionId"], script(*kinds("a")))
    runs, sessions = f"/api/runs/{ended['id']}/messages", f"/api/sessions/{ended['sessionId']}/messages"

    for index in (8, 9, 2**53):
        assert "its last one is 7" in refused(api.get(runs, after=index), "after")
        refused(api.get(runs, after=index, wait=LONG), "after")
        assert f"message {index} " in refused(api.get(sessions, after=f"{ended['id']}:{index}"), "after")
        full = {"history": "full", "after": f"{ended['id']}:{index}"}
        refused(api.get(f"/api/sessions/{fork['sessionId']}/messages", **full), "after")


@pytest.mark.parametrize("types", ["", "&type=a", "&type=b,c", "&type=result", "&type=x"])
def test_links_cover_all_messages_of_an_ended_run(api: Client, ended: dict[str, Any], types: str) -> None:
    path = f"/api/runs/{ended['id']}/messages"
    whole = api.get(f"{path}?{types.strip('&')}").json

    for limit in (1, 2, 3, 7, 8, 9):
        found = pages(api, f"{path}?limit={limit}{types}")
        assert [message for page in found for message in page] == whole
        assert all(len(page) == limit for page in found[:-1])


def test_the_link_of_a_running_run_has_the_last_index_that_was_read(api: Client, project: Path) -> None:
    run = held(api, project, "abcbb")
    path = f"/api/runs/{run['id']}/messages"

    assert link(api.get(path)) == {"after": "4"}
    assert link(api.get(path, type="a")) == {"after": "4", "type": "a"}
    assert link(api.get(path, type="x")) == {"after": "4", "type": "x"}
    assert link(api.get(path, type="b", limit=1)) == {"after": "1", "type": "b", "limit": "1"}
    assert link(api.get(path, type="b", limit=1, after=1)) == {"after": "3", "type": "b", "limit": "1"}
    assert link(api.get(path, after=4)) == {"after": "4"}
    waited = api.get(path, after=4, wait=0.01)
    assert [waited.json, link(waited)["after"]] == [[], "4"]

    following = api.get(path, type="a,result").next
    api.delete(f"/api/runs/{run['id']}")
    assert [letters(page) for page in pages(api, following)] == ["r"]
    assert api.get(path).next is None
    assert api.get(path, after=5).next is None
    assert api.get(path, type="x").next is None
    assert link(api.get(path, limit=5))["after"] == "4"
    assert api.get(path, limit=6).next is None


def test_a_wait_for_messages_ends_with_the_next_one(lite: Client, project: Path) -> None:
    run = held(lite, project, "ab")
    paths = [
        f"/api/runs/{run['id']}/messages?after=1",
        f"/api/sessions/{run['sessionId']}/messages?after={run['id']}:1",
    ]
    begun = time.monotonic()

    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(lite.get, f"{path}&wait={LONG}{more}") for path in paths for more in ("", "&type=result")
        ]
        lite.delete(f"/api/runs/{run['id']}")
    assert [letters(answer.result().json) for answer in answers] == ["r"] * 4
    assert time.monotonic() - begun < LONG


def test_a_wait_for_messages_ignores_other_types(lite: Client, project: Path) -> None:
    run = held(lite, project, "ab")
    begun = time.monotonic()
    assert lite.messages(run["id"], type="x", wait=0.3) == []
    assert time.monotonic() - begun >= 0.3
    lite.delete(f"/api/runs/{run['id']}")


def test_a_wait_for_messages_ends_at_once_if_there_are_some_or_the_run_has_ended(lite: Client, project: Path) -> None:
    run = held(lite, project, "ab")
    begun = time.monotonic()

    assert letters(lite.messages(run["id"], wait=LONG)) == "ab"
    assert letters(lite.messages(run["id"], wait=LONG, after=0)) == "b"
    assert letters(lite.messages(run["id"], wait=LONG, type="a")) == "a"
    lite.delete(f"/api/runs/{run['id']}")
    assert letters(lite.messages(run["id"], wait=LONG, after=1)) == "r"
    assert lite.messages(run["id"], wait=LONG, after=2) == []
    assert lite.messages(run["id"], wait=LONG, type="x") == []
    last = f"{run['id']}:2"
    assert lite.get(f"/api/sessions/{run['sessionId']}/messages", wait=LONG, after=last).json == []
    assert time.monotonic() - begun < LONG


def test_a_wait_for_a_run_ends_with_the_run_or_the_timeout(lite: Client, project: Path) -> None:
    run = held(lite, project)
    begun = time.monotonic()
    assert lite.run(run["id"], wait=0.3)["status"] == "running"
    assert time.monotonic() - begun >= 0.3

    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(lite.run, run["id"], LONG)
        lite.delete(f"/api/runs/{run['id']}")
    assert waited.result()["status"] == "cancelled"
    assert lite.run(run["id"], wait=LONG) == waited.result()
    assert time.monotonic() - begun < LONG


# ---- the messages of a session


def test_a_session_has_the_messages_of_its_runs_in_order(api: Client, project: Path) -> None:
    first = api.start(project, script(*kinds("ab")))
    second = api.resume(first["sessionId"], script(*kinds("cd")))
    path = f"/api/sessions/{first['sessionId']}/messages"

    whole = api.messages(first["id"]) + api.messages(second["id"])
    assert letters(whole) == "abrcdr"
    answer = api.get(path)
    assert [answer.json, answer.next] == [whole, None]
    for place, expected in (
        (f"{first['id']}:-1", "abrcdr"),
        (f"{first['id']}:1", "rcdr"),
        (f"{first['id']}:2", "cdr"),
        (f"{second['id']}:-1", "cdr"),
        (f"{second['id']}:1", "r"),
        (f"{second['id']}:2", ""),
    ):
        assert letters(api.get(path, after=place).json) == expected
    assert letters(api.get(path, after=f"{first['id']}:0", type="b,c,result", limit=3).json) == "brc"


def test_links_cover_all_messages_of_a_session(api: Client, project: Path) -> None:
    first = api.start(project, script(*kinds("aab")))
    api.resume(first["sessionId"], script(*kinds("ba")))
    api.resume(first["sessionId"], script(*kinds("")))
    path = f"/api/sessions/{first['sessionId']}/messages"

    for types in ("", "&type=a", "&type=result", "&type=x"):
        whole = api.get(f"{path}?{types.strip('&')}").json
        for limit in (1, 2, 3, 4, 9):
            found = pages(api, f"{path}?limit={limit}{types}")
            assert [message for page in found for message in page] == whole
            assert all(len(page) == limit for page in found[:-1])


def test_a_link_of_a_running_session_leads_to_later_messages(api: Client, project: Path) -> None:
    first = api.start(project, script(*kinds("ab")))
    path = f"/api/sessions/{first['sessionId']}/messages"
    second = api.resume(first["sessionId"], script(*kinds("cd"), hold=True), wait=0)
    api.wait_for_message(second["id"], "d")

    answer = api.get(path)
    assert [letters(answer.json), link(answer)] == ["abrcd", {"after": f"{second['id']}:1"}]
    api.delete(f"/api/runs/{second['id']}")
    assert [letters(page) for page in pages(api, answer.next)] == ["r"]


@pytest.mark.parametrize("fate", ["waits", "is cancelled"])
def test_a_link_of_a_session_misses_nothing_when_another_run(api: Client, project: Path, fate: str) -> None:
    first = held(api, project, "ab")
    second = api.resume(first["sessionId"], script(*kinds("cd")), wait=0, ifBusy="enqueue")
    if fate == "is cancelled":
        api.delete(f"/api/runs/{second['id']}")
    path = f"/api/sessions/{first['sessionId']}/messages"

    read = api.get(path)
    assert letters(read.json) == "ab"
    api.delete(f"/api/runs/{first['id']}")
    api.run(second["id"])
    rest = [message for page in pages(api, read.next) for message in page]
    whole = letters(api.get(path).json)
    assert whole == ("abrcdr" if fate == "waits" else "abr")
    assert letters(read.json + rest) == whole


def test_a_full_history_begins_with_the_messages_that_the_session_continued(api: Client, project: Path) -> None:
    def message(number: int) -> dict[str, Any]:
        return {"type": "assistant", "uuid": f"{UUID}{number}", "parent_tool_use_id": None, "n": number}

    first = api.start(project, script({"type": "x"}, message(1), {"type": "y"}, message(2)))
    second = api.resume(first["sessionId"], script(message(3), {"type": "z"}))
    at_head = api.fork(first["sessionId"], script(message(4)))
    at_run = api.fork(first["sessionId"], script(message(5)), atRunId=first["id"])
    at_message = api.fork(first["sessionId"], script(message(6)), atMessage=f"{UUID}1")
    twig = api.fork(at_message["sessionId"], script(message(7)))
    runs = (first, second, at_head, at_run, at_message, twig)
    own = {run["id"]: api.messages(run["id"]) for run in runs}

    expected = [
        (first, own[first["id"]] + own[second["id"]]),
        (at_head, own[first["id"]] + own[second["id"]] + own[at_head["id"]]),
        (at_run, own[first["id"]] + own[at_run["id"]]),
        (at_message, own[first["id"]][:2] + own[at_message["id"]]),
        (twig, own[first["id"]][:2] + own[at_message["id"]] + own[twig["id"]]),
    ]
    for run, whole in expected:
        path = f"/api/sessions/{run['sessionId']}/messages"
        assert api.get(path, history="full").json == whole
        for limit in (1, 2, 5):
            found = pages(api, f"{path}?history=full&limit={limit}")
            assert [message for page in found for message in page] == whole
        assert letters(api.get(path, history="full", type="result").json) == letters(
            [message for message in whole if message["type"] == "result"]
        )
    path = f"/api/sessions/{twig['sessionId']}/messages"
    assert api.get(path).json == own[twig["id"]]
    assert api.get(path, history="full", after=f"{first['id']}:0").json == expected[4][1][1:]
    refused(api.get(path, after=f"{first['id']}:0"), "after")


# ---- long lists

COUNT = 20_000


@pytest.fixture(scope="module")
def long(api: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a run with 20,000 messages and 8 MB."""
    run = api.start(folder_of(tmp_path_factory.mktemp("long")), script(*kinds("ab"), count=COUNT, pad=200))
    assert run["status"] == "completed"
    return run


def test_a_long_list_is_complete(api: Client, long: dict[str, Any]) -> None:
    answer = api.get(f"/api/runs/{long['id']}/messages")

    assert len(answer.body) > 8_000_000
    assert "Content-Length" not in answer.headers
    messages = answer.json
    assert letters(messages) == "ab" + "a" * COUNT + "r"
    assert len({message["uuid"] for message in messages[2:]}) == COUNT + 1
    assert messages[-1] == long["result"]
    assert answer.next is None
    assert api.get(f"/api/sessions/{long['sessionId']}/messages").body == answer.body


def test_a_long_list_is_read_in_parts(api: Client, long: dict[str, Any]) -> None:
    path = f"/api/runs/{long['id']}/messages"
    whole = api.get(path).json

    parts = pages(api, f"{path}?limit=1000")
    assert [message for part in parts for message in part] == whole
    assert api.get(path, after=COUNT // 2).json == whole[COUNT // 2 + 1 :]
    assert api.get(path, type="b,result").json == [whole[1], whole[-1]]
    assert api.get(path, type="assistant", limit=1, after=COUNT - 5).json == [whole[COUNT - 4]]


def test_a_disconnect_during_a_long_list_does_no_harm(api: Client, long: dict[str, Any]) -> None:
    path = f"/api/runs/{long['id']}/messages"
    for _ in range(10):
        with connect(api, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert api.get("/health").status == 200
    assert len(api.get(path).json) == COUNT + 3


# ---- all responses

PATHS = [
    "/",
    "/health",
    "/api/runs",
    "/api/runs?limit=1",
    "/api/runs/{run}",
    "/api/runs/{run}/messages",
    "/api/runs/{run}/messages?limit=1000",
    "/api/sessions",
    "/api/sessions?limit=1",
    "/api/sessions/{session}",
    "/api/sessions/{session}/messages",
    "/api/sessions/{session}/runs",
    "/api/sessions/{session}/forks",
    f"/api/runs/{NOWHERE}",
    f"/api/sessions/{NOWHERE}/messages",
    "/api/runs?limit=0",
    "/nowhere",
]


@pytest.mark.parametrize("path", PATHS)
def test_head_has_the_headers_of_get_and_no_body(api: Client, long: dict[str, Any], path: str) -> None:
    path = path.format(run=long["id"], session=long["sessionId"])
    get, head = api.get(path), api.request("HEAD", path)

    def lasting(answer: Answer) -> dict[str, str]:
        return {name: value for name, value in answer.headers.items() if name not in ("Date", "X-Request-Id")}

    assert [head.status, lasting(head)] == [get.status, lasting(get)]
    assert get.headers["Content-Type"] == "application/json"
    assert get.json is not None
    request = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connect(api, request.encode()) as connection:
        assert read_all(connection)[1] == b"", "an answer to HEAD ends with its headers"


def test_the_index_lists_every_endpoint(one_worker: Client) -> None:
    index = one_worker.get("/").json

    assert index["name"]
    assert index["version"]
    assert all(endpoint["does"] for endpoint in index["endpoints"])
    listed = {f"{endpoint['method']} {endpoint['path']}" for endpoint in index["endpoints"]}
    assert listed >= {
        "GET /",
        "GET /health",
        "POST /api/runs/start",
        "POST /api/runs/resume",
        "POST /api/runs/fork",
        "GET /api/runs",
        "GET /api/runs/{runId}",
        "DELETE /api/runs/{runId}",
        "GET /api/runs/{runId}/messages",
        "GET /api/runs/{runId}/stream",
        "GET /api/approvals/{approvalId}",
        "GET /api/sessions",
        "GET /api/sessions/{sessionId}",
        "PATCH /api/sessions/{sessionId}",
        "GET /api/sessions/{sessionId}/messages",
        "GET /api/sessions/{sessionId}/stream",
        "GET /api/sessions/{sessionId}/runs",
        "GET /api/sessions/{sessionId}/forks",
    }


@pytest.mark.parametrize(
    "path", ["/nowhere", "/api", "/api/", "/api/run", "/api/runs/", "/api/runs/x/y", "/%00", "/%FF"]
)
def test_unknown_paths_are_not_found(one_worker: Client, path: str) -> None:
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "BREW"):
        assert "GET /" in refused(one_worker.request(method, path), None, 404, "NOT_FOUND")


@pytest.mark.parametrize("path", ["/api//runs", "//api/runs//x", "/api/sessions//x/runs"])
def test_an_extra_slash_is_answered_with_json(one_worker: Client, path: str) -> None:
    assert one_worker.get(path).headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/", "GET"),
        ("DELETE", "/health", "GET"),
        ("POST", "/api/runs", "GET"),
        ("PUT", "/api/runs", "GET"),
        ("PATCH", "/api/runs/start", "POST"),
        ("PUT", "/api/runs/{run}", "GET DELETE"),
        ("POST", "/api/runs/{run}", "GET DELETE"),
        ("DELETE", "/api/runs/{run}/messages", "GET"),
        ("DELETE", "/api/sessions", "GET"),
        ("DELETE", "/api/sessions/{session}", "GET PATCH"),
        ("POST", "/api/sessions/{session}/runs", "GET"),
        ("BREW", "/api/sessions/{session}/forks", "GET"),
    ],
)
def test_an_unsupported_method_is_refused_with_the_supported_ones(
    one_worker: Client, method: str, path: str, allowed: str
) -> None:
    answer = one_worker.request(method, path.format(run=NOWHERE, session=NOWHERE))
    refused(answer, None, 405, "METHOD_NOT_ALLOWED")
    assert set(allowed.split()) <= set(answer.headers["Allow"].split(", "))
    assert method not in answer.headers["Allow"].split(", ")


@pytest.mark.parametrize("given", ["a", "trace-1:2.3_4", "x" * 100])
def test_a_clients_own_request_id_is_returned(one_worker: Client, given: str) -> None:
    for path in ("/", f"/api/runs/{NOWHERE}", "/nowhere"):
        assert one_worker.request("GET", path, headers={"X-Request-Id": given}).headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "x" * 101, "a b", "a\tb", "<script>", "\u00e9", "a,b"])
def test_an_unusable_request_id_is_replaced(one_worker: Client, given: str) -> None:
    answers = [one_worker.request("GET", "/", headers={"X-Request-Id": given}) for _ in range(2)]
    one, other = (answer.headers["X-Request-Id"] for answer in answers)
    assert re.fullmatch(r"[\w.:-]{1,100}", one, re.ASCII)
    assert len({one, other, given}) == 3


# ---- requests that are held open


@pytest.fixture
def running_run(one_worker: Client, project: Path) -> dict[str, Any]:
    """Return a run that does not end by itself: it waits for the worker, and is `running` nevertheless."""
    return waiting(one_worker, project, 1)[0]


def has_free_slot(client: Client, run: dict[str, Any]) -> bool:
    """Return whether the slot is free. Then a wait for a running run lasts until its timeout."""
    begun = time.monotonic()
    assert client.run(run["id"], wait=0.2)["status"] == "running"
    return time.monotonic() - begun >= 0.2


def take_the_slot(client: Client, run: dict[str, Any], path: str) -> socket.socket:
    """Return a connection that waits for a run in the only slot."""
    until(lambda: has_free_slot(client, run))
    request = f"GET {path}wait={LONG} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    connection = connect(client, request)
    client.get("/health")  # gives the first request time to arrive
    until(lambda: not has_free_slot(client, run) or is_answered(connection))
    if not is_answered(connection):
        return connection
    connection.close()  # `has_free_slot` itself had taken the slot
    return take_the_slot(client, run, path)


def is_answered(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])


def wait_paths(run: dict[str, Any]) -> list[str]:
    """Return the paths on which a request can wait for a run."""
    return [
        f"/api/runs/{run['id']}?",
        f"/api/runs/{run['id']}/messages?",
        f"/api/sessions/{run['sessionId']}/messages?after={run['id']}:-1&",
    ]


@pytest.mark.parametrize("place", range(3), ids=["run", "messages of a run", "messages of a session"])
def test_a_wait_without_a_free_slot_is_answered_at_once(
    one_worker: Client, running_run: dict[str, Any], project: Path, place: int
) -> None:
    with take_the_slot(one_worker, running_run, wait_paths(running_run)[place]) as connection:
        begun = time.monotonic()
        assert one_worker.run(running_run["id"], wait=LONG)["status"] == "running"
        assert one_worker.messages(running_run["id"], wait=LONG) == []
        assert one_worker.get(f"/api/sessions/{running_run['sessionId']}/messages", wait=LONG).json == []
        started = one_worker.post("/api/runs/start", {"cwd": str(project), "prompt": "Hello."}, wait=LONG)
        assert [started.status, started.json["status"]] == [202, "running"]
        # A request without a wait succeeds.
        assert one_worker.get("/health").status == 200
        assert len(one_worker.get("/api/runs", cwd=project).json) == 2
        assert one_worker.delete(f"/api/runs/{started.json['id']}").json["status"] == "cancelled"
        assert time.monotonic() - begun < LONG

        assert not is_answered(connection)
        one_worker.delete(f"/api/runs/{running_run['id']}")
        until(lambda: is_answered(connection))
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("place", range(3), ids=["run", "messages of a run", "messages of a session"])
def test_a_client_that_disconnects_while_it_waits_frees_its_slot(
    one_worker: Client, running_run: dict[str, Any], place: int
) -> None:
    take_the_slot(one_worker, running_run, wait_paths(running_run)[place]).close()
    until(lambda: has_free_slot(one_worker, running_run))


def test_a_client_that_disconnects_while_its_start_waits_frees_its_slot(
    one_worker: Client, running_run: dict[str, Any], project: Path
) -> None:
    body = json.dumps({"cwd": str(project), "prompt": "Hello."}).encode()
    head = f"POST /api/runs/start?wait={LONG} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    until(lambda: has_free_slot(one_worker, running_run))
    connection = connect(one_worker, head.encode(), b"Content-Length: %d\r\n\r\n" % len(body), body)
    until(lambda: len(one_worker.get("/api/runs", cwd=project).json) == 2)
    until(lambda: not has_free_slot(one_worker, running_run) or is_answered(connection))
    assert not is_answered(connection)
    connection.close()

    until(lambda: has_free_slot(one_worker, running_run))
    started = one_worker.get("/api/runs", cwd=project).json[0]
    assert started["status"] == "running", "the run ended when the client that waited for it disconnected"
    one_worker.delete(f"/api/runs/{started['id']}")
