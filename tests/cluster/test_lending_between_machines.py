"""A stage is short of KV memory: a device of another machine lends it some, and attends there."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from cluster.greedy import prompts, tiny_with_answers
from cluster.machines import WorkerThread, open_master
from engine.lending_cases import reclaim_something, remote_blocks, scatter, tight_devices
from steering import LONGEST_WAIT_S, arriving_together, between_steps, until, with_each_step

from core.batching.output import RequestHandle
from core.cluster.guest_calls import GuestCalls
from core.cluster.guests import Guest, Guests
from core.cluster.hosting import StageHost
from core.cluster.master import Master
from core.cluster.measuring import ClusterProfiler
from core.costs import DeviceProfile, LinkProfile
from core.devices import Device
from core.engine.carrying import Carrier
from core.engine.model_engine import ModelEngine
from core.errors import InsufficientMemoryError, LinkLostError, OutOfDeviceMemoryError
from core.execution.stage import Stage
from core.inference_pipeline import InferencePipeline
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.lending.overflow import KVOverflow
from core.models.architecture import Architecture
from core.network.link import Link
from core.network.tls import TlsConnection
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


def with_speeds(patch: pytest.MonkeyPatch, link: LinkProfile) -> None:
    """Devices and network as if they had been measured so."""

    def devices(
        self: ClusterProfiler, found: Sequence[Device], architecture: Architecture
    ) -> tuple[DeviceProfile, ...]:
        return tuple(DeviceProfile(device.name, 1e9, ((1, 1e9),), layer_overhead_s=1e-3) for device in found)

    patch.setattr(ClusterProfiler, "devices", devices)
    patch.setattr(ClusterProfiler, "_between", lambda self, source, target: link)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model, and what `generate()` says."""
    path = tmp_path_factory.mktemp("qwen3")
    return path, tiny_with_answers(path, LENGTHS, GREEDY.max_tokens)


@pytest.fixture
def master(request: pytest.FixtureRequest) -> Iterator[Master]:
    """With a parameter that is true, all links are encrypted."""
    made = open_master(tls=getattr(request, "param", False))
    yield made
    made.close()


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
        with_speeds(monkeypatch, link)
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
        return [pipeline.submit(prompt, GREEDY) for prompt in prompts(LENGTHS)]


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


@pytest.mark.parametrize(("way", "where"), [("master from worker", "hosting"), ("worker from master", "far_regions")])
def test_lenders_are_ready_before_they_are_asked(
    open_tight: Callable[..., InferencePipeline], way: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card compiles its kernels when the model is loaded, and not while streams wait."""
    made_ready = Mock()
    monkeypatch.setattr(f"core.cluster.{where}.warm_up_lender", made_ready)
    engine = open_tight(way).engine
    ((device, kinds, _),) = (call.args for call in made_ready.call_args_list)
    assert device.name == "cpu" and len(kinds) == 1
    if way == "master from worker":
        assert kinds == cast(Stage, engine.stages[0]).attention_kinds()


def hosted_by(worker: WorkerThread) -> StageHost:
    session = worker.worker._session
    assert session is not None
    return session._host


def lenders_guests(pipeline_master: Master, workers: dict[str, WorkerThread], lender: str) -> Guests:
    machine = lender.partition("/")[0]
    return hosted_by(workers[machine]).guests if machine in workers else pipeline_master.guests


def check_books(engine: ModelEngine, workers: dict[str, WorkerThread], lender: str) -> None:
    """Nobody holds more than its device has, and the master's ledgers are the nodes'."""
    overflow_of(engine).check_invariants()
    used = engine.budgets[lender].used_by_purpose()
    leases = overflow_of(engine).lending.leases(lender=lender)
    assert used.get(PagedKVCache.LENT, 0) == sum(lease.nbytes for lease in leases)
    machine, _, there = lender.rpartition("/")
    if machine:
        assert hosted_by(workers[machine]).used_by_purpose()[there] == used


@pytest.mark.parametrize("way", WAYS)
def test_blocks_may_be_anywhere_and_move_at_any_time(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, way: str, workers: dict[str, WorkerThread], master: Master
) -> None:
    pipeline = open_tight(way)
    engine, rng, away, (_, lender) = pipeline.engine, random.Random(7), [], WAYS[way]

    def stir() -> None:
        check_books(engine, workers, lender)
        scatter(engine, rng, 0.5)
        reclaim_something(engine, rng)
        away.append(remote_blocks(engine))

    with between_steps(pipeline, stir):
        assert answers(ask(pipeline)) == tiny[1]
    assert max(away) > 0
    assert sum(overflow_of(engine).lending.stats().reclaims.values()) > 0, (
        "and the lender has got back what it asked for"
    )
    assert answers(ask(pipeline)) == tiny[1], "prefixes are where they were left"
    queries = master.traffic().sent_queries + master.traffic().received_queries
    assert (queries > 0) == (way != "worker from worker"), "which do not pass the master"
    guests = lenders_guests(master, workers, lender)
    assert len(guests) == 1
    pipeline.unload()
    assert len(guests) == 0, "all of it goes back"
    assert all(budget.used_bytes == 0 for budget in engine.budgets.values())
    assert not any(node.lends for node in master.nodes)
    if "/" in lender:
        assert hosted_by(workers[lender.partition("/")[0]]).used_by_purpose()["cpu"] == {}


@pytest.mark.parametrize("master", [True], indirect=True, ids=["tls"])
@pytest.mark.parametrize("way", WAYS)
def test_where_links_are_encrypted_those_of_guests_are(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, way: str, master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert master.tls
    opened: list[Link] = []
    attach = GuestCalls.attach
    monkeypatch.setattr(GuestCalls, "attach", lambda self, link: (opened.append(link), attach(self, link))[1])
    assert answers(ask(open_tight(way))) == tiny[1]
    assert len(opened) == 1 and isinstance(opened[0]._socket, TlsConnection)


@pytest.mark.parametrize("lacking", ["attention", "pages"])
def test_what_is_done_there_has_to_be_done(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """Tokens are wrong if the lender leaves out what it holds, or forgets what it was sent."""
    pipeline = open_tight()
    attend = Guest.attend
    if lacking == "attention":
        monkeypatch.setattr(Guest, "attend", lambda self, query: nothing(attend(self, query)))
    else:
        monkeypatch.setattr(Guest, "write", lambda self, wanted, data: None)
    assert answers(ask(pipeline)) != tiny[1]


def nothing(part: torch.Tensor) -> torch.Tensor:
    """What no key gives."""
    part[..., :-1], part[..., -1] = 0.0, float("-inf")
    return part


@pytest.mark.parametrize("options", [{"link": SLOW}, {"lending__between_machines": False}], ids=["slow", "off"])
def test_where_the_network_is_slow_or_it_is_not_wanted_nobody_lends(
    open_tight: Callable[..., InferencePipeline], options: dict[str, Any], workers: dict[str, WorkerThread]
) -> None:
    pipeline = open_tight(model__max_model_len=OWN_TOKENS, **options)
    engine = pipeline.engine
    assert engine.plan.pooled.far == ()
    assert engine.kv.capacity_tokens == OWN_TOKENS and engine.memory.overflow is None
    assert pipeline.submit(prompts(LENGTHS)[0], GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids
    assert len(hosted_by(workers["desk"]).guests) == 0


def test_a_context_that_no_machine_holds_is_refused_where_the_network_is_slow(
    open_tight: Callable[..., InferencePipeline],
) -> None:
    with pytest.raises(InsufficientMemoryError):
        open_tight(link=SLOW, devices__stream_weights="off")


@pytest.mark.parametrize("way", ["master from worker", "worker from worker"])
def test_a_lender_that_is_lost_changes_no_token(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, way: str, workers: dict[str, WorkerThread],
    master: Master, add_worker: AddWorker,
) -> None:  # fmt: skip
    """What it held is computed again on a machine that has room."""
    pipeline = open_tight(way)
    engine, lost, lender = pipeline.engine, threading.Event(), WAYS[way][1].partition("/")[0]
    add_worker("spare", "cpu=8MiB")

    def lose() -> None:
        if remote_blocks(engine) and not lost.is_set():
            lost.set()
            workers[lender].worker.stop()

    with with_each_step(pipeline, lose):
        assert answers(ask(pipeline)) == tiny[1]
    assert lost.is_set()
    until(lambda: pipeline.current_engine not in (None, engine), "the model has moved")
    assert WAYS[way][1] not in {device.name for device in pipeline.engine.plan.devices}
    assert not overflow_of(engine).lending.leases()
    assert all(budget.used_bytes == 0 for budget in engine.budgets.values())
    assert len(master.guests) == 0 and not any(node.lends for node in master.nodes)
    assert answers(ask(pipeline)) == tiny[1]


def test_a_way_to_a_lender_that_is_gone_is_a_lender_that_is_lost(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, workers: dict[str, WorkerThread], add_worker: AddWorker
) -> None:
    """Both machines are there, and the master sees them. It is the lender's device that is left."""
    pipeline = open_tight("worker from worker")
    engine, cut, left = pipeline.engine, threading.Event(), list[str]()
    add_worker("spare", "cpu=8MiB")
    hear = engine.batcher.on_lost
    engine.batcher.on_lost = lambda error: (left.append(error.device), hear(error))[1]
    session = workers["desk"].worker._session
    assert session is not None

    def lose() -> None:
        if remote_blocks(engine) and not cut.is_set():
            cut.set()
            for calls in session._borrowed.values():
                calls.link.abort("the cable is out")

    with with_each_step(pipeline, lose):
        assert answers(ask(pipeline)) == tiny[1]
    assert cut.is_set() and left[0] == "attic/cpu"
    until(lambda: pipeline.current_engine not in (None, engine), "the model has moved")
    assert answers(ask(pipeline)) == tiny[1]


def test_two_stages_in_flight_borrow_from_one_machine(
    serve: Serve, add_worker: AddWorker, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, workers: dict[str, WorkerThread]
) -> None:
    """Each is a guest of its own there, and steps of two cohorts ask at the same time."""
    with_speeds(monkeypatch, QUICK)
    own = tight_devices(tiny[0], "2,2", [OWN_TOKENS, OWN_TOKENS]).split(",")
    add_worker("desk", own[1])
    workers["attic"] = add_worker("attic", "cpu=8MiB")
    pipeline = serve(
        model__name=str(tiny[0]), devices__devices=f"{own[0]},desk/cpu,attic/cpu", devices__layers="2,2,0",
        devices__plan_streams=1, engine__block_size=4, engine__kv_cache_tokens=512, model__max_model_len=128,
        engine__cohorts=2, devices__placement="profiled", lending__extent_blocks=8, lending__lend_ratio=1.0,
        lending__reclaim_threshold=1.0, lending__host_bytes=0,
    )  # fmt: skip
    engine, away = pipeline.engine, list[int]()

    def stir() -> None:
        check_books(engine, workers, "attic/cpu")
        scatter(engine, random.Random(5), 0.5)
        away.append(len(hosted_by(workers["attic"]).guests))

    with between_steps(pipeline, stir):
        assert answers(ask(pipeline)) == tiny[1]
    assert max(away) == 2
    borrows = overflow_of(engine).lending.stats().borrows
    assert set(borrows) == {("cpu", "attic/cpu"), ("desk/cpu", "attic/cpu")}


def test_a_borrower_that_is_lost_leaves_nothing_with_its_lender(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, workers: dict[str, WorkerThread]
) -> None:
    pipeline = open_tight("worker from worker")
    engine, lost = pipeline.engine, threading.Event()
    guests = hosted_by(workers["attic"]).guests

    def lose() -> None:
        if remote_blocks(engine) and not lost.is_set():
            lost.set()
            workers["desk"].worker.stop()

    with with_each_step(pipeline, lose):
        assert answers(ask(pipeline)) == tiny[1]
    until(lambda: pipeline.current_engine not in (None, engine), "the model has moved")
    assert len(guests) == 0
    assert answers(ask(pipeline)) == tiny[1]


def test_a_lender_that_is_idle_when_it_goes_is_left(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, workers: dict[str, WorkerThread], add_worker: AddWorker
) -> None:
    """Nothing runs that could notice: the plan counts on its memory all the same."""
    pipeline = open_tight()
    engine = pipeline.engine
    add_worker("spare", "cpu=8MiB")
    workers["desk"].worker.stop()
    until(lambda: pipeline.current_engine not in (None, engine), "the model has moved")
    assert answers(ask(pipeline)) == tiny[1]


def test_a_lender_that_wants_to_go_is_let_go_once_its_memory_is_free(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, workers: dict[str, WorkerThread], master: Master,
    add_worker: AddWorker,
) -> None:  # fmt: skip
    pipeline = open_tight()
    assert answers(ask(pipeline)) == tiny[1]
    assert master.nodes[0].lends
    add_worker("spare", "cpu=8MiB")
    handles = ask(pipeline)
    workers["desk"].worker.leave()
    workers["desk"].join()
    assert answers(handles) == tiny[1]
    assert [node.name for node in master.nodes] == ["spare"]


def test_a_lender_pressed_by_other_programs_gets_its_memory_back(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker says so in its report."""
    pipeline = open_tight()
    engine = pipeline.engine
    assert answers(ask(pipeline)) == tiny[1]
    overflow = overflow_of(engine)
    on_engine(engine, lambda: scatter(engine, random.Random(1), 0.5))
    assert remote_blocks(engine)
    monkeypatch.setattr(StageHost, "external_bytes", lambda self: {"cpu": 8 << 20})
    until(lambda: not on_engine(engine, lambda: overflow.lending.leases(lender="desk/cpu")), "it is back")
    assert sum(overflow.lending.stats().reclaims.values()) > 0


def test_what_is_lent_goes_along_when_the_model_moves(
    open_tight: Callable[..., InferencePipeline], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are read from wherever they are."""
    monkeypatch.setattr(Carrier, "_is_quicker", lambda self, blocks: True)
    pipeline = open_tight()
    assert answers(ask(pipeline)) == tiny[1]
    engine = pipeline.engine
    on_engine(engine, lambda: scatter(engine, random.Random(3), 0.8))
    assert remote_blocks(engine)
    monkeypatch.setattr(Guest, "read", counted := Counted(Guest.read))
    moved = pipeline.place(devices="cpu=32MiB", layers=None, placement="balanced")
    assert moved.carried_kv_tokens is not None and moved.carried_kv_tokens > 0 and counted.times > 0
    assert answers(ask(pipeline)) == tiny[1]


class Counted:
    """A method, and how often it was called."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.times = method, 0

    def __get__(self, owner: object, kind: type) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            self.times += 1
            return self.method(owner, *given)

        return call


def test_memory_that_cannot_be_had_is_refused(
    open_tight: Callable[..., InferencePipeline], workers: dict[str, WorkerThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept on either side, and the ledgers stay the same."""
    pipeline = open_tight()
    engine = pipeline.engine
    host, regions = hosted_by(workers["desk"]), engine.memory.regions
    assert regions is not None
    with pytest.raises(OutOfDeviceMemoryError, match="desk/cpu"):
        regions.add(0, 99, "desk/cpu", 1 << 20)
    monkeypatch.setattr(Master, "_connect", Mock(side_effect=LinkLostError("no way there")))
    with pytest.raises(OutOfDeviceMemoryError, match="desk/cpu: no way there"):
        regions.add(0, 99, "desk/cpu", 4)
    assert len(host.guests) == 0 and host.used_by_purpose()["cpu"] == {}
    assert engine.budgets["desk/cpu"].used_by_purpose() == {}
    monkeypatch.undo()
