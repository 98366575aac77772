"""How long a stage takes for a batch: a roofline per layer, plus what each launch costs.

    c(a, b) = sum over layers l of [max(W_l / BW, T f_l / F(T)) + K k_l / A + o + T r] + o_step

for T new tokens whose attention reads K tokens of KV. W_l are the weight bytes that T tokens read (of experts, those
that are expected to be used), f_l operations per token, k_l KV bytes per token. BW is the device's bandwidth, A the
rate at which it attends to KV, F(T) its matrix rate; o and r are what a layer takes beside them per step and per token.
The last stage adds the final norm and head for the rows that are sampled. Looking embeddings up is not counted: it
reads T rows, not the table.

While several steps are in flight, all stages compute at the same time; those on parts of one processor are then slower
by what was measured for that (`Sharing`).

Layers that stream in take as long as that once they are there. Beside it every pass has to load them, in their order,
from when the first is done with its slot; two are loaded ahead, while the stage is not at work:

    pass = max(c(a, b), c(a, first + 1) + [loads of all but the first two] + c(last, b))

and no pass follows the one before sooner than all loads take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from core.costs.plan import LayerCosts
from core.costs.profile import FREE_LINK, DeviceProfile, LinkProfile, LinkTopology
from core.devices.device import host_of


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass computes: `tokens` new ones, `kv_tokens` read by attention, `logit_rows` sampled."""

    tokens: int
    kv_tokens: int
    logit_rows: int

    @classmethod
    def decode(cls, streams: int, context: int) -> Batch:
        """One token of each of `streams` sequences of `context` tokens."""
        return cls(streams, streams * context, streams)


def layer_s(costs: LayerCosts, device: DeviceProfile, layer: int, batch: Batch) -> float:
    """Seconds of one layer."""
    compute_s = batch.tokens * costs.layer_flops[layer] / device.flops_at(batch.tokens)
    weights_s = costs.read_bytes(layer, batch.tokens) / device.bandwidth_bytes_s
    kv_s = batch.kv_tokens * costs.kv_bytes_per_token[layer] / device.kv_bytes_s
    return max(weights_s, compute_s) + kv_s + device.layer_overhead_s + batch.tokens * device.row_overhead_s


def head_s(costs: LayerCosts, device: DeviceProfile, batch: Batch) -> float:
    """Seconds of the final norm and the head."""
    if batch.logit_rows == 0:
        return 0.0
    compute_s = batch.logit_rows * costs.head_flops / device.flops_at(batch.logit_rows)
    return max((costs.after_bytes + costs.head_bytes) / device.bandwidth_bytes_s, compute_s)


def stage_s(costs: LayerCosts, device: DeviceProfile, first: int, last: int, batch: Batch) -> float:
    """Seconds of one forward pass through layers `first .. last - 1`, head included where they are the last."""
    total = sum(layer_s(costs, device, layer, batch) for layer in range(first, last))
    if last == costs.num_layers:
        total += head_s(costs, device, batch)
    return total + device.step_overhead_s


class StageTimer:
    """`stage_s` for one stage and many batches: layers that cost the same are counted once."""

    def __init__(
        self, costs: LayerCosts, device: DeviceProfile, first: int, last: int, streamed: tuple[int, ...] = (),
        link: LinkProfile = FREE_LINK, parts: int = 1,
    ) -> None:  # fmt: skip
        """`streamed` layers come in over `link`; `parts` stages are on parts of its processor, this included."""
        beside = device.among(parts)
        self._at_once = None if beside == device else StageTimer(costs, beside, first, last, streamed, link)
        nothing = (0,) * costs.num_layers
        routed = (nothing, nothing) if costs.experts is None else (costs.experts.layer_bytes, costs.experts.number)
        kinds = list(zip(costs.layer_bytes, costs.layer_flops, costs.kv_bytes_per_token, *routed, strict=True))
        first_of = {kind: layer for layer, kind in reversed(list(enumerate(kinds[first:last], first)))}
        self._counts = [(first_of[kind], count) for kind, count in Counter(kinds[first:last]).items()]
        self._costs, self._device, self._has_head = costs, device, last == costs.num_layers
        self._stage, self._link = StageCost(device, first, last, streamed), link

    def seconds(self, batch: Batch, at_once: bool = False) -> float:
        """Predicted time of one forward pass; `at_once`: while all stages compute."""
        if at_once and self._at_once is not None:
            return self._at_once.seconds(batch)
        return _with_loads_s(self._costs, self._stage, self._link, batch, self.compute_s(batch))

    def layers_s(self, batch: Batch, first: int, last: int) -> float:
        """Predicted time of layers `first .. last - 1` of it, once they are there."""
        return sum(layer_s(self._costs, self._device, layer, batch) for layer in range(first, last))

    def compute_s(self, batch: Batch) -> float:
        """Predicted time without waiting for layers that stream in."""
        costs, device = self._costs, self._device
        total = sum(count * layer_s(costs, device, layer, batch) for layer, count in self._counts)
        return device.step_overhead_s + total + (head_s(costs, device, batch) if self._has_head else 0.0)


def hop_s(costs: LayerCosts, links: LinkTopology, src: str, dst: str, batch: Batch) -> float:
    """Seconds to hand a batch's activations from one device to the next."""
    return links.link(src, dst).transfer_s(batch.tokens * costs.hidden_bytes)


@dataclass(frozen=True, slots=True)
class StageCost:
    """A stage as the cost model sees it: layers `first .. last - 1` on a device, of which `streamed` stream in."""

    device: DeviceProfile
    first: int
    last: int
    streamed: tuple[int, ...] = ()


def at_once(stages: Sequence[StageCost]) -> tuple[StageCost, ...]:
    """The stages as they are while all of them compute."""
    processors = [stage.device.sharing and stage.device.sharing.processor for stage in stages]
    parts = [processors.count(processor) for processor in processors]
    return tuple(replace(stage, device=stage.device.among(count)) for stage, count in zip(stages, parts, strict=True))


def loaded_layers(streamed: Sequence[int]) -> tuple[int, ...]:
    """Those that every pass loads. They take turns in two slots; one that has a slot to itself stays there."""
    return tuple(layer for turn, layer in enumerate(streamed) if len(streamed[turn % 2 :: 2]) > 1)


def load_s(costs: LayerCosts, stage: StageCost, links: LinkTopology) -> float:
    """Seconds that a pass's layers take to come in from main memory."""
    link = links.link(host_of(stage.device.name), stage.device.name)
    return sum(link.transfer_s(costs.layer_bytes[layer]) for layer in loaded_layers(stage.streamed))


def busy_s(costs: LayerCosts, stage: StageCost, links: LinkTopology, batch: Batch) -> float:
    """Seconds from one pass to the next when one follows the other: computing or loading, whichever takes longer."""
    compute_s = stage_s(costs, stage.device, stage.first, stage.last, batch)
    return max(compute_s, load_s(costs, stage, links)) if stage.streamed else compute_s


def _with_loads_s(costs: LayerCosts, stage: StageCost, link: LinkProfile, batch: Batch, compute_s: float) -> float:
    """Seconds of a pass with `compute_s` of computing, whose first two loads are done when it begins."""
    streamed = stage.streamed
    late = [layer for layer in loaded_layers(streamed) if layer not in streamed[:2]]
    if not late:
        return compute_s
    between = range(streamed[0] + 1, streamed[-1])
    ends_s = compute_s - sum(layer_s(costs, stage.device, layer, batch) for layer in between)
    return max(compute_s, ends_s + sum(link.transfer_s(costs.layer_bytes[layer]) for layer in late))


def pipeline_s(
    costs: LayerCosts, stages: Sequence[StageCost], links: LinkTopology, batch: Batch
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of each stage, and of each hop between two of them, for one batch."""
    compute = tuple(
        _with_loads_s(
            costs, stage, links.link(host_of(stage.device.name), stage.device.name), batch,
            stage_s(costs, stage.device, stage.first, stage.last, batch),
        )
        for stage in stages
    )  # fmt: skip
    hops = tuple(hop_s(costs, links, a.device.name, b.device.name, batch) for a, b in pairwise(stages))
    return compute, hops


def decode_tok_s(
    costs: LayerCosts, stages: Sequence[StageCost], links: LinkTopology, streams: int, context: int, cohorts: int,
    late_s: Sequence[float] = (), least_s: float = 0.0,
) -> float:  # fmt: skip
    """Tokens per second when `streams` sequences decode as `cohorts` batches in flight, dealt out evenly.

    A cohort's next step begins when its last one is through all stages; a stage, and a link between two, serves one
    cohort at a time; layers that stream in come once for each. So a round, in which every sequence gains a token, takes
    as long as one cohort's way through, or as the busiest stage or link needs for all of them, whichever is more.

    `late_s`, by stage: what a pass takes longer than its stage by itself; `least_s`: no round is shorter.
    """
    stages = at_once(stages) if cohorts > 1 else stages
    sizes = [streams // cohorts + (index < streams % cohorts) for index in range(cohorts)]
    timed = [pipeline_s(costs, stages, links, Batch.decode(size, context)) for size in sizes if size]
    late = tuple(late_s) or (0.0,) * len(stages)
    timed = [(tuple(map(sum, zip(compute, late, strict=True))), hops) for compute, hops in timed]
    way_s = max(sum(compute) + sum(hops) for compute, hops in timed)
    busiest_s = max(map(sum, zip(*(compute + hops for compute, hops in timed), strict=True)))
    loading_s = len(timed) * max(load_s(costs, stage, links) for stage in stages)
    return streams / max(way_s, busiest_s, loading_s, least_s)


def best_cohorts(
    costs: LayerCosts, stages: Sequence[StageCost], links: LinkTopology, streams: int, context: int
) -> int:
    """How many batches to keep in flight: the fewest that come within 2 % of the fastest number."""
    most = min(streams, 2 * len(stages)) if len(stages) > 1 else 1
    rates = [decode_tok_s(costs, stages, links, streams, context, count) for count in range(1, max(1, most) + 1)]
    return next(index for index, rate in enumerate(rates, 1) if rate * 1.02 >= max(rates))
