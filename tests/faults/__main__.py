"""Installs the probes before any module of the service is imported, then runs the walk."""

from __future__ import annotations

from tests.faults.probes import Probes

probes = Probes()
probes.install()

if __name__ == "__main__":
    from tests.faults.walk import main

    main(probes)
