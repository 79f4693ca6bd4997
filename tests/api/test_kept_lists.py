"""Lists of messages that clients may keep (ETag, 304), and compressed lists."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import connect, folder_of, held, kinds, letters, read_all, script
from tests.client import Answer, Client

# As waitress writes ETag; the names of headers have no case.
ETAG = "Etag"
GZIP = {"Accept-Encoding": "gzip, deflate, br"}


@pytest.fixture(scope="module")
def long(lite: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return an ended run whose list of messages is too long to be sent whole."""
    run = lite.start(folder_of(tmp_path_factory.mktemp("long")), script(*kinds("ab"), count=3_000, pad=300))
    assert run["status"] == "completed"
    return run


def get(client: Client, path: str, headers: Mapping[str, str]) -> Answer:
    return client.request("GET", path, headers=headers)


def if_none_match(client: Client, path: str, tags: str) -> Answer:
    return get(client, path, {"If-None-Match": tags})


# ---- ETag and 304


@pytest.mark.parametrize("query", ["", "?limit=2", "?type=a", "?after=1&limit=1", "?after=3"])
def test_a_client_may_keep_the_messages_of_an_ended_run(api: Client, project: Path, query: str) -> None:
    run = api.start(project, script(*kinds("aba")))
    path = f"/api/runs/{run['id']}/messages{query}"

    first = api.get(path)
    kept = {name: first.headers[name] for name in (ETAG, "Cache-Control", "Vary")}
    assert kept[ETAG].startswith('"'), "not strong"
    assert kept["Cache-Control"].split(", ") == ["private", "max-age=3600", "immutable"]
    assert kept["Vary"] == "Accept-Encoding"

    for tags in (kept[ETAG], f"W/{kept[ETAG]}", f'"other", {kept[ETAG]}', "*"):
        for method in ("GET", "HEAD"):
            again = api.request(method, path, headers={"If-None-Match": tags})
            assert [again.status, again.body] == [304, b""]
            assert {name: again.headers.get(name) for name in kept} == kept
            assert "Content-Type" not in again.headers
    for tags in ('"other"', "nonsense", ""):
        again = if_none_match(api, path, tags)
        assert [again.status, again.body] == [200, first.body]


def test_the_tag_of_a_run_is_its_own(lite: Client, project: Path) -> None:
    runs = [lite.start(project, script(*kinds("a"))) for _ in range(2)]
    paths = [f"/api/runs/{run['id']}/messages" for run in runs]
    tags = [lite.get(path).headers[ETAG] for path in paths]

    assert tags[0] != tags[1]
    assert if_none_match(lite, paths[1], tags[0]).status == 200


def test_what_can_still_change_is_not_kept(api: Client, project: Path) -> None:
    run = held(api, project, "ab")
    lists = [f"/api/runs/{run['id']}/messages", f"/api/runs/{run['id']}/messages?limit=1"]
    session = f"/api/sessions/{run['sessionId']}/messages"

    def assert_not_kept(path: str) -> None:
        answer = if_none_match(api, path, "*")
        assert answer.status == 200
        assert not {ETAG, "Cache-Control"} & set(answer.headers)

    for path in (*lists, session, f"/api/runs/{run['id']}"):
        assert_not_kept(path)
    api.delete(f"/api/runs/{run['id']}")
    for path in (session, f"/api/runs/{run['id']}", f"{lists[0]}?wait=1"):
        assert_not_kept(path)
    assert if_none_match(api, lists[0], "*").status == 304


def test_a_stream_of_an_ended_run_is_not_kept(lite: Client, project: Path) -> None:
    run = lite.start(project, script(*kinds("a")))

    answer = get(lite, f"/api/runs/{run['id']}/stream", {"If-None-Match": "*", **GZIP})

    assert answer.status == 200
    assert "no-store" in answer.headers["Cache-Control"]
    assert not {ETAG, "Content-Encoding"} & set(answer.headers)


# ---- gzip


def test_a_long_list_is_compressed_for_clients_that_accept_it(lite: Client, long: dict[str, Any]) -> None:
    for path in (f"/api/runs/{long['id']}/messages", f"/api/sessions/{long['sessionId']}/messages"):
        plain, compressed = lite.get(path), get(lite, path, GZIP)

        assert "Content-Encoding" not in plain.headers
        assert compressed.headers["Content-Encoding"] == "gzip"
        assert plain.headers["Vary"] == compressed.headers["Vary"] == "Accept-Encoding"
        assert compressed.headers["Content-Type"] == "application/json"
        assert len(compressed.body) < len(plain.body) / 2
        assert gzip.decompress(compressed.body) == plain.body
        assert letters(plain.json) == "ab" + "a" * 3_000 + "r"
        head = lite.request("HEAD", path, headers=GZIP)
        assert [head.headers["Content-Encoding"], head.body] == ["gzip", b""]


def test_each_encoding_has_its_own_tag(lite: Client, long: dict[str, Any]) -> None:
    path = f"/api/runs/{long['id']}/messages"
    plain, compressed = (get(lite, path, headers).headers[ETAG] for headers in ({}, GZIP))

    assert plain != compressed
    assert get(lite, path, {"If-None-Match": compressed, **GZIP}).status == 304
    assert get(lite, path, {"If-None-Match": compressed}).status == 200
    assert get(lite, path, {"If-None-Match": plain, **GZIP}).status == 200


@pytest.mark.parametrize("accepted", ["identity", "", "br", "gzip;q=0", "gzip;q=0.5, identity", "*;q=0", "*"])
def test_a_list_is_not_compressed_for_other_clients(lite: Client, long: dict[str, Any], accepted: str) -> None:
    answer = get(lite, f"/api/runs/{long['id']}/messages", {"Accept-Encoding": accepted})

    assert answer.status == 200
    assert "Content-Encoding" not in answer.headers
    assert len(answer.json) == long["messageCount"]


def test_short_answers_are_not_compressed(lite: Client, long: dict[str, Any]) -> None:
    for path in ("/health", "/api/runs", f"/api/runs/{long['id']}", f"/api/runs/{long['id']}/messages?limit=10"):
        answer = get(lite, path, GZIP)
        assert answer.json
        assert "Content-Encoding" not in answer.headers


def test_a_disconnect_during_a_compressed_list_does_no_harm(lite: Client, long: dict[str, Any]) -> None:
    path = f"/api/runs/{long['id']}/messages"
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n".encode()
    for _ in range(5):
        with connect(lite, request) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    with connect(lite, request) as connection:
        head, body = read_all(connection)
    assert b"Content-Encoding: gzip" in head
    assert body
