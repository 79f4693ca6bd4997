"""A real browser follows runs with its own EventSource."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, chromium
from tests.client import Client
from tests.docs import README, page, samples

# Runs in the page: collects the events of an EventSource until it closes, which it does only after a 204.
FOLLOW = """
const [path, done] = arguments;
const seen = [], source = new EventSource(path);
let opened = 0;
source.onopen = () => opened++;
const note = event => seen.push([event.type, event.lastEventId, JSON.parse(event.data)]);
source.onmessage = note;
source.addEventListener("end", note);
source.onerror = () => source.readyState === EventSource.CLOSED && done([opened, seen]);
"""
# The same, until `ends` "end" events have arrived.
FOLLOW_ENDS = """
const [path, ends, done] = arguments;
const seen = [], source = new EventSource(path);
source.onmessage = event => seen.push(event.lastEventId);
source.addEventListener("end", event => {
  seen.push(event.lastEventId);
  if (seen.filter(id => id.endsWith("end")).length === ends) { source.close(); done(seen); }
});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def test_a_browser_follows_a_run_to_its_end_and_does_not_reconnect(
    client: Client, browser: Browser, project: Path
) -> None:
    browser.open(client.url)
    run = client.start(project, "[[slow 20 0.02]]", wait=0, options={"includePartialMessages": True})
    opened, seen = browser.run(FOLLOW, f"/api/runs/{run['id']}/stream")

    messages = client.messages(run["id"])
    expected = [["message", str(index), message] for index, message in enumerate(messages)]
    assert seen == [*expected, ["end", "end", client.run(run["id"])]]
    assert len(messages) > 20
    assert opened == 1


def test_a_browser_follows_a_session_from_run_to_run(client: Client, browser: Browser, project: Path) -> None:
    browser.open(client.url)
    first = client.start(project, "Hello.", wait=0)
    second = client.resume(first["sessionId"], "And now?", wait=0, ifBusy="enqueue")
    seen = browser.run(FOLLOW_ENDS, f"/api/sessions/{first['sessionId']}/stream", 2)

    assert seen == [
        f"{run['id']}:{place}" for run in (first, second) for place in (*range(len(client.messages(run["id"]))), "end")
    ]


# Runs a sample, which reads `runId`, and collects what it logs until `isLast` is true of a line.
RUN_SAMPLE = """
const [runId, code, last, done] = arguments, lines = [];
console.log = (...words) => {
  lines.push(words);
  if (words.join(" ").includes(last)) done(lines);
};
new (Object.getPrototypeOf(async function () {}).constructor)("runId", code)(runId);
"""


def test_the_samples_for_an_event_source_log_each_message_and_the_end(
    client: Client, browser: Browser, project: Path
) -> None:
    browser.open(client.url)
    run = client.start(project, "Hello.")
    (in_readme,), (in_page, _) = samples(README, "js"), samples(page("streams"), "js")

    assert in_readme == in_page
    lines = browser.run(RUN_SAMPLE, run["id"], in_page, "completed")
    assert lines == [
        *([str(index), message] for index, message in enumerate(client.messages(run["id"]))),
        ["completed"],
    ]


def test_the_sample_for_fetch_continues_after_a_message(client: Client, browser: Browser, project: Path) -> None:
    browser.open(client.url)
    run = client.start(project, "Hello.")
    lines = browser.run(RUN_SAMPLE, run["id"], samples(page("streams"), "js")[1], "event: end")

    events = "".join(line for (line,) in lines)
    assert events.count("event: message") == len(client.messages(run["id"])) - 2
    assert json.loads(events.rpartition("data: ")[2]) == client.run(run["id"])
