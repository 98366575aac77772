"""Random fleets: mixed cards on several machines, some slowed, links of differing latency and bandwidth."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from core.costs.cards import card
from core.costs.cost import Batch, StageCost, pipeline_s
from core.costs.plan import LayerCosts, PlacementDevice
from core.costs.profile import LinkProfile, LinkTopology
from core.placement.programme import Cut

CARDS = ("RTX 3090", "RTX 4090", "RTX 3060", "RTX 4060", "RTX 2060", "GTX 1080", "RTX 3080 10GB", "A100 80GB", "T4")


@dataclass(frozen=True)
class Fleet:
    costs: LayerCosts
    devices: tuple[PlacementDevice, ...]
    links: LinkTopology
    batch: Batch
    kv_tokens: int
    cohorts: int

    def times(self, cuts: tuple[Cut, ...]) -> tuple[float, float]:
        """Seconds of the way through all stages and hops, and of the busiest of them."""
        stages = [StageCost(self.devices[cut.device].profile, cut.first, cut.last) for cut in cuts]
        compute, hops = pipeline_s(self.costs, stages, self.links, self.batch)
        return sum(compute) + sum(hops), max(compute + hops)

    def holds(self, cuts: tuple[Cut, ...]) -> bool:
        assert [layer for cut in cuts for layer in range(cut.first, cut.last)] == list(range(self.costs.num_layers))
        assert len({cut.device for cut in cuts}) == len(cuts)
        return all(
            self.costs.needed_bytes(cut.first, cut.last, self.kv_tokens) <= self.devices[cut.device].limit_bytes
            for cut in cuts
        )


def random_fleet(seed: int, number: int | None = None, share: float | None = None) -> Fleet:
    """4 to 8 devices unless `number` says how many, and a model that takes `share` of their memory, or 20 to 90 %."""
    dice = random.Random(seed)
    number, num_layers = number or dice.randint(4, 8), dice.choice((16, 24, 32))
    devices, nodes = [], [0]
    for index in range(number):
        found = card(dice.choice(CARDS))
        slowed = found.profile.bandwidth_bytes_s / dice.choice((1, 1, 1, 2, dice.uniform(1, 4)))
        overhead_s = found.profile.layer_overhead_s * dice.choice((0.1, 1))
        profile = replace(found.profile, bandwidth_bytes_s=slowed, layer_overhead_s=overhead_s)
        devices.append(PlacementDevice(f"d{index}", int(0.9 * found.limit_bytes), profile))
        nodes.append(nodes[-1] + (dice.random() < 0.5))
    total, drawn = sum(device.limit_bytes for device in devices), dice.choice((0.2, 0.4, 0.6, 0.8, 0.9))
    even, uneven = int(total * (share or drawn) / (num_layers + 2)), dice.random() < 0.3
    layers = tuple(int(even * (dice.uniform(0.5, 1.5) if uneven else 1)) for _ in range(num_layers))
    costs = LayerCosts(
        embedding_bytes=even // 2,
        layer_bytes=layers,
        after_bytes=1000,
        head_bytes=even,
        tied=False,
        kv_bytes_per_token=(4096,) * num_layers,
        workspace_bytes=10**8,
        head_workspace_bytes=10**8,
        layer_flops=layers,
        head_flops=even,
        hidden_bytes=dice.choice((4096, 8192, 32768)),
    )
    batch = Batch.decode(dice.choice((1, 4, 16, 64)), 1000)
    links = _links(dice, nodes[:number])
    return Fleet(costs, tuple(devices), links, batch, dice.choice((1000, 16000)), dice.choice((2, 4, number)))


def _links(dice: random.Random, nodes: list[int]) -> LinkTopology:
    latency_s, bandwidth = dice.choice((50e-6, 200e-6, 1e-3, 20e-3)), dice.choice((1.1e8, 2.8e8, 1.2e9, 5e9))
    between: dict[tuple[int, int], float] = {}
    links = {}
    for src, dst in ((i, j) for i in range(len(nodes)) for j in range(len(nodes)) if i != j):
        pair = min(nodes[src], nodes[dst]), max(nodes[src], nodes[dst])
        if nodes[src] == nodes[dst]:
            link = LinkProfile(dice.choice((11e9, 25e9, 3e9)), dice.choice((1e-5, 3e-5)))
        else:
            slower = between.setdefault(pair, dice.choice((1, 1, 5, 0.2, 20)))
            link = LinkProfile(bandwidth / slower, latency_s * slower)
        links[f"d{src}", f"d{dst}"] = link
    return LinkTopology(links)
