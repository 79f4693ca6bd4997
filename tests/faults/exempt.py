"""Calls at which a fault may do what is otherwise a violation, each with the reason why nothing else is possible."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.probes import Site


@dataclass(frozen=True)
class Exemption:
    """
    Args:
        module: where the call stands; with its submodules.
        text: what is called, as it reads in the source; empty for every call of the module.
        modes: `once`, `for_ever`.
        invariants: those that need not hold.
    """

    module: str
    text: str
    modes: tuple[str, ...]
    invariants: tuple[str, ...]
    reason: str

    def covers(self, site: Site, mode: str, invariant: str) -> bool:
        return (
            (site.module == self.module or site.module.startswith(self.module + "."))
            and self.text in ("", site.text)
            and mode in self.modes
            and invariant in self.invariants
        )


# What stores. A start to which it says no refuses, as it does where the database takes no writes.
STORAGE = tuple(f"ccm.core.storage.{name}" for name in ("writer", "write_task", "write_queue", "message_budget"))
UNSTORABLE = (
    "Nothing can be stored any more, as where a database takes nothing for ever. What goes on is reported by the next "
    "start, and until then by /health."
)

EXEMPTIONS: tuple[Exemption, ...] = (
    *(Exemption(module, "", ("for_ever",), ("I1", "I2", "I4", "I7"), UNSTORABLE) for module in STORAGE),
    *(
        Exemption(module, "self._writer.submit", ("for_ever",), ("I1", "I2", "I4", "I7"), UNSTORABLE)
        for module in ("ccm.core.runs.runner", "ccm.core.runs.end_store")
    ),
    Exemption(
        "ccm.core.worker_pool",
        "self._jobs.get",
        ("for_ever",),
        ("I1", "I2", "I4", "I7"),
        "No thread of the pool can take a run.",
    ),
    Exemption(
        "ccm.core.runs.transitions",
        "runs.queue",
        ("for_ever",),
        ("I1",),
        "The queue cannot be read: what waits in it goes on waiting, as where the database cannot be read.",
    ),
    Exemption(
        "ccm.core.service",
        "",
        ("for_ever",),
        ("I1", "I4", "I7"),
        "A step of the shutdown itself always fails: the service ends with 1, and the next start reports the runs.",
    ),
    *(
        Exemption(module, text, ("for_ever",), ("I1", "I4"), "The same: it is where the runs are stopped.")
        for module, text in (
            ("ccm.core.runs.runner", "time.monotonic"),
            ("ccm.core.runs.runner", "self._all_ended.wait"),
            ("ccm.core.runs.runner", "self._ends.give_up"),
            ("ccm.core.runs.end_store", "self._given_up.set"),
        )
    ),
    Exemption(
        "ccm.core.claude.sdk",
        "self.ended.set",
        ("once", "for_ever"),
        ("I6",),
        "A task of the SDK's own calls it, and nobody asks that task how it ended.",
    ),
)


def is_exempt(site: Site, mode: str, invariant: str) -> bool:
    return any(exemption.covers(site, mode, invariant) for exemption in EXEMPTIONS)


def may_refuse_to_start(site: Site, trace: str) -> bool:
    """Whether a start may raise what was injected: not where it was at a single run that the last service has left.

    Args:
        trace: the functions that it went through.
    """
    return site.module in STORAGE or "_recover" not in trace
