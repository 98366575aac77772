"""Lenders want their memory back at any moment, for a while or for good: requests go on, no token changes."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lending_cases import OpenPipeline, open_tight, reclaim_something, remote_blocks, scatter
from steering import LONGEST_WAIT_S, between_steps, until
from test_lending_serving import GREEDY, ask, prompts, reference
from test_lending_trouble import check_budgets, outcomes, outcomes_while
from tiny_models import build_tiny

import core.devices.pressure
from core.devices import Device, probe
from core.devices.probe import free_bytes_of
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.lending import Urgency


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    path = tmp_path_factory.mktemp("qwen3")
    model = build_tiny("qwen3", path)
    return path, [reference(model, prompt) for prompt in prompts()]


@pytest.mark.parametrize("cohorts", [1, 2])
def test_500_random_reclaims_cost_no_request_a_token(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline, cohorts: int
) -> None:
    """A reclaim and an audit of all budgets and leases between any two steps; half of the 500 with each number of
    steps in flight."""
    pipeline = open_tight(open_pipeline, tiny[0], [64, 640], engine__cohorts=cohorts)
    engine, rng = pipeline.engine, random.Random(cohorts)
    assert engine.memory.overflow is not None
    lending = engine.memory.overflow.lending

    def reclaim() -> None:
        reclaim_something(engine, rng)
        check_budgets(engine)

    while sum(lending.stats().reclaims.values()) < 250:
        assert outcomes_while(pipeline, reclaim) == tiny[1]


def test_memory_taken_for_good_leaves_requests_waiting_until_it_is_back(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline
) -> None:
    pipeline = open_tight(open_pipeline, tiny[0], [64, 640], lending__host_bytes=0)
    engine, long = pipeline.engine, list(range(3, 93))
    overflow = engine.memory.overflow
    assert overflow is not None
    expected = pipeline.submit(long, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids
    lender = engine.plan.devices[1].name
    engine.batcher.call(lambda: overflow.lending.request_reclaim(lender, None, Urgency.CRITICAL)).result(LONGEST_WAIT_S)
    small, waits = pipeline.submit(prompts()[0], GREEDY), pipeline.submit(long, GREEDY)
    assert outcomes([small]) == tiny[1][:1], "what fits at home goes on"
    until(
        lambda: engine.batcher.call(overflow.lending.leases).result(LONGEST_WAIT_S) == (), "the lender has its memory"
    )
    engine.batcher.call(lambda: check_budgets(engine)).result(LONGEST_WAIT_S)
    assert not waits.finished
    engine.batcher.call(lambda: overflow.lending.reopen(lender)).result(LONGEST_WAIT_S)
    assert outcomes([waits]) == [expected]


def test_a_lender_pressed_by_another_program_gets_its_memory_back(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_tight(open_pipeline, tiny[0], [64, 700])
    engine = pipeline.engine
    overflow = engine.memory.overflow
    assert overflow is not None
    lender = engine.plan.devices[1].name
    engine.batcher.call(lambda: scatter(engine, random.Random(1), 0.5)).result(LONGEST_WAIT_S)
    assert overflow.lending.leases(lender=lender)
    monkeypatch.setattr(core.devices.pressure, "free_bytes_of", lambda device: 0)
    overflow._observe_s = 0.0
    handles = ask(pipeline)
    assert outcomes(handles) == tiny[1]
    assert sum(overflow.lending.stats().reclaims.values()) > 0
    engine.batcher.call(lambda: check_budgets(engine)).result(LONGEST_WAIT_S)
    until(
        lambda: engine.batcher.call(lambda: overflow.lending.leases(lender=lender)).result(LONGEST_WAIT_S) == (),
        "it is back",
    )


def test_only_the_devices_in_use_are_asked_while_a_model_serves(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probing a machine opens every card, and changes the warnings of all threads meanwhile."""
    pipeline = open_tight(open_pipeline, tiny[0], [64, 700])
    engine = pipeline.engine
    overflow = engine.memory.overflow
    assert overflow is not None
    asked: list[str] = []

    def free(device: Device) -> int:
        asked.append(device.torch_device)
        return free_bytes_of(device)

    monkeypatch.setattr(core.devices.pressure, "free_bytes_of", free)
    monkeypatch.setattr(warnings, "catch_warnings", lambda **_: pytest.fail("warnings are caught"))
    monkeypatch.setattr(probe, "probe_machine", lambda: pytest.fail("the machine is probed"))
    overflow._observe_s = 0.0
    assert outcomes(ask(pipeline)) == tiny[1]
    assert set(asked) == {"cpu"}
    assert engine.batcher.error is None


def test_a_lender_is_served_while_all_others_wait_for_its_memory(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline
) -> None:
    """The one that runs no longer fits when the memory goes, and no step carries its blocks away."""
    pipeline = open_tight(open_pipeline, tiny[0], [64, 640], lending__host_bytes=0)
    engine = pipeline.engine
    overflow = engine.memory.overflow
    assert overflow is not None
    lender = engine.plan.devices[1].name
    reclaimed: list[int] = []

    def reclaim_what_is_used() -> None:
        if remote_blocks(engine) and not reclaimed:
            reclaimed.append(overflow.lending.request_reclaim(lender, None, Urgency.HIGH))

    with between_steps(pipeline, reclaim_what_is_used):
        waits = pipeline.submit(list(range(3, 93)), replace(GREEDY, max_tokens=30))
        until(lambda: reclaimed, "blocks that live at the lender")
    until(
        lambda: engine.batcher.call(overflow.lending.leases).result(LONGEST_WAIT_S) == (), "the lender has its memory"
    )
    assert not waits.finished
    engine.batcher.call(lambda: overflow.lending.reopen(lender)).result(LONGEST_WAIT_S)
    assert len(waits.result(LONGEST_WAIT_S).completions[0].token_ids) == 30


def test_pages_move_in_pieces_that_fit_into_little_memory(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_tight(open_pipeline, tiny[0], [64, 640])
    engine, rng, packed = pipeline.engine, random.Random(2), []
    kv = engine.stages[0].kv
    assert kv is not None
    monkeypatch.setattr("core.execution.page_mover.GROUP_BYTES", 2 * kv.page_bytes)
    pack = PagedKVCache.pack

    def counted(self: PagedKVCache, region: int, pages: list[int]) -> torch.Tensor:
        packed.append(len(pages))
        return pack(self, region, pages)

    monkeypatch.setattr(PagedKVCache, "pack", counted)
    assert outcomes_while(pipeline, lambda: scatter(engine, rng, 0.5)) == tiny[1]
    assert max(packed) == 2
