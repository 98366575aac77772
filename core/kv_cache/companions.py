"""Who looks after blocks beside the manager, and what it has to know of them. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol


class Companion(Protocol):
    """Something that looks after pages beside the manager: lent memory, tiers below. In the engine thread."""

    @property
    def is_idle(self) -> bool:
        """Whether an engine without work need not look in."""
        return True

    @property
    def wants_stop(self) -> bool:
        """Whether pages have to move before the next step computes."""
        return False

    def tick(self, waiting_blocks: int) -> None:
        """Between two steps; `waiting_blocks` are certain to be needed next."""
        return

    def step_taken(self, step: int) -> None:
        """What was gathered so far is part of this step."""

    def step_done(self, step: int, moved: bool) -> None:
        """This step, and all before it, have passed every stage; not `moved`: its pages were not all moved."""

    def check_invariants(self) -> None: ...


class Tiers(Companion, Protocol):
    """Where blocks go that leave the devices (`core.tiers.kv_tiers`)."""

    def save(self, block: int, digest: bytes, parent: bytes | None) -> None: ...

    def reused(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None: ...

    def prefetch(self, seq_id: int, known: int, hashes: Sequence[bytes], on_done: Callable[[], Any]) -> bool: ...

    def take(self, seq_id: int, known: int) -> tuple[Sequence[bytes], Any] | None: ...

    def loaded(self, loading: Any, digests: Sequence[bytes], blocks: Sequence[int]) -> None: ...

    def cancel(self, seq_id: int) -> None: ...


class Lender(Companion, Protocol):
    """Who has memory for more blocks than the stages' own pages hold (`core.lending.overflow`)."""

    def borrow(self, blocks: int) -> None:
        """Try to have room for so many blocks more."""


class Running(Protocol):
    """What is known of the sequences that run (`core.batching.running`)."""

    @property
    def prefill_token_s(self) -> float | None:
        """Seconds that a token of a prompt takes lately."""
        return None

    def cold_order(self) -> Iterable[int]:
        """Sequences whose blocks may leave their devices, those to be touched first first."""
        return ()

    def steps_left(self, seq_id: int) -> int:
        """How many steps a sequence is expected to go on for."""
        return 0


class NoneRunning(Running):
    """Nothing is known of any sequence."""
