"""A model that is swapped out leaves nothing: no memory, no object of its engine, thread, file or reservation."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lending_cases import tight_devices
from steering import LONGEST_WAIT_S
from tiny_models import VOCAB, build_tiny

from core.batching.batcher import ContinuousBatcher
from core.engine.model_engine import ModelEngine
from core.execution.model_runner import ModelRunner
from core.inference_pipeline import InferencePipeline
from core.kv_cache.manager import KVCacheManager
from core.lending.overflow import KVOverflow
from core.request import SamplingParams
from core.tiers import HierarchicalMemory
from core.tiers.kv_tiers import KVTiers

OpenPipeline = Callable[..., InferencePipeline]
Alive = Callable[[], dict[str, int]]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, detokenize=False)
ONE_EACH = (
    ModelEngine, ContinuousBatcher, ModelRunner, KVCacheManager, KVOverflow, KVTiers, HierarchicalMemory,
)  # fmt: skip
MIB = 1 << 20
FIRST, SWAPS = 3, 10
STAYING_BYTES = {"plain": 8 * MIB, "disk": 18 * MIB, "lending": 8 * MIB}
"""What each engine that stays takes. The allocator's own stock may differ by six of them, on a busy machine more often
than on an idle one; ten have to show."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


@pytest.fixture
def collector() -> Iterator[None]:
    yield
    gc.enable()


@pytest.fixture
def alive() -> Callable[[], dict[str, int]]:
    """How many of each there are, those that the collector was told to leave alone included.

    What other tests of this process left for the collector, or still hold, does not count.
    """
    gc.unfreeze()
    gc.collect()
    others = weakref.WeakSet(engine_objects())

    def count() -> dict[str, int]:
        gc.unfreeze()
        return dict(Counter(type(thing).__name__ for thing in engine_objects() if thing not in others))

    return count


def engine_objects() -> list[Any]:
    return [thing for thing in gc.get_objects() if type(thing) in ONE_EACH]


def ledgers(pipeline: InferencePipeline) -> dict[str, dict[str, int]]:
    """Who reserved how much, before the first request."""
    return {name: budget.used_by_purpose() for name, budget in pipeline.engine.budgets.items()}


def held_unloaded(pipeline: InferencePipeline) -> tuple[int, list[str], int]:
    """Resident bytes, threads and open files of the process once the model is unloaded."""
    pipeline.unload()
    process = psutil.Process()
    return process.memory_info().rss, sorted(thread.name for thread in threading.enumerate()), process.num_fds()


def cases(tiny: Path, directory: Path) -> dict[str, dict[str, Any]]:
    tiers = {"engine__block_size": 4, "engine__kv_cache_tokens": 256, "memory__host_bytes": 64 * MIB}
    disk = {"memory__disk_path": directory, "memory__disk_bytes": 16 * MIB, "memory__disk_min_free_bytes": 0}
    # Two engines do not fit, so the old one has to make room first.
    lending = {
        "devices__devices": tight_devices(tiny, "2,2", [64, 640], "sim", "@20GB/s/1TFLOPS"), "devices__layers": "2,2",
        "engine__block_size": 4, "engine__cohorts": 1, "model__max_model_len": 128, "lending__extent_blocks": 8,
        "lending__lend_ratio": 1.0, "lending__reclaim_threshold": 1.0,
    }  # fmt: skip
    return {"plain": {}, "disk": tiers | disk, "lending": lending}


def serve(pipeline: InferencePipeline) -> None:
    """More than the devices hold, twice: blocks leave and come back."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (60,), generator=generator).tolist() for _ in range(6)]
    for handle in [pipeline.submit(prompt, GREEDY) for prompt in prompts * 2]:
        assert handle.result(LONGEST_WAIT_S).completions[0].token_ids


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "disk", "lending"])
def test_ten_swaps_leave_everything_where_the_first_left_it(
    tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path, alive: Alive, case: str
) -> None:
    pipeline = open_pipeline(tiny, devices__placement="vram", **cases(tiny, tmp_path)[case])
    for _ in range(FIRST):
        serve(pipeline)
        pipeline.load()
    kinds, reserved = alive(), ledgers(pipeline)
    assert set(kinds.values()) == {1}, kinds
    assert ("KVOverflow" in kinds) == (case == "lending")
    assert ("HierarchicalMemory" in kinds) == (case != "plain")
    resident_bytes, threads, files = held_unloaded(pipeline)
    pipeline.load()
    for _ in range(SWAPS):
        serve(pipeline)
        pipeline.load()
    assert alive() == kinds
    assert ledgers(pipeline) == reserved
    after_bytes, *after = held_unloaded(pipeline)
    assert after == [threads, files]
    assert after_bytes <= resident_bytes + 6 * STAYING_BYTES[case]


@pytest.mark.parametrize("case", ["plain", "disk", "lending"])
def test_an_engine_goes_without_the_collector(
    tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path, alive: Alive, monkeypatch: pytest.MonkeyPatch,
    collector: None, case: str,
) -> None:  # fmt: skip
    """A collector that runs seldom must not keep a model's memory."""
    pipeline = open_pipeline(tiny, **cases(tiny, tmp_path)[case])
    gc.disable()
    monkeypatch.setattr(gc, "collect", lambda: 0)
    for _ in range(2):
        serve(pipeline)
        pipeline.load()
    assert set(alive().values()) == {1}, alive()
    pipeline.unload()
    assert alive() == {}


@pytest.mark.parametrize("room", ["cpu=64MiB", "cpu=17MiB"])
def test_a_load_that_fails_leaves_nothing_either(
    tiny: Path, open_pipeline: OpenPipeline, alive: Alive, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    """Beside the old model, and after it had to make room and came back."""
    pipeline = open_pipeline(tiny, devices__devices=room, memory__host_bytes=MIB)
    threads, start, failing = threading.active_count(), pipeline._keeper._warm_up, [True, False]

    def fail_once(engine: ModelEngine) -> None:
        if failing and failing.pop(0):
            raise RuntimeError("broken for a test")
        start(engine)

    monkeypatch.setattr(pipeline._keeper, "_warm_up", fail_once)
    with pytest.raises(RuntimeError, match="broken for a test") as caught:
        pipeline.load()
    assert set(alive().values()) == {1}, "although the error is still in hand"
    assert caught.value is not None
    assert threading.active_count() == threads
    serve(pipeline)
