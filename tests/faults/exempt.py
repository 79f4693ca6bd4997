"""Calls at which a fault may violate an invariant, each with the reason why that is unavoidable."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.probes import Site


@dataclass(frozen=True)
class Exemption:
    """A permission for faults at some calls to violate some invariants.

    Args:
        module: the module of the call; includes its submodules.
        text: the callee as written in the source; empty for every call of the module.
        modes: `once`, `always`.
        invariants: the invariants that need not hold.
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


# The modules that store. If they fail during a start, it is refused, as it is if the database is not writable.
STORAGE = tuple(f"ccm.core.storage.{name}" for name in ("writer", "write_task", "write_queue", "message_budget"))
UNSTORABLE = (
    "Nothing can be stored any more, as if the database were never writable again. The next start reports the runs in "
    "progress; until then /health reports the fault."
)

EXEMPTIONS: tuple[Exemption, ...] = (
    *(Exemption(module, "", ("always",), ("I1", "I2", "I4", "I7"), UNSTORABLE) for module in STORAGE),
    *(
        Exemption(module, "self._writer.submit", ("always",), ("I1", "I2", "I4", "I7"), UNSTORABLE)
        for module in ("ccm.core.runs.runner", "ccm.core.runs.end_store")
    ),
    Exemption(
        "ccm.core.worker_pool",
        "self._jobs.get",
        ("always",),
        ("I1", "I2", "I4", "I7"),
        "No thread of the pool can take a run.",
    ),
    Exemption(
        "ccm.core.runs.transitions",
        "runs.count_started_and_find_next",
        ("always",),
        ("I1",),
        "The queue cannot be read: its runs stay queued, as if the database were not readable.",
    ),
    Exemption(
        "ccm.core.service",
        "",
        ("always",),
        ("I1", "I4", "I7"),
        "A step of the shutdown itself always fails: the service exits with 1, and the next start reports the runs.",
    ),
    *(
        Exemption(
            module,
            text,
            ("always",),
            ("I1", "I4"),
            "Part of stopping the runs, as above.",
        )
        for module, text in (
            ("ccm.core.runs.runner", "time.monotonic"),
            ("ccm.core.runs.runner", "self._all_ended.wait"),
            ("ccm.core.runs.runner", "self._ends.give_up"),
            ("ccm.core.runs.end_store", "self._given_up.set"),
        )
    ),
    Exemption(
        "ccm.core.claude.cli_process",
        "self._writer.close",
        ("always",),
        ("I1",),
        "Claude Code's input stays open: each run takes 5 s longer, all together longer than the walk waits.",
    ),
    Exemption(
        "ccm.core.claude.sdk",
        "self.ended.set",
        ("once", "always"),
        ("I6",),
        "A task of the SDK calls it, and the SDK never retrieves that task's exception.",
    ),
)


def is_exempt(site: Site, mode: str, invariant: str) -> bool:
    return any(exemption.covers(site, mode, invariant) for exemption in EXEMPTIONS)


def may_refuse_to_start(site: Site, trace: str) -> bool:
    """Return whether a start may raise the injected fault: not if it is raised while one interrupted run is recovered.

    Args:
        trace: the names of the functions on the stack.
    """
    return site.module in STORAGE or "_recover" not in trace
