"""A stage on a worker is short of KV memory: another device of that worker lends it some, and attends there."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from cluster.greedy import prompts, tiny_with_answers
from cluster.machines import WorkerThread
from engine.lending_cases import reclaim_something, remote_blocks, scatter, tight_devices
from steering import LONGEST_WAIT_S, arriving_together, between_steps, until, with_each_step

from core.batching.output import RequestHandle
from core.cluster.hosting import StageHost
from core.cluster.lending_messages import AddRegion, DropRegion
from core.cluster.master import Master
from core.cluster.messages import Measure, ModelRef, ReadPages
from core.cluster.placed_stage import PlacedRemoteStage
from core.engine.carrying import Carrier
from core.engine.kv_memory import Regions
from core.engine.model_engine import ModelEngine
from core.errors import InvalidRequestError, LinkLostError, NotFoundError, OutOfDeviceMemoryError
from core.execution.page_mover import PageMover
from core.inference_pipeline import InferencePipeline
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.lending.overflow import KVOverflow
from core.request import SamplingParams

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, detokenize=False)
LENGTHS = (5, 40, 31)
OWN, NEIGHBOUR = "desk/cpu#0", "desk/cpu#1"
OWN_TOKENS = 64

Serve = Callable[..., InferencePipeline]
AddWorker = Callable[..., WorkerThread]
Tiny = tuple[Path, list[list[int]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model, and what `generate()` says."""
    path = tmp_path_factory.mktemp("qwen3")
    return path, tiny_with_answers(path, LENGTHS, GREEDY.max_tokens)


@pytest.fixture
def started() -> list[WorkerThread]:
    """Workers of this test."""
    return []


@pytest.fixture
def open_tight(
    serve: Serve, add_worker: AddWorker, tiny: Tiny, started: list[WorkerThread]
) -> Callable[..., InferencePipeline]:
    """The second stage is on a worker, with room for `OWN_TOKENS` tokens; a neighbour there has no layers."""

    def start(**options: Any) -> InferencePipeline:
        own = tight_devices(tiny[0], "2,2", [640, OWN_TOKENS]).split(",")[1]
        started.append(add_worker("desk", f"{own},cpu=8MiB"))
        defaults = {
            "model__name": str(tiny[0]), "devices__devices": f"cpu=32MiB,{OWN},{NEIGHBOUR}", "devices__layers": "2,2",
            "engine__block_size": 4, "engine__kv_cache_tokens": 512, "model__max_model_len": 128, "engine__cohorts": 2,
            "lending__extent_blocks": 8, "lending__lend_ratio": 1.0, "lending__reclaim_threshold": 1.0,
        }  # fmt: skip
        return serve(**{**defaults, **options})

    return start


def ask(pipeline: InferencePipeline) -> list[RequestHandle]:
    with arriving_together(pipeline):
        return [pipeline.submit(prompt, GREEDY) for prompt in prompts(LENGTHS)]


def answers(handles: list[RequestHandle]) -> list[list[int]]:
    return [list(handle.result(LONGEST_WAIT_S).completions[0].token_ids) for handle in handles]


def overflow_of(engine: ModelEngine) -> KVOverflow:
    assert engine.memory.overflow is not None
    return engine.memory.overflow


def on_engine(engine: ModelEngine, act: Callable[[], Any]) -> Any:
    return engine.batcher.call(act).result(LONGEST_WAIT_S)


def hosted_by(worker: WorkerThread) -> StageHost:
    session = worker.worker._session
    assert session is not None
    return session._host


def check_books(engine: ModelEngine, host: StageHost) -> None:
    """Nobody holds more than its device has, and the master's ledgers are the node's."""
    overflow_of(engine).check_invariants()
    for ledger in host._ledgers.values():
        ledger.check_invariants()
    there = host.used_by_purpose()
    for name in (OWN, NEIGHBOUR):
        used, leases = engine.budgets[name].used_by_purpose(), overflow_of(engine).lending.leases(lender=name)
        assert sum(used.values()) <= engine.budgets[name].device.memory_limit_bytes
        assert used.get(PagedKVCache.LENT, 0) == sum(lease.nbytes for lease in leases)
        assert used == there[name.removeprefix("desk/")]


def test_a_stage_on_a_worker_borrows_and_tokens_stay_the_same(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny
) -> None:
    pipeline = open_tight(engine__cohorts=1)
    engine = pipeline.engine
    assert engine.plan.placement.stages[1].device_name == OWN and engine.kv.capacity_tokens == 512
    assert answers(ask(pipeline)) == tiny[1]
    assert engine.batcher.stats.preemptions == 0
    overflow = overflow_of(engine)
    assert {pair: count > 0 for pair, count in overflow.lending.stats().borrows.items()} == {(OWN, NEIGHBOUR): True}


@pytest.mark.parametrize("kind", ["cpu", "sim"])
def test_a_stage_beside_it_lends_as_well(serve: Serve, add_worker: AddWorker, tiny: Tiny, kind: str) -> None:
    """Both stages are on one worker, which has real or emulated cards; the first has little room, the second much."""
    speed = "@100GB/s/10TFLOPS" if kind == "sim" else ""
    own = tight_devices(tiny[0], "2,2", [OWN_TOKENS, 640], kind, speed).split(",")[0]
    add_worker("desk", f"{own},{kind}=8MiB{speed}")
    pipeline = serve(
        model__name=str(tiny[0]), devices__devices=f"desk/{kind}#0,desk/{kind}#1", devices__layers="2,2",
        engine__block_size=4, engine__kv_cache_tokens=512, model__max_model_len=128, engine__cohorts=2,
        lending__extent_blocks=8,
    )  # fmt: skip
    assert answers(ask(pipeline)) == tiny[1]
    borrows = overflow_of(pipeline.engine).lending.stats().borrows
    assert {pair: count > 0 for pair, count in borrows.items()} == {(f"desk/{kind}#0", f"desk/{kind}#1"): True}


def test_without_lending_there_is_no_more_than_the_stage_has(open_tight: Callable[..., InferencePipeline]) -> None:
    pipeline = open_tight(lending__enabled=False, model__max_model_len=OWN_TOKENS)
    assert pipeline.engine.kv.capacity_tokens == OWN_TOKENS
    assert pipeline.engine.memory.overflow is None


def test_blocks_may_be_anywhere_and_move_at_any_time(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, started: list[WorkerThread]
) -> None:
    pipeline = open_tight()
    engine, rng, away = pipeline.engine, random.Random(7), []

    def stir() -> None:
        check_books(engine, hosted_by(started[0]))
        scatter(engine, rng, 0.5)
        reclaim_something(engine, rng)
        away.append(remote_blocks(engine))

    with between_steps(pipeline, stir):
        assert answers(ask(pipeline)) == tiny[1]
    assert max(away) > 0
    assert sum(overflow_of(engine).lending.stats().reclaims.values()) > 0
    assert answers(ask(pipeline)) == tiny[1], "prefixes are where they were left"


def test_what_moves_has_to_move_there(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are wrong if the node forgets to copy pages to where the master says they are."""
    pipeline = open_tight()
    monkeypatch.setattr(PageMover, "apply", lambda self, ops: None)
    with between_steps(pipeline, lambda: scatter(pipeline.engine, random.Random(7), 0.5)):
        assert answers(ask(pipeline)) != tiny[1]


@pytest.fixture
def lent(open_tight: Callable[..., InferencePipeline], tiny: Tiny) -> InferencePipeline:
    """Half of what a prompt left is with the neighbour."""
    pipeline = open_tight()
    assert answers(ask(pipeline)) == tiny[1]
    engine = pipeline.engine
    on_engine(engine, lambda: scatter(engine, random.Random(1), 0.5))
    assert remote_blocks(engine)
    return pipeline


def test_both_sides_keep_the_same_books_and_everything_goes_back(
    lent: InferencePipeline, tiny: Tiny, started: list[WorkerThread]
) -> None:
    engine = lent.engine
    (stage,) = (stage for stage in engine.stages if isinstance(stage, PlacedRemoteStage))
    host = hosted_by(started[0])
    assert answers(ask(lent)) == tiny[1]
    on_engine(engine, lambda: check_books(engine, host))
    assert host.used_by_purpose()["cpu#1"].keys() == {PagedKVCache.LENT}
    lent.unload()
    assert host.used_by_purpose()["cpu#1"] == {} == host.used_by_purpose()["cpu#0"]
    assert all(budget.used_bytes == 0 for budget in engine.budgets.values())
    assert stage.kv is None


def test_a_neighbour_pressed_by_other_programs_gets_its_memory_back(
    lent: InferencePipeline, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker says so in its report."""
    overflow = overflow_of(lent.engine)
    monkeypatch.setattr(StageHost, "external_bytes", lambda self: {"cpu#1": 8 << 20, "cpu#0": 0})
    handles = ask(lent)
    until(lambda: sum(on_engine(lent.engine, overflow.lending.stats).reclaims.values()) > 0, "it is asked back")
    assert answers(handles) == tiny[1]
    until(lambda: not on_engine(lent.engine, lambda: overflow.lending.leases(lender=NEIGHBOUR)), "it is back")
    assert answers(ask(lent)) == tiny[1], "main memory there lends, or requests wait"


def test_a_worker_that_is_lost_takes_its_leases_along(
    lent: InferencePipeline, tiny: Tiny, started: list[WorkerThread]
) -> None:
    engine, lost = lent.engine, threading.Event()
    worker = started[0]

    def lose() -> None:
        if remote_blocks(engine) and not lost.is_set():
            lost.set()
            worker.worker.stop()

    with with_each_step(lent, lose):
        assert answers(ask(lent)) == tiny[1]
    assert lost.is_set()
    until(lambda: lent.current_engine not in (None, engine), "the model has moved")
    assert all(stage.device_name == "cpu" for stage in lent.engine.plan.placement.stages)
    assert not overflow_of(engine).lending.leases()
    assert all(budget.used_bytes == 0 for budget in engine.budgets.values())
    assert answers(ask(lent)) == tiny[1]


def test_what_is_lent_goes_along_when_the_model_moves(
    lent: InferencePipeline, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are read from wherever they are on the node."""
    monkeypatch.setattr(Carrier, "_is_quicker", lambda self, blocks: True)
    long = SamplingParams(max_tokens=30, temperature=0.8, seed=5, ignore_eos=True)
    expected = lent.submit(prompts(LENGTHS)[2], long).result(LONGEST_WAIT_S).completions[0].token_ids
    engine = lent.engine
    handle = lent.submit(prompts(LENGTHS)[2], long)
    until(lambda: engine.batcher.stats.running == 1, "it runs")
    on_engine(engine, lambda: scatter(engine, random.Random(3), 0.8))
    moved = lent.place(devices="cpu=32MiB", layers=None, placement="balanced")
    assert moved.carried_kv_tokens is not None and moved.carried_kv_tokens > 0
    assert handle.result(LONGEST_WAIT_S).completions[0].token_ids == expected
    assert answers(ask(lent)) == tiny[1]


def test_regions_that_cannot_be_had_are_refused(
    lent: InferencePipeline, started: list[WorkerThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = lent.engine
    (stage,) = (stage for stage in engine.stages if isinstance(stage, PlacedRemoteStage))
    host, node = hosted_by(started[0]), stage.node
    before = on_engine(engine, host.used_by_purpose)
    with pytest.raises(OutOfDeviceMemoryError, match="cpu#1"):
        node.call(AddRegion(stage.number, 99, "cpu#1", 1 << 20))
    for wrong, kind in (
        (AddRegion(stage.number, 99, "cpu#7", 1), NotFoundError),
        (AddRegion(stage.number + 1, 99, "cpu#1", 1), NotFoundError),
        (ReadPages(stage.number, (stage.part.first,), (0,), 99), InvalidRequestError),
    ):
        with pytest.raises(kind):
            node.call(wrong)
    assert host.used_by_purpose() == before
    for pages in (2, 3):  # one that the master has not heard of is replaced
        node.call(AddRegion(stage.number, 99, "cpu#1", pages))
        assert stage.kv is not None
        lent_there = before["cpu#1"][PagedKVCache.LENT] + pages * stage.kv.page_bytes
        assert host.used_by_purpose()["cpu#1"][PagedKVCache.LENT] == lent_there
    for _ in range(2):
        node.call(DropRegion(stage.number, 99))
    assert host.used_by_purpose() == before
    monkeypatch.setattr(node, "call", Mock(side_effect=LinkLostError("gone")))  # a node that does not answer
    with pytest.raises(OutOfDeviceMemoryError, match="desk/cpu#1: gone"):
        Regions(engine.stages, engine.budgets).add(1, 99, NEIGHBOUR, 1)
    monkeypatch.undo()
    on_engine(engine, lambda: check_books(engine, host))


def test_streams_do_not_wait_for_what_takes_long(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that measures itself, or loads another stage, still makes regions."""
    pipeline = open_tight()
    measuring, go_on = threading.Event(), threading.Event()

    def wait(self: StageHost, asked: Measure) -> None:
        measuring.set()
        assert go_on.wait(LONGEST_WAIT_S)
        raise InvalidRequestError("not now")

    monkeypatch.setattr(StageHost, "measure", wait)
    (node,) = master.nodes
    call = Measure(ModelRef("any", "/nowhere", None, "0" * 32, "float32", ()), ("cpu#0",), {})
    with ThreadPoolExecutor(1) as pool:
        measured = pool.submit(node.call, call)
        try:
            assert measuring.wait(LONGEST_WAIT_S)
            assert answers(ask(pipeline)) == tiny[1]
            assert overflow_of(pipeline.engine).lending.stats().bytes_lent_total > 0
            assert not measured.done()
        finally:
            go_on.set()
        with pytest.raises(InvalidRequestError, match="not now"):
            measured.result()
