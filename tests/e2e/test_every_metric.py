"""A server under a load that crosses every feature: each metric moves, and by the right amount."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import TOKEN
from engine.lending_cases import BLOCK, open_tight
from front_doors import serving
from prometheus_client.parser import text_string_to_metric_families
from steering import LONGEST_WAIT_S, until
from tiny_models import VOCAB, build_tiny

from core.api import create_app
from core.errors import DeviceLostError
from core.inference_pipeline import InferencePipeline
from core.metrics import COMING, NAMESPACE

HIDDEN, BYTES = 32, 4
Values = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Service:
    pipeline: InferencePipeline
    port: int

    def call(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST_WAIT_S)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return json.loads(text) if "json" in response.headers["Content-Type"] else text

    def complete(self, prompt: list[int], max_tokens: int = 6, **fields: Any) -> Any:
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0, **fields}
        return self.call("POST", "/v1/completions", body)

    def scrape(self) -> Values:
        families = text_string_to_metric_families(self.call("GET", "/metrics"))
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


class Meter:
    """What metrics were, and by how much they have moved since. Names come without their prefix."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._before = service.scrape()
        self._now = self._before

    def look(self) -> None:
        self._now = self._service.scrape()

    def now(self, metric: str, prefix: str = f"{NAMESPACE}_", /, **labels: str) -> float | None:
        return self._now.get((prefix + metric, frozenset(labels.items())))

    def moved(self, metric: str, prefix: str = f"{NAMESPACE}_", /, **labels: str) -> float:
        key = prefix + metric, frozenset(labels.items())
        return self._now.get(key, 0.0) - self._before.get(key, 0.0)

    def total(self, name: str) -> float:
        """How much a metric moved, all labels together."""
        mine = [key for key in self._now if key[0] == f"{NAMESPACE}_{name}"]
        return sum(self._now[key] - self._before.get(key, 0.0) for key in mine)


def tokens(seed: int, length: int) -> list[int]:
    return [3 + (seed * 31 + at * 7 + at * at * seed) % (VOCAB - 3) for at in range(length)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


@pytest.fixture
def service(llama: Path, tmp_path: Path, open_pipeline: Callable[..., InferencePipeline]) -> Iterator[Service]:
    """Two devices, of which the first borrows KV memory of the second; main memory and a directory below."""
    pipeline = open_tight(
        open_pipeline, llama, [64, 640], memory__host_bytes=1 << 20, memory__disk_path=tmp_path / "kv",
        memory__disk_bytes=1 << 24, memory__disk_min_free_bytes=0, api__token=TOKEN, engine__cohorts=1,
        engine__breaker_failures=100, monitoring__interval_s=0.1, lending__lend_ratio=0.7,
    )  # fmt: skip
    with serving(create_app(pipeline)) as port:
        yield Service(pipeline, port)


@pytest.fixture
def meter(service: Service) -> Meter:
    return Meter(service)


def test_a_stream(service: Service, meter: Meter) -> None:
    prompt = tokens(1, 10)
    events = service.complete(prompt, 6, stream=True)
    assert events.endswith("data: [DONE]\n\n")
    again = service.complete(prompt, 6)
    assert again["usage"]["completion_tokens"] == 6
    meter.look()
    assert meter.moved("infer_total") == meter.moved("requests_finished_total", reason="length") == 2
    assert meter.moved("infer_errors_total") == meter.moved("requests_aborted_total") == 0
    assert (meter.moved("prompt_tokens_total"), meter.moved("generation_tokens_total")) == (20, 12)
    for name in ("time_to_first_token", "infer_latency", "request_queue", "request_prefill", "request_decode"):
        assert meter.moved(f"{name}_seconds_count") == 2, name
        assert meter.moved(f"{name}_seconds_sum") > 0, name
    assert meter.moved("inter_token_latency_seconds_count") == 10
    assert meter.moved("request_prompt_tokens_sum") == 20
    assert meter.moved("request_generation_tokens_sum") == 12
    answered = {"path": "/v1/completions", "method": "POST", "status": "200"}
    assert meter.moved("api_latency_seconds_count", **answered) == 2
    assert meter.moved("prefix_cache_queries_total") == 20
    assert (
        meter.moved("prefix_cache_hits_total") == 8
    )  # two blocks of four, and of the third a token has to be computed
    vllm = {"model_name": service.pipeline.model.name, "engine": "0"}
    assert meter.moved("generation_tokens_total", "vllm:", **vllm) == 12
    assert meter.moved("e2e_request_latency_seconds_count", "vllm:", **vllm) == 2


def test_stages_and_what_passes_between_them(service: Service, meter: Meter) -> None:
    service.complete(tokens(2, 10), 6)
    meter.look()
    devices = [stage.device.name for stage in service.pipeline.engine.stages]
    for index, device in enumerate(devices):
        assert meter.moved("stage_forwards_total", stage=f"{index}:{device}") == 6
        assert meter.moved("stage_busy_seconds_total", stage=f"{index}:{device}") > 0
        assert 0 < (meter.now("stage_busy_ratio", stage=f"{index}:{device}") or 0) <= 1
    assert meter.total("gpu_transfer_ops_total") == 6
    assert meter.total("transfer_bytes_total") == (10 + 5) * HIDDEN * BYTES
    assert meter.total("transfer_seconds_total") > 0
    assert meter.now("model_info", name=service.pipeline.model.name, dtype=service.pipeline.model.dtype) == 1
    (rate,) = [value for (name, _), value in service.scrape().items() if name.endswith("transfer_bandwidth_gbps")]
    assert rate > 0


def test_a_client_that_leaves(service: Service, meter: Meter) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=LONGEST_WAIT_S)
    body = {"prompt": tokens(3, 8), "max_tokens": 110, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    with pytest.MonkeyPatch.context() as patched:
        gate, execute = threading.Event(), service.pipeline.engine.batcher._runner.execute
        steps = iter(range(1000))

        def slowly(output: Any) -> Any:
            assert next(steps) < 4 or gate.wait(LONGEST_WAIT_S)
            return execute(output)

        patched.setattr(service.pipeline.engine.batcher._runner, "execute", slowly)
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        connection.getresponse().read(50)
        meter.look()
        assert (meter.now("requests_running"), meter.now("batcher_batch_size")) == (1, 1)
        assert (meter.now("kv_cache_usage_ratio") or 0) > 0
        connection.close()
        gate.set()
        until(lambda: service.pipeline.engine.batcher.num_unfinished == 0, "the request is given up")
    meter.look()
    assert meter.moved("requests_aborted_total") == meter.moved("requests_finished_total", reason="abort") == 1
    assert meter.moved("infer_total") == 1
    assert meter.moved("infer_latency_seconds_count") == 0
    assert (meter.now("requests_running"), meter.now("kv_cache_usage_ratio")) == (0, 0)


def test_steps_that_fail(service: Service, meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(output: Any) -> Any:
        raise RuntimeError("a kernel broke")

    monkeypatch.setattr(service.pipeline.engine.batcher._runner, "execute", broken)
    answer = service.complete(tokens(4, 8))
    assert "a kernel broke" in answer["error"]["message"]
    meter.look()
    assert meter.moved("infer_errors_total") == meter.moved("requests_finished_total", reason="error") == 1
    assert meter.moved("infer_latency_seconds_count") == 1
    assert meter.moved("api_latency_seconds_count", path="/v1/completions", method="POST", status="500") == 1
    assert meter.now("circuit_breaker_open") == 0


def test_more_than_memory_holds(service: Service, meter: Meter) -> None:
    """The first stage borrows, blocks go down the tiers, and whoever finds no room is preempted."""
    clients = [threading.Thread(target=service.complete, args=(tokens(seed, 60), 60)) for seed in range(5, 17)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(LONGEST_WAIT_S)
    engine = service.pipeline.engine
    assert engine.memory.overflow is not None and engine.memory.tiers is not None
    assert engine.memory.tiers.memory.flush(LONGEST_WAIT_S)
    meter.look()
    lent = engine.memory.overflow.view
    first, second = (device.name for device in engine.plan.devices)
    assert meter.moved("generation_tokens_total") == 12 * 60
    assert meter.moved("preemptions_total") == engine.batcher.stats.preemptions > 0
    assert meter.moved("kv_cache_evictions_total") == engine.batcher.stats.evictions > 0
    assert meter.moved("lending_borrows_total", borrower=first, lender=second) == len(lent.leases) > 0
    assert meter.moved("lending_bytes_lent_total") == sum(lease.bytes for lease in lent.leases)
    assert meter.now("lending_active_leases") == len(lent.leases)
    assert meter.now("paged_kv_borrowed_pages") == sum(lease.blocks for lease in lent.leases)
    assert (meter.now("lending_pool_capacity_gb") or 0) > 0
    moves = engine.memory.tiers.memory.stats().moves
    for source, target, blocks in (
        (source.name, target, n) for (kind, source, target), n in moves.items() if kind == "demotion"
    ):
        assert target is not None
        assert meter.moved("memory_demotions_total", **{"from": source, "to": target.name}) == blocks
    assert meter.moved("memory_demotions_total", **{"from": "L1", "to": "L2"}) == lent.moved_out > 0
    assert meter.moved("orch_hierarchy_moves_total", to_level="L2") == lent.moved_out
    assert meter.now("memory_tier_blocks", tier="L3") == meter.now("block_hotness_gcount", tier="L3")
    used = (meter.now("memory_tier_used_bytes", tier="L3") or 0) / (
        meter.now("memory_tier_capacity_bytes", tier="L3") or 1
    )
    assert 0 < used <= 1


def test_blocks_that_move_by_call(service: Service, meter: Meter) -> None:
    for seed in range(20, 50):
        service.complete(tokens(seed, 60), 2)
    tiers = service.pipeline.engine.memory.tiers
    assert tiers is not None and tiers.memory.flush(LONGEST_WAIT_S)  # a block that is being written cannot be moved
    (host, _) = service.call("GET", "/api/memory?blocks=1")["tiers"]
    block = host["hottest"][0]["block"]
    assert service.call("POST", f"/api/memory/blocks/{block}/demote")["status"] == "demoted"
    assert tiers.memory.flush(LONGEST_WAIT_S)
    meter.look()
    before = meter.moved("memory_demotions_total", **{"from": "L3", "to": "L5"})
    assert before > 0
    assert meter.now("memory_tier_blocks", tier="L5") == meter.now("block_hotness_gcount", tier="L5")
    assert service.call("POST", f"/api/memory/blocks/{block}/promote")["status"] == "promoted"
    meter.look()
    assert meter.moved("memory_promotions_total", **{"from": "L5", "to": "L3"}) == 1
    assert meter.moved("orch_hierarchy_moves_total", to_level="L3") >= 1
    assert meter.moved("tasks_completed_total") == 2
    assert meter.moved("task_duration_seconds_count", priority="low", status="completed") == 2
    first = tokens(20, 60)
    service.complete(first, 2)  # long gone from the devices
    meter.look()
    assert meter.total("memory_tier_hits_total") > 0
    assert meter.total("memory_tier_misses_total") > 0


def test_memory_that_is_asked_back(service: Service, meter: Meter) -> None:
    for seed in range(5):
        service.complete(tokens(seed, 100), 10)
    lender = service.pipeline.engine.plan.devices[1].name
    answer = service.call("POST", "/api/memory/reclaim", {"device": lender, "urgency": "high"})
    assert answer["bytes"] > 0
    until(lambda: service.call("GET", "/api/memory")["leases"] == [], "everything has come back")
    meter.look()
    assert meter.moved("lending_reclaims_total", urgency="high") == 1
    assert (meter.now("lending_active_leases"), meter.now("paged_kv_borrowed_pages")) == (0, 0)
    assert meter.moved("tasks_completed_total") == 1


def test_a_model_that_moves(service: Service, meter: Meter) -> None:
    outlook = service.call(
        "POST", "/api/pipeline/place", {"devices": "cpu=64MiB,cpu=64MiB", "layers": "1,3", "dry_run": True}
    )
    meter.look()
    assert outlook["moved_layers"] == 1
    assert meter.moved("orch_migrations_total") == meter.moved("tasks_submitted_total") == 0
    service.call("POST", "/api/pipeline/place", {"devices": "cpu=64MiB,cpu=64MiB", "layers": "1,3"})
    meter.look()
    assert meter.moved("orch_migrations_total") == 1
    assert meter.moved("orch_placements_total", level="L1") == 1
    assert meter.moved("orch_rebalance_total") == 0
    assert meter.moved("tasks_submitted_total") == meter.moved("tasks_completed_total") == 1
    done = {"priority": "normal", "status": "completed"}
    assert meter.moved("task_duration_seconds_count", **done) == 1
    assert (meter.now("task_duration_percentile", percentile="95", **done) or 0) > 0


def test_a_device_that_is_lost(service: Service, meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = service.pipeline.engine
    lost = engine.plan.devices[0].name

    def gone(output: Any) -> Any:
        raise DeviceLostError("no answer", device=lost)

    monkeypatch.setattr(engine.batcher._runner, "execute", gone)
    answer = service.complete(tokens(6, 8))
    assert len(answer["choices"]) == 1
    until(lambda: not service.pipeline.loading, "the model has moved")
    meter.look()
    assert meter.moved("orch_rebalance_total") == 1
    assert meter.moved("orch_placements_total", level="L1") == 1
    assert meter.moved("orch_migrations_total") == 2
    assert meter.moved("task_duration_seconds_count", priority="high", status="completed") == 1


def test_a_load_that_fails_and_one_that_does_not(service: Service, meter: Meter, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    build_tiny("qwen2", other)
    assert "error" in service.call("POST", "/api/models/load", {"model": str(tmp_path / "nothing")})
    loaded = service.call("POST", "/api/models/load", {"model": str(other), "devices": "cpu=64MiB,cpu=64MiB"})
    assert "error" not in loaded, loaded
    service.complete(tokens(7, 8), 4)
    meter.look()
    assert (meter.moved("tasks_submitted_total"), meter.moved("tasks_refused_total")) == (2, 1)
    assert meter.moved("tasks_failed_total") == 0
    assert meter.moved("tasks_completed_total") == 1
    assert (meter.now("tasks_running"), meter.now("tasks_resource_running", resource="devices")) == (0, 0)
    assert meter.moved("orch_placements_total", level="L1") == 1
    assert meter.now("generation_tokens_total", "vllm:", model_name=loaded["id"], engine="0") == 4


def test_devices_and_whoever_asks_for_them(service: Service, meter: Meter) -> None:
    for path in ("/api/gpu", "/api/system", "/api/nodes"):
        service.call("GET", path)
    until(lambda: service.pipeline.monitor.readings, "devices have been read")
    service.complete(tokens(8, 30), 20)
    meter.look()
    assert meter.moved("env_endpoint_hits_total") == 3
    for device in service.pipeline.engine.plan.devices:
        used, total = (meter.now(f"gpu_memory_{what}_bytes", gpu=device.name) or 0 for what in ("used", "total"))
        assert total == device.memory_limit_bytes
        kv = service.pipeline.engine.budgets[device.name].used_by_purpose()
        assert used == sum(kv.values()) - kv.get("kv_cache", 0) - kv.get("lent", 0)  # no request has any of it
        assert 0 <= (meter.now("gpu_utilization_ratio", gpu=device.name) or 0) <= 1
        assert meter.now("device_info", backend="cpu", name=device.name, index=str(device.index)) == 1
        assert meter.now("paged_kv_used_pages", device=device.name) == 0
        assert (meter.now("paged_kv_free_pages", device=device.name) or 0) * BLOCK >= 64


def test_what_belongs_to_features_to_come_is_absent_and_everything_else_is_there(service: Service) -> None:
    service.complete(tokens(9, 8), 2)
    before = service.scrape()
    service.call("POST", "/api/pipeline/place", {"devices": "cpu=64MiB,cpu=64MiB", "layers": "1,3"})
    names = {name.removeprefix(f"{NAMESPACE}_") for name, _ in [*before, *service.scrape()]}
    assert not [name for name in names if name.startswith(COMING)]
    expected = """
        infer_total infer_errors_total infer_latency_seconds_count gpu_memory_used_bytes gpu_transfer_ops_total
        gpu_transfer_bandwidth_gbps device_info lending_reclaims_total lending_active_leases lending_bytes_lent_total
        lending_pool_capacity_gb batcher_batch_size batcher_queue_depth batcher_throughput_tok_s paged_kv_used_pages
        paged_kv_free_pages paged_kv_borrowed_pages tasks_submitted_total tasks_completed_total tasks_failed_total
        tasks_running tasks_resource_running task_duration_seconds_count task_duration_percentile
        api_latency_seconds_count env_endpoint_hits_total orch_placements_total orch_migrations_total
        orch_rebalance_total process_resident_memory_bytes
    """
    assert not set(expected.split()) - names
