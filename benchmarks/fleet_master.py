"""What one master's Python costs, measured for real: the scheduler by streams, links and reports by nodes.

Streams: the real `Scheduler` and `KVCacheManager` decide steps in which every stream decodes, and the record is encoded
as for stages on other machines; only the tokens are made up. Nodes: real links over loopback with heartbeats and a
report a second; the other ends are in another process. Not measured here: turning tokens into text, HTTP, and hidden
states that cross the master.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import msgspec
from rich.console import Console
from rich.table import Table

from core.batching.scheduler import Scheduler
from core.batching.sequence import Request, Sequence
from core.batching.step import SchedulerLimits
from core.cluster.calls import CallEnd
from core.cluster.messages import Ask, Call, Report
from core.cluster.session import REPORT_S
from core.devices.readings import DeviceReading
from core.errors import NetworkError
from core.execution.codec import encode
from core.execution.records import SAMPLE, SampledToken, StepOutput
from core.kv_cache.manager import KVCacheManager
from core.network.frames import Opcode
from core.network.link import Link
from core.network.watch import HEARTBEAT_S, Watch
from core.request import SamplingParams

STREAMS = (1, 16, 64, 256, 1024)
NODES = (10, 50, 200)
_CONTEXT, _BLOCK, _STEPS, _WATCHED_S = 512, 16, 60, 5.0
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class MasterCost:
    """`number` streams or nodes; seconds of one core, for a step by part, or for a second of wall time."""

    what: str
    number: int
    schedule_s: float = 0.0
    encode_s: float = 0.0
    update_s: float = 0.0
    core_share: float = 0.0

    @property
    def step_s(self) -> float:
        """Of the engine thread for each step."""
        return self.schedule_s + self.encode_s + self.update_s


def measure_master() -> list[MasterCost]:
    """All numbers, one after another."""
    return [*map(measure_streams, STREAMS), *map(measure_nodes, NODES)]


def measure_streams(number: int, steps: int = _STEPS) -> MasterCost:
    """Mean over `steps` steps of `number` streams that decode."""
    blocks = number * (-(-(_CONTEXT + steps + 8) // _BLOCK) + 1)
    scheduler = Scheduler(KVCacheManager(blocks, _BLOCK), SchedulerLimits(number, 1 << 30, 1 << 30, 1 << 20))
    for index in range(number):
        prompt = list(range(index * _CONTEXT, (index + 1) * _CONTEXT))
        request = Request(f"r{index}", prompt, SamplingParams(ignore_eos=True), 1 << 16, arrival=index)
        request.sequences = [Sequence(request, 0, 0, list(prompt))]
        scheduler.add(request)
    spent = [0.0, 0.0, 0.0]
    for count in range(steps + 2):  # the first ones are the prompts
        marks = [time.perf_counter()]
        output = scheduler.schedule()
        assert output is not None
        marks.append(time.perf_counter())
        encode(output.record)
        marks.append(time.perf_counter())
        sampling = output.record.seq_ids[(output.record.flags & SAMPLE) != 0].tolist()
        result = StepOutput(output.step, {seq_id: SampledToken(5) for seq_id in sampling})
        marks.append(time.perf_counter())
        scheduler.update_from_output(output, result)
        marks.append(time.perf_counter())
        if count >= 2:
            for place, (first, last) in enumerate(((0, 1), (1, 2), (3, 4))):
                spent[place] += (marks[last] - marks[first]) / steps
    return MasterCost("streams", number, *spent)


def measure_nodes(number: int, seconds: float = _WATCHED_S) -> MasterCost:
    """CPU seconds of the master's process for each second, with `number` nodes that have nothing to do. Raises
    `NetworkError` if one of them is lost, as on a machine too busy for heartbeats."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * number) as server:
        server.settimeout(_PATIENCE_S)
        port = server.getsockname()[1]
        far = subprocess.Popen([sys.executable, "-m", "benchmarks.fleet_master", str(port), str(number)])
        sockets = [server.accept()[0] for _ in range(2 * number)]
    reports = threading.Semaphore(0)
    lost: list[NetworkError] = []
    watch, links, ends = Watch(), [], []
    for index, sock in enumerate(sockets):
        end = CallEnd(Ask, _nothing_to_serve, lost.append, f"n{index}", lambda report: reports.release())
        heartbeat_s = HEARTBEAT_S if index < number else None  # a control and a data link for each
        link = Link(sock, 0, 1, end, name=f"n{index}", heartbeat_s=heartbeat_s)
        end.attach(link)
        link.start()
        links.append(link)
        ends.append(end)
    for link in links[:number]:
        watch.add(link)
    for _ in range(number):
        while not reports.acquire(timeout=1.0):  # all are under way
            if lost:
                raise lost[0]
    before_cpu_s, before_s = time.process_time(), time.perf_counter()
    time.sleep(seconds)
    share = (time.process_time() - before_cpu_s) / (time.perf_counter() - before_s)
    if lost:
        raise lost[0]
    watch.close()
    for link in links:
        link.close()
    for end in ends:
        end.close()
    far.wait()
    return MasterCost("nodes", number, core_share=share)


def _nothing_to_serve(call: object) -> msgspec.Struct:
    raise NotImplementedError(f"nobody asks here, but {call}")


def _far_ends(port: int, number: int) -> None:
    """The nodes' ends, in a process of their own, until the master closes."""
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(2 * number)]
    ended, links, ends = threading.Event(), [], []
    for index, sock in enumerate(sockets):
        end = CallEnd(Call, _nothing_to_serve, lambda error: ended.set(), f"far{index}")
        link = Link(sock, 1, 0, end, name=f"far{index}", heartbeat_s=HEARTBEAT_S if index < number else None)
        end.attach(link)
        link.start()
        links.append(link)
        ends.append(end)
    reading = DeviceReading("cuda:0", 24 << 30, 1 << 30, 0.0)
    report = msgspec.msgpack.encode(Report(readings=(reading,)))
    while not ended.is_set():
        for link in links[:number]:
            if link.error is None:
                link.send(Opcode.REPORT, [report])
        ended.wait(REPORT_S)
    for link in links:
        link.close()
    for end in ends:
        end.close()


def show_master(costs: list[MasterCost], console: Console) -> None:
    """A table for streams and one for nodes."""
    table = Table(title="the engine thread, for a step in which every stream decodes", title_justify="left")
    for column in ("streams", "schedule ms", "encode ms", "update ms", "step ms", "per stream us"):
        table.add_column(column, justify="right")
    nodes = Table(title="links of nodes that have nothing to do", title_justify="left")
    for column in ("nodes", "share of a core", "per node"):
        nodes.add_column(column, justify="right")
    for cost in costs:
        if cost.what == "nodes":
            nodes.add_row(str(cost.number), f"{cost.core_share:.1%}", f"{cost.core_share / cost.number:.3%}")
        else:
            parts = (cost.schedule_s, cost.encode_s, cost.update_s, cost.step_s)
            cells = [f"{1e3 * part:.2f}" for part in parts]
            table.add_row(str(cost.number), *cells, f"{1e6 * cost.step_s / cost.number:.1f}")
    console.print(table, nodes)


if __name__ == "__main__":
    _far_ends(int(sys.argv[1]), int(sys.argv[2]))
