"""The README and the pages in ccm/docs: their form, their links, and that no sample goes without a test."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from pydantic.alias_generators import to_camel

from app import create_app
from ccm.settings.settings import Settings
from tests.docs import FENCE, FOLDER, PAGES, README, ROOT, blocks, page, prose, samples, text_of

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# The samples that tests/e2e/test_pages.py runs, and the outputs that it compares.
IN_SHELL = {"sh", "json", "text"}
# The tests that run the samples in other languages, which they look up by page and language.
TESTED = {
    ("README.md", "js"): "e2e/test_browser.py",
    ("clients.md", "python"): "clients/test_generated.py",
    ("clients.md", "ts"): "clients/test_generated.py",
    ("front-end.md", "js"): "test_docs.py",
    ("front-end.md", "nginx"): "e2e/test_nginx.py",
    ("python-client.md", "python"): "clients/test_page.py",
    ("reverse-proxy.md", "caddyfile"): "e2e/test_samples.py",
    ("reverse-proxy.md", "nginx"): "e2e/test_nginx.py",
    ("streams.md", "js"): "e2e/test_browser.py",
    ("systemd.md", "ini"): "e2e/test_samples.py",
    ("webhooks.md", "http"): "api/test_webhooks.py",
    ("webhooks.md", "python"): "api/test_webhooks.py",
}

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def anchors(path: Path) -> list[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


@each_page
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(prose(path)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target in PAGES, f"{link} is no page"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


@each_page
def test_anchors_are_unique(path: Path) -> None:
    assert [anchor for anchor, count in Counter(anchors(path)).items() if count > 1] == []


@each_page
def test_a_page_begins_with_its_title_its_purpose_and_a_sample(path: Path) -> None:
    title, purpose, *_ = text_of(path).split("\n\n")

    assert re.fullmatch(r"# \S[^\n]*", title)
    assert purpose[0].isalpha() or purpose.startswith(("`", "**"))
    if path not in (README, page("changelog")):
        assert "```" in text_of(path).partition("\n## ")[0], "the smallest example comes before the first section"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    links = {(README.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(README))}

    assert len(text_of(README).splitlines()) <= 350
    assert [path.name for path in FOLDER.glob("*.md") if path not in links] == []


@each_page
def test_every_sample_has_a_language_and_a_test(path: Path) -> None:
    untested = {block.language for block in blocks(path)} - IN_SHELL

    assert {language for language in untested if (path.name, language) not in TESTED} == set()
    assert "```" not in FENCE.sub("", text_of(path)), "a fence that is indented or not closed"


def test_no_entry_of_the_tested_samples_is_stale() -> None:
    languages = {(path.name, block.language) for path in PAGES for block in blocks(path)}

    assert set(TESTED) - languages == set()
    assert [file for file in TESTED.values() if not (ROOT / "tests" / file).exists()] == []


def test_the_sample_for_vite_keeps_the_host() -> None:
    # Vite itself is not among the tests' packages: a string as the target would set changeOrigin.
    (sample,) = samples(page("front-end"), "js")

    assert re.search(r'"/api": \{ target: "http://127\.0\.0\.1:3000", changeOrigin: false \}', sample)


def test_the_page_of_endpoints_lists_every_route() -> None:
    rules = create_app(Settings(database_path=Path("/nowhere/db.sqlite"))).url_map.iter_rules()
    routes = {
        f"{method} " + re.sub(r"<(\w+)>", lambda name: "{" + to_camel(name[1]) + "}", rule.rule)
        for rule in rules
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if not rule.rule.startswith("/docs/assets/")  # what the pages load
    }

    assert set(re.findall(r"^\| `([A-Z]+ /\S*)` \|", text_of(page("endpoints")), re.MULTILINE)) == routes
