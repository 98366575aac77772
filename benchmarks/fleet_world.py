"""What `benchmarks.fleet` simulates: a fleet of mixed machines, what happens to them, what users ask. All seeded."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from core.costs.cards import card
from core.costs.model import ModelBytes, Workspace, costs_of
from core.costs.plan import LayerCosts, PlacementProblem
from core.costs.profile import LinkProfile, LinkTopology
from core.costs.room import usable
from core.placement.replicas import FleetNode

BLOCK_TOKENS = 128
"""Tokens that a hash of the simulation stands for; a server's blocks are smaller."""
CONTEXT = 4096
"""Tokens of a stream that replicas are planned for."""
MOST_STREAMS = 64

CARDS = (
    ("RTX 3060", 20), ("RTX 3090", 15), ("RTX 4090", 10), ("RTX 4060 Ti 16GB", 12), ("RTX 4070 Ti Super", 8),
    ("RTX 3080 10GB", 8), ("RTX 2080 Ti", 7), ("GTX 1080 Ti", 5), ("RTX 4060", 10), ("RTX 5090", 3), ("A100 80GB", 2),
)  # fmt: skip
"""Cards and how often a machine has them: assumed, after what people own."""
SLOW_FACTOR = 3
"""How many times longer everything takes on a machine that has slowed down."""
BETWEEN = LinkProfile(1.1e9, 250e-6, "tcp", "assumed")
"""10 Gbit/s Ethernet within a site, as TCP reaches it."""


def model_8b() -> LayerCosts:
    """A Llama-3-shaped model of 8 billion parameters in bf16: 32 layers of width 4,096, 8 KV heads of 128."""
    hidden, ffn, vocab, layers, kv = 4096, 14336, 128256, 32, 1024
    per_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + 2 * hidden
    head = vocab * hidden
    weights = ModelBytes(
        embedding=2 * head, layers=(2 * per_layer,) * layers, after=2 * hidden, head=2 * head, tied=False,
        num_parameters=layers * per_layer + 2 * head, layer_parameters=(per_layer,) * layers, head_parameters=head,
    )  # fmt: skip
    return costs_of(weights, Workspace(300 << 20, 300 << 20), (4 * kv,) * layers, hidden, 2)


def problem_of(costs: LayerCosts) -> PlacementProblem:
    """What each replica is planned for; its devices are not part of it."""
    nobody = replace(card("RTX 3090"), name="nobody")
    return PlacementProblem(
        "8B", costs, (nobody,), LinkTopology(default=BETWEEN), objective="throughput", streams=MOST_STREAMS,
        context=CONTEXT, min_kv_tokens=4 * CONTEXT, max_kv_tokens=MOST_STREAMS * CONTEXT,
    )  # fmt: skip


def make_fleet(number: int, dice: random.Random) -> tuple[FleetNode, ...]:
    """Machines with one card or two of a kind, at sites of 8 to 24."""
    names, weights = zip(*CARDS, strict=True)
    nodes: list[FleetNode] = []
    site, room = 0, dice.randint(8, 24)
    for index in range(number):
        if room == 0:
            site, room = site + 1, dice.randint(8, 24)
        room -= 1
        found = usable(card(dice.choices(names, weights)[0]))
        count = 2 if dice.random() < 0.15 else 1
        devices = tuple(replace(found, name=f"n{index}/{place}") for place in range(count))
        nodes.append(FleetNode(f"n{index}", f"s{site}", devices))
    return tuple(nodes)


@dataclass(frozen=True, slots=True)
class Churn:
    """How often a machine leaves without a word or slows down, in times per hour, and for how long (means, seconds)."""

    leaves_per_h: float = 1.0
    away_s: float = 240.0
    slows_per_h: float = 0.4
    slow_s: float = 90.0


@dataclass(frozen=True, slots=True)
class Happening:
    """At `at_s` a node `leaves`, `comes`, `slows` or `recovers`."""

    at_s: float
    what: str
    node: str


def make_churn(nodes: tuple[FleetNode, ...], churn: Churn, seconds: float, dice: random.Random) -> list[Happening]:
    """All happenings in order; a node's own ones alternate."""
    found: list[Happening] = []
    for node in nodes:
        for per_h, mean_s, begins, ends in (
            (churn.leaves_per_h, churn.away_s, "leaves", "comes"),
            (churn.slows_per_h, churn.slow_s, "slows", "recovers"),
        ):
            at_s = 0.0
            while per_h > 0:
                at_s += dice.expovariate(per_h / 3600)
                if at_s >= seconds:
                    break
                found.append(Happening(at_s, begins, node.name))
                at_s += dice.expovariate(1 / mean_s)
                found.append(Happening(at_s, ends, node.name))
    return sorted((each for each in found if each.at_s < seconds), key=lambda each: (each.at_s, each.node, each.what))


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's message and the answer to it, in tokens, and how long the user thinks before."""

    message: int
    answer: int
    think_s: float


@dataclass(frozen=True, slots=True)
class Session:
    """A user's conversation: begins at `at_s` with `shared` tokens of its application's system prompt."""

    number: int
    at_s: float
    application: int
    shared: int
    turns: tuple[Turn, ...]

    def prompt_tokens(self, turn: int) -> int:
        """Everything before the answer of a turn."""
        before = sum(each.message + each.answer for each in self.turns[:turn])
        return self.shared + before + self.turns[turn].message

    def hashes(self, tokens: int) -> list[tuple[str, int, int]]:
        """Of the full blocks of its first `tokens` tokens: those of the system prompt are shared with others."""
        common = self.shared // BLOCK_TOKENS
        return [
            ("app", self.application, index) if index < common else ("own", self.number, index)
            for index in range(tokens // BLOCK_TOKENS)
        ]


def _tokens(dice: random.Random, median: float, sigma: float, most: int) -> int:
    return max(8, min(most, round(dice.lognormvariate(0.0, sigma) * median)))


def make_sessions(per_s: float, seconds: float, dice: random.Random) -> list[Session]:
    """Sessions that begin within `seconds`, `per_s` on the mean, in bursts: five times as many in a tenth of the time.

    Seven in eight are chats that come back turn by turn, the others long documents with a few questions. Lengths are
    lognormal, with medians near those of published traces of chat services.
    """
    shared = [_tokens(dice, 500, 0.8, 3000) for _ in range(24)]
    popular = [1 / (rank + 1) for rank in range(24)]
    quiet = per_s / (0.9 + 5 * 0.1)
    sessions: list[Session] = []
    at_s, burst_until, next_burst = 0.0, 0.0, dice.expovariate(1 / 180)
    while True:
        bursting = at_s < burst_until
        at_s += dice.expovariate(quiet * (5 if bursting else 1))
        if at_s >= seconds:
            return sessions
        if at_s >= next_burst:
            burst_until, next_burst = at_s + 20, at_s + 20 + dice.expovariate(1 / 180)
        application = dice.choices(range(24), popular)[0]
        document = dice.random() < 1 / 8
        count = 1 + min(3 if document else 12, int(dice.expovariate(1 / (1 if document else 3))))
        turns = []
        for index in range(count):
            message = _tokens(dice, 7000, 0.4, 16000) if document and index == 0 else _tokens(dice, 60, 1.0, 1500)
            turns.append(Turn(message, _tokens(dice, 180, 0.7, 1000), dice.expovariate(1 / 20)))
        sessions.append(Session(len(sessions), at_s, application, shared[application], tuple(turns)))
