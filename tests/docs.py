"""The documentation, README.md and the pages in ccm/docs, and the samples in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDER = ROOT / "ccm" / "docs"
PAGES = [README, *sorted(FOLDER.glob("*.md"))]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Sample(NamedTuple):
    """A fenced block.

    Attributes:
        follows: only white space is between it and the block before.
    """

    language: str
    text: str
    follows: bool


def page(name: str) -> Path:
    """Return a page by its name, such as `webhooks` for ccm/docs/webhooks.md."""
    return FOLDER / f"{name}.md"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> list[Sample]:
    """Return the fenced blocks of a page, in order."""
    text, end = text_of(path), 0
    found: list[Sample] = []
    for match in FENCE.finditer(text):
        follows = bool(found) and not text[end : match.start()].strip()
        found.append(Sample(match[1], match[2], follows))
        end = match.end()
    return found


def samples(path: Path, language: str) -> list[str]:
    """Return the texts of the fenced blocks of one language, in order."""
    return [block.text for block in blocks(path) if block.language == language]


def prose(path: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", text_of(path))


def section(path: Path, title: str) -> str:
    """Return the text from a heading of the second level to the next one."""
    _, found, rest = text_of(path).partition(f"\n## {title}\n")
    assert found, f"{path.name} has no section {title}"
    return rest.partition("\n## ")[0]


def filled_in(sample: str, places: Mapping[str, str]) -> str:
    """Replace each key of `places`, which the sample must contain, with its value."""
    for place, own in places.items():
        assert place in sample, f"the sample has no {place}"
        sample = sample.replace(place, own)
    return sample
