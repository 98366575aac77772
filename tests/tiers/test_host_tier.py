"""Host RAM: page-locked where that is asked for; nothing stays pinned that nobody uses."""

from __future__ import annotations

import pytest
from fake_runtime import FakeRuntime
from memory_helpers import LAYOUT, block, open_memory, payload, save

from core.devices import DeviceBudget, host_device, pinned
from core.tiers import HierarchicalMemory, Tier
from core.tiers.policy import MemoryOptions


def test_host_memory_is_not_page_locked_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(pinned, "gpu_runtime", lambda: runtime)
    memory = HierarchicalMemory(LAYOUT, MemoryOptions(LAYOUT.nbytes), DeviceBudget(host_device(LAYOUT.nbytes)))
    assert memory.stats().tiers[0].medium == "pageable" and runtime.registered == {}
    memory.close()


@pytest.mark.parametrize("run", [(1, 9, 2), (9, 1, 2)])
def test_what_lies_behind_a_missing_block_of_a_run_is_not_pinned(run: tuple[int, ...]) -> None:
    with open_memory(slots=2) as memory:
        for number in (1, 2):
            assert save(memory, number, 0)
        loading = memory.load([block(number) for number in run])
        leading = list(run[: run.index(9)])
        assert [bytes(slot.view()) for slot in loading.slots()] == [payload(number) for number in leading]
        assert {info.hash for info in memory.blocks(Tier.L3, 2) if info.pinned} == {block(each) for each in leading}
        loading.release()
        for number in (3, 4):
            assert save(memory, number, 0), "both slots can be had"
