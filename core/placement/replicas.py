"""How many replicas of a model a fleet makes, and which nodes form each: a pure function over profiles.

A replica is a pipeline over the devices of some nodes. Nodes of one site may share a replica, those of different sites
never do: each token would cross what is between them. What counts is the sum of what the replicas serve: tokens per
second with as many streams as their KV holds and as many as keep the gap between two tokens of a stream below a bound.

Up to `EXACT_NODES` nodes of a site, all partitions are compared. With more, nodes of a kind are put together first,
since stages that are alike leave no device waiting: of every number of nodes of that kind, the one with the best rate
per node is taken. What is left over is put together across kinds, or joins a replica where that brings more than
waiting for a loss; else it is spare.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from core.costs.cost import best_cohorts, decode_tok_s
from core.costs.plan import PlacementDevice, PlacementPlan, PlacementProblem
from core.errors import InsufficientMemoryError
from core.placement.engine import place, stage_costs

EXACT_NODES = 5
MOST_NODES = 8
"""In one replica, unless it takes more to hold the model at all: each hop adds to every token."""
_CLEARLY = 1.05
"""A node joins a replica that serves without it for so much more at least; spare, it replaces one that is lost."""


@dataclass(frozen=True, slots=True)
class FleetNode:
    """A machine: its devices, and where it is."""

    name: str
    site: str
    devices: tuple[PlacementDevice, ...]


@dataclass(frozen=True, slots=True)
class Replica:
    """A pipeline over `nodes`; with `streams` streams it gives `tok_s` tokens per second in all."""

    nodes: tuple[str, ...]
    plan: PlacementPlan
    problem: PlacementProblem
    streams: int
    tok_s: float


@dataclass(frozen=True, slots=True)
class Partition:
    """Replicas, and the names of nodes that belong to none."""

    replicas: tuple[Replica, ...]
    spare: tuple[str, ...]

    @property
    def tok_s(self) -> float:
        return sum(each.tok_s for each in self.replicas)


class ReplicaRates:
    """What groups of nodes would serve. Groups that are alike are worked out once.

    Args:
        problem: the model, links and load of one replica; `streams` is the most it is asked for, its `devices` are not
            looked at.
        gap_s: the most seconds between two tokens of a stream.
    """

    def __init__(self, problem: PlacementProblem, gap_s: float) -> None:
        self._problem, self._gap_s = problem, gap_s
        self._known: dict[Hashable, tuple[Replica, tuple[str, ...]] | None] = {}

    def replica(self, nodes: Sequence[FleetNode]) -> Replica | None:
        """Of these nodes; None if they do not hold the model, or not one stream keeps the bound."""
        nodes = sorted(nodes, key=lambda node: (repr(kind_of(node)), node.name))
        devices = [device for node in nodes for device in node.devices]
        links = self._problem.links
        key = (
            tuple(map(kind_of, nodes)),
            tuple(links.link(a.name, b.name) for a in devices for b in devices if a is not b),
        )
        if key not in self._known:
            found = self._work_out(devices)
            names = tuple(device.name for device in devices)
            self._known[key] = None if found is None else (found, names)
        known = self._known[key]
        if known is None:
            return None
        named = tuple(node.name for node in nodes)
        return _renamed(known[0], known[1], devices, named)

    def _work_out(self, devices: Sequence[PlacementDevice]) -> Replica | None:
        problem = replace(self._problem, devices=tuple(devices))
        try:
            plan = place(problem)
        except InsufficientMemoryError:
            return None
        stages, held = stage_costs(plan, problem), plan.kv_tokens // problem.context
        best: tuple[float, int] | None = None
        streams = 1
        while streams <= min(held, problem.streams):
            cohorts = best_cohorts(problem.costs, stages, problem.links, streams, problem.context)
            rate = decode_tok_s(problem.costs, stages, problem.links, streams, problem.context, cohorts)
            if streams / rate <= self._gap_s and (best is None or rate > best[0]):
                best = rate, streams
            streams *= 2
        return None if best is None else Replica((), plan, problem, best[1], best[0])


def kind_of(node: FleetNode) -> Hashable:
    """Equal for nodes that can stand in for one another, but for their links."""
    bare = (replace(device.profile, name="", source="assumed") for device in node.devices)
    return tuple(zip((device.limit_bytes for device in node.devices), bare, strict=True))


def _renamed(
    found: Replica, names: tuple[str, ...], devices: Sequence[PlacementDevice], nodes: tuple[str, ...]
) -> Replica:
    """The same replica of other devices that are alike, in the same order."""
    to = dict(zip(names, (device.name for device in devices), strict=True))
    plan = replace(
        found.plan,
        stages=tuple(replace(stage, device_name=to[stage.device_name]) for stage in found.plan.stages),
        unused_devices=tuple(to[name] for name in found.plan.unused_devices),
    )
    return replace(found, nodes=nodes, plan=plan, problem=replace(found.problem, devices=tuple(devices)))


def partition(nodes: Sequence[FleetNode], rates: ReplicaRates) -> Partition:
    """Replicas over the nodes of each site."""
    sites: dict[str, list[FleetNode]] = defaultdict(list)
    for node in nodes:
        sites[node.site].append(node)
    replicas: list[Replica] = []
    for members in sites.values():
        replicas += _exact(members, rates) if len(members) <= EXACT_NODES else _greedy(members, rates)
    return _whole(replicas, nodes)


def mend(nodes: Sequence[FleetNode], before: Partition, rates: ReplicaRates) -> Partition:
    """The partition of `nodes` after some have left, or come, since `before`, with as few replicas changed as can be.

    A replica that has lost nodes goes on with those that are left, if they hold the model; else with a spare node of
    the site beside them, the one that brings most; else its nodes are spare. Spare nodes form replicas where they can,
    or join one that has become slower by its loss.
    """
    here = {node.name: node for node in nodes}
    spare = {name for name in here if not any(name in replica.nodes for replica in before.replicas)}
    whole = [replica for replica in before.replicas if here.keys() >= set(replica.nodes)]
    hurt = []
    for replica in before.replicas:
        left = [here[name] for name in replica.nodes if name in here]
        if len(left) == len(replica.nodes) or not left:
            continue
        found = rates.replica(left) or _helped(left, [here[name] for name in sorted(spare)], rates)
        if found is None:
            spare |= {node.name for node in left}
        else:
            spare -= set(found.nodes)
            hurt.append(found)
    new = partition([here[name] for name in sorted(spare)], rates)
    mended = _joined([*hurt], [here[name] for name in new.spare], rates, here)
    return _whole([*whole, *mended, *new.replicas], nodes)


def _helped(left: Sequence[FleetNode], spare: Sequence[FleetNode], rates: ReplicaRates) -> Replica | None:
    found = (rates.replica([*left, node]) for node in spare if node.site == left[0].site)
    return max((each for each in found if each is not None), key=lambda each: each.tok_s, default=None)


def _joined(
    replicas: list[Replica], left: Sequence[FleetNode], rates: ReplicaRates, here: dict[str, FleetNode]
) -> list[Replica]:
    """Each node that is left joins the replica of its site where it brings most, if that is clearly more."""
    for node in left:
        best: tuple[float, int, Replica] | None = None
        for index, replica in enumerate(replicas):
            members = [here[name] for name in replica.nodes]
            if members[0].site != node.site or len(members) >= MOST_NODES:
                continue
            found = rates.replica([*members, node])
            if found is not None and found.tok_s > _CLEARLY * replica.tok_s:
                gain = found.tok_s - replica.tok_s
                best = max(best or (0.0, 0, found), (gain, index, found), key=lambda each: each[0])
        if best is not None:
            replicas[best[1]] = best[2]
    return replicas


def _whole(replicas: Sequence[Replica], nodes: Sequence[FleetNode]) -> Partition:
    used = {name for replica in replicas for name in replica.nodes}
    return Partition(tuple(replicas), tuple(node.name for node in nodes if node.name not in used))


def _exact(members: Sequence[FleetNode], rates: ReplicaRates) -> list[Replica]:
    """The best of all partitions; nodes may be left out. Of equally good ones that with the most nodes to spare."""
    best: list[Replica] = []
    best_key = (0.0, 0)
    for groups in _partitions(list(members)):
        found = [replica for group in groups if (replica := rates.replica(group)) is not None]
        key = (sum(replica.tok_s for replica in found), -sum(len(replica.nodes) for replica in found))
        if key > best_key:
            best, best_key = found, key
    return best


def _partitions(members: list[FleetNode]) -> Iterator[list[list[FleetNode]]]:
    """All ways to put the members into groups."""
    if not members:
        yield []
        return
    first, rest = members[0], members[1:]
    for groups in _partitions(rest):
        yield [[first], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [first, *group], *groups[index + 1 :]]


def _greedy(members: Sequence[FleetNode], rates: ReplicaRates) -> list[Replica]:
    kinds: dict[Hashable, list[FleetNode]] = defaultdict(list)
    for node in members:
        kinds[kind_of(node)].append(node)
    replicas, left = [], list[FleetNode]()
    for alike in kinds.values():
        size = _best_size(alike, rates)
        groups = len(alike) // size if size else 0
        for index in range(groups):
            replicas += _of([rates.replica(alike[index * size : (index + 1) * size])])
        left += alike[groups * size :]
    left.sort(key=lambda node: -max(device.profile.bandwidth_bytes_s for device in node.devices))
    mixed, rest = _mixed(left, rates)
    return _joined([*replicas, *mixed], rest, rates, {node.name: node for node in members})


def _of(found: Iterable[Replica | None]) -> list[Replica]:
    return [each for each in found if each is not None]


def _best_size(alike: Sequence[FleetNode], rates: ReplicaRates) -> int:
    """How many of these nodes give the best rate per node together; 0 if no number of them serves."""
    found = {size: rates.replica(alike[:size]) for size in range(1, min(len(alike), MOST_NODES) + 1)}
    per_node = {size: replica.tok_s / size for size, replica in found.items() if replica is not None}
    return max(per_node, key=lambda size: (per_node[size], -size), default=0)


def _mixed(left: Sequence[FleetNode], rates: ReplicaRates) -> tuple[list[Replica], list[FleetNode]]:
    """Groups of the nodes that follow one another, as small as they serve; and the nodes that no group was made of."""
    replicas, group = [], list[FleetNode]()
    rest = list[FleetNode]()
    for node in left:
        group.append(node)
        found = rates.replica(group)
        if found is not None:
            replicas.append(found)
            group = []
        elif len(group) > 2 * MOST_NODES:
            rest.append(group.pop(0))
    return replicas, [*rest, *group]
