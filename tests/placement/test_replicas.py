"""Which machines of a fleet form replicas, beside all other partitions where these can be counted."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from core.costs.cards import card
from core.costs.plan import LayerCosts, PlacementProblem
from core.costs.profile import LinkProfile, LinkTopology
from core.placement import replicas
from core.placement.replicas import FleetNode, Partition, ReplicaRates, mend, partition

CARDS = ("RTX 3060", "RTX 3090", "RTX 4090", "RTX 4060", "GTX 1080 Ti")
LAYERS = 16


def node(name: str, kind: str, site: str = "s", count: int = 1) -> FleetNode:
    devices = tuple(replace(card(kind), name=f"{name}/{index}") for index in range(count))
    return FleetNode(name, site, devices)


def rates(gigabytes: float = 16.0, gap_s: float = 0.3, links: LinkTopology | None = None) -> ReplicaRates:
    """Of a model of that size."""
    layer = int(gigabytes * 1e9 / LAYERS)
    costs = LayerCosts(
        0, (layer,) * LAYERS, 0, 10**6, False, (8192,) * LAYERS, layer_flops=(layer,) * LAYERS, head_flops=10**6,
        hidden_bytes=8192,
    )  # fmt: skip
    problem = PlacementProblem(
        "m", costs, (card("T4"),), links or LinkTopology(default=LinkProfile(1.1e9, 250e-6)), "throughput", streams=16,
        context=1024, min_kv_tokens=2048, max_kv_tokens=16 * 1024,
    )  # fmt: skip
    return ReplicaRates(problem, gap_s)


def check(found: Partition, nodes: list[FleetNode]) -> None:
    """Each machine is in one replica or spare, each replica holds the model, within one site, on its own devices."""
    here = {each.name: each for each in nodes}
    named = [name for replica in found.replicas for name in replica.nodes] + list(found.spare)
    assert sorted(named) == sorted(here)
    for replica in found.replicas:
        assert len({here[name].site for name in replica.nodes}) == 1
        own = {device.name for name in replica.nodes for device in here[name].devices}
        stages = replica.plan.stages
        assert {stage.device_name for stage in stages} <= own
        assert [layer for s in stages for layer in range(s.first_layer, s.last_layer)] == list(range(LAYERS))
        assert all(stage.free_bytes >= 0 for stage in stages)
        assert {device.name for device in replica.problem.devices} == own
        assert replica.streams / replica.tok_s <= 0.3


def test_a_card_that_holds_the_model_is_a_replica_and_small_ones_are_put_together() -> None:
    nodes = [node("big", "RTX 3090"), node("x", "RTX 3060"), node("y", "RTX 3060")]
    found = partition(nodes, rates())
    check(found, nodes)
    assert sorted(replica.nodes for replica in found.replicas) == [("big",), ("x", "y")]


def test_machines_of_different_sites_share_no_replica() -> None:
    nodes = [node("x", "RTX 3060", "here"), node("y", "RTX 3060", "there")]
    found = partition(nodes, rates())
    check(found, nodes)
    assert found == Partition((), ("x", "y"))


def test_a_replica_that_is_too_slow_for_a_stream_is_none() -> None:
    nodes = [node("x", "RTX 3060"), node("y", "RTX 3060")]
    assert partition(nodes, rates(gap_s=0.3)).replicas
    assert partition(nodes, rates(gap_s=0.02)).replicas == ()


@pytest.mark.parametrize("seed", range(6))
def test_what_many_machines_are_made_into_is_near_the_best_of_all_partitions(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six machines have 203 partitions. With more than can be counted, kinds go first: that is held against it."""
    dice = random.Random(seed)
    nodes = [node(f"n{index}", dice.choice(CARDS)) for index in range(6)]
    fleet = rates()
    monkeypatch.setattr(replicas, "EXACT_NODES", 6)
    best = partition(nodes, fleet)
    monkeypatch.setattr(replicas, "EXACT_NODES", 0)
    found = partition(nodes, fleet)
    check(best, nodes)
    check(found, nodes)
    assert 0.8 * best.tok_s <= found.tok_s <= best.tok_s * (1 + 1e-9)


def test_a_hundred_machines_are_all_of_use() -> None:
    dice = random.Random(3)
    nodes = [node(f"n{index}", dice.choice(CARDS), f"s{index // 20}", dice.choice((1, 1, 2))) for index in range(100)]
    found = partition(nodes, rates())
    check(found, nodes)
    assert len(found.spare) <= 5
    assert found == partition(nodes, rates())  # the same each time


def test_a_replica_goes_on_with_those_that_are_left_where_they_hold_the_model() -> None:
    nodes = [node(name, "RTX 3090") for name in "xyz"]
    fleet = rates(gigabytes=40.0)
    before = partition(nodes, fleet)
    (replica,) = before.replicas
    assert len(replica.nodes) == 3 or len(replica.nodes) == 2
    left = [each for each in nodes if each.name != replica.nodes[0]]
    after = mend(left, before, fleet)
    check(after, left)
    assert sorted(after.replicas[0].nodes) == sorted(each.name for each in left)


def test_a_spare_machine_takes_the_place_of_one_that_is_lost_and_other_replicas_stay() -> None:
    nodes = [node(name, "RTX 3060") for name in ("a", "b", "c", "d", "e")] + [node("far", "RTX 3060", "there")]
    fleet = rates()
    before = Partition(
        tuple(r for pair in ((0, 1), (2, 3)) if (r := fleet.replica([nodes[i] for i in pair]))), ("e", "far")
    )
    assert len(before.replicas) == 2
    left = [each for each in nodes if each.name != "a"]
    after = mend(left, before, fleet)
    check(after, left)
    assert before.replicas[1] in after.replicas
    assert sorted(replica.nodes for replica in after.replicas) == [("b", "e"), ("c", "d")]
    assert after.spare == ("far",)


def test_what_can_go_on_nowhere_waits_for_a_machine_that_comes_back() -> None:
    nodes = [node("a", "RTX 3060"), node("b", "RTX 3060")]
    fleet = rates()
    before = partition(nodes, fleet)
    after = mend(nodes[:1], before, fleet)
    assert after == Partition((), ("a",))
    again = mend(nodes, after, fleet)
    assert [replica.nodes for replica in again.replicas] == [("a", "b")]


def test_cards_that_hold_the_model_with_little_kv_serve_more_in_pairs() -> None:
    nodes = [node(f"n{index}", "RTX 3090") for index in range(6)]
    fleet = rates(gigabytes=25.0)
    alone = fleet.replica(nodes[:1])
    assert alone is not None and alone.streams < 8
    found = partition(nodes, fleet)
    check(found, nodes)
    assert {len(replica.nodes) for replica in found.replicas} == {2}
    assert found.tok_s > 6 * alone.tok_s


def test_what_is_left_of_two_replicas_is_not_mixed() -> None:
    """Their machines keep the layers that they have."""
    nodes = [node(name, "RTX 3090") for name in "abcdxy"]
    fleet = rates(gigabytes=40.0)
    groups = [[nodes[0], nodes[2], nodes[4]], [nodes[1], nodes[3], nodes[5]]]
    before = Partition(tuple(found for group in groups if (found := fleet.replica(group))), ())
    after = mend(nodes[:4], before, fleet)
    assert sorted(replica.nodes for replica in after.replicas) == [("a", "c"), ("b", "d")]


def test_of_spare_machines_each_helps_one_that_has_layers() -> None:
    nodes = [node(name, "RTX 3060") for name in "abcdef"]
    fleet = rates()
    pairs = [[nodes[0], nodes[2]], [nodes[1], nodes[3]]]
    before = Partition(tuple(found for pair in pairs if (found := fleet.replica(pair))), ("e", "f"))
    here = [nodes[0], nodes[1], nodes[4], nodes[5]]
    after = mend(here, before, fleet)
    check(after, here)
    assert sorted(replica.nodes for replica in after.replicas) == [("a", "e"), ("b", "f")]
