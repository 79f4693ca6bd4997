"""Which Claude Codes shall be ready, without any process."""

from __future__ import annotations

import pytest

from ccm.core.claude.prestart_key import Key
from ccm.core.runs import prestart_demand
from ccm.core.runs.prestart_demand import MAX_FAILURES, MAX_REFUSED, PrestartDemand

PLAIN, OTHER = Key("{}", approvals=False), Key('{"maxTurns": 3}', approvals=False)


def continuation(session: str) -> Key:
    return Key("{}", approvals=False, resume=session, cwd="/srv")


def test_spares_are_wanted_before_sessions_and_the_newest_session_first() -> None:
    demand = PrestartDemand(spares=2, warm=2, first=PLAIN)
    for session in ("a", "b", "c"):
        demand.note_ended(session, continuation(session))

    assert demand.wanted() == [PLAIN, PLAIN, continuation("c"), continuation("b")]


def test_two_fresh_runs_in_a_row_change_the_spares() -> None:
    demand = PrestartDemand(spares=1, warm=0, first=PLAIN)
    wanted = []
    for key in (OTHER, PLAIN, OTHER, OTHER):
        demand.note_fresh(key)
        wanted += demand.wanted()

    assert wanted == [PLAIN, PLAIN, PLAIN, OTHER]


def test_too_many_spares_that_end_in_a_row_are_the_last() -> None:
    demand = PrestartDemand(spares=1, warm=1, first=PLAIN)
    demand.note_ended("a", continuation("a"))
    assert not any(demand.note_spare_ended() for _ in range(MAX_FAILURES - 1))
    demand.note_success()
    assert [demand.note_spare_ended() for _ in range(MAX_FAILURES)] == [False] * (MAX_FAILURES - 1) + [True]

    demand.note_fresh(PLAIN)

    assert demand.wanted() == [continuation("a")], "sessions are kept warm all the same"


def test_what_was_not_used_for_long_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    demand = PrestartDemand(spares=1, warm=1, first=PLAIN)
    demand.note_ended("a", continuation("a"))

    monkeypatch.setattr(prestart_demand, "IDLE_TIMEOUT", -1.0)
    assert demand.wanted() == []
    monkeypatch.undo()

    assert demand.wanted() == [], "until a run wants it again"
    demand.note_fresh(OTHER)
    assert demand.wanted() == [OTHER]


def test_a_session_is_dropped_until_its_next_run_has_ended() -> None:
    demand = PrestartDemand(spares=0, warm=1, first=None)
    demand.note_ended("a", continuation("a"))

    demand.drop("a")
    assert demand.wanted() == []
    demand.note_ended("a", None)
    assert demand.wanted() == []
    demand.note_ended("a", continuation("a"))
    assert demand.wanted() == [continuation("a")]


def test_a_directory_is_refused_for_a_while_and_a_bounded_number_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    demand = PrestartDemand(spares=1, warm=0, first=PLAIN)
    for number in range(MAX_REFUSED + 1):
        demand.note_refusal(f"/srv/{number}")

    assert not demand.is_refused("/srv/0")
    assert demand.is_refused(f"/srv/{MAX_REFUSED}")
    monkeypatch.setattr(prestart_demand, "REFUSED_TIME", 0.0)
    assert not demand.is_refused(f"/srv/{MAX_REFUSED}")
