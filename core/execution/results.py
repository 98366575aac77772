"""What the last stage makes of its output: sampled tokens, log-probabilities of prompts, or the numbers themselves.

Sampler state is a function of what the stage was told of a sequence (tokens, parameters, seed), so another stage that
is told the same samples the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.errors import StepFailedError
from core.execution.known_sequences import PackedStep, SampledRow
from core.execution.records import StepOutput
from core.execution.sampler import NonFiniteLogitsError, Sampler, SamplingRow, prompt_logprobs


class ResultMaker:
    """The last stage's. Used by one thread at a time, in the order of the steps."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.sampler = Sampler(vocab_size, device)

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
        try:
            self._sample(output, step.sampled, result)
        except NonFiniteLogitsError as error:  # those sequences fail alone, and the others are sampled without them
            result.failed.update(dict.fromkeys(error.seq_ids, error.message))
            self._sample(output, step.sampled, result)
        return result

    def _sample(self, logits: torch.Tensor, rows: Sequence[SampledRow], result: StepOutput) -> None:
        """Sample the rows of sequences that have not failed."""
        sampled = [row for row in rows if row.sequence.seq_id not in result.failed]
        if not sampled:
            return
        indices = [row.logits for row in sampled]
        if indices != list(range(len(logits))):
            logits = logits[torch.tensor(indices, device=logits.device)]
        tokens = self.sampler.sample(logits, [_sampling_row(row) for row in sampled])
        result.sampled.update((row.sequence.seq_id, token) for row, token in zip(sampled, tokens, strict=True))


def _sampling_row(row: SampledRow) -> SamplingRow:
    known = row.sequence
    return SamplingRow(
        seq_id=known.seq_id,
        params=known.params,
        seed=known.seed,
        position=row.position,
        prompt_token_ids=known.prompt_token_ids,
        output_token_ids=known.output_token_ids,
        suppress_token_ids=known.suppress_token_ids,
    )
