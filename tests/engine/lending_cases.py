"""Pipelines whose first stage is short of KV memory, and ways to stir their pages."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plain_settings import CACHE_DIR, make_settings

from core.devices import open_devices
from core.engine.model_engine import ModelEngine
from core.engine.model_plan import measure_with, plan_model
from core.inference_pipeline import InferencePipeline
from core.kv_cache.page_ops import LOCAL
from core.lending import Urgency
from core.models.resolve import resolve_model
from core.transfer import TransferManager

OpenPipeline = Callable[..., InferencePipeline]
BLOCK = 4


def tight_devices(model: Path, layers: str, own_tokens: list[int], kind: str = "cpu", speed: str = "") -> str:
    """Devices that hold their layers and exactly so many tokens of KV each, to the byte; emulated ones at a `speed`."""
    roomy = ",".join("cpu=64MiB" for _ in own_tokens)
    settings = make_settings(
        model__name=str(model), devices__devices=roomy, devices__layers=layers, devices__placement="vram",
        engine__block_size=BLOCK, engine__kv_cache_tokens=16, engine__cohorts=1, runtime__cache_dir=CACHE_DIR,
        lending__enabled=False,
    )  # fmt: skip
    devices = open_devices(settings.devices)
    plan = plan_model(resolve_model(str(model), None), devices, settings, measure_with(settings, TransferManager()))
    sizes = [
        stage.weight_bytes + stage.workspace_bytes + stage.kv_bytes_per_token * tokens
        for stage, tokens in zip(plan.placement.stages, own_tokens, strict=True)
    ]
    return ",".join(f"{kind}={size}B{speed}" for size in sizes)


def open_tight(
    open_pipeline: OpenPipeline, model: Path, own_tokens: list[int], layers: str = "2,2", **options: Any
) -> InferencePipeline:
    """Stages with room for `own_tokens` tokens each; those that lack room borrow from those that have it."""
    defaults = {
        "devices__devices": tight_devices(model, layers, own_tokens),
        "devices__layers": layers,
        "engine__block_size": BLOCK,
        "model__max_model_len": 128,
        "lending__extent_blocks": 8,
        "lending__lend_ratio": 1.0,
        "lending__reclaim_threshold": 1.0,
    }
    return open_pipeline(model, **{**defaults, **options})


def remote_blocks(engine: ModelEngine) -> int:
    """Blocks that live away from home now, over all stages."""
    return sum(
        len(region.blocks) for _, pages in engine.kv.pages.mapped for i, region in pages.regions.items() if i != LOCAL
    )


def scatter(engine: ModelEngine, rng: random.Random, share: float) -> None:
    """On the engine thread: about `share` of each stage's full blocks away from home, as far as there is room."""
    kv = engine.kv
    assert engine.memory.overflow is not None
    if share > 0:
        engine.memory.overflow.borrow(kv.pool.num_blocks)
    full = {b for table in kv._tables.values() for b in table.blocks[: table.num_full]} | set(kv.pool.cached_blocks())
    for index, pages in kv.pages.mapped:
        blocks = sorted(full)
        rng.shuffle(blocks)
        for block in blocks:
            if rng.random() < share and pages.is_local(block):
                targets = list(pages.roomy())
            elif not pages.is_local(block):
                targets = [region for region in pages.roomy(local=True) if share < 1 or region.region_id != LOCAL]
            else:
                continue
            if targets:
                kv.pages.move(index, block, rng.choice(targets).region_id)
    kv.check_invariants()


def reclaim_something(engine: ModelEngine, rng: random.Random) -> None:
    """On the engine thread: a random lender wants some of its memory back."""
    assert engine.memory.overflow is not None
    lending = engine.memory.overflow.lending
    leases = lending.leases()
    if leases:
        lease = rng.choice(leases)
        lending.request_reclaim(lease.lender, rng.randint(1, lease.nbytes), rng.choice(list(Urgency)))
