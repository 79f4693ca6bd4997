"""The files that the pages load: scripts, style sheets and an icon."""

from __future__ import annotations

import gzip
import hashlib
from functools import cached_property, lru_cache
from pathlib import Path

FOLDER = Path(__file__).with_name("assets")
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class Assets:
    """The files in a folder that have one of the MEDIA_TYPES.

    Args:
        folder: its files must not change while the service runs.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self.compressed = lru_cache(maxsize=None)(self._compressed)  # at most one entry per file

    @cached_property
    def files(self) -> dict[str, Path]:
        """The files by their names, which are unique."""
        return {path.name: path for path in sorted(self._folder.rglob("*")) if path.suffix in MEDIA_TYPES}

    @cached_property
    def digest(self) -> str:
        """The digest of all files. Their URLs contain it, so that browsers can keep them until one of them changes.

        It is one for all, because the scripts import each other by relative URLs.
        """
        digest = hashlib.sha256()
        for name, path in self.files.items():
            digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def _compressed(self, name: str) -> bytes:
        """Return a file as gzip."""
        return gzip.compress(self.files[name].read_bytes(), compresslevel=6, mtime=0)
