"""The lists of runs and of sessions: filters, order, summaries, and their cursors."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import held, ids, ids_of, pages, refused, write_tokens
from tests.client import Answer, Client
from tests.conftest import ServeFunction

TOKEN = "a-token-of-many-characters"
LONG_FIELDS = {"prompt", "options", "result", "permissionDenials"}
NEVER = "9999-01-01"


def found(client: Client, path: str, cwd: Path, **parameters: object) -> list[str]:
    """Return the ids of the items of a list, without its order."""
    name = "id" if path.endswith("runs") else "sessionId"
    return sorted(ids(client.get(path, cwd=cwd, **parameters), name))


def sorted_ids(name: str, *runs: dict[str, Any]) -> list[str]:
    return sorted({run[name] for run in runs})


# ---- filters


def test_lists_are_filtered_by_the_metadata_of_sessions(api: Client, project: Path) -> None:
    odd = {"a.b": "x y", "é": 1, "yes": True, "nil": None, "half": 0.5, "list": ["x"]}
    one = api.start(project, "One.", metadata={"team": "docs", **odd})
    two = api.start(project, "Two.", metadata={"team": "docs", "n": "1"})
    again = api.resume(one["sessionId"], "Again.")
    api.start(project, "Three.")

    for values, runs in (
        ({"team": "docs"}, [one, two, again]),
        ({"team": "docs", "n": "1"}, [two]),
        ({"a.b": "x y", "é": "1", "yes": "true", "nil": "null", "half": "0.5"}, [one, again]),
        ({"list": '["x"]'}, []),
        ({"Team": "docs"}, []),
        ({"team": ""}, []),
    ):
        parameters = {f"metadata.{key}": value for key, value in values.items()}
        assert found(api, "/api/runs", project, **parameters) == sorted_ids("id", *runs), values
        assert found(api, "/api/sessions", project, **parameters) == sorted_ids("sessionId", *runs), values


def test_the_first_fifty_values_of_the_metadata_are_filtered_by(api: Client, project: Path) -> None:
    def found_by(number: int) -> list[str]:
        return found(api, "/api/runs", project, **{f"metadata.key{number}": number})

    values = {"nested": {}, **{f"key{number}": number for number in range(51)}}
    run = api.start(project, "Hello.", metadata=values)
    assert [found_by(number) for number in (0, 1, 49, 50)] == [[run["id"]]] * 3 + [[]]

    api.patch(f"/api/sessions/{run['sessionId']}", {"metadata": {**values, "key0": "changed"}})
    assert [found_by(number) for number in (0, 1, 49, 50)] == [[], [run["id"]], [run["id"]], []]


def test_changed_metadata_is_filtered_at_once(api: Client, project: Path) -> None:
    run = api.start(project, "Hello.", metadata={"state": "open"})
    api.resume(run["sessionId"], "More.")
    api.patch(f"/api/sessions/{run['sessionId']}", {"metadata": {"state": "closed"}})

    assert [len(found(api, "/api/runs", project, **{"metadata.state": state})) for state in ("open", "closed")] == [
        0,
        2,
    ]
    assert found(api, "/api/sessions", project, **{"metadata.state": "closed"}) == [run["sessionId"]]


def test_pages_of_filtered_lists_have_every_item_once(api: Client, project: Path) -> None:
    runs = [api.start(project, "Hello.", metadata={"kind": "paged"}, wait=0) for _ in range(5)]
    api.start(project, "Hello.", wait=0)

    for path, name in (("/api/runs", "id"), ("/api/sessions", "sessionId")):
        for filters in (
            "metadata.kind=paged",
            "metadata.kind=paged&since=2020-01-01",
            f"metadata.kind=paged&until={NEVER}",
        ):
            for order, expected in (("asc", runs), ("desc", runs[::-1])):
                listed = pages(api, f"{path}?cwd={project}&{filters}&order={order}&limit=2")
                assert [ids_of(page, name) for page in listed] == [
                    ids_of(expected[at : at + 2], name) for at in (0, 2, 4)
                ]


def test_lists_are_filtered_by_time(api: Client, project: Path) -> None:
    first, second = api.start(project, "One."), api.start(project, "Two.")
    at = second["createdAt"]
    assert first["createdAt"] < at

    for path, name in (("/api/runs", "id"), ("/api/sessions", "sessionId")):
        assert found(api, path, project, since=at) == [second[name]]
        assert found(api, path, project, until=at) == [first[name]]
        assert found(api, path, project, since=first["createdAt"], until=at) == [first[name]]
        assert found(api, path, project, since=NEVER) == found(api, path, project, until="2020-01-01T00:00+01:00") == []


def test_a_session_is_filtered_by_its_latest_activity(api: Client, project: Path) -> None:
    session = api.start(project, "One.")
    resumed = api.resume(session["sessionId"], "Two.")

    assert found(api, "/api/sessions", project, since=resumed["createdAt"]) == [session["sessionId"]]
    assert found(api, "/api/sessions", project, until=resumed["createdAt"]) == []


def test_runs_are_filtered_by_their_error(api: Client, project: Path) -> None:
    failed = api.start(project, json.dumps({"exit": 3}))
    api.start(project, "Hello.")
    assert failed["error"], failed

    assert found(api, "/api/runs", project, errorCode=failed["error"]["code"]) == [failed["id"]]
    assert found(api, "/api/runs", project, errorCode="OPTIONS_UNUSABLE") == []


def test_running_runs_are_those_that_wait_and_those_that_work(serve_all: ServeFunction, project: Path) -> None:
    client = Client(serve_all(CCM_MAX_CONCURRENT_RUNS=1).url)
    client.start(project, "Ended.")
    working = held(client, project)
    queued = client.start(project, "Hello.", wait=0)

    assert found(client, "/api/runs", project, waiting="true") == [queued["id"]]
    assert found(client, "/api/runs", project, waiting="false") == [working["id"]]
    assert found(client, "/api/runs", project, waiting="true", status="completed") == []


class ClientWithToken(Client):
    """A client that sends a token with each request."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url)
        self.token = token

    def request(self, *words: Any, **named: Any) -> Answer:
        return super().request(*words, **{**named, "headers": {"Authorization": f"Bearer {self.token}"}})


def test_lists_are_filtered_by_the_client(serve_all: ServeFunction, tmp_path: Path, project: Path) -> None:
    write_tokens(tmp_path / "tokens", f"ann:{TOKEN}-a\nbob:{TOKEN}-b\n")
    url = serve_all(CCM_API_TOKEN_FILE=tmp_path / "tokens").url
    ann, bob = (ClientWithToken(url, f"{TOKEN}-{name}") for name in "ab")
    one = ann.start(project, "Hello.")
    two = bob.resume(one["sessionId"], "Hello.")
    three = bob.start(project, "Hello.")

    assert found(ann, "/api/runs", project, createdBy="ann") == [one["id"]]
    assert found(ann, "/api/runs", project, createdBy="bob") == sorted_ids("id", two, three)
    # A session is that of the client that started its first run.
    assert found(ann, "/api/sessions", project, createdBy="ann") == [one["sessionId"]]
    assert found(ann, "/api/sessions", project, createdBy="bob") == [three["sessionId"]]


# ---- order


def test_lists_have_either_order(api: Client, project: Path) -> None:
    runs = [api.start(project, "Hello.", wait=0) for _ in range(3)]

    for path, name in (("/api/runs", "id"), ("/api/sessions", "sessionId")):
        expected = ids_of(runs, name)
        assert ids(api.get(path, cwd=project, order="asc"), name) == expected
        assert ids(api.get(path, cwd=project, order="desc"), name) == expected[::-1]
        assert ids(api.get(path, cwd=project), name) == expected[::-1]


def test_a_list_from_the_oldest_on_ends_with_what_was_added_meanwhile(api: Client, project: Path) -> None:
    runs = [api.start(project, "Hello.", wait=0) for _ in range(3)]
    first = api.get("/api/runs", cwd=project, order="asc", limit=2)
    runs.append(api.start(project, "Hello.", wait=0))

    rest = [run["id"] for page in pages(api, first.next) for run in page]
    assert ids(first) + rest == ids_of(runs)


# ---- summaries


def test_a_summary_leaves_out_what_may_be_long(api: Client, project: Path) -> None:
    run = api.start(project, "Hello.", metadata={"a": 1}, title="T")
    whole = api.get(f"/api/runs/{run['id']}").json

    (summary,) = api.get("/api/runs", cwd=project, fields="summary").json
    assert summary == {name: value for name, value in whole.items() if name not in LONG_FIELDS}
    (listed,) = api.get("/api/sessions", cwd=project).json
    (summary,) = api.get("/api/sessions", cwd=project, fields="summary").json
    assert summary == {name: value for name, value in listed.items() if name != "metadata"}
    assert listed == api.get(f"/api/sessions/{run['sessionId']}").json | {"match": None}


# ---- bad input

TIMES = ["", "x", "1", "yesterday", "2026-13-01", "2026-11-22T25:00:00Z", "0001-01-01T00:00%2B23:00", "2026-11-22%00"]
BAD = [
    ("since", TIMES),
    ("until", TIMES),
    ("order", ["", "up", "ASC", "asc,desc"]),
    ("fields", ["", "all", "id"]),
    ("createdBy", ["%00"]),
    ("metadata", ["", "x", "a=b"]),
    ("metadata.", ["x", ""]),
]


@pytest.mark.parametrize("path", ["/api/runs", "/api/sessions"])
@pytest.mark.parametrize(("name", "values"), BAD, ids=[name for name, _ in BAD])
def test_a_bad_filter_is_named(lite: Client, path: str, name: str, values: list[str]) -> None:
    for value in values:
        assert name in refused(lite.get(f"{path}?{name}={value}"), name)


def test_bad_filters_of_one_list_are_named(lite: Client) -> None:
    for value in ("", "1", "True", "yes", "null"):
        assert refused(lite.get(f"/api/runs?waiting={value}"), "waiting") == "waiting: must be true or false."
    assert "must be one of INTERRUPTED, " in refused(lite.get("/api/runs?errorCode=%00"), "errorCode")
    for path in ("/api/runs", "/api/sessions"):
        for value in ("", "project", "./project"):
            assert "is not an absolute path" in refused(lite.get(f"{path}?cwd={value}"), "cwd")
    for path, name in (("/api/runs", "q"), ("/api/sessions", "waiting"), ("/api/sessions", "errorCode")):
        refused(lite.get(f"{path}?{name}=true"), name)
    assert "is given 2 times" in refused(lite.get("/api/runs?metadata.a=1&metadata.a=2"), "metadata.a")
    many = "&".join(f"metadata.k{number}=1" for number in range(11))
    assert "at most 10" in refused(lite.get(f"/api/runs?{many}"), "metadata")
    for path in ("/api/approvals", "/api/sessions/x/runs"):
        refused(lite.get(f"{path}?metadata.a=1"), "metadata.a")
    for name in ("since", "until"):
        message = refused(lite.get(f"/api/runs?{name}=2026-11-22T05:40:54+01:00"), name)
        assert "write + as %2B" in message


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


@pytest.mark.parametrize("path", ["/api/runs", "/api/sessions"])
def test_a_cursor_belongs_to_a_list_with_the_same_parameters(lite: Client, path: str) -> None:
    number, timed, searched = encoded("7"), encoded("2026-03-01T10:00:00.000Z,7"), encoded("0,2147483648,1,7")

    for query, accepted in (
        ("", number),
        ("since=2026-01-01&", timed),
        ("until=2026-01-01&", timed),
        ("q=a&", searched),
    ):
        if query == "q=a&" and path == "/api/runs":
            continue
        assert lite.get(f"{path}?{query}cursor={accepted}").status == 200
        for other in {number, timed, searched} - {accepted}:
            assert "take it from a Link header" in refused(lite.get(f"{path}?{query}cursor={other}"), "cursor")
    for text in (
        "1,2",
        "1,2,3,4,5",
        "0,9999999999999999999,1,7",
        "0,1,3,7",
        "2026-03-01,7",
        "2026-03-01T10:00:00.000Z,",
    ):
        for query in ("", "since=2026-01-01&"):
            refused(lite.get(f"{path}?{query}cursor={encoded(text)}"), "cursor")
