"""A model's name and the replicas that answer for it: which of them a request goes to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from core.routing.affinity import EXPECTED_OUTPUT_TOKENS, candidates, choose
from core.routing.prefix_index import PrefixIndex
from core.upstreams.prompt import BLOCK_TOKENS, Prompt
from core.upstreams.replica import Replica, ReplicaView, Reported

INDEXED_BLOCKS = 16384
"""Of each replica: half a million tokens."""


@dataclass(frozen=True, slots=True)
class GroupView:
    """A model that other servers answer for, at one moment. `available`: at least one of them would be asked now."""

    name: str
    available: bool
    replicas: tuple[ReplicaView, ...]


class Group:
    """Thread-safe. `own` says how loaded our own model is; None: it cannot serve now."""

    def __init__(self, name: str, replicas: Sequence[Replica], own: Callable[[], Reported | None]) -> None:
        self.name = name
        self.replicas = tuple(replicas)
        self.moved = 0
        """Requests that went on at another replica after a failure."""
        self._own = own
        self._lock = threading.Lock()
        self._index = PrefixIndex()
        self._draws = itertools.count()
        for replica in self.replicas:
            self._index.set_capacity(replica.name, INDEXED_BLOCKS)

    @property
    def has_self(self) -> bool:
        return any(replica.is_self for replica in self.replicas)

    def order(self, prompt: Prompt, without: Sequence[Replica] = ()) -> Iterator[tuple[Replica, int]]:
        """Replicas in the order in which to ask them, each with the prompt's tokens that are probably cached there.

        First those that were reachable, by `core.routing.affinity.choose`; those with an open breaker come last, and
        say themselves that they are not asked.
        """
        own = self._own()
        with self._lock:
            matched = self._index.matches(prompt.hashes)
        cached = {name: blocks * BLOCK_TOKENS for name, blocks in matched.items()}
        left = [replica for replica in self.replicas if replica not in without]
        named = set(candidates([replica.name for replica in left], cached, next(self._draws)))
        ranks: list[list[Replica]] = [[], [], []]
        for replica in left:
            usable = replica.breaker.admits() and (own is not None or not replica.is_self)
            doubtful = replica.reachable is False or replica.name not in named
            ranks[2 if not usable else int(doubtful)].append(replica)
        for rank in ranks:
            loads = {replica.name: (replica, replica.load(own)) for replica in rank}
            while loads:
                output = prompt.output_tokens or EXPECTED_OUTPUT_TOKENS
                best = choose([load for _, load in loads.values()], prompt.tokens, cached, output)
                if best is None:
                    break
                yield loads.pop(best.name)[0], min(prompt.tokens, cached.get(best.name, 0))

    def routed(self, replica: Replica, prompt: Prompt) -> None:
        """The replica computes the prompt, and will have its prefix."""
        with self._lock:
            self._index.record(replica.name, prompt.hashes)

    def lost(self, replica: Replica, *, busy: bool) -> None:
        """It failed to answer. Unless it is only `busy`, what it had cached is probably gone."""
        with self._lock:
            if not busy:
                self._index.forget(replica.name)
                self._index.set_capacity(replica.name, INDEXED_BLOCKS)
            self.moved += 1

    def available(self) -> bool:
        own = self._own()
        return any(
            replica.breaker.admits() and (own is not None if replica.is_self else replica.reachable is not False)
            for replica in self.replicas
        )

    def view(self) -> GroupView:
        return GroupView(self.name, self.available(), tuple(replica.view() for replica in self.replicas))
