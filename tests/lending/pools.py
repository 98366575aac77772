"""Small pools for tests: bytes are small numbers, the clock is set by hand."""

from __future__ import annotations

from collections.abc import Collection

from core.costs import LinkProfile, LinkTopology
from core.lending import GPUBudget, VRAMLendingPool

LINKS = LinkTopology(default=LinkProfile(1000.0, 0.001))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def gpu(name: str, limit: int = 1000, own: int = 0, idle_s: float = 0.0, total: int | None = None) -> GPUBudget:
    return GPUBudget(name, limit, total or limit, own_bytes=own, idle_s=idle_s)


def host(limit: int = 1000) -> GPUBudget:
    return GPUBudget("host", limit, limit, last_resort=True)


def make_pool(
    *budgets: GPUBudget,
    links: LinkTopology = LINKS,
    lend_ratio: float = 0.7,
    reclaim_threshold: float = 0.8,
    clock: Clock | None = None,
    far: Collection[tuple[str, str]] = (),
) -> VRAMLendingPool:
    return VRAMLendingPool(
        budgets, links, lend_ratio=lend_ratio, reclaim_threshold=reclaim_threshold, clock=clock or Clock(), far=far
    )


def take(pool: VRAMLendingPool, borrower: str, nbytes: int, priority: int = 0, block_bytes: int = 10) -> int:
    """Borrow and activate; the lease's id."""
    lease = pool.borrow(borrower, nbytes, nbytes // block_bytes, priority)
    assert lease is not None
    pool.activate(lease.lease_id)
    return lease.lease_id


def use(pool: VRAMLendingPool, device: str, own: int, external: int = 0, idle_s: float = 0.0) -> None:
    pool.observe(device, own_bytes=own, external_bytes=external, idle_s=idle_s)
