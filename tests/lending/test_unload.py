"""What is left of lent memory when the model that borrowed it is unloaded."""

from __future__ import annotations

from lending.pools import gpu, host
from overflow_cases import Rig


def test_lenders_have_all_of_it_back_when_the_model_is_unloaded() -> None:
    rig = Rig((8, 12), budgets=[gpu("x", 400), host()])
    free = rig.pool.capacity_bytes()
    rig.fill(20)
    assert {lease.lender for lease in rig.leases()} == {"x", "host"}
    rig.overflow.close()
    assert rig.leases() == [] and rig.pool.lent_bytes() == 0 and rig.overflow.is_idle
    assert rig.pool.capacity_bytes() == free, "all of it can be lent again"
    rig.pool.check_invariants()
