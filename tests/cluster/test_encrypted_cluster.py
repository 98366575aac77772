"""A cluster whose connections are encrypted serves the same, and takes in nobody who does not encrypt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.machines import HOST, WorkerThread, joined, open_master, open_worker, worker_settings
from network.wire import Wire
from plain_settings import CACHE_DIR, make_settings
from steering import until

from core.cluster.master import Master
from core.errors import ClusterRefusedError
from core.inference_pipeline import InferencePipeline
from core.network.frames import MAGIC
from core.network.greeting import CALLER_ENCRYPTS, LISTENER_ENCRYPTS
from core.network.tls import TlsConnection
from core.request import SamplingParams
from core.views.nodes import nodes_view

PROMPT = [5, 17, 3, 90, 42, 8, 8, 61, 7]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=24, temperature=0.8, seed=11, ignore_eos=True)


@pytest.fixture
def master() -> Iterator[Master]:
    """Instead of the one of the other tests."""
    pytest.importorskip("cryptography", reason="certificates are made by the extra tls")
    made = open_master(tls=True)
    yield made
    made.close()


@pytest.fixture
def plain_master() -> Iterator[Master]:
    made = open_master()
    yield made
    made.close()


def tokens(pipeline: InferencePipeline) -> list[list[int]]:
    handles = [pipeline.submit(PROMPT, params) for params in (GREEDY, SEEDED)]
    return [list(handle.result().completions[0].token_ids) for handle in handles]


def homes(pipeline: InferencePipeline) -> list[str]:
    return [stage.device_name for stage in pipeline.engine.plan.placement.stages]


def test_tokens_are_the_same_and_nobody_can_read_along(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], tiny_llama: Path
) -> None:
    """Over the master and two workers, which send each other hidden states; one is watched on its way to the master."""
    wire = Wire(master.address[1])
    try:
        attic = add_worker("attic")
        desk = add_worker("desk", master=f"{HOST}:{wire.port}")
        joined(master, 2)
        pipeline = serve(devices__devices="cpu=64MiB,desk/cpu,attic/cpu", devices__layers="1,2,1")
        over_three = tokens(pipeline)
        assert homes(pipeline) == ["cpu", "desk/cpu", "attic/cpu"]
        pipeline.place(devices="desk/cpu,attic/cpu", placement="balanced")
        assert homes(pipeline) == ["desk/cpu", "attic/cpu"]
        between_workers = tokens(pipeline)
        nodes = nodes_view(pipeline.current_engine, pipeline.state()).nodes
        assert [node.link.encrypted for node in nodes if node.link is not None] == [True, True]
        local = InferencePipeline(
            make_settings(
                model__name=str(tiny_llama), devices__devices="cpu=64MiB", devices__profile_seconds=0.02,
                runtime__cache_dir=CACHE_DIR,
            )
        )  # fmt: skip
        try:
            local.load()
            assert over_three == between_workers == tokens(local)
        finally:
            local.shutdown()
        links = [link for node in master.nodes for link in (node.control, node.data)]
        for worker in (attic.worker, desk.worker):
            assert worker._session is not None
            links += [link for link, _ in (*worker._session._in, *worker._session._out.values())]
        assert len(links) >= 6 and all(isinstance(link._socket, TlsConnection) for link in links)
        assert len(wire.passed) > 10_000
        for secret in (MAGIC, b"desk", b"llama", b"devices", b"hidden"):
            assert secret not in wire.passed
    finally:
        wire.close()


@pytest.mark.parametrize("encrypts", ["master", "worker"])
def test_one_that_encrypts_and_one_that_does_not_do_not_go_together(
    master: Master, plain_master: Master, encrypts: str
) -> None:
    """Each says so in one line."""
    asked, reason = (master, LISTENER_ENCRYPTS) if encrypts == "master" else (plain_master, CALLER_ENCRYPTS)
    worker = WorkerThread(open_worker(asked, worker_settings(CACHE_DIR, "cpu=64MiB"), "desk", tls=encrypts == "worker"))
    worker.join()
    try:
        assert isinstance(worker.error, ClusterRefusedError) and worker.error.message == reason
        until(lambda: asked.left_out, "the master's word")
        assert asked.left_out[0].reason == reason and not asked.nodes
    finally:
        worker.close()
