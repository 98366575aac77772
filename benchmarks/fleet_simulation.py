"""The events of `benchmarks.fleet`: requests, rounds of replicas, machines that leave, slow down and come back.

A machine that leaves stops its replica at once; it is noticed `SILENCE_S` later, as a watched link notices it. Then the
nodes that are left are placed anew, and what moved is read from disk before that replica serves again. With replay the
requests go on from their tokens, wherever they are expected to end first; without, they begin anew.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.fleet_server import Call, Gaps, Server, Speeds
from benchmarks.fleet_world import BLOCK_TOKENS, SLOW_FACTOR, Happening, Session
from core.network.watch import SILENCE_S
from core.placement.replicas import FleetNode, Partition, Replica, ReplicaRates, mend
from core.routing.affinity import ReplicaLoad, candidates, choose
from core.routing.prefix_index import PrefixIndex
from core.routing.recovery import Interrupted, spread

DISK_BYTES_S = 1.5e9
"""At which layers that moved are read: assumed, an NVMe drive's half."""
PATIENCE_S = 180.0
"""After the last request has come, the simulation waits so long for answers."""


@dataclass(frozen=True, slots=True)
class Variant:
    """`routing`: "prefix" (and load), "load" alone, "sticky" (by session, as plain balancers hash a header) or "round
    robin"."""

    routing: str
    replays: bool

    @property
    def name(self) -> str:
        return f"{self.routing}, {'replay' if self.replays else 'anew'}"


VARIANTS = (
    Variant("prefix", True), Variant("load", True), Variant("sticky", True), Variant("round robin", True),
    Variant("prefix", False), Variant("round robin", False),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one variant.

    `within`: share of requests with a first token in time and a mean gap below the objective; `goodput_tok_s`: their
    tokens. `lost_share`: of all tokens computed, those whose KV was lost with a machine. `anew`: requests that clients
    had to send again. `unanswered`: of those that came, at the end.
    """

    variant: str
    requests: int
    within: float
    goodput_tok_s: float
    output_tok_s: float
    gap_p50_s: float
    gap_p99_s: float
    ttft_p99_s: float
    longest_pause_s: float
    lost_tokens: int
    lost_share: float
    anew: int
    hit_rate: float
    unanswered: int
    wall_s: float


class Simulation:
    """One variant on one fleet. `objectives`: seconds to the first token, and mean seconds between tokens."""

    def __init__(
        self, fleet: Sequence[FleetNode], planned: Partition, rates: ReplicaRates, variant: Variant,
        objectives: tuple[float, float], seed: int,
    ) -> None:  # fmt: skip
        self._fleet = {node.name: node for node in fleet}
        self._away: set[str] = set()
        self._slow: dict[str, int] = {}
        self._rates, self._variant, self._objectives, self._seed = rates, variant, objectives, seed
        self._events: list[tuple[float, int, str, Any]] = []
        self._order = 0
        self._calls: list[Call] = []
        self._homeless: list[Call] = []
        self._lost: dict[str, list[Call]] = {}  # by server, until it is noticed
        self._told: dict[str, ReplicaLoad] = {}
        self._lost_tokens = 0
        self._index, self._gaps = PrefixIndex(), Gaps()
        self._speeds: dict[Hashable, Speeds] = {}
        self._partition = planned
        self._servers: dict[str, Server] = {}
        self._all: list[Server] = []
        self._names: list[str] = []
        self._turn = 0
        for replica in planned.replicas:
            self._serve(replica, 0.0)

    def run(self, sessions: Sequence[Session], happenings: Sequence[Happening], seconds: float) -> Outcome:
        """Simulate, and sum up."""
        began = time.perf_counter()
        for session in sessions:
            self._at(session.at_s, "ask", (session, 0))
        for happening in happenings:
            self._at(happening.at_s, happening.what, happening.node)
        while self._events:
            now, _, what, subject = heapq.heappop(self._events)
            if now > seconds + PATIENCE_S:
                break
            if what == "server":
                if subject.wake_s == now:
                    self._advance(subject, now, seconds)
            elif what == "ask":
                session, turn = subject
                self._ask(session, turn, now)
            elif what == "noticed":
                self._noticed(now)
            else:
                self._happen(what, subject, now)
        return self._outcome(seconds, time.perf_counter() - began)

    def _at(self, at_s: float, what: str, subject: object) -> None:
        self._order += 1
        heapq.heappush(self._events, (at_s, self._order, what, subject))

    def _wake(self, server: Server) -> None:
        if math.isfinite(server.wake_s):
            self._at(server.wake_s, "server", server)

    # -- requests ---------------------------------------------------------------------------------------------------

    def _ask(self, session: Session, turn: int, now: float) -> None:
        prompt, answer = session.prompt_tokens(turn), session.turns[turn].answer
        call = Call(session, turn, len(self._calls), now, prompt, answer)
        self._calls.append(call)
        self._route(call, now)

    def _advance(self, server: Server, now: float, seconds: float) -> None:
        for call in server.advance(now):
            if server.name in self._servers:
                self._index.record(server.name, call.hashes())
            following = call.turn + 1
            if following < len(call.session.turns):
                at_s = now + call.session.turns[following].think_s
                if at_s < seconds:
                    self._at(at_s, "ask", (call.session, following))
        self._wake(server)

    def _route(self, call: Call, now: float) -> None:
        if not self._names:
            self._homeless.append(call)
            return
        cached = self._cached(call) if self._variant.routing == "prefix" else {}
        self._send(call, self._chosen(call, cached, now), now)

    def _chosen(self, call: Call, cached: dict[str, int], now: float) -> str:
        if self._variant.routing == "round robin":
            self._turn += 1
            return self._names[self._turn % len(self._names)]
        if self._variant.routing == "sticky":
            return max(self._names, key=lambda name: _weight(call.session.number, name))
        names = candidates(self._names, cached, call.arrival * 7919 + self._seed)
        found = choose([self._load(self._servers[name], now) for name in names], call.context, cached)
        assert found is not None
        return found.name

    def _send(self, call: Call, name: str, now: float, *, first: bool = False) -> None:
        server = self._servers[name]
        self._index.record(name, call.hashes())
        server.submit(call, now, first=first)
        self._wake(server)

    def _cached(self, call: Call) -> dict[str, int]:
        return {name: blocks * BLOCK_TOKENS for name, blocks in self._index.matches(call.hashes()).items()}

    def _load(self, server: Server, now: float) -> ReplicaLoad:
        """What is not ready yet counts as so many tokens that wait."""
        load = self._told.get(server.name) or server.load()
        until_s = max(0.0, server.ready_s - now)
        if not until_s or server.name in self._told:
            return load
        waiting = load.waiting_tokens + int(until_s * load.prefill_tok_s)
        return ReplicaLoad(load.name, waiting, load.prefill_tok_s, load.streams, load.max_streams, load.token_s)

    # -- machines ---------------------------------------------------------------------------------------------------

    def _happen(self, what: str, node: str, now: float) -> None:
        if what in ("slows", "recovers"):
            self._slow[node] = SLOW_FACTOR if what == "slows" else 1
            for server in self._servers.values():
                if node in server.replica.nodes:
                    server.speeds = self._speeds_of(server.replica)
            return
        if what == "comes":
            self._away.discard(node)
            self._mend(now)
            return
        self._away.add(node)
        for server in [each for each in self._servers.values() if node in each.replica.nodes]:
            self._stop(server, now)
        self._at(now + SILENCE_S, "noticed", None)

    def _stop(self, server: Server, now: float) -> None:
        """Its machines say nothing any more; nobody knows yet, and requests still go there."""
        self._told[server.name] = server.load()  # what routers were told last
        self._lost_tokens += server.computed_tokens
        self._lost.setdefault(server.name, []).extend(server.abandon(now))
        server.ready_s = math.inf

    def _noticed(self, now: float) -> None:
        lost: list[Call] = []
        for name in list(self._lost):
            server = self._servers.pop(name)
            self._names.remove(name)
            del self._told[name]
            self._index.forget(name)
            lost += [*self._lost.pop(name), *server.waiting]
            server.waiting.clear()
            server.wake_s = math.inf
        self._mend(now)
        self._resume(lost, now)

    def _resume(self, lost: Sequence[Call], now: float) -> None:
        """Lost requests go where they end first, the shortest first; or begin anew, as clients send them again."""
        if not self._variant.replays:
            for call in lost:
                if call.emitted or call.first_s is not None:
                    call.attempts += 1
                    call.emitted, call.first_s, call.last_s = 0, None, 0.0
                self._route(call, now)
            return
        by_id = {str(call.arrival): call for call in lost}
        interrupted = [
            Interrupted(number, 0, call.arrival, call.context, call.answer - call.emitted, self._cached(call))
            for number, call in by_id.items()
        ]
        loads = [self._load(server, now) for server in self._servers.values()]
        chosen = spread(interrupted, loads)
        self._homeless += [call for number, call in by_id.items() if number not in chosen]
        for number in reversed(chosen):  # the shortest is put in front last, and so served first
            self._send(by_id[number], chosen[number], now, first=True)

    def _mend(self, now: float) -> None:
        """Place what is here anew where that is needed. Servers that were lost and are not noticed yet stay."""
        here = [node for name, node in self._fleet.items() if name not in self._away]
        unnoticed = {name for server in self._lost for name in self._servers[server].replica.nodes}
        kept = [node for node in here if node.name not in unnoticed]
        before = self._partition
        self._partition = mend(kept, before, self._rates)
        old = {replica.nodes for replica in before.replicas}
        for replica in self._partition.replicas:
            if replica.nodes not in old:
                self._serve(replica, now + _load_s(replica, before))
        if self._names:
            homeless, self._homeless = self._homeless, []
            for call in homeless:
                self._route(call, now)

    def _serve(self, replica: Replica, ready_s: float) -> None:
        name = f"r{len(self._all)}"
        server = Server(name, replica, self._speeds_of(replica), self._gaps, ready_s)
        self._servers[name] = server
        self._names.append(name)
        self._all.append(server)
        self._index.set_capacity(name, replica.plan.kv_tokens // BLOCK_TOKENS)

    def _speeds_of(self, replica: Replica) -> Speeds:
        at = {device.name: device for device in replica.problem.devices}
        slow = tuple(self._slow.get(stage.device_name.partition("/")[0], 1) for stage in replica.plan.stages)
        key = tuple(
            (stage.first_layer, at[stage.device_name].profile.bandwidth_bytes_s, stage.limit_bytes, factor)
            for stage, factor in zip(replica.plan.stages, slow, strict=True)
        )
        if key not in self._speeds:
            self._speeds[key] = Speeds(replica, slow)
        return self._speeds[key]

    # -- the sum ----------------------------------------------------------------------------------------------------

    def _outcome(self, seconds: float, wall_s: float) -> Outcome:
        first_s, gap_s = self._objectives
        done = [call for call in self._calls if call.emitted == call.answer and call.first_s is not None]
        good = [
            call for call in done
            if (call.first_s or 0.0) - call.submitted_s <= first_s
            and (call.last_s - (call.first_s or 0.0)) / max(1, call.answer - 1) <= gap_s
        ]  # fmt: skip
        waits = sorted((call.first_s or math.inf) - call.submitted_s for call in self._calls)
        prompts = sum(server.prompt_tokens for server in self._all)
        reused = sum(server.reused_tokens for server in self._all)
        output = sum(call.answer for call in done)
        return Outcome(
            variant=self._variant.name,
            requests=len(self._calls),
            within=len(good) / max(1, len(self._calls)),
            goodput_tok_s=sum(call.answer for call in good) / seconds,
            output_tok_s=output / seconds,
            gap_p50_s=self._gaps.quantile(0.5),
            gap_p99_s=self._gaps.quantile(0.99),
            ttft_p99_s=waits[int(0.99 * (len(waits) - 1))] if waits else math.nan,
            longest_pause_s=self._gaps.quantile(1.0),
            lost_tokens=int(self._lost_tokens),
            lost_share=self._lost_tokens / max(1, prompts - reused + output),
            anew=sum(call.attempts > 1 for call in self._calls),
            hit_rate=reused / max(1, prompts),
            unanswered=len(self._calls) - len(done),
            wall_s=wall_s,
        )


def _weight(session: int, name: str) -> bytes:
    """Rendezvous hashing: most sessions stay where they are when servers come and go."""
    return hashlib.blake2b(f"{session}/{name}".encode(), digest_size=8).digest()


def _load_s(replica: Replica, before: Partition) -> float:
    """Seconds to read the layers that a device did not have; devices read side by side."""
    held = {stage.device_name: stage for each in before.replicas for stage in each.plan.stages}
    longest = 0.0
    for stage in replica.plan.stages:
        old = held.get(stage.device_name)
        kept = (
            0
            if old is None
            else max(0, min(stage.last_layer, old.last_layer) - max(stage.first_layer, old.first_layer))
        )
        fresh = stage.weight_bytes * (1 - kept / stage.num_layers)
        longest = max(longest, fresh / DISK_BYTES_S)
    return longest
