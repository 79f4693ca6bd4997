"""`python -m tests.api.openapi` stores the present description, unless it would break clients of the stored one."""

from __future__ import annotations

import json
import sys

from app import create_app
from ccm.api.http.extensions import DOCUMENT
from ccm.settings.settings import Settings
from tests.api.openapi.breaks import ACCEPTED, accepted, breaks
from tests.contract import STORED


def main() -> int:
    text: str = create_app(Settings()).extensions[DOCUMENT].text("")
    if STORED.exists():
        found = set(breaks(json.loads(STORED.read_text(encoding="utf-8")), json.loads(text))) - accepted()
        if found:
            print(*sorted(found), f"Clients would break. To accept a line, add it to {ACCEPTED}.", sep="\n")
            return 1
    STORED.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
