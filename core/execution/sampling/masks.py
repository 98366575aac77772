"""Masks of the sequences in a step that keep to a grammar, and their use on logits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.execution.known_sequences import PackedStep, SampledRow
from core.grammars.compiler import Grammars
from core.grammars.matching import Bits, GrammarState, MaskMaker, MaskOrder, Masks

if TYPE_CHECKING:
    from core.execution.sampler import SamplingRow

__all__ = ["Bits", "StepMasks", "apply_masks"]


class StepMasks:
    """Those of the last stage's steps. `begin` is called by whoever tells the stage of steps, `of` by whoever samples.

    Steps that fail are begun and never sampled; what they leave goes with the next step that is.
    """

    def __init__(self, grammars: Grammars, vocab_size: int) -> None:
        self._maker = MaskMaker(grammars, vocab_size)
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


def apply_masks(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Put -inf in place of what the rows' masks forbid, in float32 `logits` `[R, V]` of their own."""
    masked = [index for index, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return
    packed = torch.from_numpy(np.stack([mask for row in rows if (mask := row.mask) is not None])).to(logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed[:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]].bool()
    if len(masked) == len(rows):
        logits.masked_fill_(~allowed, -torch.inf)
    else:
        logits[masked] = logits[masked].masked_fill_(~allowed, -torch.inf)
