"""What would let a model in that does not fit. Each piece of advice has been planned, and fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from core.config import Settings
from core.costs import PlacementPlan, PlacementProblem
from core.devices.device import format_bytes, machine_of
from core.engine.problem import least_kv_tokens, lend_ratio
from core.errors import InsufficientMemoryError
from core.placement.engine import cuts_by_hand, place
from core.placement.pooled import place_pooled, pool_of
from core.placement.search import PlacementSearch, largest
from core.placement.splitter import cuts_by_memory
from core.placement.stream_search import StreamingSearch
from core.placement.streaming import place_streaming

_ANY_MACHINE_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class MemoryAdvice:
    """Looks for what fits.

    Attributes:
        request: what was refused; its `host_bytes` and `node_host_bytes` are what layers that stream in may take.
        settings: what was asked for.
        lend_ratio: as in `place_pooled`.
        kv_tokens: of KV that a load must have room for.
    """

    request: PlacementProblem
    settings: Settings
    lend_ratio: float
    kv_tokens: int

    def added_to(self, error: InsufficientMemoryError) -> InsufficientMemoryError:
        """The same error, saying what to do."""
        found = [*self._layers(), *self._strategy(), *self._streaming(), *self._shorter()]
        advice = f"What fits: {', or '.join(found)}." if found else self._too_large()
        return InsufficientMemoryError(f"{error.message} {advice}", lacking_bytes=error.lacking_bytes)

    def _too_large(self) -> str:
        costs, total = self.request.costs, sum(device.limit_bytes for device in self.request.devices)
        weights = format_bytes(costs.weight_bytes(0, costs.num_layers))
        workspace = format_bytes(costs.stage_workspace_bytes(costs.num_layers))
        return (
            f"Its weights take {weights} and a step's workspace {workspace}, and all devices together may use "
            f"{format_bytes(total)}: give it larger or more --devices, or take a smaller --max-num-batched-tokens or "
            "--model."
        )

    def _layers(self) -> list[str]:
        """Other layers on each device than those by hand."""
        request, moves = self.request, []
        for device, first, last in cuts_by_hand(request, request.layers) if request.layers is not None else ():
            over = last - first - self._most_layers(device, first, last)
            if over:
                moves.append(f"at least {over} layers fewer on {request.devices[device].name}")
        counts = self._fitting_layers() if moves else None
        return [] if counts is None else [f"--layers {counts} ({', '.join(moves)})"]

    def _most_layers(self, device: int, first: int, last: int) -> int:
        """Of a stage, with the end of the model that it holds."""
        costs, tokens = self.request.costs, self.request.least_kv_tokens
        limit = self.request.devices[device].limit_bytes

        def fits(count: int) -> bool:
            start = last - count if last == costs.num_layers else first
            return costs.needed_bytes(start, start + count, tokens) <= limit

        return largest(fits, 0, last - first)

    def _fitting_layers(self) -> str | None:
        """In proportion to the memory of as many devices as can be used, those with the most."""
        devices = self.request.devices
        roomy = sorted(range(len(devices)), key=lambda index: -devices[index].limit_bytes)
        for number in range(len(roomy), 0, -1):
            used = sorted(roomy[:number])
            part = replace(self.request, devices=tuple(devices[index] for index in used), layers=None)
            try:
                cuts = {used[cut.device]: cut.last - cut.first for cut in cuts_by_memory(part)}
            except InsufficientMemoryError:
                continue
            counts = tuple(cuts.get(index, 0) for index in range(len(devices)))
            by_hand = replace(self.request, layers=counts)
            if self._holds(by_hand, lambda by_hand=by_hand: place(by_hand), self.kv_tokens):  # type: ignore[misc]
                return ",".join(map(str, counts))
        return None

    def _strategy(self) -> list[str]:
        """The one that leaves out no plan."""
        request = self.request
        if request.layers is not None or self.settings.devices.placement == "profiled":
            return []
        fits = self._holds(request, lambda: self._pooled(request, "profiled", self.kv_tokens), self.kv_tokens)
        return ["--placement profiled"] if fits else []

    def _streaming(self) -> list[str]:
        """Layers in main memory, where that was switched off."""
        if self.settings.devices.stream_weights != "off":
            return []
        machines = {machine_of(device.name) for device in self.request.devices}
        streaming = replace(
            self.request, host_bytes=_ANY_MACHINE_BYTES, min_kv_tokens=self.kv_tokens,
            node_host_bytes=dict.fromkeys(machines - {""}, _ANY_MACHINE_BYTES),
        )  # fmt: skip
        plan = _planned(lambda: place_streaming(streaming, self.settings.devices.placement))
        if plan is None:
            return []
        return [f"--stream-weights auto, with {format_bytes(plan.streamed_bytes)} of layers in main memory"]

    def _shorter(self) -> list[str]:
        """As long a context as there is room for."""
        strategy, block = self.settings.devices.placement, self.request.block_size
        tokens = self._most_tokens(strategy)
        if tokens is None or not block <= tokens < self.kv_tokens:
            return []
        least = replace(self.request, min_kv_tokens=min(tokens, self.request.min_kv_tokens))
        streaming = replace(self.request, min_kv_tokens=tokens)
        fits = self._holds(least, lambda: self._pooled(least, strategy, tokens), tokens) or (
            self.request.may_stream and self._holds(streaming, lambda: place_streaming(streaming, strategy), tokens)
        )
        return [f"--max-model-len {tokens}"] if fits else []

    def _most_tokens(self, strategy: str) -> int | None:
        """Of KV that any plan holds, or one with memory that devices lend each other."""
        request, block = self.request, self.request.block_size
        one_block = replace(request, min_kv_tokens=1)
        if request.layers is not None or self.lend_ratio > 0:
            plan = _planned(lambda: self._pooled(one_block, strategy, 0))
            if plan is not None:
                return pool_of(one_block, plan, self.lend_ratio).tokens
        if request.layers is not None:
            return None
        if request.may_stream:
            search: PlacementSearch = StreamingSearch(request, frozenset())
        else:
            search = PlacementSearch(request.costs, request.devices, request.links, frozenset())
        return search.most_kv_tokens(block, request.least_kv_tokens, block)

    def _pooled(self, request: PlacementProblem, strategy: str, tokens: int) -> PlacementPlan:
        return place_pooled(request, strategy, self.lend_ratio, tokens)

    def _holds(self, request: PlacementProblem, make: Callable[[], PlacementPlan], tokens: int) -> bool:
        """Whether there is such a plan, and its devices hold so much KV together."""
        plan = _planned(make)
        return plan is not None and pool_of(request, plan, self.lend_ratio).tokens >= tokens


def _planned(make: Callable[[], PlacementPlan]) -> PlacementPlan | None:
    try:
        return make()
    except InsufficientMemoryError:
        return None


def advised(
    error: InsufficientMemoryError, problem: PlacementProblem, settings: Settings, max_model_len: int
) -> InsufficientMemoryError:
    """The error with what would fit."""
    least = least_kv_tokens(settings, max_model_len, problem.max_kv_tokens)
    return MemoryAdvice(problem, settings, lend_ratio(settings), least).added_to(error)
