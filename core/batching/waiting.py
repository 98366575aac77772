"""Sequences that hold no blocks: those in the queue, and those that join it or run once something has come."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from core.batching.sequence import Request, Sequence, SequenceStatus
from core.kv_cache.manager import KVCacheManager


class WaitingSequences:
    """The queue, by `Sequence.queue_key`; sequences whose prefix is on its way up from a tier below; and siblings that
    wait for the prompt of the first of their request. Used by the engine thread alone, but for `on_loaded`.
    """

    def __init__(self, kv: KVCacheManager) -> None:
        self.on_loaded: Callable[[int], None] = self.loaded
        self._kv = kv
        self._queue: list[tuple[tuple[int, ...], Sequence]] = []
        self._forking: list[Sequence] = []
        self._loading: dict[int, Sequence] = {}

    @property
    def first(self) -> Sequence | None:
        """The next one to be started; None if the queue is empty."""
        return self._queue[0][1] if self._queue else None

    @property
    def total(self) -> int:
        """Sequences in the queue and those that are not there yet."""
        return len(self._queue) + len(self._forking) + len(self._loading)

    def foremost(self, count: int) -> list[Sequence]:
        """At most `count` sequences of the queue, those that are served first."""
        entries = heapq.nsmallest(count, self._queue) if len(self._queue) > count else self._queue
        return [sequence for _, sequence in entries]

    def add(self, request: Request) -> None:
        """Queue a request's sequences; the second and later ones wait for the first one's prompt."""
        first, *siblings = request.sequences
        self.push(first)
        for sibling in siblings:
            self.hold(sibling)

    def hold(self, sibling: Sequence) -> None:
        """Let a sequence wait for the prompt of the first of its request."""
        sibling.status = SequenceStatus.FORKING
        self._forking.append(sibling)

    def push(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        heapq.heappush(self._queue, (sequence.queue_key, sequence))

    def pop(self) -> None:
        """The first one leaves the queue."""
        heapq.heappop(self._queue)

    def fetches(self, sequence: Sequence) -> bool:
        """Whether a sequence has to wait for its prefix to come up from a tier below; others go ahead meanwhile."""
        if sequence.prefetched or not sequence.request.reads_prefix:
            return False
        sequence.prefetched, seq_id = True, sequence.seq_id
        if not self._kv.prefetch(seq_id, sequence.token_ids, lambda: self.on_loaded(seq_id), sequence.chain):
            return False
        sequence.status = SequenceStatus.LOADING
        self._loading[seq_id] = sequence
        return True

    def loaded(self, seq_id: int) -> None:
        """What a sequence was waiting for is in main memory."""
        sequence = self._loading.pop(seq_id, None)
        if sequence is not None:
            self.push(sequence)

    def take_siblings(self, sequence: Sequence) -> list[Sequence]:
        """Those that waited for this sequence's prompt, and do no longer."""
        siblings = [s for s in self._forking if s.request is sequence.request] if sequence.index == 0 else []
        for sibling in siblings:
            self._forking.remove(sibling)
        return siblings

    def release_siblings(self, sequence: Sequence) -> None:
        """Siblings that still wait for this sequence's prompt must compute it themselves."""
        for sibling in self.take_siblings(sequence):
            self.push(sibling)

    def remove(self, sequence: Sequence, was: SequenceStatus) -> None:
        """A sequence that `was` waiting in one way or another has ended."""
        if was is SequenceStatus.FORKING:
            self._forking.remove(sequence)
            return
        if was is SequenceStatus.LOADING:
            del self._loading[sequence.seq_id]
        else:
            self._queue = [entry for entry in self._queue if entry[1] is not sequence]
            heapq.heapify(self._queue)
        self._kv.forget_prefetch(sequence.seq_id)
        self.release_siblings(sequence)

    def __iter__(self) -> Iterator[Sequence]:
        yield from (sequence for _, sequence in self._queue)
        yield from self._forking
        yield from self._loading.values()
