"""Executes a `SchedulerOutput`: stages in order, activations handed on, the last stage's logits sampled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.execution.input_batch import InputBatch, build_batch
from core.execution.sampler import NonFiniteLogitsError, Sampler, SamplingRow, prompt_logprobs
from core.execution.schedule import ScheduledSequence, SchedulerOutput, StepOutput
from core.execution.stage import Stage
from core.request import TokenLogprob
from core.transfer import TransferManager


class ModelRunner:
    """Owns the stages of one loaded model. Called by the engine thread."""

    def __init__(self, stages: Sequence[Stage], transfer: TransferManager, vocab_size: int, block_size: int) -> None:
        self.stages = tuple(stages)
        self._transfer = transfer
        self._block_size = block_size
        self._sampler = Sampler(vocab_size, self.stages[-1].torch_device)

    def execute(self, output: SchedulerOutput) -> StepOutput:
        """One step. Raises whatever the forward pass raises; the KV of the step's tokens is then undefined."""
        self.forget(output.ended_seq_ids)
        self._copy_blocks(output.block_copies)
        batch = build_batch(output, self._block_size)
        rows = _LogitRows(output, batch)
        if not rows.indices:
            self._forward(batch, None)
            return StepOutput(output.step)
        logits = self._forward(batch, torch.tensor(rows.indices))[0]
        return self._sample(output, rows, logits)

    def hidden_states(self, output: SchedulerOutput) -> torch.Tensor:
        """Final hidden states of a step's tokens, `[T, hidden_size]`."""
        return self._forward(build_batch(output, self._block_size), None)[0]

    def logits(self, output: SchedulerOutput, rows: Sequence[int]) -> torch.Tensor:
        """Raw logits of some rows of a step's tokens, `[R, vocab]`."""
        return self._forward(build_batch(output, self._block_size), torch.tensor(rows))[0]

    def forget(self, seq_ids: Sequence[int]) -> None:
        if seq_ids:
            self._sampler.forget(seq_ids)

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        if not copies:
            return
        for stage in self.stages:
            if stage.kv is not None:
                stage.kv.copy_blocks(copies)

    def _forward(self, batch: InputBatch, logit_rows: torch.Tensor | None) -> torch.Tensor:
        hidden: torch.Tensor | None = None
        previous: Stage | None = None
        for stage in self.stages:
            if hidden is not None and previous is not None:
                hidden = self._transfer.send(hidden, previous.device, stage.device)
            rows = None if logit_rows is None else logit_rows.to(stage.torch_device)
            hidden = stage.forward(batch.to(stage.torch_device), hidden, rows)
            previous = stage
        assert hidden is not None
        return hidden

    def _sample(self, output: SchedulerOutput, rows: _LogitRows, logits: torch.Tensor) -> StepOutput:
        result = StepOutput(output.step)
        for item, first, count in rows.prompt:
            result.prompt_logprobs[item.seq_id] = self._prompt_logprobs(item, logits[first : first + count])
        if rows.sampled:
            self._sample_rows(logits, rows.sampled, result)
        return result

    def _sample_rows(
        self, logits: torch.Tensor, sampled: Sequence[tuple[ScheduledSequence, int]], result: StepOutput
    ) -> None:
        """Sample; sequences whose logits are not finite fail alone, and the others are sampled without them."""
        indices = torch.tensor([row for _, row in sampled], device=logits.device)
        try:
            tokens = self._sampler.sample(logits[indices], [_sampling_row(item) for item, _ in sampled])
        except NonFiniteLogitsError as error:
            result.failed.update(dict.fromkeys(error.seq_ids, error))
            sound = [(item, row) for item, row in sampled if item.seq_id not in result.failed]
            if sound:
                self._sample_rows(logits, sound, result)
            return
        for (item, _), token in zip(sampled, tokens, strict=True):
            result.sampled[item.seq_id] = token

    def _prompt_logprobs(self, item: ScheduledSequence, logits: torch.Tensor) -> list[TokenLogprob]:
        following = item.prompt_token_ids[item.start + 1 : item.start + 1 + logits.shape[0]]
        targets = torch.tensor(list(following), device=logits.device)
        return prompt_logprobs(logits, targets, item.params.prompt_logprobs or 0)


class _LogitRows:
    """Which rows of the packed batch need logits, and which row of the logits belongs to whom.

    `sampled` pairs a sequence with its row of the logits; `prompt` holds `(sequence, first row, number of rows)`.
    """

    def __init__(self, output: SchedulerOutput, batch: InputBatch) -> None:
        self.indices: list[int] = []
        self.sampled: list[tuple[ScheduledSequence, int]] = []
        self.prompt: list[tuple[ScheduledSequence, int, int]] = []
        for item, start in zip(output.sequences, batch.attention.host_query_start, strict=False):
            if item.prompt_logprobs:
                self._add_prompt(item, start)
            if item.sample:
                self._add_sampled(item, start + item.num_tokens - 1)

    def _add_prompt(self, item: ScheduledSequence, start: int) -> None:
        """Rows whose next token is part of the prompt."""
        count = min(item.end, len(item.prompt_token_ids) - 1) - item.start
        if count > 0:
            self.prompt.append((item, len(self.indices), count))
            self.indices.extend(range(start, start + count))

    def _add_sampled(self, item: ScheduledSequence, row: int) -> None:
        self.sampled.append((item, len(self.indices)))
        self.indices.append(row)


def _sampling_row(item: ScheduledSequence) -> SamplingRow:
    return SamplingRow(
        seq_id=item.seq_id,
        params=item.params,
        seed=item.seed,
        position=item.end,
        prompt_token_ids=item.prompt_token_ids,
        output_token_ids=item.output_token_ids,
        suppress_token_ids=item.suppress_token_ids,
    )
