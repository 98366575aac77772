"""Who joins, who does not and why, and what both sides do when the other one goes."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.machines import (
    HOST,
    TOKEN,
    WorkerProcess,
    WorkerThread,
    joined,
    open_master,
    open_worker,
    worker_settings,
)
from plain_settings import CACHE_DIR
from steering import until

from core.cluster.master import Master
from core.cluster.messages import Load, ModelRef, Release
from core.cluster.node import Node
from core.errors import ClusterRefusedError, DeviceLostError, NotFoundError
from core.network.greeting import greet
from core.network.handshake import derive_key

DEVICES = "cpu=64MiB"


@pytest.fixture
def worker(master: Master) -> Iterator[WorkerThread]:
    made = WorkerThread(open_worker(master, worker_settings(CACHE_DIR, "cpu=64MiB,sim=1GiB@100GB/s/5TFLOPS"), "desk"))
    joined(master, 1)
    yield made
    made.close()


def test_what_the_master_knows_of_a_worker(master: Master, worker: WorkerThread) -> None:
    (node,) = master.nodes
    assert (node.name, node.number, node.address, node.info.port) == ("desk", 1, HOST, worker.worker.port)
    cpu, card = master.devices(3)
    assert (cpu.name, cpu.index, cpu.kind, cpu.node, cpu.is_here) == ("desk/cpu", 3, "cpu", "desk", False)
    assert (card.name, card.memory_limit_bytes, card.speed.flops if card.speed else 0) == ("desk/sim", 1 << 30, 5e12)
    assert master.has("desk") and not master.has("attic")
    assert node.speed.bandwidth_bytes_s > 1e6


def test_two_machines_of_one_name_are_told_apart(master: Master, worker: WorkerThread) -> None:
    again = WorkerThread(open_worker(master, worker_settings(CACHE_DIR, DEVICES), "desk"))
    joined(master, 2)
    assert [node.name for node in master.nodes] == ["desk", "desk-2"]
    again.close()
    joined(master, 1)


def test_a_worker_that_is_stopped_says_so(master: Master) -> None:
    gone: list[tuple[str, str]] = []
    master.on_change.append(lambda change, node: gone.append((change, node.name)))
    made = WorkerThread(open_worker(master, worker_settings(CACHE_DIR, DEVICES), "desk"))
    joined(master, 1)
    (node,) = master.nodes
    made.close()
    joined(master, 0)
    until(lambda: len(gone) == 2, "both are told")
    assert gone == [("joined", "desk"), ("lost", "desk")]
    assert node.lost is not None and "the worker has been stopped" in node.lost.message


def test_another_version_is_refused_with_the_reason(master: Master) -> None:
    made = WorkerThread(open_worker(master, worker_settings(CACHE_DIR, DEVICES), "desk", version="1.2.4"))
    made.join()
    assert isinstance(made.error, ClusterRefusedError) and "1.2.4, and the master 1.2.3" in made.error.message
    made.close()
    until(lambda: master.left_out, "the entry")
    assert not master.nodes and master.left_out[0].name == "desk" and "1.2.4" in master.left_out[0].reason


def test_another_token_is_refused(master: Master) -> None:
    made = WorkerThread(
        open_worker(master, worker_settings(CACHE_DIR, DEVICES), "desk", token="another one of some length")
    )
    made.join()
    assert isinstance(made.error, ClusterRefusedError) and "another cluster token" in made.error.message
    made.close()
    assert not master.nodes
    (left,) = master.left_out
    assert (left.name, left.address) == (HOST, HOST) and "another cluster token" in left.reason
    right = WorkerThread(open_worker(master, worker_settings(CACHE_DIR, DEVICES), "desk"))
    joined(master, 1)
    assert not master.left_out, "it has the right one now"
    right.close()


def test_half_a_worker_is_let_go(master: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which one connection comes, and not the other."""
    key, socks = derive_key(TOKEN), []
    for number in range(70):
        sock = socket.create_connection(master.address)
        greet(sock, key, f"{number:032x}", "control")
        socks.append(sock)
    until(lambda: len(master._pending) == 64, "as many as may wait")
    assert not socks[0].recv(1)  # the oldest ones have been closed
    monkeypatch.setattr("core.cluster.master._PENDING_S", 0.0)
    with socket.create_connection(master.address) as sock:
        greet(sock, key, f"{99:032x}", "data")
        until(lambda: list(master._pending) == [f"{99:032x}"], "those that waited too long have been closed")
    for each in socks:
        each.close()


def test_the_master_lends_to_nodes_of_its_cluster_alone(master: Master, worker: WorkerThread) -> None:
    with socket.create_connection(master.address) as sock, pytest.raises(ClusterRefusedError, match="are lent memory"):
        greet(sock, derive_key(TOKEN), "a" * 32, "guests")
    (node,) = master.nodes
    with socket.create_connection(master.address) as sock:
        greet(sock, derive_key(TOKEN), node.id, "guests")
        until(lambda: len(node._guest_links) == 1, "it may borrow")
    until(lambda: not master.nodes, "a link of its that ends is a node that is lost")


def test_workers_take_what_workers_send_alone(master: Master, worker: WorkerThread) -> None:
    with socket.create_connection((HOST, worker.worker.port)) as sock, pytest.raises(ClusterRefusedError):
        greet(sock, derive_key(TOKEN), "a" * 32, "control")


def test_a_worker_finds_the_master_that_comes_after_it(tmp_path: Path) -> None:
    first = open_master()
    port = first.address[1]
    made = WorkerThread(open_worker(first, worker_settings(CACHE_DIR, DEVICES), "desk"))
    joined(first, 1)
    first.close()
    second = open_master(port=port)
    joined(second, 1)
    made.close()
    second.close()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX")
def test_a_worker_that_stands_still_is_lost_and_comes_back() -> None:
    master = open_master(silence_s=1.0)
    worker = WorkerProcess(master, CACHE_DIR, "desk", DEVICES)
    try:
        joined(master, 1)
        (node,) = master.nodes
        os.kill(worker.process.pid, signal.SIGSTOP)
        until(lambda: node.lost is not None and not master.nodes, "the loss")
        assert node.lost is not None and "silent" in node.lost.message
        os.kill(worker.process.pid, signal.SIGCONT)
        joined(master, 1)
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
        worker.close()
        master.close()


def _model(**given: object) -> ModelRef:
    fields = {"name": "m", "path": "/nowhere", "revision": None, "digest": "a" * 32, "dtype": "float32", "files": ()}
    return ModelRef(**{**fields, **given})  # type: ignore[arg-type]


def test_calls_that_make_no_sense_are_refused(master: Master, worker: WorkerThread) -> None:
    """And change nothing: the node goes on."""
    (node,) = master.nodes
    load = Load(1, _model(), "cuda:7", 0, 1, 4, 1, 1, 1, {})
    with pytest.raises(NotFoundError, match="desk: cuda:7 is not there; there are cpu, sim"):
        node.call(load)
    with pytest.raises(Exception, match="no dtype that models are served in"):
        node.call(Load(1, _model(dtype="int3"), "cpu", 0, 1, 4, 1, 1, 1, {}))
    with pytest.raises(NotFoundError, match="no checkpoint with the digest"):
        node.call(Load(1, _model(files=[{"name": "config.json", "nbytes": 10}]), "cpu", 0, 1, 4, 1, 1, 1, {}))
    node.call(Release((5, 6)))
    assert master.has("desk")


def test_a_new_epoch_is_told_to_all(master: Master, worker: WorkerThread) -> None:
    (node,) = master.nodes
    master.begin_epoch(DeviceLostError("lost", device="desk/cpu"))
    assert node.data.epoch == 1
    assert node.call(Release(())) is not None
    again = WorkerThread(open_worker(master, worker_settings(CACHE_DIR, DEVICES), "attic"))
    joined(master, 2)
    assert master.nodes[1].data.epoch == 1
    assert master.nodes[1]._end.echo.measure().bandwidth_bytes_s > 0, "its frames are of this epoch, both ways"
    again.close()


def test_nodes_hear_of_changes_in_threads_that_nothing_waits_for(master: Master) -> None:
    names: list[str] = []

    def note(change: str, node: Node) -> None:
        names.append(threading.current_thread().name)

    master.on_change.append(note)
    made = WorkerThread(open_worker(master, worker_settings(CACHE_DIR, DEVICES), "desk"))
    joined(master, 1)
    made.close()
    until(lambda: len(names) == 2, "both changes")
    assert names == ["vrm-joining", "vrm-parting"]
