"""Blocks of a model over several machines: each machine keeps its part in its own main memory, and all come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster.machines import WorkerProcess, WorkerThread, joined
from plain_settings import CACHE_DIR, make_settings
from steering import LONGEST_WAIT_S, arriving_together, until
from tiny_models import VOCAB

from core.cluster.kept_blocks import StageParts
from core.cluster.master import Master
from core.engine.block_tiers import RestoreRule
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from core.tiers import Tier
from core.views.health import health
from core.views.memory import memory_view

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
KEEPS = 1 << 20
SMALL = {
    "engine__block_size": 4, "engine__kv_cache_tokens": 64, "memory__host_bytes": KEEPS,
    "memory__disk_min_free_bytes": 0,
}  # fmt: skip
"""Room for 64 tokens: the blocks of a prompt push out those of the one before."""


def prompts(count: int, length: int = 48) -> list[list[int]]:
    return [
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in range(count)
    ]


def answer(pipeline: InferencePipeline, prompt: list[int]) -> list[int]:
    return list(pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids)


def cached(pipeline: InferencePipeline, prompt: list[int]) -> int:
    return pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S).num_cached_tokens


def moves(pipeline: InferencePipeline) -> dict[tuple[str, Tier, Tier | None], int]:
    assert pipeline.engine.memory.tiers is not None
    return dict(pipeline.engine.memory.tiers.memory.stats().moves)


def memories(node: WorkerThread) -> dict[int, Any]:
    """What a worker of this process keeps, by number."""
    session = node.worker._session
    assert session is not None
    return session._host.blocks.memories


@pytest.fixture(autouse=True)
def _restoring_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models on processors that share a machine are sooner computed than measured."""
    monkeypatch.setattr(RestoreRule, "_token_s", lambda self, context: 1.0)


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> list[list[int]]:
    """What one machine says without tiers and with room for everything."""
    settings = make_settings(
        model__name=str(tiny_llama), devices__devices="cpu=64MiB", devices__profile_seconds=0.02,
        runtime__cache_dir=CACHE_DIR,
    )  # fmt: skip
    pipeline = InferencePipeline(settings)
    try:
        pipeline.load()
        return [answer(pipeline, prompt) for prompt in prompts(4)]
    finally:
        pipeline.shutdown()


@pytest.mark.parametrize(
    "devices",
    [
        "cpu=64MiB,desk/cpu#0",
        "desk/cpu#0,cpu=64MiB,attic/cpu",
        "cpu=32MiB,desk/cpu#0,cpu=32MiB",
        "desk/cpu#0,desk/cpu#1",
    ],
)
def test_prefixes_that_were_pushed_out_come_back(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]],
    devices: str,
) -> None:  # fmt: skip
    workers = [add_worker("desk", "cpu=64MiB,cpu=64MiB", keeps=KEEPS), add_worker("attic", keeps=KEEPS)]
    pipeline = serve(devices__devices=devices, devices__layers=None, **SMALL)
    for _ in range(2):
        for prompt, expected in zip(prompts(4), alone, strict=True):
            assert answer(pipeline, prompt) == expected
    assert cached(pipeline, prompts(4)[0]) >= 44
    assert moves(pipeline)["promotion", Tier.L3, Tier.L1] >= 44
    (tier,) = memory_view(pipeline.engine).tiers
    assert tier.tier == "L3" and tier.used_bytes == tier.blocks * _block_bytes(pipeline)
    for worker in workers:
        kept = [memory for memory in memories(worker).values() if isinstance(memory, StageParts)]
        assert len(kept) == devices.count(worker.worker.name)
        ledger = worker.worker._main_memory.used_by_purpose()
        assert ledger.get("kv_tiers", 0) == sum(memory._arena.numel() for memory in kept) <= KEEPS


def test_they_go_to_disk_whole_and_other_machines_find_them(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]],
    tmp_path: Path,
) -> None:  # fmt: skip
    """What was kept in parts comes back where one machine has all layers, and the other way round."""
    add_worker("desk", keeps=KEEPS)
    disk = {"memory__disk_path": tmp_path, "memory__disk_bytes": 1 << 24}
    for devices in ("cpu=64MiB,desk/cpu", "cpu=64MiB", "desk/cpu,cpu=64MiB"):
        pipeline = serve(devices__devices=devices, **SMALL, **disk)
        if devices != "cpu=64MiB,desk/cpu":
            assert cached(pipeline, prompts(4)[1]) >= 44
            assert moves(pipeline)["promotion", Tier.L5, Tier.L3] >= 11
        assert [answer(pipeline, prompt) for prompt in prompts(4)] == alone
        pipeline.shutdown()


def test_preempted_requests_come_back(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    add_worker("desk", keeps=KEEPS)
    long = SamplingParams(max_tokens=30, temperature=0.8, seed=3, ignore_eos=True, detokenize=False)
    asked = prompts(3, 24)
    roomy = serve(devices__devices="cpu=64MiB")
    expected = [roomy.submit(prompt, long).result(LONGEST_WAIT_S).completions[0].token_ids for prompt in asked]
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu", **SMALL)
    with arriving_together(pipeline):
        handles = [pipeline.submit(prompt, long) for prompt in asked]
    assert [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles] == expected
    assert pipeline.engine.batcher.stats.preemptions > 0
    assert moves(pipeline)["promotion", Tier.L3, Tier.L1] > 0


def test_a_machine_that_keeps_nothing_is_named(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    """A worker whose only device is main memory keeps nothing unless it is told to."""
    add_worker("desk", keeps=KEEPS)
    add_worker("attic")
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu,attic/cpu", **SMALL)
    assert pipeline.engine.memory.tiers is None
    assert memory_view(pipeline.engine).tier_troubles == {"L3": "attic keeps no blocks (memory.host_bytes there)"}
    assert health(pipeline.current_engine, pipeline.state()).checks["tiers"].status == "degraded"
    without = serve(devices__devices="cpu=64MiB,attic/cpu")  # where nobody has asked for tiers, nothing is missing
    assert memory_view(without.engine).tier_troubles == {}


def test_memory_that_a_worker_does_not_have_is_not_used(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    add_worker("desk", keeps=16 << 10)
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu", **SMALL)
    assert pipeline.engine.memory.tiers is not None
    slots = pipeline.engine.memory.tiers.memory.num_slots
    assert 0 < slots * _block_bytes(pipeline) // 2 <= 16 << 10 < (slots + 1) * _block_bytes(pipeline) // 2


def test_a_model_that_moves_leaves_nothing_behind(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]]
) -> None:
    workers = [add_worker(name, keeps=KEEPS) for name in ("desk", "attic")]
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu", **SMALL)
    for devices, kept in (("attic/cpu,desk/cpu", [1, 1]), ("cpu=64MiB,attic/cpu", [0, 1]), ("cpu=64MiB", [0, 0])):
        pipeline.place(devices=devices)
        assert [len(memories(worker)) for worker in workers] == kept
        for prompt, expected in zip(prompts(4), alone, strict=True):
            assert answer(pipeline, prompt) == expected
        assert cached(pipeline, prompts(4)[0]) >= 44
    assert [worker.worker._main_memory.used_by_purpose().get("kv_tiers", 0) for worker in workers] == [0, 0]


def test_a_worker_that_leaves_gives_its_parts_to_the_disk_first(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]],
    tmp_path: Path,
) -> None:  # fmt: skip
    worker = add_worker("desk", keeps=KEEPS)
    disk = {"memory__disk_path": tmp_path, "memory__disk_bytes": 1 << 24}
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu", **SMALL, **disk)
    assert [answer(pipeline, prompt) for prompt in prompts(4)] == alone
    worker.worker.leave()
    worker.join()
    until(lambda: len(pipeline.engine.stages) == 1 and not pipeline.loading, "the model has moved")
    assert cached(pipeline, prompts(4)[0]) >= 44
    assert moves(pipeline)["promotion", Tier.L5, Tier.L3] >= 11
    assert [answer(pipeline, prompt) for prompt in prompts(4)] == alone


def test_a_node_is_not_let_go_while_parts_of_blocks_are_there(
    master: Master, add_worker: Callable[..., WorkerThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.cluster.master._TOLD_EVERY_S", 0.0)
    worker = add_worker("desk")
    (node,) = master.nodes
    node.kept.add(1)
    told: list[str] = []
    master.on_change.append(lambda change, node: told.append(change))
    worker.worker.leave()
    until(lambda: told.count("leaving") >= 3, "it has been looked at again and again")
    assert node.lost is None
    node.kept.discard(1)
    worker.join()
    until(lambda: node.lost is not None, "it has gone")


@pytest.mark.parametrize("when", ["told", "done"])
def test_a_worker_that_is_lost_while_blocks_come_back(
    master: Master, serve: Callable[..., InferencePipeline], alone: list[list[int]], when: str
) -> None:
    """When it is about to be told to bring them back, or has just done so."""
    worker = WorkerProcess(master, CACHE_DIR, "desk", "cpu=64MiB", keeps=KEEPS)
    try:
        joined(master, 1)
        pipeline = serve(devices__devices="cpu=64MiB,desk/cpu", **SMALL)
        for prompt, expected in zip(prompts(4), alone, strict=True):
            assert answer(pipeline, prompt) == expected
        mine, tiers = pipeline.engine.kv, pipeline.engine.memory.tiers
        assert tiers is not None and ("promotion", Tier.L3, Tier.L1) not in moves(pipeline)
        take, done = tiers.step_taken, tiers.step_done

        def kill_unless_dead(now: bool) -> None:
            if now and worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()

        def taken(step: int) -> None:
            kill_unless_dead(when == "told" and bool(tiers._now.loads))
            take(step)

        def over(step: int, moved: bool) -> None:
            done(step, moved)
            kill_unless_dead(tiers.memory.moves["promotion", Tier.L3, Tier.L1] > 0)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(tiers, "step_taken", taken)
            patched.setattr(tiers, "step_done", over)
            assert answer(pipeline, prompts(4)[0]) == alone[0]
        assert worker.process.poll() is not None
        until(lambda: pipeline.engine.kv is not mine, "the model has moved")
        assert [answer(pipeline, prompt) for prompt in prompts(4)] == alone
        assert cached(pipeline, prompts(4)[0]) >= 44
    finally:
        worker.close()


def _block_bytes(pipeline: InferencePipeline) -> int:
    assert pipeline.engine.memory.tiers is not None
    return pipeline.engine.memory.tiers.memory.layout.nbytes


@pytest.mark.parametrize("devices", ["cpu=64MiB,desk/cpu,attic/cpu", "desk/cpu,attic/cpu"])
def test_many_requests_at_once_over_all_tiers(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], tmp_path: Path, devices: str
) -> None:
    """Steps overlap, blocks go up and down, slots change hands; every answer is that of a machine alone."""
    shared, tails = prompts(3, 32), prompts(16, 20)
    asked = [shared[number % 3] + tail for number, tail in enumerate(tails)] * 2
    roomy = serve(devices__devices="cpu=64MiB")
    expected = [answer(roomy, prompt) for prompt in asked]
    add_worker("desk", keeps=40 << 10)
    add_worker("attic", keeps=KEEPS, lends=64 << 10)
    disk = {"memory__disk_path": tmp_path, "memory__disk_bytes": 1 << 24, "memory__write_back_bytes_s": None}
    few = {**SMALL, "engine__kv_cache_tokens": 160, "engine__cohorts": 3}
    pipeline = serve(devices__devices=devices, **few, **disk)
    for first in range(0, len(asked), 8):
        with arriving_together(pipeline):
            handles = [pipeline.submit(prompt, GREEDY) for prompt in asked[first : first + 8]]
        found = [list(handle.result(LONGEST_WAIT_S).completions[0].token_ids) for handle in handles]
        assert found == expected[first : first + 8]
    seen = moves(pipeline)
    assert seen["promotion", Tier.L3, Tier.L1] > 0
    assert sum(count for (kind, below, _), count in seen.items() if kind == "promotion" and below > Tier.L3) > 0
