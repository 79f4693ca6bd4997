"""The pages of the documentation: the README and the Markdown files in ccm/docs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ccm

FOLDER = Path(ccm.__file__).with_name("docs")
README = FOLDER.parents[1] / "README.md"
# The README's list of all pages: a paragraph for each group of readers.
LIST = re.compile(r"^## All pages\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
GROUP = re.compile(r"^(For [^:\n]+):\s(.+?)(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(ccm/docs/([\w-]+)\.md\)")
# The groups of the README itself, and of the pages that it does not list.
START, OTHERS = "Start", "More"


@dataclass(frozen=True)
class Page:
    """A page of the documentation.

    Attributes:
        name: its name in URLs, which is that of its file without the suffix, in lower case.
        title: its first heading.
        text: its Markdown.
    """

    name: str
    title: str
    text: str


class Pages:
    """The pages by their names, in the order of the README's list.

    Args:
        readme: the first page.
        folder: the folder with the other pages. They must not change while the service runs.
    """

    def __init__(self, readme: Path = README, folder: Path = FOLDER) -> None:
        self._readme = readme
        self._folder = folder

    @cached_property
    def by_name(self) -> dict[str, Page]:
        return {page.name: page for page in map(_read, (self._readme, *sorted(self._folder.glob("*.md"))))}

    @cached_property
    def groups(self) -> dict[str, list[Page]]:
        """The pages of the navigation by the titles of their groups. No group is empty."""
        rest = dict(self.by_name)
        readme = rest.pop(self._readme.stem.lower())
        groups = {START: [readme]}
        for listed in LIST.findall(readme.text):
            for title, links in GROUP.findall(listed):
                groups[title] = [rest.pop(name) for name in LINK.findall(links) if name in rest]
        groups[OTHERS] = list(rest.values())
        return {title: pages for title, pages in groups.items() if pages}


def _read(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    return Page(path.stem.lower(), text.partition("\n")[0].removeprefix("# "), text)
