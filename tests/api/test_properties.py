"""Properties: the service answers any request in its own format, and returns any stored value as it was given.

The requests are made in process. A default run tries few examples of each property; the tests that are marked
`many_rounds` try many.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pydantic
import pytest
from claude_agent_sdk import ClaudeAgentOptions
from claude_agent_sdk._internal.transport.subprocess_cli import SubprocessCLITransport
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ccm.api.http.options_body import Options
from ccm.core.claude.sdk_options import sdk_arguments
from ccm.json_text import to_json_text
from tests.api.conftest import folder_of
from tests.api.in_process import InProcessService
from tests.client import Answer, Client
from tests.e2e.test_runs import PNG
from tests.postgresql import new_database

FEW, MANY = 30, 500
# All examples go to one service, on purpose: each answer has to be right after any others.
default = settings(max_examples=FEW, deadline=None, suppress_health_check=list(HealthCheck), database=None)
# How many examples a test tries.
each_budget = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.many_rounds)])


def at_most(examples: int) -> settings:
    return settings(default, max_examples=examples)


# Every character, control characters and lone surrogates too.
texts = st.text(st.characters(exclude_categories=()), max_size=20)
sendable_texts = st.text(st.characters(codec="utf-8"), max_size=20)
numbers = st.integers() | st.integers(-(10**400), 10**400) | st.floats()
finite_numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


def json_values(scalars: st.SearchStrategy[Any], names: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
        max_leaves=10,
    )


values = json_values(numbers | texts, texts)


class World:
    """A service and the ids that requests to it can refer to.

    Args:
        bodies: for each path a body that is right and has every field.
        ids: of a run that has ended, in a session that nothing else happens to.
    """

    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        run, quiet = client.start(folder, "Hello."), client.start(folder, "Hello.")
        self.bodies = _bodies(folder, run, client.messages(run["id"], type="assistant")[0]["uuid"])
        # This run takes the only worker, so that every later one only waits.
        client.start(folder, '{"hold": true}', wait=0)
        self.ids = {"run": quiet["id"], "session": quiet["sessionId"]}

    def send(self, path: str, body: Any) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.request("PATCH" if "sessions" in path else "POST", path, data)


SERVICE = {"CCM_MAX_CONCURRENT_RUNS": 1, "CCM_MAX_QUEUED_RUNS": 100_000, "CCM_PRIVILEGED_OPTIONS": "*"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with InProcessService(tmp_path_factory.mktemp("service"), **SERVICE) as service:
        yield World(service.client, folder_of(tmp_path_factory.mktemp("properties")))


@pytest.fixture(scope="module")
def postgresql_world(postgresql: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    database = {"DATABASE_URL": new_database(postgresql)}
    with InProcessService(tmp_path_factory.mktemp("service"), **SERVICE, **database) as service:
        yield World(service.client, folder_of(tmp_path_factory.mktemp("properties")))


AGENT = {"description": "x", "prompt": "x", "tools": ["Read"], "mcpServers": [{"s": {}}], "permissionMode": "plan"}
OPTIONS = {
    "model": "x",
    "systemPrompt": {"type": "preset", "preset": "claude_code", "append": "x"},
    "maxTurns": 1,
    "maxBudgetUsd": 0.5,
    "permissionMode": "plan",
    "settingSources": ["user"],
    "tools": ["Read"],
    "agents": {"poet": AGENT},
    "skills": ["x"],
    "outputFormat": {"type": "json_schema", "schema": {"type": "object"}},
    "thinking": {"type": "enabled", "budgetTokens": 1},
    "env": {"GREETING": "x"},
    "extraArgs": {"x": None},
    "mcpServers": {"s": {"command": "true"}},
    "plugins": [{"type": "local", "path": "/"}],
    "sandbox": {},
    "settings": {},
}


def _bodies(folder: Path, run: dict[str, Any], message: str) -> dict[str, dict[str, Any]]:
    common = {
        "prompt": "x",
        "images": [{"mediaType": "image/png", "data": PNG}],
        "options": OPTIONS,
        "timeoutMs": 60_000,
    }
    session = {"title": "x", "metadata": {"x": [1]}}
    point = {"atRunId": run["id"], "atMessage": message, "cwd": str(folder)}
    return {
        "/api/runs/start": {**common, **session, "cwd": str(folder)},
        "/api/runs/resume": {**common, "sessionId": run["sessionId"], "ifBusy": "enqueue"},
        "/api/runs/fork": {**common, **session, **point, "sessionId": run["sessionId"]},
        f"/api/sessions/{run['sessionId']}": session,
    }


def _containers(value: Any) -> list[Any]:
    """Every object and array in a JSON value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict | list) else []
    return own + [container for part in inner for container in _containers(part)]


def _changed(data: st.DataObject, body: Any) -> Any:
    """The body with a few fields replaced, added or removed, at any depth."""
    body = copy.deepcopy(body)
    for _ in range(data.draw(st.integers(1, 3))):
        container = data.draw(st.sampled_from(_containers(body)))
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        change = data.draw(st.sampled_from(["replace", "add", "remove"])) if keys else "add"
        if change == "remove":
            del container[data.draw(st.sampled_from(keys))]
        elif change == "replace":
            container[data.draw(st.sampled_from(keys))] = data.draw(values)
        elif isinstance(container, dict):
            container[data.draw(texts)] = data.draw(values)
        else:
            container.append(data.draw(values))
    return body


def check(answer: Answer) -> None:
    """Assert what holds for every answer."""
    assert answer.status < 500, answer.body
    assert answer.headers["X-Request-Id"]
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.body.isascii()
    if answer.status >= 400:
        assert set(answer.json) == {"error"}
        assert {"code", "message"} <= set(answer.error)
        assert all(isinstance(text, str) for text in answer.error.values())
    else:
        assert isinstance(answer.json, dict | list)


# ---- requests

each_write = pytest.mark.parametrize("place", range(4), ids=["start", "resume", "fork", "session"])


@each_write
@each_budget
def test_any_change_of_a_right_body_is_answered_properly(world: World, place: int, examples: int) -> None:
    path, right = list(world.bodies.items())[place]

    @at_most(examples)
    @given(data=st.data())
    def is_answered(data: st.DataObject) -> None:
        check(world.send(path, _changed(data, right)))

    is_answered()


@each_write
@each_budget
def test_any_json_is_answered_properly(world: World, place: int, examples: int) -> None:
    @at_most(examples)
    @given(value=values)
    def is_answered(value: Any) -> None:
        check(world.send(list(world.bodies)[place], value))

    is_answered()


@each_write
@each_budget
def test_any_bytes_are_answered_properly(world: World, place: int, examples: int) -> None:
    path, right = list(world.bodies.items())[place]
    whole = json.dumps(right).encode()

    @at_most(examples)
    @given(data=st.data(), noise=st.binary(max_size=50))
    def are_answered(data: st.DataObject, noise: bytes) -> None:
        at = data.draw(st.integers(0, len(whole)))
        body = data.draw(st.sampled_from([noise, whole[:at] + noise, whole[:at] + noise + whole[at:]]))
        check(world.send(path, body))

    are_answered()


READS = ["/api/runs", "/api/runs/{run}", "/api/runs/{run}/messages", "/api/sessions", "/api/sessions/{session}"]
READS += [f"/api/sessions/{{session}}/{name}" for name in ("messages", "runs", "forks")]
PARAMETERS = ["status", "sessionId", "cwd", "mode", "limit", "cursor", "q", "wait", "after", "type", "history"]
LIKELY = ["fresh", "completed", "full", "user,result", "MTIz", "/", "1", "-1"]
queries = st.dictionaries(
    st.sampled_from(PARAMETERS) | st.text(max_size=5),
    st.text(max_size=20) | st.integers().map(str) | st.sampled_from(LIKELY),
    max_size=3,
)
segments = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=5)


@each_budget
def test_any_query_is_answered_properly(world: World, examples: int) -> None:
    @at_most(examples)
    @given(path=st.sampled_from(READS), query=queries)
    def is_answered(path: str, query: dict[str, str]) -> None:
        check(world.client.get(f"{path.format(**world.ids)}?{urlencode(query)}"))

    is_answered()


@each_budget
def test_any_name_is_answered_properly(world: World, examples: int) -> None:
    @at_most(examples)
    @given(path=st.sampled_from(READS), name=segments)
    def is_answered(path: str, name: str) -> None:
        check(world.client.get(path.format(run=quote(name), session=quote(name)) + quote(name)))

    is_answered()


@each_budget
def test_any_request_is_answered_properly_on_postgresql(postgresql_world: World, examples: int) -> None:
    world = postgresql_world

    @at_most(examples)
    @given(data=st.data(), path=st.sampled_from(READS), query=queries)
    def is_answered(data: st.DataObject, path: str, query: dict[str, str]) -> None:
        where, right = data.draw(st.sampled_from(list(world.bodies.items())))
        check(world.send(where, _changed(data, right)))
        check(world.client.get(f"{path.format(**world.ids)}?{urlencode(query)}"))

    is_answered()


# ---- accepted options


@each_budget
def test_any_accepted_options_make_a_command_line(tmp_path: Path, examples: int) -> None:
    @at_most(examples)
    @given(data=st.data())
    def make_a_command_line(data: st.DataObject) -> None:
        try:
            options = Options.model_validate_json(json.dumps(_changed(data, OPTIONS)))
        except pydantic.ValidationError:
            return
        arguments = sdk_arguments(
            options.given(),
            permission_mode="default",
            setting_sources=(),
            directory=tmp_path,
        )
        transport = SubprocessCLITransport("", ClaudeAgentOptions(cli_path="claude", **arguments))
        words = [*transport._build_command(), *arguments["env"], *arguments["env"].values()]
        assert b"\0" not in b"".join(os.fsencode(word) for word in words)

    make_a_command_line()


# ---- stored values


titles = sendable_texts.filter(lambda text: "\0" not in text)
metadata_objects = st.dictionaries(
    sendable_texts, json_values(finite_numbers | sendable_texts, sendable_texts), max_size=4
)


@each_budget
def test_a_title_and_metadata_come_back_as_they_were_given(world: World, examples: int) -> None:
    path = f"/api/sessions/{world.ids['session']}"

    @at_most(examples)
    @given(title=titles, metadata=metadata_objects)
    def come_back(title: str, metadata: dict[str, Any]) -> None:
        answer = world.client.patch(path, {"title": title, "metadata": metadata})
        assert answer.status == 200, answer.body
        assert [answer.json["title"], answer.json["metadata"]] == [title, metadata]
        assert world.client.get(path).json == answer.json

    come_back()


def _as_read(value: Any) -> Any:
    """A value as JSON can carry it: two surrogates that make a pair become one character."""
    return json.loads(json.dumps(value))


@each_budget
def test_a_stored_text_is_ascii_and_reads_as_the_value_that_it_was_made_of(examples: int) -> None:
    @at_most(examples)
    @given(json_values(finite_numbers | texts, texts).map(_as_read))
    @example("\0")
    @example("\ud800")
    @example("\udfff\ud800")
    @example({"\ud800": {"\0": ["\udc00", "\U0001f600", "\x7f\x80\u2028\uffff"]}})
    @example([10**4000, -0.0, 5e-324, 1.7976931348623157e308, 2**53 + 1])
    def reads_as_it_was(value: Any) -> None:
        text = to_json_text(value)
        assert text.isascii()
        assert not {"\0", "\n"} & set(text)
        assert json.loads(text) == value
        assert repr(json.loads(text)) == repr(value)  # tells 1 from 1.0 and from True, and 0.0 from -0.0

    reads_as_it_was()


@pytest.mark.parametrize("inmost", ["1", '"\\ud800"'])
@pytest.mark.parametrize("depth", [100, 255, 300, 900])
def test_a_deep_message_is_stored(depth: int, inmost: str) -> None:
    for left, right in (("[", "]"), ('{"a":', "}")):
        text = left * depth + inmost + right * depth
        assert to_json_text(json.loads(text)) == text
