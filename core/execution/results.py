"""What the last stage makes of its output: sampled tokens, log-probabilities of prompts, or the numbers themselves.

Sampler state is a function of what the stage was told of a sequence (tokens, parameters, seed), so another stage that
is told the same samples the same. That goes for grammars, too: their masks are made here, beside the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from core.errors import StepFailedError
from core.execution.known_sequences import PackedStep, SampledRow
from core.execution.records import StepOutput
from core.execution.sampler import NonFiniteLogitsError, Sampler, SamplingRow, prompt_logprobs

if TYPE_CHECKING:
    from core.execution.sampling.masks import Bits, StepMasks
    from core.grammars.compiler import Grammars


class ResultMaker:
    """The last stage's. `make` is called by one thread at a time, in the order of the steps. `grammars` are those of
    the model; without them, sequences that have one fail."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.sampler = Sampler(vocab_size, device)
        self.grammars: Grammars | None = None
        self._vocab_size, self._device = vocab_size, torch.device(device)
        self._masks: StepMasks | None = None  # made for the first sequence that has a grammar

    def begin(self, step: PackedStep) -> None:
        """A step is told, in the order of steps and by one thread: masks that it needs are begun."""
        if self.grammars is not None and any(row.sequence.params.grammar is not None for row in step.sampled):
            if self._masks is None:
                from core.execution.sampling.masks import StepMasks

                self._masks = StepMasks(self.grammars, self._vocab_size, beside=self._device.type != "cpu")
            self._masks.begin(step)

    def close(self) -> None:
        """End what `begin` has begun."""
        if self._masks is not None:
            self._masks.close()
            self._masks = None

    @torch.inference_mode()
    def make(self, step: PackedStep, output: torch.Tensor) -> StepOutput:
        """`output` is `[R, vocab]` logits of the step's `logit_rows`, or `[T, hidden_size]`."""
        self.sampler.forget(step.ended)
        result = StepOutput(step.step)
        if step.raw is not None:
            wanted = output if step.raw == "logits" else output[torch.from_numpy(step.logit_rows).to(output.device)]
            result.raw = wanted.float().cpu().numpy()
            return result
        for rows in step.prompts:
            logits = output[rows.first : rows.first + len(rows.targets)]
            targets, top = torch.tensor(rows.targets, device=logits.device), rows.sequence.params.prompt_logprobs or 0
            try:
                result.prompt_logprobs[rows.sequence.seq_id] = prompt_logprobs(logits, targets, top)
            except StepFailedError as error:
                result.failed[rows.sequence.seq_id] = error.message
        masks = self._masks.of(step, result.failed) if self._masks is not None else {}
        for row in step.sampled:
            if row.sequence.params.grammar is not None and row.sequence.seq_id not in (masks | result.failed):
                result.failed[row.sequence.seq_id] = "This stage has no vocabulary to keep to a grammar with."
        try:
            self._sample(output, step.sampled, masks, result)
        except NonFiniteLogitsError as error:  # those sequences fail alone, and the others are sampled without them
            result.failed.update(dict.fromkeys(error.seq_ids, error.message))
            self._sample(output, step.sampled, masks, result)
        return result

    def _sample(
        self, logits: torch.Tensor, rows: Sequence[SampledRow], masks: Mapping[int, Bits], result: StepOutput
    ) -> None:
        """Sample the rows of sequences that have not failed."""
        sampled = [row for row in rows if row.sequence.seq_id not in result.failed]
        if not sampled:
            return
        indices = [row.logits for row in sampled]
        if indices != list(range(len(logits))):
            logits = logits[torch.tensor(indices, device=logits.device)]
        tokens = self.sampler.sample(logits, [_sampling_row(row, masks) for row in sampled])
        result.sampled.update((row.sequence.seq_id, token) for row, token in zip(sampled, tokens, strict=True))


def _sampling_row(row: SampledRow, masks: Mapping[int, Bits]) -> SamplingRow:
    known = row.sequence
    mask = masks.get(known.seq_id) if masks else None
    return SamplingRow(
        seq_id=known.seq_id,
        params=known.params,
        seed=known.seed,
        position=row.position,
        prompt_token_ids=known.prompt_token_ids,
        output_token_ids=known.output_token_ids,
        suppress_token_ids=known.suppress_token_ids if mask is None else (),  # the mask has left them out
        mask=mask,
    )
