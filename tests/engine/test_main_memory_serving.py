"""What an engine keeps in main memory is on one ledger, whoever keeps it, and gone from it when the engine is."""

from __future__ import annotations

from pathlib import Path

import pytest
from lending_cases import OpenPipeline, open_tight
from plain_settings import CACHE_DIR, make_settings
from steering import LONGEST_WAIT_S
from streamed_models import ENGINE, build_deep, half_of_it
from tiny_models import build_tiny

from core.config import DeviceSettings
from core.devices import HOST, MainMemory, discovery
from core.errors import OutOfDeviceMemoryError
from core.inference_pipeline import InferencePipeline
from core.lending import Urgency
from core.request import SamplingParams

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    build_tiny("qwen3", path)
    return path


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_deep("llama", path)
    return path


def test_streamed_layers_and_the_tier_share_a_ledger_with_the_devices(deep: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(deep, devices__devices=half_of_it(deep, 1), memory__host_bytes=1 << 20, **ENGINE)
    engine, ledger = pipeline.engine, pipeline.main_memory.budget
    tiers = engine.memory.tiers
    assert tiers is not None and engine.plan.placement.streamed_bytes > 0
    kept = {
        "streamed_weights": engine.plan.placement.streamed_bytes,
        "kv_tiers": tiers.memory.num_slots * tiers.memory.layout.nbytes,
    }
    assert engine.budgets[HOST].used_by_purpose() == kept
    assert ledger.used_by_purpose() == kept | {"devices": engine.plan.devices[0].memory_limit_bytes}
    pipeline.unload()
    assert ledger.used_by_purpose() == {}


def test_blocks_that_main_memory_takes_are_on_it(tiny: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_tight(open_pipeline, tiny, [64, 640])
    engine, ledger = pipeline.engine, pipeline.main_memory.budget
    overflow = engine.memory.overflow
    assert overflow is not None
    lender = engine.plan.devices[1].name
    engine.batcher.call(lambda: overflow.lending.request_reclaim(lender, None, Urgency.CRITICAL)).result(30)
    free = ledger.free_bytes

    def borrow() -> tuple[int, int]:
        overflow.borrow(engine.kv.pool.num_blocks)
        return free - ledger.free_bytes, sum(lease.nbytes for lease in overflow.lending.leases(lender=HOST))

    taken, lent = engine.batcher.call(borrow).result(30)
    assert taken == lent > 0
    assert engine.budgets[HOST].used_by_purpose() == {"lent": lent}
    pipeline.unload()
    assert ledger.used_by_purpose() == {}


@pytest.mark.parametrize(("setting", "purpose"), [("memory__host_bytes", "kv_tiers"), ("lending__host_bytes", "lent")])
def test_more_than_there_is_is_refused_before_anything_is_loaded(tiny: Path, setting: str, purpose: str) -> None:
    pipeline = InferencePipeline(
        make_settings(
            model__name=str(tiny), devices__devices="cpu=64MiB", runtime__cache_dir=CACHE_DIR, **{setting: 1 << 50}
        ),
        on_progress=lambda done, total: pytest.fail("weights were read"),
    )
    with pytest.raises(OutOfDeviceMemoryError, match=f"{purpose} needs 1024 TiB") as caught:
        pipeline.load()
    assert "in use: devices 64 MiB" in caught.value.message
    assert pipeline.main_memory.budget.used_by_purpose() == {}
    pipeline.shutdown()


@pytest.mark.parametrize("devices", [None, "cpu"])
def test_memory_that_becomes_free_before_the_load_does_not_count(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, devices: str | None
) -> None:
    """A device without a limit takes what the ledger had, not what there is a moment later."""
    main = discovery.open_main_memory

    def before(settings: DeviceSettings) -> MainMemory:
        return MainMemory(main(settings).limit_bytes // 2)

    monkeypatch.setattr("core.inference_pipeline.open_main_memory", before)
    pipeline = open_pipeline(tiny, devices__devices=devices, memory__host_bytes=1 << 20, engine__kv_cache_tokens=256)
    (device,) = pipeline.engine.plan.devices
    assert device.memory_limit_bytes == pipeline.main_memory.limit_bytes - (1 << 20)


def test_swaps_leave_the_ledger_as_the_first_load_did(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(tiny, memory__host_bytes=1 << 20)
    ledger, held = pipeline.main_memory.budget, []
    first = ledger.used_by_purpose()
    assert set(first) == {"devices", "kv_tiers"}
    start = pipeline._keeper._start

    def noting(*given: object) -> object:
        engine = start(*given)  # type: ignore[arg-type]
        held.append(ledger.used_by_purpose())
        return engine

    monkeypatch.setattr(pipeline._keeper, "_start", noting)
    for _ in range(2):
        pipeline.load(str(tiny))
        (device,) = pipeline.engine.plan.devices  # what the other engine holds has been taken off its limit
        assert ledger.used_by_purpose() == first | {"devices": device.memory_limit_bytes}
    assert [each["kv_tiers"] for each in held] == [2 * first["kv_tiers"]] * 2, "beside each other for a while"
    assert held[0]["devices"] == first["devices"], "both are on the same devices"
    pipeline.submit([5, 6, 7], GREEDY).result(LONGEST_WAIT_S)
    pipeline.unload()
    assert ledger.used_by_purpose() == {}


def test_a_load_that_fails_leaves_nothing_on_it(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(tiny, memory__host_bytes=1 << 20)
    before = pipeline.main_memory.budget.used_by_purpose()

    def broken(*given: object, **named: object) -> None:
        raise RuntimeError("no scheduler")

    monkeypatch.setattr("core.engine.builder.Scheduler", broken)
    with pytest.raises(RuntimeError, match="no scheduler"):
        pipeline.load(str(tiny))
    assert pipeline.main_memory.budget.used_by_purpose() == before
