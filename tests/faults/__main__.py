"""Puts the probes in place, and then walks: nothing of the service may be imported before."""

from __future__ import annotations

from tests.faults.probes import Probes

probes = Probes()
probes.install()

if __name__ == "__main__":
    from tests.faults.walk import main

    main(probes)
