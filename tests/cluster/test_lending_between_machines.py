"""A stage is short of KV memory: a device of another machine lends it some, and attends there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster.machines import WorkerThread
from engine.lending_cases import reclaim_something, remote_blocks, scatter, tight_devices
from steering import LONGEST_WAIT_S, arriving_together, between_steps
from tiny_models import VOCAB, build_tiny

from core.batching.output import RequestHandle
from core.cluster.guests import Guest
from core.cluster.master import Master
from core.cluster.measuring import ClusterProfiler
from core.costs import LinkProfile
from core.engine.model_engine import ModelEngine
from core.inference_pipeline import InferencePipeline
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.lending.overflow import KVOverflow
from core.request import SamplingParams

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, detokenize=False)
LENGTHS = (5, 100, 61)
OWN_TOKENS = 64
QUICK, SLOW = LinkProfile(1e7, 1e-6), LinkProfile(1e7, 0.05)
"""A network beside which computing takes long, and one that is slower than that."""

Serve = Callable[..., InferencePipeline]
AddWorker = Callable[..., WorkerThread]
Tiny = tuple[Path, list[list[int]]]
WAYS = {
    "master from worker": ("cpu", "desk/cpu"),
    "worker from master": ("desk/cpu", "cpu"),
    "worker from worker": ("desk/cpu", "attic/cpu"),
}


def prompts() -> list[list[int]]:
    return [
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model, and what `generate()` says."""
    path = tmp_path_factory.mktemp("qwen3")
    model = build_tiny("qwen3", path)
    found = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY.max_tokens, do_sample=False
            )
        found.append(out[0, len(prompt) :].tolist())
    return path, found


@pytest.fixture
def workers() -> dict[str, WorkerThread]:
    """Of this test, by name."""
    return {}


@pytest.fixture
def open_tight(
    serve: Serve, add_worker: AddWorker, tiny: Tiny, workers: dict[str, WorkerThread], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., InferencePipeline]:
    """The borrower has all layers, and room for `OWN_TOKENS` tokens; the lender has none."""

    def start(way: str = "master from worker", link: LinkProfile = QUICK, **options: Any) -> InferencePipeline:
        monkeypatch.setattr(ClusterProfiler, "_between", lambda self, source, target: link)
        borrower, lender = WAYS[way]
        own = tight_devices(tiny[0], "4", [OWN_TOKENS])
        for name in (borrower, lender):
            machine = name.partition("/")[0]
            if machine != name:
                workers[machine] = add_worker(machine, own if name == borrower else "cpu=8MiB")
        order = sorted((borrower, lender), key=lambda name: "/" in name)  # this machine's come first
        specs = {"cpu": own if borrower == "cpu" else "cpu=8MiB"}
        defaults = {
            "model__name": str(tiny[0]), "devices__devices": ",".join(specs.get(name, name) for name in order),
            "devices__layers": "4,0" if order[0] == borrower else "0,4", "devices__plan_streams": 1,
            "engine__block_size": 4, "engine__kv_cache_tokens": 512, "model__max_model_len": 128,
            "lending__extent_blocks": 8, "lending__lend_ratio": 1.0, "lending__reclaim_threshold": 1.0,
            "lending__host_bytes": 0,
        }  # fmt: skip
        return serve(**{**defaults, **options})

    return start


def ask(pipeline: InferencePipeline) -> list[RequestHandle]:
    with arriving_together(pipeline):
        return [pipeline.submit(prompt, GREEDY) for prompt in prompts()]


def answers(handles: list[RequestHandle]) -> list[list[int]]:
    return [list(handle.result(LONGEST_WAIT_S).completions[0].token_ids) for handle in handles]


def overflow_of(engine: ModelEngine) -> KVOverflow:
    assert engine.memory.overflow is not None
    return engine.memory.overflow


def on_engine(engine: ModelEngine, act: Callable[[], Any]) -> Any:
    return engine.batcher.call(act).result(LONGEST_WAIT_S)


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_borrows_from_another_machine_and_tokens_stay_the_same(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attended: list[int] = []
    attend = Guest.attend

    def count(self: Guest, query: Any) -> torch.Tensor:
        attended.append(sum(sum(batch.host_seq_lens) for _, batch in self.sites[query.site].regions))
        return attend(self, query)

    monkeypatch.setattr(Guest, "attend", count)
    pipeline = open_tight(way)
    engine = pipeline.engine
    borrower, lender = WAYS[way]
    assert engine.plan.pooled.far == ((borrower, lender),)
    assert engine.kv.capacity_tokens == 512 and engine.plan.pooled.local_tokens == (OWN_TOKENS,)
    assert answers(ask(pipeline)) == tiny[1]
    assert engine.batcher.stats.preemptions == 0
    borrows = overflow_of(engine).lending.stats().borrows
    assert {pair: count > 0 for pair, count in borrows.items()} == {(borrower, lender): True}
    assert max(attended) > OWN_TOKENS, "more than there is room for at home"
