"""`/docs`: what is open, what needs a token, the headers, and the vendored packages."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from ccm.api.reference.assets import FOLDER as ASSETS
from ccm.api.reference.pages import OTHERS, README, START, Pages
from ccm.testing.service_process import ServiceProcess
from tests.api.conftest import connect, refused
from tests.api.in_process import InProcessService
from tests.client import Client
from tests.conftest import ServeFunction

TOKEN = "0123456789-a-token-of-the-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
VENDOR = ASSETS / "vendor"
PACKAGES = json.loads((VENDOR / "packages.json").read_text(encoding="utf-8"))
SHELLS = ["/docs", "/docs/readme", "/docs/streams"]


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with InProcessService(tmp_path_factory.mktemp("closed"), CCM_API_TOKEN=TOKEN, CCM_URL_PREFIX="/agents") as service:
        yield service.client


@pytest.fixture(scope="module")
def shells(closed: Client) -> dict[str, str]:
    return {path: closed.get(path).body.decode() for path in SHELLS}


def policy(client: Client, path: str) -> dict[str, str]:
    """The Content-Security-Policy of a page, by directive."""
    header = client.get(path).headers["Content-Security-Policy"]
    directives = [directive.strip().partition(" ") for directive in header.split(";")]
    return {name: value for name, _, value in directives}


# ---- access


@pytest.mark.parametrize("path", SHELLS)
def test_a_page_needs_no_token_and_holds_no_content(closed: Client, path: str) -> None:
    page = closed.get(path)

    assert page.status == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.headers["Cache-Control"] == "no-store"
    assert "data-asks-for-token" in page.body.decode()
    assert "operationId" not in page.body.decode()


def test_content_needs_a_token(closed: Client) -> None:
    refused(closed.get("/openapi.json"), None, 401, "UNAUTHORIZED")
    refused(closed.get("/docs/streams.md"), None, 401, "UNAUTHORIZED")
    refused(closed.get("/docs/nothing.md"), None, 401, "UNAUTHORIZED")


def test_a_token_that_a_proxy_adds_is_not_asked_for(closed: Client) -> None:
    assert "data-asks-for-token" not in closed.request("GET", "/docs", headers=BEARER).body.decode()


@pytest.mark.parametrize(
    "path", ["/docs/nothing", "/docs/nothing.md", "/docs/..%2Fclient", "/docs/README", "/docs/streams/", "/docs/%00"]
)
def test_there_are_no_other_pages(closed: Client, path: str) -> None:
    refused(closed.request("GET", path, headers=BEARER), None, 404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/docs/nothing", None),
        ("/docs/nothing.md", None),
        ("/docs/README", "/docs/readme"),
        ("/docs/webhook.md", "/docs/webhooks.md"),
        ("/docs/streams.html", "/docs/streams"),
        ("/docs/" + "x" * 5_000, None),
    ],
)
def test_a_real_page_is_suggested_for_an_unknown_one(closed: Client, given: str, meant: str | None) -> None:
    message = refused(closed.request("GET", given, headers=BEARER), None, 404, "NOT_FOUND")

    assert (f"; did you mean {meant}?" in message) if meant else ("did you mean" not in message)


def test_a_browser_gets_a_page_that_leads_back(closed: Client) -> None:
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    for given, meant in (("/docs/nothing", None), ("/docs/webhook", "Webhooks")):
        answer = closed.request("GET", given, headers=browser)

        assert [answer.status, answer.headers["Content-Type"]] == [404, "text/html; charset=utf-8"]
        assert 'href="/agents/docs"' in answer.body.decode()
        assert (f">{meant}</a>?" in answer.body.decode()) == (meant is not None)
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_a_link_from_another_site_leads_to_the_pages_only(closed: Client) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}

    assert closed.request("GET", "/docs/streams", headers=link).status == 200
    refused(closed.request("GET", "/docs/streams.md", headers=link | BEARER), None, 403, "ORIGIN_FORBIDDEN")
    refused(closed.request("GET", "/api/runs", headers=link | BEARER), None, 403, "ORIGIN_FORBIDDEN")
    for changed in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "no-cors"}, {"Origin": "http://evil.example"}):
        refused(closed.request("GET", "/docs", headers=link | changed), None, 403, "ORIGIN_FORBIDDEN")


# ---- the policy of a page


def test_a_page_may_load_only_what_the_service_has(closed: Client) -> None:
    strict = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }

    assert policy(closed, "/docs/streams") == strict
    assert policy(closed, "/docs") == strict | {"style-src": "'self' 'unsafe-inline'"}


def test_a_page_has_no_script_and_no_style_of_its_own(shells: dict[str, str]) -> None:
    for text in shells.values():
        assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)


# ---- assets


def assets(text: str) -> set[str]:
    """The URLs of what a page loads."""
    return set(re.findall(r'<(?:script|link|img)[^>]*?(?:src|href)="([^"]+)"', text))


def test_assets_may_be_kept_for_ever(closed: Client, shells: dict[str, str]) -> None:
    urls = {url for text in shells.values() for url in assets(text)}

    assert len(urls) >= 5
    for url in urls:
        assert url.startswith("/agents/docs/assets/")
        plain = closed.get(url)
        packed = closed.request("GET", url, headers={"Accept-Encoding": "gzip"})
        for answer in (plain, packed):
            assert answer.status == 200
            assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
            assert answer.headers["Vary"] == "Accept-Encoding"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert packed.headers["Content-Encoding"] == "gzip"
        assert "Content-Encoding" not in plain.headers
        assert gzip.decompress(packed.body) == plain.body


def open_files(service: ServiceProcess) -> set[str]:
    """Return the files that a service has open, without those that are closed meanwhile."""
    files = set()
    for link in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            files.add(os.readlink(link))
    return files


def test_clients_that_do_not_read_an_asset_cost_no_copies_of_it(serve: ServeFunction) -> None:
    service = serve()
    client = Client(service.url)
    url = max(assets(client.get("/docs").body.decode()), key=lambda url: len(client.get(url).body))
    size = len(client.get(url).body)
    assert size > 2**22
    files_before = open_files(service)
    head = f"GET {url} HTTP/1.1\r\nHost: localhost\r\n"
    with ExitStack() as stack:
        for encoding in ("gzip", "identity"):
            request = f"{head}Accept-Encoding: {encoding}\r\n\r\n".encode()
            waiting = [stack.enter_context(connect(client, request)) for _ in range(5)]
            assert all(connection.recv(4) == b"HTTP" for connection in waiting)

        # A large answer is otherwise copied to a temporary file.
        assert not [file for file in open_files(service) - files_before if file.endswith("(deleted)")]
        assert len(client.get(url).body) == size


def test_an_asset_of_another_version_is_not_served(closed: Client, shells: dict[str, str]) -> None:
    url = next(url for url in assets(shells["/docs"]) if url.endswith(".css"))
    folder, _, name = url.rpartition("/")

    for wrong in (
        f"{folder[:-1]}x/{name}",
        f"{folder}/nothing.css",
        f"{folder}/packages.json",
        f"{folder}/..%2Fdocs.py",
    ):
        refused(closed.get(wrong), None, 404, "NOT_FOUND")


def test_names_of_assets_are_unique() -> None:
    names = [path.name for path in ASSETS.rglob("*.*") if path.suffix in (".js", ".css", ".svg")]
    assert len(set(names)) == len(names)


def test_vendored_files_are_those_of_their_packages() -> None:
    named: dict[str, str] = {}
    for package in PACKAGES:
        tarball = f"{package['name'].rpartition('/')[2]}-{package['version']}.tgz"
        assert package["source"] == f"https://registry.npmjs.org/{package['name']}/-/{tarball}"
        assert re.fullmatch("[0-9a-f]{64}", package["sha256"])
        assert package["license"] == "MIT"
        named |= {name: file["sha256"] for name, file in package["files"].items()}
    files = [path for path in VENDOR.rglob("*") if path.is_file() and path.name != "packages.json"]

    assert {
        path.relative_to(VENDOR).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    } == named
    for folder in {path.parent for path in files}:
        assert "MIT" in (folder / "LICENSE").read_text(encoding="utf-8")


# ---- the Markdown


def test_a_page_is_served_as_it_is(closed: Client) -> None:
    answer = closed.request("GET", "/docs/readme.md", headers=BEARER)

    assert answer.body == README.read_bytes()
    assert answer.headers["Content-Type"] == "text/markdown; charset=utf-8"
    again = closed.request("GET", "/docs/readme.md", headers=BEARER | {"If-None-Match": answer.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")


def test_every_page_has_its_place_in_the_navigation(shells: dict[str, str]) -> None:
    pages = Pages()

    assert list(pages.groups) == [START, "For a client's author", "For an operator", "For developers"]
    assert sorted(page.name for group in pages.groups.values() for page in group) == sorted(pages.by_name)
    for page in pages.by_name.values():
        assert f'href="/agents/docs/{page.name}"' in shells["/docs/streams"]
        assert page.text.startswith(f"# {page.title}\n")


def test_the_navigation_has_the_order_of_the_list_in_the_readme(tmp_path: Path) -> None:
    for name in ("alpha", "beta", "gamma"):
        (tmp_path / f"{name}.md").write_text(f"# The {name}\n\nText.\n")
    readme = tmp_path / "elsewhere" / "README.md"
    readme.parent.mkdir()
    listed = "For all: [Gamma](ccm/docs/gamma.md) ·\n[Nothing](ccm/docs/nothing.md) · [Alpha](ccm/docs/alpha.md)"
    readme.write_text(f"# Name\n\nFor [beta](ccm/docs/beta.md): no.\n\n## All pages\n\n{listed}\n\n## End\n")

    groups = {title: [page.title for page in group] for title, group in Pages(readme, tmp_path).groups.items()}
    assert groups == {START: ["Name"], "For all": ["The gamma", "The alpha"], OTHERS: ["The beta"]}


def test_a_readme_without_the_list_is_enough(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Name\n")

    assert [page.title for page in Pages(tmp_path / "README.md", tmp_path / "none").groups[START]] == ["Name"]
