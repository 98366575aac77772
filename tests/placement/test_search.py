"""The exact search against brute force over all devices, orders and cuts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.costs.cost import Batch, StageCost, pipeline_s
from core.costs.plan import LayerCosts, Objective, PlacementDevice
from core.costs.profile import DeviceProfile, LinkProfile, LinkTopology, Sharing
from core.placement.programme import Cut
from core.placement.search import PlacementSearch

OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput")


@dataclass(frozen=True)
class Case:
    costs: LayerCosts
    profiles: tuple[DeviceProfile, ...]
    limits: tuple[int, ...]
    links: LinkTopology
    batch: Batch
    kv_tokens: int

    def search(self, required: frozenset[int] = frozenset()) -> PlacementSearch:
        found = zip(self.profiles, self.limits, strict=True)
        devices = [PlacementDevice(profile.name, limit, profile) for profile, limit in found]
        return PlacementSearch(self.costs, devices, self.links, required)

    def fits(self, cuts: tuple[Cut, ...]) -> bool:
        needed = ((cut.device, self.costs.needed_bytes(cut.first, cut.last, self.kv_tokens)) for cut in cuts)
        return all(nbytes <= self.limits[device] for device, nbytes in needed)

    def seconds(self, cuts: tuple[Cut, ...], at_once: bool) -> tuple[float, float]:
        """The way through all stages and hops, and the busiest of them; `at_once`: with all parts at work."""
        profiles = [self.profiles[cut.device] for cut in cuts]
        if at_once:
            profiles = [p.among(p.sharing.parts) if p.sharing else p for p in profiles]
        stages = [StageCost(profile, cut.first, cut.last) for profile, cut in zip(profiles, cuts, strict=True)]
        compute, hops = pipeline_s(self.costs, stages, self.links, self.batch)
        return sum(compute) + sum(hops), max(compute + hops)

    def value(self, cuts: tuple[Cut, ...], objective: Objective) -> float:
        return self.seconds(cuts, objective == "throughput")[objective == "throughput"]

    def rank(self, cuts: tuple[Cut, ...], objective: Objective) -> tuple[float, int, float, tuple[int, ...]]:
        """What is better comes first: ties by number of stages, then the other objective, then the order given."""
        way, busiest = self.seconds(cuts, objective == "throughput")
        first, second = (way, busiest) if objective == "latency" else (busiest, way)
        return first, len(cuts), second, tuple(cut.device for cut in cuts)

    def all_plans(self) -> list[tuple[Cut, ...]]:
        num_layers, found = self.costs.num_layers, []
        for number in range(1, min(len(self.profiles), num_layers) + 1):
            for inner in combinations(range(1, num_layers), number - 1):
                bounds = (0, *inner, num_layers)
                for order in permutations(range(len(self.profiles)), number):
                    cuts = tuple(Cut(device, *bounds[index : index + 2]) for index, device in enumerate(order))
                    if self.fits(cuts):
                        found.append(cuts)
        return found


@st.composite
def models(draw: st.DrawFn, most_layers: int) -> LayerCosts:
    num_layers = draw(st.integers(1, most_layers))

    def per_layer(low: int, high: int) -> tuple[int, ...]:
        same = draw(st.booleans())
        values = st.integers(low, high)
        return (draw(values),) * num_layers if same else tuple(draw(values) for _ in range(num_layers))

    part = st.integers(0, 300)
    return LayerCosts(
        embedding_bytes=draw(part),
        layer_bytes=per_layer(1, 300),
        after_bytes=draw(st.integers(0, 20)),
        head_bytes=draw(part),
        tied=draw(st.booleans()),
        kv_bytes_per_token=per_layer(0, 9),
        workspace_bytes=draw(st.integers(0, 50)),
        head_workspace_bytes=draw(st.integers(0, 50)),
        layer_flops=per_layer(0, 300),
        head_flops=draw(part),
        hidden_bytes=draw(st.integers(0, 64)),
    )


@st.composite
def some_limits(draw: st.DrawFn, costs: LayerCosts, kv_tokens: int) -> int:
    """A share of what the model needs, or what some stage needs to the byte, or a byte less."""
    if draw(st.booleans()):
        eighths = draw(st.sampled_from((5, 4, 6, 3, 7, 8, 1, 20)))
        return costs.needed_bytes(0, costs.num_layers, kv_tokens) * eighths // 8
    first = draw(st.integers(0, costs.num_layers - 1))
    last = draw(st.integers(first + 1, costs.num_layers))
    return costs.needed_bytes(first, last, kv_tokens) - draw(st.integers(0, 1))


@st.composite
def cases(draw: st.DrawFn, most_layers: int = 10, most_devices: int = 4) -> Case:
    """Speeds and overheads are powers of two, so that sums are exact and ties are ties."""
    costs = draw(models(most_layers))
    power = st.integers(-2, 6).map(lambda exponent: 2.0**exponent)
    overhead = st.sampled_from((0.0, 0.25, 4.0))
    number = draw(st.integers(1, most_devices))
    sharing = st.sampled_from((None, Sharing("cpu", 2, 2.0, 4.0), Sharing("cuda:0", 3, 1.0, 2.0)))
    kinds = [
        DeviceProfile(
            "", draw(power), ((1, draw(power)),), draw(overhead), draw(overhead),
            row_overhead_s=draw(overhead), sharing=draw(sharing),
        )
        for _ in range(draw(st.integers(1, number)))
    ]  # fmt: skip
    profiles = [replace(draw(st.sampled_from(kinds)), name=f"d{index}") for index in range(number)]
    names = [profile.name for profile in profiles]
    pairs = draw(st.lists(st.permutations(names).map(lambda order: tuple(order[:2])), max_size=6)) if number > 1 else []
    links = {(src, dst): LinkProfile(draw(power), draw(overhead)) for src, dst in pairs}
    kv_tokens = draw(st.integers(0, 12))
    limits = [draw(some_limits(costs, kv_tokens)) for _ in range(number)]
    if draw(st.booleans()):
        limits = [limits[0]] * number
    tokens, context = draw(st.integers(1, 8)), draw(st.integers(0, 16))
    default = LinkProfile(draw(power), draw(overhead))
    batch = Batch(tokens, tokens * context, draw(st.integers(0, tokens)))
    return Case(costs, tuple(profiles), tuple(limits), LinkTopology(links, default), batch, kv_tokens)


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=120)
@given(case=cases(most_layers=10))
def test_the_best_plan_is_the_best_of_all_with_every_tie_broken_as_documented(objective: Objective, case: Case) -> None:
    found = case.search().best(case.batch, case.kv_tokens, objective)
    plans = case.all_plans()
    assert (found is None) == (not plans)
    if found is not None:
        assert case.rank(found, objective) == min(case.rank(cuts, objective) for cuts in plans)
        check_plan(case, found)


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=40)
@given(case=cases(most_layers=6), speeds=st.lists(st.floats(0.3, 99.0), min_size=16, max_size=16))
def test_speeds_that_are_not_round_are_no_hindrance(objective: Objective, case: Case, speeds: list[float]) -> None:
    profiles = tuple(
        DeviceProfile(profile.name, speeds[2 * index], ((1, speeds[2 * index + 1]), (4, speeds[index])), 1e-3, 0.1)
        for index, profile in enumerate(case.profiles)
    )
    links = {pair: LinkProfile(speeds[index + 8], speeds[-index]) for index, pair in enumerate(case.links.links)}
    case = Case(case.costs, profiles, case.limits, LinkTopology(links), case.batch, case.kv_tokens)
    found = case.search().best(case.batch, case.kv_tokens, objective)
    plans = case.all_plans()
    assert (found is None) == (not plans)
    if found is not None:
        best = min(case.value(cuts, objective) for cuts in plans)
        assert case.value(found, objective) == pytest.approx(best, rel=1e-12)


@settings(max_examples=80)
@given(case=cases(most_layers=7), cohorts=st.integers(1, 6))
def test_the_best_round_is_as_close_to_the_best_of_all_as_documented(case: Case, cohorts: int) -> None:
    def round_s(cuts: tuple[Cut, ...]) -> float:
        way, busiest = case.seconds(cuts, cohorts > 1)
        return max(way, cohorts * busiest)

    search, plans = case.search(), case.all_plans()
    found = search.best_round(case.batch, case.kv_tokens, cohorts)
    assert (found is None) == (not plans)
    if found is not None:
        check_plan(case, found)
        best = min(map(round_s, plans))
        seconds = [case.seconds(cuts, cohorts > 1) for cuts in plans]
        distance = min(seconds)[1] - min(busiest for _, busiest in seconds)
        assert best <= round_s(found) <= best + cohorts * distance / 100
        under = search.best_round(case.batch, case.kv_tokens, cohorts, best * 1.01 + cohorts * distance)
        assert under == found


@settings(max_examples=80)
@given(case=cases(most_layers=6), required=st.sets(st.integers(0, 3), max_size=3))
def test_required_devices_are_used(case: Case, required: set[int]) -> None:
    wanted = frozenset(required & set(range(len(case.profiles))))
    plans = [cuts for cuts in case.all_plans() if wanted <= {cut.device for cut in cuts}]
    found = case.search(wanted).best(case.batch, case.kv_tokens, "latency")
    assert (found is None) == (not plans)
    if found is not None:
        assert wanted <= {cut.device for cut in found}
        assert case.value(found, "latency") == min(case.value(cuts, "latency") for cuts in plans)


@settings(max_examples=120)
@given(case=cases(most_layers=6), least=st.integers(0, 5), block=st.integers(1, 5))
def test_the_most_kv_tokens_fit_and_one_block_more_does_not(case: Case, least: int, block: int) -> None:
    def some_plan(tokens: int) -> bool:
        held = Case(case.costs, case.profiles, case.limits, case.links, case.batch, tokens)
        return bool(held.all_plans())

    search = case.search()
    assert search.fits(case.kv_tokens) == some_plan(case.kv_tokens)
    most = search.most_kv_tokens(least, 40, block)
    if most is None:
        assert not some_plan(-(-least // block) * block)
    else:
        assert most % block == 0 and some_plan(most)
        assert most >= 40 or sum(case.costs.kv_bytes_per_token) == 0 or not some_plan(most + block)


def check_plan(case: Case, cuts: tuple[Cut, ...]) -> None:
    assert [layer for cut in cuts for layer in range(cut.first, cut.last)] == list(range(case.costs.num_layers))
    assert len({cut.device for cut in cuts}) == len(cuts)
    assert case.fits(cuts)


def big_case(limits: tuple[int, ...], *, alike: bool = False, num_layers: int = 80) -> Case:
    costs = LayerCosts(
        embedding_bytes=2 * 10**9,
        layer_bytes=(17 * 10**8,) * num_layers,
        after_bytes=10**4,
        head_bytes=2 * 10**9,
        tied=False,
        kv_bytes_per_token=(4096,) * num_layers,
        workspace_bytes=10**8,
        head_workspace_bytes=10**8,
        layer_flops=(17 * 10**8,) * num_layers,
        head_flops=2 * 10**9,
        hidden_bytes=16384,
    )
    profiles = tuple(
        DeviceProfile(f"d{index}", (900 if alike else 300 + 100 * index) * 1e9, ((1, 5e13),), 3e-5)
        for index in range(len(limits))
    )
    links = LinkTopology(default=LinkProfile(11.6e9, 1e-5))
    return Case(costs, profiles, limits, links, Batch.decode(8, 2048), 16384)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eight_devices_and_eighty_layers(objective: Objective) -> None:
    case = big_case(tuple((16 + 4 * index) << 30 for index in range(8)))
    found = case.search().best(case.batch, case.kv_tokens, objective)
    assert found is not None
    check_plan(case, found)


def test_devices_that_are_alike_are_filled_evenly_in_the_order_given() -> None:
    case = big_case((48 << 30,) * 16, alike=True)
    found = case.search().best(case.batch, case.kv_tokens, "latency")
    assert found is not None
    check_plan(case, found)
    assert [cut.device for cut in found] == [0, 1, 2]
    assert max(cut.last - cut.first for cut in found) - min(cut.last - cut.first for cut in found) <= 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fourteen_devices_that_differ(objective: Objective) -> None:
    case = big_case(tuple((16 + index) << 30 for index in range(14)))
    for required in (frozenset[int](), frozenset({0, 1, 13})):
        found = case.search(required).best(case.batch, case.kv_tokens, objective)
        assert found is not None
        check_plan(case, found)
        assert required <= {cut.device for cut in found}


def test_what_cannot_be_searched_is_refused() -> None:
    case = big_case((1 << 30,))
    assert case.search().best(case.batch, case.kv_tokens, "latency") is None
    assert not case.search().fits(10**30)
    bare = LayerCosts(1, (1, 1), 1, 1, False, (1, 1))
    with pytest.raises(ValueError, match="layer_flops"):
        replace(case, costs=bare).search()


def test_more_required_devices_than_layers_is_no_plan() -> None:
    case = big_case((100 << 30,) * 3, num_layers=2)
    assert case.search(frozenset({0, 1, 2})).best(case.batch, 16, "latency") is None
    assert case.search(frozenset({0, 1, 2})).best(case.batch, 16, "throughput") is None
