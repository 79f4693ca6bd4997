"""The samples in the README."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def samples(language: str) -> list[str]:
    """Return the fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def filled_in(sample: str, places: Mapping[str, str]) -> str:
    """Replace each key of `places`, which the sample must contain, with its value."""
    for place, own in places.items():
        assert place in sample, f"the README's sample has no {place}"
        sample = sample.replace(place, own)
    return sample
