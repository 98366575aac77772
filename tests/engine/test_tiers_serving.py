"""Blocks that leave the devices come back from the tiers below, and tokens stay what they were."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_store import BrokenStore
from lending_cases import OpenPipeline
from steering import LONGEST_WAIT_S, arriving_together, until
from tiny_models import VOCAB, build_tiny

from core.batching.batcher import ContinuousBatcher
from core.engine.model_engine import ModelEngine
from core.errors import StepFailedError, VRAMancerError
from core.execution.page_mover import PageMover
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from core.tiers import Tier
from core.tiers.disk import LocalFiles
from core.views.health import Check, health
from core.views.memory import memory_view

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
HOST = {"memory__host_bytes": 1 << 20}


def prompts(count: int, length: int = 48) -> list[list[int]]:
    return [
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in range(count)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    build_tiny("qwen3", path)
    return path


def answers(pipeline: InferencePipeline, asked: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    with arriving_together(pipeline):
        handles = [pipeline.submit(prompt, params) for prompt in asked]
    return [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles]


def cached(pipeline: InferencePipeline, prompt: list[int]) -> int:
    return pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S).num_cached_tokens


def open_small(open_pipeline: OpenPipeline, tiny: Path, **options: Any) -> InferencePipeline:
    """Room for 64 tokens: the blocks of a prompt push out those of the one before."""
    defaults = {
        "devices__devices": "cpu=64MiB,cpu=64MiB", "engine__block_size": 4, "engine__kv_cache_tokens": 64,
        "engine__cohorts": 1, "memory__disk_min_free_bytes": 0,
    }  # fmt: skip
    return open_pipeline(tiny, **{**defaults, **HOST, **options})


def restarted(
    open_pipeline: OpenPipeline, tiny: Path, tmp_path: Path
) -> tuple[InferencePipeline, list[list[list[int]]]]:
    """A pipeline whose directory another one has filled, and what that one answered to six prompts."""
    disk = {"memory__disk_path": tmp_path / "kv", "memory__disk_bytes": 1 << 24}
    first = open_small(open_pipeline, tiny, **disk)
    expected = [answers(first, [prompt]) for prompt in prompts(6)]
    first.shutdown()
    return open_small(open_pipeline, tiny, **disk), expected


@pytest.mark.parametrize("cohorts", [1, 2])
def test_a_prefix_that_was_pushed_out_comes_back_from_main_memory(
    tiny: Path, open_pipeline: OpenPipeline, cohorts: int
) -> None:
    expected = answers(open_pipeline(tiny, engine__kv_cache_tokens=4096), prompts(4))
    pipeline = open_small(open_pipeline, tiny, engine__cohorts=cohorts)
    for _ in range(2):
        for prompt, tokens in zip(prompts(4), expected, strict=True):
            assert answers(pipeline, [prompt]) == [tokens]
    assert cached(pipeline, prompts(4)[0]) >= 44
    assert pipeline.engine.memory.tiers is not None
    moves = pipeline.engine.memory.tiers.memory.stats().moves
    assert moves["demotion", Tier.L1, Tier.L3] > 0
    assert moves["promotion", Tier.L3, Tier.L1] > 0


def test_without_tiers_nothing_comes_back(tiny: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_small(open_pipeline, tiny, memory__host_bytes=0)
    for prompt in prompts(4):
        answers(pipeline, [prompt])
    assert cached(pipeline, prompts(4)[0]) == 0


def test_a_restarted_server_finds_its_prefixes_on_disk(tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path) -> None:
    second, expected = restarted(open_pipeline, tiny, tmp_path)
    assert cached(second, prompts(6)[1]) >= 40
    assert [answers(second, [prompt]) for prompt in prompts(6)] == expected


def test_damaged_files_cost_a_recompute_and_nothing_else(
    tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path
) -> None:
    disk = {"memory__disk_path": tmp_path / "kv", "memory__disk_bytes": 1 << 24}
    first = open_small(open_pipeline, tiny, **disk)
    expected = [answers(first, [prompt]) for prompt in prompts(6)]
    first.shutdown()
    files = [file for file in (tmp_path / "kv").rglob("*") if file.is_file() and file.stat().st_size > 1000]
    assert files
    for number, file in enumerate(files):
        data = bytearray(file.read_bytes())
        for at in range(600 + number, len(data), 97):
            data[at] ^= 0xFF
        file.write_bytes(data)
    second = open_small(open_pipeline, tiny, **disk)
    assert [answers(second, [prompt]) for prompt in prompts(6)] == expected


def test_a_preempted_sequence_comes_back_from_main_memory(tiny: Path, open_pipeline: OpenPipeline) -> None:
    params = replace(GREEDY, max_tokens=40)
    expected = answers(open_pipeline(tiny, engine__kv_cache_tokens=4096), prompts(5, 20), params)
    pipeline = open_small(open_pipeline, tiny, engine__kv_cache_tokens=100)
    assert answers(pipeline, prompts(5, 20), params) == expected
    assert pipeline.engine.batcher.stats.preemptions > 0
    assert pipeline.engine.memory.tiers is not None
    assert pipeline.engine.memory.tiers.memory.stats().moves["promotion", Tier.L3, Tier.L1] > 0


def test_requests_given_up_while_their_prefix_is_read_leave_nothing(
    tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path
) -> None:
    second, expected = restarted(open_pipeline, tiny, tmp_path)
    for prompt in prompts(6):
        second.submit(prompt, GREEDY).abort()
    assert [answers(second, [prompt]) for prompt in prompts(6)] == expected


def test_what_the_devices_hold_outlasts_a_restart(tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path) -> None:
    """The prompt that everybody begins with never leaves the devices by itself."""
    roomy = {"engine__kv_cache_tokens": 4096, "memory__disk_path": tmp_path / "kv", "memory__disk_bytes": 1 << 24}
    first = open_small(open_pipeline, tiny, **roomy)
    expected = answers(first, [prompts(1)[0]])
    assert first.engine.memory.tiers is not None
    assert not first.engine.memory.tiers.memory.stats().moves
    first.shutdown()
    second = open_small(open_pipeline, tiny, **roomy)
    assert cached(second, prompts(1)[0]) >= 44
    assert answers(second, [prompts(1)[0]]) == expected


def test_what_is_used_again_is_written_down_at_once(tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path) -> None:
    """A server that is killed has no time to write."""
    roomy = {
        "engine__kv_cache_tokens": 4096, "memory__disk_path": tmp_path / "kv", "memory__disk_bytes": 1 << 24,
        "memory__write_back_bytes_s": None,
    }  # fmt: skip
    pipeline = open_small(open_pipeline, tiny, **roomy)
    first, *others = prompts(3)
    for _ in range(2):
        answers(pipeline, [first])
    answers(pipeline, others)
    assert pipeline.engine.memory.tiers is not None
    memory = pipeline.engine.memory.tiers.memory
    until(lambda: memory.stats().tiers[1].blocks >= 11, "the first prompt's blocks are written")
    assert memory.stats().tiers[1].blocks == 11


@pytest.mark.parametrize("cohorts", [1, 2])
def test_what_a_load_that_fails_was_for_is_computed_and_nothing_wrong_is_left(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, cohorts: int
) -> None:
    expected = answers(open_pipeline(tiny, engine__kv_cache_tokens=4096), prompts(4))
    pipeline = open_small(open_pipeline, tiny, engine__cohorts=cohorts)
    assert [answers(pipeline, [prompt])[0] for prompt in prompts(4)] == expected
    load, failed = PageMover._load_layer, []

    def broken(self: PageMover, *args: Any) -> None:
        if not failed:
            failed.append(args)
            raise RuntimeError("broken for a test")
        load(self, *args)

    monkeypatch.setattr(PageMover, "_load_layer", broken)
    assert answers(pipeline, [prompts(4)[0]]) == expected[:1]
    assert failed
    for _ in range(2):
        assert [answers(pipeline, [prompt])[0] for prompt in prompts(4)] == expected


def test_samples_of_a_prompt_whose_prefix_is_fetched_share_it_and_may_be_given_up(
    tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path
) -> None:
    second, expected = restarted(open_pipeline, tiny, tmp_path)
    three = replace(GREEDY, n=3, temperature=0.0)
    for prompt in prompts(6)[:3]:
        second.submit(prompt, three).abort()
    result = second.submit(prompts(6)[3], three).result(LONGEST_WAIT_S)
    assert [sample.token_ids for sample in result.completions] == expected[3] * 3
    assert result.num_cached_tokens >= 40
    second.engine.check_invariants()


def test_other_weights_in_the_same_place_find_nothing_of_the_old_ones(
    open_pipeline: OpenPipeline, tmp_path: Path
) -> None:
    disk = {"memory__disk_path": tmp_path / "kv", "memory__disk_bytes": 1 << 24}
    build_tiny("qwen3", tmp_path / "model")
    first = open_small(open_pipeline, tmp_path / "model", **disk)
    old = answers(first, [prompts(1)[0]])
    first.shutdown()
    build_tiny("qwen3", tmp_path / "model", seed=1)
    second = open_small(open_pipeline, tmp_path / "model", **disk)
    assert cached(second, prompts(1)[0]) == 0
    assert answers(second, [prompts(1)[0]]) != old


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


ROOMS = ["cpu=64MiB,cpu=64MiB", "cpu=1300KiB,cpu=1300KiB"]
"""Both models at once, and one at a time."""


def on_disk(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"memory__disk_path": tmp_path / "kv", "memory__disk_bytes": 1 << 24, **more}


def names(pipeline: InferencePipeline) -> list[str]:
    return [tier.tier for tier in memory_view(pipeline.engine).tiers]


def tiers_check(pipeline: InferencePipeline) -> Check:
    return health(pipeline.current_engine, pipeline.state()).checks["tiers"]


def answers_written(pipeline: InferencePipeline, prompt: list[int]) -> list[list[int]]:
    """What main memory has of it is on disk afterwards."""
    tokens = answers(pipeline, [prompt])
    assert pipeline.engine.memory.tiers is not None
    assert pipeline.engine.memory.tiers.memory.flush(60.0)
    return tokens


@pytest.mark.parametrize("room", ROOMS)
def test_a_swapped_in_model_has_the_directory_and_both_models_find_their_blocks(
    tiny: Path, other: Path, open_pipeline: OpenPipeline, tmp_path: Path, room: str
) -> None:
    """Also those that only the devices had when a model left. Every load has a thread of its own, as in the server."""
    pipeline = open_small(open_pipeline, tiny, devices__devices=room, **on_disk(tmp_path))
    expected = {tiny: answers(pipeline, prompts(1))}
    with ThreadPoolExecutor(1) as thread:
        thread.submit(pipeline.load, str(other)).result()
    assert names(pipeline) == ["L3", "L5"]
    expected[other] = answers(pipeline, prompts(1))
    for model in (tiny, other):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(pipeline.load, str(model)).result()
        assert names(pipeline) == ["L3", "L5"]
        assert cached(pipeline, prompts(1)[0]) >= 44
        assert answers(pipeline, prompts(1)) == expected[model]


def test_the_old_model_has_the_directory_until_it_has_ended(
    tiny: Path, other: Path, open_pipeline: OpenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_small(open_pipeline, tiny, **on_disk(tmp_path))
    old = pipeline.engine.memory.tiers
    assert old is not None
    stop, seen = ContinuousBatcher.stop, []

    def look(self: ContinuousBatcher, **options: Any) -> None:
        if not seen:
            seen.append((pipeline.model.name, names(pipeline), old.memory.lasts, old.memory.promote(b"unknown")))
        stop(self, **options)

    monkeypatch.setattr(ContinuousBatcher, "stop", look)
    pipeline.load(str(other))
    assert seen == [(other.name, ["L3"], True, False)]
    assert names(pipeline) == ["L3", "L5"]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("fault", ["weights", "warm-up"])
def test_a_model_that_does_not_load_leaves_the_old_ones_tiers_working(
    tiny: Path, other: Path, open_pipeline: OpenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    room: str, fault: str,
) -> None:  # fmt: skip
    """What was saved before comes back from disk, and so does what is saved after."""
    room_for_two = {"devices__devices": room, "memory__host_bytes": 64 << 10}  # of nine prompts; the others sink
    pipeline = open_small(open_pipeline, tiny, **room_for_two, **on_disk(tmp_path))
    expected = [answers_written(pipeline, prompt) for prompt in prompts(6)]
    broken = tmp_path / "broken"
    shutil.copytree(other, broken)
    warm_up = pipeline._keeper._warm_up

    def fail(engine: ModelEngine) -> None:
        if engine.model.path == broken:
            raise StepFailedError("broken for a test")
        warm_up(engine)

    if fault == "weights":
        (file,) = broken.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-200])
    else:
        monkeypatch.setattr(pipeline._keeper, "_warm_up", fail)
    with pytest.raises(VRAMancerError):
        pipeline.load(str(broken))
    assert pipeline.model.path == tiny
    assert names(pipeline) == ["L3", "L5"]
    assert tiers_check(pipeline).status == "ok"
    assert cached(pipeline, prompts(6)[2]) >= 40
    fresh = prompts(9)[6:]
    expected += [answers_written(pipeline, prompt) for prompt in fresh]
    pipeline.load()
    assert cached(pipeline, fresh[0]) >= 40
    assert [answers(pipeline, [prompt]) for prompt in prompts(9)] == expected


@pytest.mark.parametrize("way", ["beside", "alone", "back"])
def test_a_model_that_moves_takes_its_directory_along(
    tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Beside the old placement, after that made room, and back to it because the move failed."""
    pipeline = open_small(open_pipeline, tiny, devices__devices=ROOMS[1], **on_disk(tmp_path))
    expected = [answers_written(pipeline, prompt) for prompt in prompts(6)]
    place = partial(pipeline.place, devices="cpu=64MiB" if way == "beside" else "cpu=1300KiB,cpu=1200KiB")
    if way == "back":
        warm_up, calls = pipeline._keeper._warm_up, []

        def fail(engine: ModelEngine) -> None:
            calls.append(engine)
            if len(calls) == 1:
                raise StepFailedError("broken for a test")
            warm_up(engine)

        monkeypatch.setattr(pipeline._keeper, "_warm_up", fail)
        with pytest.raises(StepFailedError):
            place()
    else:
        place()
    assert names(pipeline) == ["L3", "L5"]
    assert cached(pipeline, prompts(6)[2]) >= 40
    assert [answers(pipeline, [prompt]) for prompt in prompts(6)] == expected


def test_a_remote_place_whose_driver_fails_does_not_stop_a_load(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BrokenStore, "fails", frozenset(["list"]))
    pipeline = open_small(open_pipeline, tiny, memory__remote_url="broken://place")
    assert answers(pipeline, prompts(1))
    assert tiers_check(pipeline) == Check("degraded", "L6 is not used: BackendError: cannot list")


def test_health_says_which_tier_is_missing_and_why(tiny: Path, open_pipeline: OpenPipeline, tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "kv")
    pipeline = open_small(open_pipeline, tiny, **on_disk(tmp_path))
    assert health(pipeline.current_engine, pipeline.state()).status == "degraded"
    assert tiers_check(pipeline).status == "degraded"
    assert "L5 is not used: " in tiers_check(pipeline).detail
    assert "in use by another process" in memory_view(pipeline.engine).tier_troubles["L5"]
    files.close()
    pipeline.load()
    assert tiers_check(pipeline).status == "ok"
    assert memory_view(pipeline.engine).tier_troubles == {}
