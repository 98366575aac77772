"""Executes a `SchedulerOutput`: stages in order, activations handed on, the last stage's logits sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from core.execution.input_batch import InputBatch, build_batch
from core.execution.pipeline import Station, StationLine
from core.execution.sampler import NonFiniteLogitsError, Sampler, SamplingRow, prompt_logprobs
from core.execution.schedule import ScheduledSequence, SchedulerOutput, StepDone, StepOutput
from core.execution.stage import Stage
from core.execution.threads import CpuThreads
from core.request import TokenLogprob
from core.transfer import TransferManager


@dataclass(slots=True)
class _Step:
    """A step on its way through the stages. `hidden` is what the last stage so far produced."""

    output: SchedulerOutput
    batch: InputBatch
    rows: _LogitRows
    logit_rows: torch.Tensor | None
    hidden: torch.Tensor | None = None
    result: StepOutput | None = None


class ModelRunner:
    """Owns the stages of one loaded model.

    The engine thread runs a step by itself with `execute`, or puts several in flight with `submit`; then every stage
    has a thread of its own. `cpu_threads` is told which of the two it is.
    """

    def __init__(
        self, stages: Sequence[Stage], transfer: TransferManager, vocab_size: int, block_size: int,
        cpu_threads: CpuThreads | None = None, torch_threads: int | None = None,
    ) -> None:  # fmt: skip
        self.stages = tuple(stages)
        self._transfer = transfer
        self._block_size = block_size
        self._sampler = Sampler(vocab_size, self.stages[-1].torch_device)
        self._cpu_threads = cpu_threads
        self._torch_threads = torch_threads
        self._line: StationLine[_Step] | None = None

    def execute(self, output: SchedulerOutput) -> StepOutput:
        """One step, here. Raises whatever the forward pass raises; the KV of the step's tokens is then undefined.

        A step without sequences moves pages and computes nothing.
        """
        self._overlap(False)
        if not output.sequences:
            for index, stage in enumerate(self.stages):
                stage.move_pages(output.stage(index).ops)
            for stage in self.stages:
                stage.settle()
            return StepOutput(output.step)
        step = self._begin(output)
        self._through(step)
        self._finish(step)
        assert step.result is not None
        return step.result

    def _through(self, step: _Step) -> None:
        """A step through all stages, here. If one fails, those behind it still do what the step asks of their pages:
        other sequences' blocks may have moved."""
        for index in range(len(self.stages)):
            try:
                self._receive_and_run(index, step)
            except BaseException:
                for behind in range(index + 1, len(self.stages)):
                    self._skip(behind, step)
                raise

    def submit(self, output: SchedulerOutput, done: StepDone) -> None:
        """One step, in the stages' own threads. `done(output, result or error)` is called from the last of them."""
        self._overlap(True)
        if self._line is None:
            self._line = StationLine(self._stations())

        def finish(step: _Step, error: Exception | None) -> None:
            result = error or step.result
            assert result is not None
            done(output, result)

        self._line.submit(self._begin(output), finish)

    def close(self) -> None:
        """End the stages' threads."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _overlap(self, several: bool) -> None:
        if self._cpu_threads is not None:
            self._cpu_threads.overlap(several)
        for stage in self.stages:
            stage.overlaps = several

    def _stations(self) -> list[Station[_Step]]:
        stations: list[Station[_Step]] = []
        for index, stage in enumerate(self.stages):
            has_link = index > 0 and self._transfer.is_slow(self.stages[index - 1].device, stage.device)
            if has_link:
                stations.append(Station(f"link-{index}", partial(self._receive, index)))
            run = self._run_layers if has_link or index == 0 else self._receive_and_run
            skip = partial(self._skip, index)
            stations.append(Station(f"stage-{index}", partial(run, index), self._prepare_thread, skip))
        stations.append(Station("sampler", self._finish, self._prepare_thread))
        return stations

    def _prepare_thread(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)

    def _begin(self, output: SchedulerOutput) -> _Step:
        batch = build_batch(output, self._block_size)
        rows = _LogitRows(output, batch)
        return _Step(output, batch, rows, torch.tensor(rows.indices) if rows.indices else None)

    def _receive(self, index: int, step: _Step) -> None:
        """Bring the activations to a stage's device."""
        if index and step.hidden is not None:
            source, target = self.stages[index - 1], self.stages[index]
            step.hidden = self._transfer.send(step.hidden, source.device, target.device)

    def _receive_and_run(self, index: int, step: _Step) -> None:
        try:
            self._receive(index, step)
        except BaseException:
            self._skip(index, step)
            raise
        self._run_layers(index, step)

    def _skip(self, index: int, step: _Step) -> None:
        """What a step that has failed still owes a stage."""
        if step.output.stage(index).ops:
            self._move_pages(index, step)
            self.stages[index].settle()

    def _move_pages(self, index: int, step: _Step) -> None:
        ops = step.output.stage(index).ops
        if ops:
            self.stages[index].move_pages(ops)

    def _run_layers(self, index: int, step: _Step) -> None:
        """Move pages, then run a stage's layers."""
        stage = self.stages[index]
        self._move_pages(index, step)
        try:
            rows = None if step.logit_rows is None else step.logit_rows.to(stage.torch_device)
            batch = stage.place(step.batch, step.output, step.output.stage(index))
        except BaseException:
            stage.settle()  # loads that were begun still read their slots
            raise
        step.hidden = stage.forward(batch, step.hidden, rows)

    def _finish(self, step: _Step) -> None:
        """Sample. In flight this has a thread of its own: the last stage goes on with the next step meanwhile."""
        self._sampler.forget(step.output.ended_seq_ids)
        assert step.hidden is not None
        if step.logit_rows is None:
            step.result = StepOutput(step.output.step)
        else:
            step.result = self._sample(step.output, step.rows, step.hidden[0])
        step.hidden = None

    def hidden_states(self, output: SchedulerOutput) -> torch.Tensor:
        """Final hidden states of a step's tokens, `[T, hidden_size]`."""
        return self._forward(output, None)[0]

    def logits(self, output: SchedulerOutput, rows: Sequence[int]) -> torch.Tensor:
        """Raw logits of some rows of a step's tokens, `[R, vocab]`."""
        return self._forward(output, torch.tensor(rows))[0]

    def _forward(self, output: SchedulerOutput, logit_rows: torch.Tensor | None) -> torch.Tensor:
        """A step through all stages, here, without sampling."""
        self._overlap(False)
        step = self._begin(output)
        step.logit_rows = logit_rows
        self._through(step)
        assert step.hidden is not None
        return step.hidden

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
