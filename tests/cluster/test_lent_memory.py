"""L4: blocks of a model go to memory that other machines offer, come back, and go with the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cluster.machines import WorkerProcess, WorkerThread, joined
from cluster.test_telemetry import scrape
from plain_settings import CACHE_DIR, make_settings
from steering import LONGEST_WAIT_S, until
from tiny_models import VOCAB, build_tiny

from core.cluster import lent_memory
from core.cluster.kept_blocks import LENT
from core.cluster.master import Master
from core.cluster.opening import open_worker
from core.engine.block_tiers import RestoreRule
from core.errors import ConfigError
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from core.tiers import HierarchicalMemory, Tier
from core.views.health import health
from core.views.memory import TierView, memory_view
from core.views.nodes import nodes_view

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
LENDS = 1 << 20
SMALL = {
    "devices__devices": "cpu=64MiB", "engine__block_size": 4, "engine__kv_cache_tokens": 64,
    "memory__host_bytes": 128 << 10,
}  # fmt: skip
"""Room for one prompt on the device, and for about two more in main memory."""


def prompts(count: int, length: int = 48) -> list[list[int]]:
    return [
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in range(count)
    ]


def answer(pipeline: InferencePipeline, prompt: list[int]) -> list[int]:
    return list(pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids)


def cached(pipeline: InferencePipeline, prompt: list[int]) -> int:
    return pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S).num_cached_tokens


def memory(pipeline: InferencePipeline) -> HierarchicalMemory:
    assert pipeline.engine.memory.tiers is not None
    return pipeline.engine.memory.tiers.memory


def tier(pipeline: InferencePipeline, name: str = "L4") -> TierView | None:
    return next((each for each in memory_view(pipeline.engine).tiers if each.tier == name), None)


def fill(pipeline: InferencePipeline, count: int = 8) -> list[list[int]]:
    """Answers to so many prompts, of which the first are in no memory of this machine any more."""
    answers = []
    for prompt in prompts(count):
        answers.append(answer(pipeline, prompt))
        assert memory(pipeline).flush(LONGEST_WAIT_S)
    return answers


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
        return [answer(pipeline, prompt) for prompt in prompts(8)]
    finally:
        pipeline.shutdown()


@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize("join", ["before", "after"])
def test_what_main_memory_has_no_room_for_comes_back_from_another_machine(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]],
    join: str, codec: str,
) -> None:  # fmt: skip
    """Of a worker that was there when the model was loaded, or that came later; it computes nothing."""
    if join == "before":
        worker = add_worker("attic", lends=LENDS)
    pipeline = serve(memory__peer_codec=codec, **SMALL)
    if join == "after":
        assert tier(pipeline) is None
        worker = add_worker("attic", lends=LENDS)
        until(lambda: tier(pipeline) is not None, "memory of another machine is used")
    assert fill(pipeline) == alone
    lent = tier(pipeline)
    assert lent is not None and lent.capacity_bytes == LENDS and lent.blocks > 40
    assert lent.codec == codec and lent.read_bytes_per_second and lent.stopped is None
    assert cached(pipeline, prompts(8)[0]) >= 44
    assert memory(pipeline).stats().moves["promotion", Tier.L4, Tier.L3] >= 11
    assert [answer(pipeline, prompt) for prompt in prompts(8)] == alone

    def offered() -> list[tuple[int, int]]:
        nodes = nodes_view(pipeline.current_engine, pipeline.state()).nodes
        return [(node.lends_bytes, node.lent_bytes) for node in nodes]

    until(lambda: offered() == [(0, 0), (LENDS, tier(pipeline).used_bytes)], "the worker has said what is used")  # type: ignore[union-attr]
    scraped = scrape(pipeline)
    sent, received = (scraped["vtp_kv_cache_ops_total", frozenset([way])] for way in ("sent", "received"))
    assert sent >= lent.blocks and received >= 11
    assert scraped["memory_promotions_total", frozenset(["L4", "L3"])] >= 11
    assert scraped["memory_tier_capacity_bytes", frozenset(["L4"])] == LENDS
    session = worker.worker._session
    assert session is not None and session._host.blocks.lent_bytes == tier(pipeline).used_bytes > 0  # type: ignore[union-attr]
    assert worker.worker._main_memory.used_by_purpose()[LENT] == LENDS
    pipeline.shutdown()
    assert session._host.blocks.lent_bytes == 0 and not session._host.blocks.memories


def test_without_an_offer_nothing_is_kept_elsewhere(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    worker = add_worker("attic")
    pipeline = serve(**SMALL)
    fill(pipeline)
    assert tier(pipeline) is None and cached(pipeline, prompts(8)[0]) == 0
    assert worker.worker._session is not None and not worker.worker._session._host.blocks.memories


def test_a_model_over_machines_keeps_whole_blocks_on_a_third(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]]
) -> None:
    add_worker("desk", keeps=64 << 10)
    add_worker("attic", lends=LENDS)
    pipeline = serve(**{**SMALL, "devices__devices": "cpu=64MiB,desk/cpu"})
    assert fill(pipeline) == alone
    assert cached(pipeline, prompts(8)[0]) >= 44
    assert memory(pipeline).stats().moves["promotion", Tier.L4, Tier.L3] >= 11
    assert [answer(pipeline, prompt) for prompt in prompts(8)] == alone


def test_the_coldest_blocks_make_room_and_no_machine_keeps_more_than_it_offers(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]]
) -> None:
    workers = [add_worker(name, lends=64 << 10) for name in ("attic", "desk")]
    pipeline = serve(memory__peer_codec="none", **SMALL)
    assert fill(pipeline) == alone
    lent = tier(pipeline)
    assert lent is not None and lent.capacity_bytes == 128 << 10 >= lent.used_bytes > 64 << 10
    for worker in workers:
        assert worker.worker._session is not None
        assert 0 < worker.worker._session._host.blocks.lent_bytes <= 64 << 10
    assert memory(pipeline).stats().moves["eviction", Tier.L4, None] > 0


@pytest.mark.parametrize("while_reading", [False, True])
def test_blocks_go_with_their_machine_quietly(
    master: Master, serve: Callable[..., InferencePipeline], alone: list[list[int]], while_reading: bool
) -> None:
    """They are computed again; a machine that comes is used."""
    workers = [WorkerProcess(master, CACHE_DIR, "attic", "cpu=64MiB", lends=LENDS)]
    try:
        joined(master, 1)
        pipeline = serve(**SMALL)
        assert fill(pipeline) == alone
        lent = tier(pipeline)
        assert lent is not None and lent.blocks > 40

        def kill() -> None:
            workers[0].process.kill()
            workers[0].process.wait()

        with pytest.MonkeyPatch.context() as patched:
            if while_reading:
                get = lent_memory._Lender.get

                def gone(self: lent_memory._Lender, block: bytes) -> memoryview | None:
                    kill()
                    return get(self, block)

                patched.setattr(lent_memory._Lender, "get", gone)
            else:
                kill()
                until(lambda: tier(pipeline).blocks == 0, "blocks are gone")  # type: ignore[union-attr]
            assert answer(pipeline, prompts(8)[0]) == alone[0]
        until(lambda: not master.nodes, "its loss is known")
        until(lambda: tier(pipeline).capacity_bytes == 0, "so is that of its memory")  # type: ignore[union-attr]
        lost = memory(pipeline).stats().moves["eviction", Tier.L4, None]
        assert 40 < lost <= lent.blocks and tier(pipeline).blocks == 0  # type: ignore[union-attr]
        assert memory_view(pipeline.engine).tier_troubles == {}
        assert health(pipeline.current_engine, pipeline.state()).status == "ok"
        workers.append(WorkerProcess(master, CACHE_DIR, "desk", "cpu=64MiB", lends=LENDS))
        until(lambda: tier(pipeline).capacity_bytes == LENDS, "another machine's memory")  # type: ignore[union-attr]
        assert fill(pipeline) == alone
        assert cached(pipeline, prompts(8)[0]) >= 44
    finally:
        for worker in workers:
            worker.close()


def test_a_machine_that_wants_to_go_gets_no_more_blocks_and_may_go(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline],
    alone: list[list[int]],
) -> None:  # fmt: skip
    worker = add_worker("attic", lends=LENDS)
    pipeline = serve(**SMALL)
    fill(pipeline, 4)
    worker.worker.leave()
    worker.join()
    until(lambda: tier(pipeline).blocks == 0, "its blocks are gone")  # type: ignore[union-attr]
    assert fill(pipeline) == alone


def test_memory_from_which_reading_takes_longer_than_computing_is_left_alone(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RestoreRule, "_token_s", lambda self, context: 1e-12)
    worker = add_worker("attic", lends=LENDS)
    pipeline = serve(**SMALL)
    fill(pipeline)
    assert tier(pipeline) is None
    assert worker.worker._session is not None and not worker.worker._session._host.blocks.memories


def test_a_model_that_moves_finds_what_it_has_on_other_machines(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]]
) -> None:
    worker = add_worker("attic", lends=LENDS)
    add_worker("desk", keeps=64 << 10)
    pipeline = serve(**SMALL)
    fill(pipeline)
    assert worker.worker._session is not None
    kept = worker.worker._session._host.blocks
    (number,) = kept.memories
    for devices in ("cpu=64MiB,desk/cpu", "cpu=64MiB,cpu=64MiB"):
        before = tier(pipeline)
        pipeline.place(devices=devices)
        after = tier(pipeline)
        assert before is not None and after is not None and after.blocks >= before.blocks - 16 > 0
        assert list(kept.memories) == [number]
        assert cached(pipeline, prompts(8)[0]) >= 44
        assert memory(pipeline).stats().moves["promotion", Tier.L4, Tier.L3] >= 11
        assert fill(pipeline) == alone


def test_blocks_on_another_machine_outlast_the_loss_of_one_that_computes(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline],
    alone: list[list[int]],
) -> None:  # fmt: skip
    add_worker("attic", lends=LENDS)
    desk = WorkerProcess(master, CACHE_DIR, "desk", "cpu=64MiB", keeps=64 << 10)
    try:
        joined(master, 2)
        pipeline = serve(**{**SMALL, "devices__devices": "cpu=64MiB,desk/cpu"})
        assert fill(pipeline) == alone
        before = pipeline.engine
        desk.process.kill()
        until(lambda: pipeline.current_engine not in (None, before) and not pipeline.loading, "the model has moved")
        lent = tier(pipeline)
        assert lent is not None and lent.blocks > 40
        assert cached(pipeline, prompts(8)[0]) >= 44
        assert [answer(pipeline, prompt) for prompt in prompts(8)] == alone
    finally:
        desk.close()


def test_another_model_begins_with_empty_memory_and_none_leaves_nothing(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], tmp_path: Path
) -> None:
    worker = add_worker("attic", lends=LENDS)
    pipeline = serve(**SMALL)
    fill(pipeline)
    build_tiny("qwen3", tmp_path)
    pipeline.load(str(tmp_path))
    assert worker.worker._session is not None
    kept = worker.worker._session._host.blocks
    lent = tier(pipeline)
    assert lent is not None and lent.blocks == 0 == kept.lent_bytes
    fill(pipeline)
    assert kept.lent_bytes > 0
    pipeline.shutdown()
    assert kept.lent_bytes == 0 and not kept.memories


def test_an_offer_that_the_machine_does_not_have_is_refused() -> None:
    token = "a-cluster-token-of-tests"
    settings = make_settings(
        cluster__token=token, devices__devices="cpu=64MiB", cluster__memory_bytes=1 << 60
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"cluster\.memory_bytes: host: kv_lent needs 1\.049e\+06 TiB"):
        open_worker(settings, version="1")
