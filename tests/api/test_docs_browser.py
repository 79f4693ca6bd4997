"""`/docs` in a real Chromium: the reference of the API, "try it", the guides, the token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ccm.api.reference.pages import Pages
from tests.api.conftest import folder_of
from tests.browser import Browser, chromium
from tests.client import Client
from tests.conftest import ServeFunction
from tests.docs_pages import START_RUN, DocsPages

TOKEN = "0123456789-a-token-of-the-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
START_RUN_PATH = "/docs#tag/runs/startRun"
STREAM_RUN = "Stream a run's messages as Server-Sent Events"  # a title that is too long for a phone


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def closed(serve_all: ServeFunction) -> Client:
    """Start a service that requires a token; return its client, which sends none."""
    return Client(serve_all(CCM_API_TOKEN=TOKEN).url)


@pytest.fixture
def docs(lite: Client, browser: Browser) -> DocsPages:
    """Return the pages of a service without tokens, in a tab of its own."""
    return in_new_tab(browser, lite)


@pytest.fixture
def closed_docs(closed: Client, browser: Browser) -> DocsPages:
    """Return the pages of a service that requires a token, in a tab without one."""
    return in_new_tab(browser, closed)


def in_new_tab(browser: Browser, client: Client) -> DocsPages:
    browser.new_tab()
    pages = DocsPages(browser, client.url)
    pages.resize(1440, 1000)
    return pages


# ---- the reference


def test_the_reference_is_loaded_from_the_service_alone(docs: DocsPages) -> None:
    docs.open(START_RUN_PATH)
    docs.wait_for(START_RUN)

    assert "startRun" in docs.browser.value("document.getElementById('reference').innerText")
    assert not docs.asks()
    docs.assert_nothing_went_wrong()


def test_the_search_finds_an_operation_by_its_id(docs: DocsPages) -> None:
    docs.open("/docs")
    docs.click("button", "Search")
    docs.browser.until("document.querySelector('[role=combobox]') !== null")
    docs.browser.value("document.querySelector('[role=combobox]').focus()")
    docs.browser.value("document.execCommand('insertText', false, 'startRun')")
    docs.click("[role=option]", START_RUN)

    # The address may be that of the operation before: Scalar sets it while it scrolls.
    at_the_top = "(top => top > 0 && top < innerHeight / 2)(found.getBoundingClientRect().top)"
    docs.wait_for(START_RUN, "#reference h3", at_the_top)


def test_try_it_starts_a_run(docs: DocsPages, lite: Client, tmp_path: Path) -> None:
    docs.open(START_RUN_PATH)
    body = {"cwd": str(folder_of(tmp_path)), "prompt": "Hello from the page."}
    docs.start_run(body)

    (run,) = lite.get("/api/runs", cwd=body["cwd"]).json
    assert run["prompt"] == body["prompt"]
    docs.assert_nothing_went_wrong()


# ---- the token


def test_a_token_is_asked_for_and_sent_with_each_request(
    closed_docs: DocsPages, closed: Client, tmp_path: Path
) -> None:
    docs = closed_docs
    docs.open(START_RUN_PATH)
    docs.browser.until("!document.getElementById('access').hidden")
    requested = docs.browser.requested()
    assert not [url for url in requested if url.endswith(".json")], "nothing is fetched without a token"
    assert docs.browser.errors() == []
    docs.enter("wrong")
    docs.wait_for("not accepted", "[role=alert]")
    assert "wrong" not in "".join(docs.kept())
    docs.enter(f" {TOKEN}\n")
    docs.wait_for(START_RUN)
    body = {"cwd": str(folder_of(tmp_path)), "prompt": "Hello from the page."}
    docs.start_run(body)

    (run,) = closed.request("GET", f"/api/runs?cwd={body['cwd']}", headers=BEARER).json
    assert run["createdBy"] == "api"
    local, session, cookie, address = docs.kept()
    assert TOKEN in session
    assert not [place for place in (local, cookie, address, *docs.browser.requested()) if TOKEN in place]


def test_the_token_is_kept_for_the_guides_until_it_is_forgotten(closed_docs: DocsPages) -> None:
    docs = closed_docs
    docs.open("/docs/security")
    docs.enter(TOKEN)
    docs.wait_for("Security", "#page h1")
    docs.click(".docs-bar a", "API reference")
    docs.wait_for("CC Manager", "#reference h1")
    docs.click("button", "Forget token")

    docs.browser.until("!document.getElementById('access').hidden")
    assert TOKEN not in "".join(docs.kept())


# ---- the guides


def test_a_guide_leads_to_the_others_and_to_the_reference(docs: DocsPages) -> None:
    docs.open("/docs/streams")
    docs.wait_for("Streams", "#page h1")
    assert docs.browser.value("document.title") == "Streams · CC Manager"
    docs.click(".sidebar a", "Webhooks")
    docs.wait_for("Webhooks", "#page h1")
    docs.click(".neighbours .next", "")
    docs.browser.until("location.pathname !== '/docs/webhooks'")
    docs.click(".docs-bar a", "API reference")
    docs.wait_for("CC Manager", "#reference h1")

    docs.assert_nothing_went_wrong()


def test_a_link_to_a_section_of_a_guide_shows_it(docs: DocsPages) -> None:
    docs.open("/docs/streams")
    docs.wait_for("Streams", "#page h1")
    last = docs.browser.value("[...document.querySelectorAll('#contents a')].at(-1).hash")
    docs.open("/docs")
    docs.open(f"/docs/streams{last}")

    docs.browser.until(f"document.querySelector('{last}')?.getBoundingClientRect().bottom < innerHeight")


def test_every_link_to_a_section_of_a_guide_leads_to_a_heading(docs: DocsPages) -> None:
    pages, anchors, links = Pages().by_name, {}, set()
    for name, page in pages.items():
        docs.open(f"/docs/{name}")
        docs.wait_for(page.title, "#page h1")
        anchors[name] = docs.browser.value("[...document.querySelectorAll('#page [id]')].map(each => each.id)")
        found = docs.browser.value("[...document.querySelectorAll('#page a')].map(each => each.href)")
        links |= {link.removeprefix(f"{docs.url}/docs/") for link in found if link.startswith(docs.url)}

    for link in links:
        name, _, anchor = link.partition("#")
        assert not anchor or anchor in anchors.get(name, ()), link
    assert len(links) > len(pages)
    docs.assert_nothing_went_wrong()


# ---- how they look


def test_a_failure_is_told(docs: DocsPages) -> None:
    docs.browser.devtools("Network.enable")
    docs.browser.devtools("Network.setBlockedURLs", urls=["*/openapi.json", "*.md"])
    for path in ("/docs", "/docs/streams"):
        docs.open(path)
        docs.wait_for("cannot be reached", "#failure")


@pytest.mark.parametrize(("scheme", "colour"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(15, 15, 15)")])
def test_the_colours_follow_the_browser(docs: DocsPages, scheme: str, colour: str) -> None:
    docs.browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for path, heading in (("/docs", "#reference h1"), ("/docs/streams", "#page h1")):
        docs.open(path)
        docs.wait_for("", heading)
        assert docs.browser.value("getComputedStyle(document.body).backgroundColor") == colour


@pytest.mark.parametrize(
    ("path", "heading"),
    [("/docs#tag/runs/streamRun", STREAM_RUN), ("/docs/configuration", "Configuration"), ("/docs/streams", "Streams")],
)
def test_nothing_is_wider_than_a_phone(docs: DocsPages, path: str, heading: str) -> None:
    docs.resize(390, 844, phone=True)
    docs.open(path)
    docs.wait_for(heading)
    docs.browser.until("scrollY > 0 || !location.hash")

    assert docs.browser.value("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
