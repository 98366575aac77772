"""`/api/memory` and its calls, on a real pipeline."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import pytest
import torch
from api_client import TOKEN, ApiClient
from engine.lending_cases import open_tight
from steering import LONGEST_WAIT_S, until
from tiny_models import VOCAB, build_tiny

from core.api import create_app
from core.batching import batcher, intake
from core.inference_pipeline import InferencePipeline
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.request import SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    build_tiny("qwen3", path)
    return path


Opener = Callable[..., tuple[InferencePipeline, ApiClient]]


@pytest.fixture
def opened(open_pipeline: Callable[..., InferencePipeline], tiny: Path, tmp_path: Path) -> Opener:
    """A pipeline whose first stage borrows, with main memory and a disk below, and a client."""

    def start(**options: Any) -> tuple[InferencePipeline, ApiClient]:
        tiers = {
            "memory__host_bytes": 1 << 20, "memory__disk_path": tmp_path / "kv", "memory__disk_bytes": 1 << 24,
            "memory__disk_min_free_bytes": 0, "api__token": TOKEN,
        }  # fmt: skip
        pipeline = open_tight(open_pipeline, tiny, [64, 640], **{**tiers, **options})
        return pipeline, ApiClient(create_app(pipeline))

    return start


def fill(pipeline: InferencePipeline, count: int = 30, length: int = 60) -> None:
    for seed in range(count):
        prompt = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S)


def tier(view: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in view["tiers"] if each["tier"] == name]
    return found  # type: ignore[no-any-return]


def metric(client: ApiClient, name: str) -> float:
    """Sum of a metric over its labels."""
    text = client.get("/metrics").text
    return sum(float(value) for value in re.findall(rf"^\w*{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def test_the_view_adds_up(opened: Opener) -> None:
    pipeline, client = opened()
    fill(pipeline)
    view = client.get("/api/memory").get_json()
    assert [device["name"] for device in view["devices"]] == [d.name for d in pipeline.engine.plan.devices]
    for device in view["devices"]:
        parts = ("weights_bytes", "own_kv_bytes", "lent_bytes", "other_bytes", "free_bytes")
        assert sum(device[part] for part in parts) == device["limit_bytes"]
    first, second = view["devices"]
    assert first["borrowed_bytes"] == second["lent_bytes"] == sum(lease["bytes"] for lease in view["leases"]) > 0
    assert view["kv_blocks"]["total"] >= view["kv_blocks"]["with_memory"] > 16
    assert tier(view, "L3")["blocks"] > 0
    assert tier(view, "L3")["hottest"] == []


def test_blocks_are_listed_as_many_as_asked_for(opened: Opener) -> None:
    pipeline, client = opened()
    fill(pipeline)
    hottest = tier(client.get("/api/memory?blocks=3").get_json(), "L3")["hottest"]
    assert len(hottest) == 3
    assert [each["hotness"] for each in hottest] == sorted((each["hotness"] for each in hottest), reverse=True)
    assert client.get("/api/memory?blocks=1000").status_code == 200
    for wrong in ("1001", "-1", "x", "1.5", "²"):
        assert client.get("/api/memory", query_string={"blocks": wrong}).status_code == 400


def test_a_block_goes_down_and_comes_up_by_call(opened: Opener) -> None:
    pipeline, client = opened()
    fill(pipeline)
    block = tier(client.get("/api/memory?blocks=1").get_json(), "L3")["hottest"][0]["block"]
    before = metric(client, "memory_demotions_total")
    assert client.post(f"/api/memory/blocks/{block}/demote").status_code == 200
    tiers = pipeline.engine.memory.tiers
    assert tiers is not None
    assert tiers.memory.flush(30)
    assert metric(client, "memory_demotions_total") > before
    answer = client.post(f"/api/memory/blocks/{block}/promote")
    assert answer.get_json() == {"block": block, "status": "promoted"}


@pytest.mark.parametrize("call", ["promote", "demote"])
def test_what_is_no_block_cannot_move(opened: Opener, call: str) -> None:
    _, client = opened()
    client.error(f"/api/memory/blocks/{'0' * 32}/{call}", status=404)
    assert client.error(f"/api/memory/blocks/xyz/{call}", status=400)["param"] == "block"


def lent_bytes(pipeline: InferencePipeline, lender: str) -> int:
    return pipeline.engine.budgets[lender].used_by_purpose().get(PagedKVCache.LENT, 0)


def test_a_device_takes_back_what_it_lent_and_lends_again(opened: Opener) -> None:
    pipeline, client = opened(lending__host_bytes=0)
    fill(pipeline, 3)
    lender = pipeline.engine.plan.devices[1].name
    lent = lent_bytes(pipeline, lender)
    assert lent == sum(lease["bytes"] for lease in client.get("/api/memory").get_json()["leases"]) > 0
    answer = client.post("/api/memory/reclaim", {"device": lender, "urgency": "critical"})
    assert answer.get_json() == {"device": lender, "bytes": lent, "urgency": "critical"}
    until(lambda: lent_bytes(pipeline, lender) == 0, "the lender has its memory")
    fill(pipeline, 1, 40)
    assert lent_bytes(pipeline, lender) == 0
    assert metric(client, "lending_borrows_total") > 0
    assert metric(client, "lending_bytes_lent_total") >= lent
    answer = client.post("/api/memory/lend", {"device": lender})
    assert answer.get_json()["bytes"] >= lent
    until(lambda: fill(pipeline, 3) or lent_bytes(pipeline, lender), "it lends again")


def test_a_request_that_no_longer_fits_is_told_so_and_fits_when_memory_is_lent_again(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "MEMORY_WAIT_S", 0.3)
    pipeline, client = opened(lending__host_bytes=0)
    lender = pipeline.engine.plan.devices[1].name
    client.post("/api/memory/reclaim", {"device": lender, "urgency": "critical"})
    asked = {"model": pipeline.engine.model.name, "prompt": [3 + i % 80 for i in range(100)], "max_tokens": 4}
    error = client.error("/v1/completions", asked, status=503)
    assert "100 tokens" in error["message"]
    assert client.post("/v1/completions", {**asked, "prompt": [3, 4, 5]}).status_code == 200
    monkeypatch.setattr(batcher, "MEMORY_WAIT_S", 60.0)
    client.post("/api/memory/lend", {"device": lender})
    assert client.post("/v1/completions", asked).status_code == 200


def test_who_waited_and_went_does_not_shorten_the_wait_of_others(opened: Opener) -> None:
    pipeline, client = opened(lending__host_bytes=0)
    engine = pipeline.engine
    client.post("/api/memory/reclaim", {"device": engine.plan.devices[1].name, "urgency": "critical"})
    waits = pipeline.submit([3 + i % 80 for i in range(100)], GREEDY)
    until(lambda: engine.batcher._starved_since_s is not None, "it waits for memory")
    waits.abort()
    until(lambda: engine.batcher._starved_since_s is None, "nobody waits any more")


CALLS: list[tuple[str, Any]] = [
    ("/api/memory/reclaim", {"device": "cpu#1", "urgency": "critical"}),
    ("/api/memory/lend", {"device": "cpu#1"}),
]


def test_a_call_that_the_engine_does_not_come_to_is_never_done(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, client = opened(lending__host_bytes=0)
    fill(pipeline, 3)
    assert lent_bytes(pipeline, "cpu#1") > 0
    engine, go_on, done = pipeline.engine, threading.Event(), []
    assert engine.memory.overflow is not None
    monkeypatch.setattr(engine.memory.overflow.lending, "request_reclaim", lambda *_: done.append("reclaim"))
    monkeypatch.setattr(engine.memory.overflow.lending, "reopen", lambda *_: done.append("lend"))
    engine.batcher.call(lambda: go_on.wait(60))
    try:
        with monkeypatch.context() as short:
            short.setattr(intake, "CALL_S", 0.01)
            for path, body in CALLS:
                answer = client.post(path, body)
                assert answer.status_code == 503, path
                assert answer.get_json()["error"]["code"] == "unavailable"
                assert int(answer.headers["Retry-After"]) >= 1
    finally:
        go_on.set()
    engine.check_invariants()
    assert done == []


def test_a_call_that_has_begun_is_waited_for(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Future[int]):
        def result(self, timeout: float | None = None) -> int:
            if timeout is not None:
                self.set_result(5)
                raise FutureTimeoutError
            return super().result()

    pipeline, _ = opened()
    begun = Slow()
    begun.set_running_or_notify_cancel()
    monkeypatch.setattr(pipeline.engine.batcher.intake, "call", lambda function: begun)
    assert pipeline.engine.batcher.intake.call_within(lambda: 0, 0.01) == 5
    monkeypatch.undo()


def test_unknown_devices_and_fields_are_refused(opened: Opener) -> None:
    _, client = opened()
    client.error("/api/memory/reclaim", {"device": "nobody"}, status=404)
    client.error("/api/memory/reclaim", {"device": "cpu:0", "urgency": "soon"}, status=400)
    client.error("/api/memory/reclaim", {"device": "cpu:0", "bytes": 0}, status=400)
    client.error("/api/memory/reclaim", {"device": "cpu:0", "more": 1}, status=400)
    client.error("/api/memory/lend", {"device": "nobody"}, status=404)
    client.error("/api/memory/lend", {"device": "cpu:0", "more": 1}, status=400)


def test_nothing_moves_by_call_in_read_only_mode(opened: Opener) -> None:
    _, client = opened(security__read_only=True)
    assert client.get("/api/memory").status_code == 200
    client.error(f"/api/memory/blocks/{'0' * 32}/promote", status=403)
    client.error(f"/api/memory/blocks/{'0' * 32}/demote", status=403)
    client.error("/api/memory/reclaim", {"device": "cpu:0"}, status=403)
    client.error("/api/memory/lend", {"device": "cpu:0"}, status=403)
