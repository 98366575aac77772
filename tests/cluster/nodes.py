"""Stages of an engine moved to the other end of links, each on a node of its own: real frames over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from steering import LONGEST_WAIT_S

from core.cluster.hosted_stage import HostedStage, NodeEnd, ToMaster, ToNextStage
from core.cluster.remote_stage import MasterEnd, RecordEncoder, RemoteStage
from core.cluster.stage_wire import RemoteInlet
from core.engine.model_engine import ModelEngine
from core.errors import NetworkError
from core.execution.known_sequences import KnownSequences
from core.execution.stage_handle import StageHandle
from core.network.flow import LinkHandler
from core.network.link import Link

MASTER = 0


@dataclass
class Nodes:
    """Nodes by the number of their stage, their links to the master, and everything to be closed."""

    hosted: dict[int, HostedStage] = field(default_factory=dict)
    links: dict[int, Link] = field(default_factory=dict)
    lost: list[NetworkError] = field(default_factory=list)
    opened: list[Link] = field(default_factory=list)

    def connect(self, near: LinkHandler, far: LinkHandler, numbers: tuple[int, int]) -> tuple[Link, Link]:
        sockets = socket.socketpair()
        pair = (
            Link(sockets[0], *numbers, near, name=f"{numbers[0]}-{numbers[1]}"),
            Link(sockets[1], *reversed(numbers), far, name=f"{numbers[1]}-{numbers[0]}"),
        )
        self.opened.extend(pair)
        return pair

    def close(self) -> None:
        for link in self.opened:
            link.close()


def connect_stages(stages: Sequence[StageHandle], which: Collection[int]) -> tuple[Nodes, tuple[StageHandle, ...]]:
    """Put the stages `which` on nodes of their own; returns the handles that the master has then."""
    nodes, encoder = Nodes(), RecordEncoder()
    handles: list[StageHandle] = list(stages)
    far: dict[int, Link] = {}
    remotes: dict[int, dict[int, RemoteStage]] = {}
    for number in which:
        remotes[number] = {}
        end = NodeEnd(nodes.hosted, nodes.lost.append)
        nodes.links[number], far[number] = nodes.connect(MasterEnd(remotes[number]), end, (MASTER, number + 1))
    for number in which:
        stage, follows = stages[number], number + 1 if number + 1 < len(stages) else None
        device = stage.devices[0]
        if follows is not None and follows in which:
            ends_between = (NodeEnd(nodes.hosted, nodes.lost.append), NodeEnd(nodes.hosted, nodes.lost.append))
            out, into = nodes.connect(*ends_between, (number + 1, follows + 1))
            outlet: ToNextStage | ToMaster = ToNextStage(RemoteInlet(out, follows, device))
            out.start()
            into.start()
        else:
            outlet = ToMaster(
                far[number], number, None if follows is None else RemoteInlet(far[number], number, device)
            )
        nodes.hosted[number] = HostedStage(stage, outlet, takes_hidden=number > 0, called=device.name)
        entrance = stages[number - 1].outlet if number else stage.outlet
        fed_here = number > 0 and number - 1 not in which
        remote = RemoteStage(
            nodes.links[number],
            number,
            device,
            entrance,
            encoder,
            fed_here=fed_here,
            tells_here=follows is None or follows not in which,
        )
        remotes[number][number] = handles[number] = remote
    for number in which:
        nodes.links[number].start()
        far[number].start()
    return nodes, tuple(handles)


def move_to_nodes(engine: ModelEngine, which: Collection[int]) -> Nodes:
    """The same for stages of an engine that has not computed anything yet."""
    for number in which:
        engine.stages[number]._known = KnownSequences()  # of a process of its own
    nodes, handles = connect_stages(engine.stages, which)

    def put() -> None:
        engine.runner.close()
        engine.runner.stages = handles

    engine.batcher.call(put).result(LONGEST_WAIT_S)
    return nodes
