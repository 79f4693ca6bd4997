"""`python app.py` with one callee that raises: `served.py NAME MODE`; further arguments are ignored."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def serve() -> int:
    from tests.faults.probes import Probes

    name, mode = sys.argv[1:3]
    probes = Probes()
    probes.install()
    import app

    probes.arm_callee(name, always=mode == "always")
    return app.main()


if __name__ == "__main__":
    sys.exit(serve())
