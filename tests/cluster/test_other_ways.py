"""A cluster whose tensors do not go through its connections: by process groups, and by RDMA."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from cluster.groups import means
from cluster.machines import WorkerThread
from network.cards import Here
from steering import LONGEST_WAIT_S, until

from core.cluster import node, session
from core.cluster.group_path import GroupPath
from core.cluster.master import Master
from core.inference_pipeline import InferencePipeline
from core.network.frames import MIB, Opcode
from core.network.rdma import RemoteMemory
from core.request import SamplingParams

PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=11, ignore_eos=True)


def tokens(pipeline: InferencePipeline) -> list[int]:
    return list(pipeline.submit([5, 17, 3, 90, 42, 8], PARAMS).result().completions[0].token_ids)


def test_stages_of_several_processes_by_process_groups(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], master: Master,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From the master to a worker, from there to another one, and the same tokens as on one device."""
    gpus, time = itertools.count(), GroupPath._time
    for module in (node, session):
        monkeypatch.setattr(module, "means_for", lambda sock: means(str(next(gpus))))
    monkeypatch.setattr(
        GroupPath, "_time", lambda self, *, by_group: (time(self, by_group=by_group), 1.0 if by_group else 2.0)[1]
    )
    workers = [add_worker(name) for name in ("desk", "attic")]
    assert [each.path.is_used for each in master.nodes] == [True, True]
    pipeline = serve(devices__devices="cpu=64MiB")
    alone = tokens(pipeline)
    pipeline.place(devices="cpu=64MiB,desk/cpu,attic/cpu")
    assert tokens(pipeline) == alone
    between = [end.path for each in workers if each.worker._session for _, end in each.worker._session._out.values()]
    assert between and all(path.is_used for path in between)
    labels = {"method": "gloo", "src": "cpu", "dst": "desk/cpu"}
    ops = pipeline.metrics.registry.get_sample_value("vramancer_gpu_transfer_ops_total", labels)
    assert ops is not None and ops >= 12


def test_a_worker_that_is_reached_by_rdma(
    add_worker: Callable[..., WorkerThread], master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions."""
    time = RemoteMemory._time
    for module in (node, session):
        monkeypatch.setattr(module, "agent_for", lambda sock: Here)
    monkeypatch.setattr(
        RemoteMemory, "_time", lambda self, *, by_rdma: (time(self, by_rdma=by_rdma), 1.0 if by_rdma else 2.0)[1]
    )
    there = add_worker("desk").worker._session
    here = master.nodes[0].data
    assert there is not None and here.ask_for_rdma() and there._data.ask_for_rdma(LONGEST_WAIT_S)
    before = master.traffic()
    here.send(Opcode.ECHO, [bytes(MIB)])
    until(lambda: master.traffic().received_rdma_bytes == before.received_rdma_bytes + MIB, "what went there and back")
    assert master.traffic().sent_rdma_bytes == before.sent_rdma_bytes + MIB
