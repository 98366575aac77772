"""Which tokens may come next in the sequences of a step, found while the step is computed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from core.grammars.compiler import GrammarError, Grammars

if TYPE_CHECKING:
    import llguidance

Bits = npt.NDArray[np.uint8]
"""uint8 `[ceil(vocabulary / 8)]`, lowest bit first; 1: the token may come."""


@dataclass(eq=False, slots=True)
class GrammarState:
    """Where a sequence is in its grammar: behind its first `num_taken` output tokens. The matcher is the mask thread's,
    all else that of whoever tells a stage of steps."""

    grammar: str
    num_taken: int = 0
    matcher: llguidance.LLMatcher | None = None


@dataclass(frozen=True, slots=True)
class MaskOrder:
    """The mask that a sequence needs: `fresh` are its tokens since the last one; tokens of `held` may come only where
    nothing else may."""

    seq_id: int
    state: GrammarState
    fresh: Sequence[int]
    held: Sequence[int] = ()


Masks = dict[int, "Bits | str"]
"""By sequence; a text says why there is none."""


class MaskMaker:
    """Makes masks in a thread of its own, so that they are there when the logits are. The thread exists from the first
    order to `close`. Without `beside`, whoever begins a step makes them: where kernels have all cores, a thread more
    takes one from them, and may hold Python's lock while it waits for one."""

    def __init__(self, grammars: Grammars, vocab_size: int, *, beside: bool = True) -> None:
        self._grammars = grammars
        self._beside = beside
        self._num_bytes = -(-vocab_size // 8)
        self._thread: ThreadPoolExecutor | None = None

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._grammars.vocabulary.ends

    def begin(self, orders: Sequence[MaskOrder]) -> Future[Masks]:
        """The masks of one step. Steps are begun in their order."""
        if not self._beside:
            made: Future[Masks] = Future()
            made.set_result(self._masks(orders))
            return made
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="vrm-masks")
        return self._thread.submit(self._masks, orders)

    def _masks(self, orders: Sequence[MaskOrder]) -> Masks:
        return {order.seq_id: self._mask(order) for order in orders}

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _mask(self, order: MaskOrder) -> Bits | str:
        try:
            return self._found(order)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's is none
                raise
            return f"The answer cannot keep to its grammar: {error!r}"

    def _found(self, order: MaskOrder) -> Bits | str:
        state = order.state
        try:
            if state.matcher is None:
                state.matcher = self._grammars.matcher(state.grammar)
        except GrammarError as error:
            return f"The grammar cannot be compiled: {error}"
        matcher = state.matcher
        if order.fresh:
            matcher.consume_tokens(list(order.fresh))
        found = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            return f"The answer cannot keep to its grammar any longer: {matcher.get_error()}"
        bits: Bits = np.zeros(self._num_bytes, dtype=np.uint8)
        size = min(len(bits), len(found))
        bits[:size] = found[:size]
        if matcher.is_stopped():
            _set(bits, self.ends)
        if not bits.any():
            return "The grammar leaves no token that the model has."
        if order.held:
            free: Bits = bits.copy()
            for token_id in order.held:
                if token_id >> 3 < len(free):
                    free[token_id >> 3] &= ~np.uint8(1 << (token_id & 7))
            if free.any():
                return free
        return bits


def _set(bits: Bits, token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        if token_id >> 3 < len(bits):
            bits[token_id >> 3] |= np.uint8(1 << (token_id & 7))
