"""The pages of the documentation: the README and the Markdown files in ccm/docs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ccm

FOLDER = Path(ccm.__file__).with_name("docs")
README = FOLDER.parents[1] / "README.md"
# The order of the pages in the navigation. Those that are not named here come last.
GROUPS = {
    "Start": ("readme",),
    "For clients": (
        "runs",
        "sessions-and-forks",
        "streams",
        "follow-ups",
        "approvals",
        "webhooks",
        "retries",
        "options",
        "lists",
        "errors",
        "endpoints",
        "front-end",
    ),
    "For operators": (
        "configuration",
        "login",
        "security",
        "reverse-proxy",
        "systemd",
        "database",
        "import-export-prune",
        "backup",
        "upgrade",
        "monitoring",
        "starting-sooner",
        "changelog",
    ),
    "For developers": ("how-it-works", "tests", "benchmarks"),
}
OTHERS = "More"


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
    """The pages by their names, in the order of the navigation.

    Args:
        readme: becomes the first page.
        folder: the folder with the other pages. They must not change while the service runs.
    """

    def __init__(self, readme: Path = README, folder: Path = FOLDER) -> None:
        self._paths = [readme, *sorted(folder.glob("*.md"))]

    @cached_property
    def by_name(self) -> dict[str, Page]:
        return {page.name: page for page in map(_read, self._paths)}

    @cached_property
    def groups(self) -> dict[str, list[Page]]:
        """The pages of the navigation by the titles of their groups. No group is empty."""
        rest = dict(self.by_name)
        groups = {title: [rest.pop(name) for name in names if name in rest] for title, names in GROUPS.items()}
        groups[OTHERS] = list(rest.values())
        return {title: pages for title, pages in groups.items() if pages}


def _read(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    return Page(path.stem.lower(), text.partition("\n")[0].removeprefix("# "), text)
