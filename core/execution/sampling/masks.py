"""Masks of the sequences in a step that keep to a grammar, and their use on logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.execution.known_sequences import PackedStep, SampledRow
from core.grammars.compiler import Grammars
from core.grammars.matching import Bits, GrammarState, MaskMaker, MaskOrder, Masks

if TYPE_CHECKING:
    from core.execution.sampler import SamplingRow

__all__ = ["Bits", "StepMasks", "masked"]


class StepMasks:
    """Those of the last stage's steps. `begin` is called by whoever tells the stage of steps, `of` by whoever samples.

    Steps that fail are begun and never sampled; what they leave goes with the next step that is.
    """

    def __init__(self, grammars: Grammars, vocab_size: int, *, beside: bool) -> None:
        self._maker = MaskMaker(grammars, vocab_size, beside=beside)
        self._begun: dict[int, Future[Masks]] = {}

    def begin(self, step: PackedStep) -> None:
        orders = [self._order(row) for row in step.sampled if row.sequence.params.grammar is not None]
        self._begun[step.step] = self._maker.begin(orders)

    def _order(self, row: SampledRow) -> MaskOrder:
        known = row.sequence
        assert known.params.grammar is not None
        state = known.grammar_state
        if state is None:
            state = known.grammar_state = GrammarState(known.params.grammar)
        fresh = known.output_token_ids[state.num_taken :]
        state.num_taken += len(fresh)
        held = known.suppress_token_ids or (self._maker.ends if known.params.ignore_eos else ())
        return MaskOrder(known.seq_id, state, fresh, held)

    def of(self, step: PackedStep, failed: dict[int, str]) -> dict[int, Bits]:
        """Waits for the masks of a step. What cannot go on is entered among the `failed`."""
        begun = self._begun.get(step.step)
        for number in [number for number in list(self._begun) if number <= step.step]:
            del self._begun[number]
        masks: dict[int, Bits] = {}
        for seq_id, found in (begun.result() if begun is not None else {}).items():
            if isinstance(found, str):
                failed[seq_id] = found
            else:
                masks[seq_id] = found
        return masks

    def close(self) -> None:
        self._maker.close()
        self._begun.clear()


@contextmanager
def masked(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Iterator[None]:
    """Within, `logits` `[R, V]` have -inf in place of what the rows' masks forbid; afterwards they are as before. Other
    rows are neither touched nor copied, so that all of them are sampled together."""
    index = [number for number, row in enumerate(rows) if row.mask is not None]
    packed = torch.from_numpy(np.concatenate([mask for row in rows if (mask := row.mask) is not None]))
    added = torch.index_select(_ADDED.to(logits.device), 0, packed.to(logits.device, torch.int32))
    kept = []
    for number, more in zip(index, added.view(len(index), -1), strict=True):
        kept.append(logits[number].clone())
        logits[number].add_(more[: logits.shape[1]])
    try:
        yield
    finally:
        for number, row in zip(index, kept, strict=True):
            logits[number] = row


_ADDED = torch.where(
    torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")).bool(), 0.0,
    -torch.inf,
)  # fmt: skip
"""What a mask's byte adds to the logits of its eight tokens: float32 `[256, 8]`. Filling by a mask of bools takes ten
times as long."""
