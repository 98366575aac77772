"""What a lease and a budget say about themselves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.lending import GPUBudget, Lease, LeaseState, Urgency, bytes_to_move
from core.lending.lease import STEP_SLACK

GRANTED, ACTIVE, RECLAIMING, RELEASED = LeaseState
LEGAL = {
    (GRANTED, ACTIVE),
    (GRANTED, RECLAIMING),
    (GRANTED, RELEASED),
    (ACTIVE, RECLAIMING),
    (ACTIVE, RELEASED),
    (RECLAIMING, GRANTED),
    (RECLAIMING, ACTIVE),
    (RECLAIMING, RELEASED),
}


def make_lease(**changes: object) -> Lease:
    lease = Lease(1, "b", "a", nbytes=100, blocks=10, priority=0, granted_s=0.0)
    for name, value in changes.items():
        setattr(lease, name, value)
    return lease


@pytest.mark.parametrize(("old", "new"), list(itertools.product(LeaseState, repeat=2)))
def test_only_these_transitions_are_legal(old: LeaseState, new: LeaseState) -> None:
    lease = make_lease(state=old)
    if (old, new) in LEGAL:
        lease.move_to(new)
        assert lease.state is new
    else:
        with pytest.raises(ValueError, match=f"lease 1 is {old.value}, it cannot become {new.value}"):
            lease.move_to(new)
        assert lease.state is old


@pytest.mark.parametrize(("state", "used"), [(GRANTED, False), (ACTIVE, True)])
def test_a_reclaim_that_is_called_off_leaves_the_lease_as_it_was(state: LeaseState, used: bool) -> None:
    lease = make_lease(state=state, used=used)
    lease.ask_back(30, Urgency.LOW, 30.0)
    lease.ask_back(40, Urgency.HIGH, 1.0)
    lease.check_invariants()
    assert (lease.state, lease.reclaim_bytes, lease.urgency, lease.deadline_s) == (RECLAIMING, 40, Urgency.HIGH, 1.0)
    lease.leave()
    lease.check_invariants()
    assert (lease.state, lease.reclaim_bytes, lease.urgency, lease.deadline_s) == (state, 0, None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": RELEASED}, "kept"),
        ({"blocks": 0}, "0 blocks"),
        ({"nbytes": 0}, "0 bytes"),
        ({"borrower": "a"}, "own memory"),
        ({"state": ACTIVE}, "never activated"),
        ({"used": True}, "only granted"),
        ({"reclaim_bytes": 101, "state": RECLAIMING, "urgency": Urgency.LOW, "deadline_s": 1.0}, "101 of 100"),
        ({"state": RECLAIMING}, "reclaiming"),
        ({"reclaim_bytes": 1, "urgency": Urgency.LOW, "deadline_s": 1.0}, "is granted"),
        ({"urgency": Urgency.LOW, "deadline_s": 1.0}, "urgency"),
        ({"deadline_s": 1.0}, "deadline"),
    ],
)
def test_an_unsound_lease_is_found(changes: dict[str, object], said: str) -> None:
    make_lease().check_invariants()
    with pytest.raises(AssertionError, match=said):
        make_lease(**changes).check_invariants()


def test_a_lender_may_want_a_single_byte_back() -> None:
    lease = make_lease(state=ACTIVE, used=True)
    lease.ask_back(1, Urgency.LOW, 30.0)
    lease.check_invariants()


def test_urgencies_have_falling_bounds() -> None:
    assert [urgency.bound_s for urgency in Urgency] == [30.0, 5.0, 1.0, 0.0]
    assert sorted(Urgency) == [Urgency.LOW, Urgency.MEDIUM, Urgency.HIGH, Urgency.CRITICAL]
    assert [urgency.label for urgency in Urgency] == ["low", "medium", "high", "critical"]


@pytest.mark.parametrize(
    ("bytes_left", "seconds_left", "step_s", "expected"),
    [
        (1000, 0.0, 0.1, 1000),  # CRITICAL
        (1000, -3.0, 0.1, 1000),  # late
        (1000, 0.39, 0.1, 1000),  # one step of twice the length fits
        (1000, 0.41, 0.1, 500),
        (1000, 2.01, 0.1, 100),
        (1001, 2.01, 0.1, 101),  # rounded up
        (5, 30.0, 0.001, 1),
        (0, 1.0, 0.1, 0),
    ],
)
def test_bytes_to_move(bytes_left: int, seconds_left: float, step_s: float, expected: int) -> None:
    assert bytes_to_move(bytes_left, seconds_left, step_s) == expected


@pytest.mark.parametrize(("bytes_left", "step_s"), [(1, 0.0), (1, -1.0), (-1, 1.0)])
def test_bytes_to_move_refuses_nonsense(bytes_left: int, step_s: float) -> None:
    with pytest.raises(ValueError, match="bytes in steps"):
        bytes_to_move(bytes_left, 1.0, step_s)


@given(
    st.integers(1, 10**12),
    st.sampled_from([urgency for urgency in Urgency if urgency.bound_s > 0]),
    st.floats(0.001, 0.49),
    st.lists(st.floats(0.0, STEP_SLACK), min_size=1, max_size=20),
)
def test_the_bound_is_kept_while_no_step_is_slower_than_the_slack(
    nbytes: int, urgency: Urgency, step_s: float, slowness: list[float]
) -> None:
    now_s, left = 0.0, nbytes
    for factor in itertools.cycle([*slowness, 0.1]):  # steps never all take no time
        part = bytes_to_move(left, urgency.bound_s - now_s, step_s)
        left -= part
        now_s += factor * step_s  # the part has moved when the step has ended
        if left == 0:
            break
    assert now_s <= urgency.bound_s + 1e-9


# -- budgets -----------------------------------------------------------------------------------------------------------

GPU = GPUBudget("a", limit_bytes=900, total_bytes=1000)
HOST = GPUBudget("host", limit_bytes=1000, total_bytes=1000, last_resort=True)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (GPU, 700),  # the ratio
        (replace(GPU, lent_bytes=300), 400),
        (replace(GPU, lent_bytes=700), 0),
        (replace(GPU, lent_bytes=750), 0),
        (replace(GPU, own_bytes=500), 400),  # the limit
        (replace(GPU, own_bytes=500, external_bytes=100), 300),
        (replace(GPU, own_bytes=500, external_bytes=100, lent_bytes=250), 50),
        (replace(GPU, own_bytes=900), 0),
        (replace(GPU, own_bytes=900, external_bytes=500), 0),
        (HOST, 1000),  # all of it, whatever the ratio
        (replace(HOST, external_bytes=10, lent_bytes=900), 90),
    ],
)
def test_lendable_bytes(budget: GPUBudget, expected: int) -> None:
    assert budget.lendable_bytes(0.7) == expected


def test_what_is_lent_is_not_the_lenders_own_need() -> None:
    assert replace(GPU, own_bytes=300, external_bytes=200).utilisation == 0.5
    assert replace(GPU, own_bytes=300, external_bytes=200, lent_bytes=400).utilisation == 0.5


@pytest.mark.parametrize(
    ("own", "external", "lent", "expected"), [(300, 200, 400, 0), (301, 200, 400, 1), (900, 5, 0, 5)]
)
def test_shortfall_bytes(own: int, external: int, lent: int, expected: int) -> None:
    assert replace(GPU, own_bytes=own, external_bytes=external, lent_bytes=lent).shortfall_bytes == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"limit_bytes": 1001},
        {"limit_bytes": -1},
        {"limit_bytes": 0, "total_bytes": 0},
        {"own_bytes": -1},
        {"external_bytes": -1},
        {"lent_bytes": -1},
        {"idle_s": -0.1},
        {"idle_s": float("inf")},
        {"idle_s": float("nan")},
    ],
)
def test_budgets_that_cannot_be_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a: "):
        replace(GPU, **changes)  # type: ignore[arg-type]
