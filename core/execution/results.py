"""What the last stage makes of its output: sampled tokens, log-probabilities of prompts, or the numbers themselves.

Sampler state is a function of what the stage was told of a sequence (tokens, parameters, seed), so another stage that
is told the same samples the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.errors import StepFailedError
from core.execution.known_sequences import PackedStep, PromptRows, SampledRow
from core.execution.records import StepOutput
from core.execution.sampler import NonFiniteLogitsError, Sampler, SamplingRow, prompt_logprobs
from core.request import TokenLogprob


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
            try:
                logits = output[rows.first : rows.first + len(rows.targets)]
                result.prompt_logprobs[rows.sequence.seq_id] = self._prompt_logprobs(rows, logits)
            except StepFailedError as error:
                result.failed[rows.sequence.seq_id] = error.message
        self._sample(output, [row for row in step.sampled if row.sequence.seq_id not in result.failed], result)
        return result

    def _sample(self, logits: torch.Tensor, sampled: Sequence[SampledRow], result: StepOutput) -> None:
        """Sample; sequences whose logits are not finite fail alone, and the others are sampled without them."""
        if not sampled:
            return
        indices = [row.logits for row in sampled]
        if indices != list(range(len(logits))):
            logits = logits[torch.tensor(indices, device=logits.device)]
        try:
            tokens = self.sampler.sample(logits, [_sampling_row(row) for row in sampled])
        except NonFiniteLogitsError as error:
            result.failed.update(dict.fromkeys(error.seq_ids, error.message))
            sound = [at for at, row in enumerate(sampled) if row.sequence.seq_id not in result.failed]
            if sound:
                kept = logits[torch.tensor(sound, device=logits.device)]
                tokens = self.sampler.sample(kept, [_sampling_row(sampled[at]) for at in sound])
                result.sampled.update(
                    (sampled[at].sequence.seq_id, token) for at, token in zip(sound, tokens, strict=True)
                )
            return
        result.sampled.update((row.sequence.seq_id, token) for row, token in zip(sampled, tokens, strict=True))

    @staticmethod
    def _prompt_logprobs(rows: PromptRows, logits: torch.Tensor) -> list[TokenLogprob]:
        targets = torch.tensor(rows.targets, device=logits.device)
        return prompt_logprobs(logits, targets, rows.sequence.params.prompt_logprobs or 0)


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
