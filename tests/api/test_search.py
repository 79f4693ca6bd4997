"""The search for sessions: `q` of GET /api/sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ccm.api.http.query import cursor_of
from ccm.core.search import SearchPosition
from ccm.db.search import TOP
from tests.api.conftest import ids, ids_of, pages, refused, script
from tests.client import Client
from tests.waiting import until


def says(*texts: str) -> str:
    """Return a prompt that makes the stand-in CLI say some texts. It does not contain their words itself."""
    messages = [
        {"type": "assistant", "message": {"role": "assistant", "content": [{"type": "text", "text": f"<{number}>"}]}}
        for number in range(len(texts))
    ]
    prompt = script(*messages)
    for number, text in enumerate(texts):
        prompt = prompt.replace(f"<{number}>", "".join(f"\\u{ord(character):04x}" for character in text))
    return prompt


def found(client: Client, cwd: Path, words: str) -> list[str]:
    """Return the titles of the sessions that a search finds."""
    return ids(client.get("/api/sessions", cwd=cwd, q=words), "title")


def match(client: Client, cwd: Path, words: str) -> dict[str, Any]:
    """Return the match of the only session that a search finds."""
    (session,) = client.get("/api/sessions", cwd=cwd, q=words).json
    shown: dict[str, Any] = session["match"]
    return shown


# ---- what is found


def test_a_search_covers_titles_prompts_and_what_was_said(api: Client, project: Path) -> None:
    first = api.start(project, "Where do parrots live?", title="one")
    api.start(project, "Where do owls live?", title="Parrots and two others")
    api.resume(first["sessionId"], says("In the far south, mostly on ice.", "Penguins cannot fly."))

    assert found(api, project, "parrot") == ["Parrots and two others", "one"]
    assert found(api, project, "penguin") == ["one"]
    assert found(api, project, "OWLS LIVE?") == ["Parrots and two others"]
    assert found(api, project, "mostly south") == ["one"]
    assert found(api, project, "penguins live") == []
    assert found(api, project, "enguin") == []
    assert found(api, project, " ") == found(api, project, "") == ["one", "Parrots and two others"]


def test_the_writer_does_not_parse_what_a_run_records(
    api: Client, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*_arguments: object) -> str:
        raise AssertionError

    monkeypatch.setattr("ccm.db.search.said", parsed)
    api.start(project, says("A kite flies."), title="one")

    assert found(api, project, "kite") == ["one"]


def test_a_match_says_where(api: Client, project: Path) -> None:
    run = api.start(project, "Ask the heron.", title="About the bittern")
    other = api.resume(run["sessionId"], says("Nothing.", "First a stork came.\nThe egret did not."))

    def where(words: str) -> list[Any]:
        shown = match(api, project, words)
        return [shown[name] for name in ("where", "runId", "index", "snippet")]

    assert where("bittern") == ["title", None, None, "About the bittern"]
    assert where("heron") == ["prompt", run["id"], None, "Ask the heron."]
    _, _, index, _ = expected = ["message", other["id"], where("egret")[2], "First a stork came. The egret did not."]
    assert where("egret stork") == expected
    assert "egret" in str(api.messages(other["id"])[index])


def test_what_claude_says_is_found_while_it_works(api: Client, project: Path) -> None:
    prompt = says("A cormorant dives.").removesuffix("}") + ', "hold": true}'
    run = api.start(project, prompt, wait=0, title="live")

    assert until(lambda: found(api, project, "cormorant")) == ["live"]
    assert api.run(run["id"], wait=0)["status"] == "running"
    api.delete(f"/api/runs/{run['id']}")


def test_a_result_is_found(api: Client, project: Path) -> None:
    run = api.start(project, "Hello.", title="t")
    result = run["result"]["result"]
    assert result, run

    shown = match(api, project, result)
    assert (shown["where"], shown["runId"], shown["snippet"]) == ("message", run["id"], " ".join(result.split()))
    message = api.messages(run["id"])[shown["index"]]
    assert message["type"] == "result"


def test_a_changed_title_is_found_at_once(api: Client, project: Path) -> None:
    run = api.start(project, "Hello.", title="pelican")
    path = f"/api/sessions/{run['sessionId']}"

    api.patch(path, {"title": "flamingo"})
    assert [found(api, project, words) for words in ("pelican", "flamingo")] == [[], ["flamingo"]]
    api.patch(path, {"title": None})
    assert found(api, project, "flamingo") == []


def test_a_search_is_plain_text(api: Client, project: Path) -> None:
    api.start(project, "Hello.", title="near 100 a b s q OR x and NOT parrots")
    operators = [
        "100%",
        "a_b",
        "a!b",
        "a\\b",
        "%s",
        ":q",
        '"parrots"',
        "'parrots'",
        "(parrots",
        "parrots)",
        "NOT parrots",
    ]
    operators += ["a OR b", "x AND parrots", "NEAR(a b)", "parrots*", "^near", "-parrots", "+a"]
    operators += ["a & b | x", "!parrots", "parrots:*", "a <-> b", "{a} b", "a;b--", "\U0001f600 a", "a\tb\nx", "a,b"]

    for words in operators:
        assert len(found(api, project, words)) == 1, words
    for words in ("!", "%", "_", "\\", "'", '"', "?", "--", "*", "()", "\U0001f600", "words:parrots", "rowid:1"):
        assert found(api, project, words) == [], words


def test_a_search_ignores_case_and_form_in_every_script(api: Client, project: Path) -> None:
    texts = "\u00c9COLE \u0416\u0423\u041a stra\u00dfe \u4e2d\u6587\u641c\u7d22 \ufb01sh "
    texts += "\u0939\u093f\u0928\u094d\u0926\u0940"
    api.start(project, "Hello.", title=f"title: {texts}")
    api.start(project, f"Prompt: {texts}", title="prompt")

    searches = [
        "\u00c9COLE",
        "\u00e9cole",
        "e\u0301cole",
        "\u0436\u0443\u043a",
        "STRASSE",
        "\u4e2d\u6587",
        "\u641c\u7d22",
        "\u641c",
    ]
    searches += ["\u0939\u093f\u0928\u094d\u0926\u0940", "fish"]
    results = {words: len(found(api, project, words)) for words in searches}
    assert results == dict.fromkeys(searches, 2)
    assert found(api, project, "\u6587\u4e2d") == []


@pytest.mark.parametrize("words", ["a" * 1000, "a " * 500, " ".join(map(str, range(270))), "\u4e2d" * 1000])
def test_a_long_search_is_answered(api: Client, project: Path, words: str) -> None:
    api.start(project, words, title="long")

    assert found(api, project, words) == ["long"]


def test_long_texts_are_found_by_their_beginning(api: Client, project: Path) -> None:
    prompt = "alpha " + " ".join(f"w{number}" for number in range(100_000)) + " omega"
    api.start(project, prompt, title="long")

    assert [found(api, project, words) for words in ("alpha", "omega")] == [["long"], []]
    api.start(
        project, "\u4e2d\u6587" + "".join(chr(0x4E00 + number % 20_000) for number in range(300_000)), title="Han"
    )
    assert found(api, project, "\u4e2d\u6587") == ["Han"]


# ---- order and pages


def test_titles_come_before_prompts_and_prompts_before_messages(api: Client, project: Path) -> None:
    api.start(project, "Hello.", title="kestrel 1")
    api.start(project, "A kestrel.", title="2")
    result = api.start(project, "Hello.", title="3")["result"]["result"].split()[0]
    api.start(project, "Another kestrel.", title="4")
    api.start(project, "Hello.", title="the kestrel 5")

    assert found(api, project, "kestrel") == ["the kestrel 5", "kestrel 1", "4", "2"]
    api.patch(f"/api/sessions/{api.start(project, 'x')['sessionId']}", {"title": result})
    assert found(api, project, result)[0] == result


def test_pages_of_a_search_have_every_session_once(api: Client, project: Path) -> None:
    for number in range(7):
        api.start(project, "The osprey.", title=f"osprey {number}" if number % 3 == 0 else str(number), wait=0)

    whole = found(api, project, "osprey")
    assert whole == ["osprey 6", "osprey 3", "osprey 0", "5", "4", "2", "1"]
    for size in (1, 2, 3, 7, 8):
        listed = pages(api, f"/api/sessions?cwd={project}&q=osprey&limit={size}")
        assert [ids_of(page, "title") for page in listed] == [whole[at : at + size] for at in range(0, 7, size)]


def test_new_sessions_do_not_shift_the_pages_of_a_search(api: Client, project: Path) -> None:
    for number in range(5):
        api.start(project, "The harrier.", title=str(number), wait=0)
    first = api.get("/api/sessions", cwd=project, q="harrier", limit=2)
    api.start(project, "The harrier.", title="harrier", wait=0)

    rest = [session["title"] for page in pages(api, first.next) for session in page]
    assert ids(first, "title") + rest == ["4", "3", "2", "1", "0"]


def test_a_forged_cursor_of_a_search_is_answered(api: Client, project: Path) -> None:
    for number in range(2):
        api.start(project, "The hobby.", title=str(number), wait=0)
    highest = 5 * 10**18 - 1
    for bottom, top in ((-TOP, TOP), (TOP, -TOP), (-highest, highest), (highest, highest)):
        cursor = cursor_of(SearchPosition(bottom, top, 2, 10**18 - 1))
        listed = pages(api, f"/api/sessions?cwd={project}&q=hobby&cursor={cursor}")
        assert [title for page in listed for title in ids_of(page, "title")] == ["1", "0"]


def test_a_search_takes_the_filters_of_the_list(api: Client, project: Path) -> None:
    one = api.start(project, "The merlin.", title="one", metadata={"n": 1})
    api.start(project, "The merlin.", title="two", metadata={"n": 2})

    def titles(**parameters: object) -> list[str]:
        return ids(api.get("/api/sessions", cwd=project, q="merlin", **parameters), "title")

    assert titles(**{"metadata.n": 2}) == ["two"]
    assert titles(until="2020-01-01") == titles(createdBy="nobody") == []
    assert titles(since=one["createdAt"]) == ["two", "one"]
    (summary, _) = api.get("/api/sessions", cwd=project, q="merlin", fields="summary").json
    assert summary["match"]["where"] == "prompt"
    assert "metadata" not in summary


def test_the_order_of_a_search_cannot_be_chosen(lite: Client) -> None:
    for order in ("asc", "desc"):
        assert "best" in refused(lite.get(f"/api/sessions?q=a&order={order}"), "order")
    assert lite.get("/api/sessions?q=&order=asc").status == 200
    assert lite.get("/api/sessions?q=!&cursor=Nw==").status == 400


def test_a_snippet_is_around_the_words(api: Client, project: Path) -> None:
    filler = "lorem ipsum dolor sit amet " * 40
    api.start(project, f"{filler}the avocet\n  and the\tdunlin {filler}")

    snippet = until(lambda: match(api, project, "dunlin avocet"))["snippet"]
    assert "the avocet and the dunlin" in snippet
    assert snippet.startswith("\u2026 ")
    assert snippet.endswith(" \u2026")
    assert len(snippet) < 170
