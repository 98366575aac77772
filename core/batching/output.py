"""From sampled tokens to what the client reads: incremental text, stop strings, deltas, and the request's handle."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from core.batching.sequence import Request, Sequence, SequenceUpdate
from core.batching.stop import StopChecker
from core.errors import VRAMancerError
from core.request import Completion, GenerationResult, RequestOutput, SamplingParams, SequenceDelta, TokenLogprob

Message: TypeAlias = "RequestOutput | VRAMancerError"
Sink: TypeAlias = "queue.SimpleQueue[tuple[int, Message]]"
AbortCall: TypeAlias = "Callable[[str], object]"
"""How a handle reaches the batcher, with the request's id."""


class TextStream(Protocol):
    """Incremental detokenizer of one sequence."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Detokenizer(Protocol):
    """Opens one `TextStream` per sequence, without special tokens but for those that are `kept`. `special_tokens` are
    texts by id."""

    special_tokens: Mapping[int, str]

    def stream(
        self, prompt_token_ids: list[int], *, skip_special_tokens: bool, kept: Collection[int] = ()
    ) -> TextStream: ...


class SequenceWriter:
    """Turns one sequence's tokens into deltas, holding text back while it may be part of a stop string."""

    def __init__(self, sequence: Sequence, detokenizer: Detokenizer) -> None:
        params = sequence.request.params
        self._sequence = sequence
        self._stream = (
            detokenizer.stream(
                sequence.request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                kept=params.kept_special_tokens,
            )
            if params.detokenize
            else None
        )
        self._specials = detokenizer.special_tokens if params.stop else {}
        self._stops = (
            StopChecker(params.stop, params.include_stop_str_in_output, set(self._specials.values()))
            if params.stop
            else None
        )
        self.matched_stop: str | None = None

    def push(self, token_id: int) -> str:
        """Text that the token makes certain. Sets `matched_stop` when a stop string is complete."""
        if self._stream is None:
            return ""
        ended = self._ended_by(token_id)
        text = "" if ended else self._emit(self._stream.push(token_id))
        params = self._sequence.request.params
        if ended or (params.skip_special_tokens and token_id not in params.kept_special_tokens):
            text += self._emit(self._specials.get(token_id, ""), hidden=True)
        return text

    def _ended_by(self, token_id: int) -> bool:
        """Whether the token is the one that ended the sequence, whose text is not part of the answer."""
        sequence = self._sequence
        return (
            sequence.finish_reason == "stop"
            and sequence.output_token_ids[-1] == token_id
            and not sequence.request.params.include_stop_str_in_output
        )

    def _emit(self, text: str, *, hidden: bool = False) -> str:
        """What of it is certain; a special token's text that the answer leaves out can only complete a stop string."""
        if self._stops is not None and text:
            text, self.matched_stop = self._stops.push(text, hidden=hidden)
        return text

    def flush(self) -> str:
        """The text still held back, once the sequence has ended. May complete a stop string."""
        if self._stream is None or self.matched_stop is not None:
            return ""
        text = self._emit(self._stream.flush())
        return text if self._stops is None else text + self._stops.flush()


class RequestHandle:
    """The client's end of a request: its outputs in order, and `abort`.

    `sink`, if given, receives `(index, message)` instead of the handle's own queue, so that one thread can wait for
    several requests at once.
    """

    def __init__(
        self, request_id: str, params: SamplingParams, abort: AbortCall, sink: Sink | None = None, index: int = 0
    ) -> None:
        self.request_id = request_id
        self.params = params
        self._abort = abort
        self._index = index
        self._sink: Sink = sink if sink is not None else queue.SimpleQueue()
        self._done = False

    @property
    def finished(self) -> bool:
        """Whether the last message has been put; it may still wait to be read."""
        return self._done

    def put(self, message: Message) -> None:
        """Called by the engine thread."""
        if self._done:
            return
        self._done = isinstance(message, VRAMancerError) or message.finished
        self._sink.put((self._index, message))

    def get(self, timeout_s: float | None = None) -> RequestOutput | None:
        """Next output; None if none came within `timeout_s`. Raises the request's error."""
        try:
            _, message = self._sink.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(message, VRAMancerError):
            raise message
        return message

    def __iter__(self) -> Iterator[RequestOutput]:
        while True:
            output = self.get()
            if output is not None:
                yield output
                if output.finished:
                    return

    def result(self, timeout_s: float | None = None) -> GenerationResult:
        """Wait for the whole answer; with `best_of`, the best `n` sequences by mean log-probability.

        Raises `TimeoutError` after `timeout_s`; the request goes on.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        gathered = Gathered(self.params)
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            output = self.get(left)
            if output is None:
                raise TimeoutError(f"request {self.request_id} did not finish within {timeout_s} s")
            gathered.add(output)
            if output.finished:
                return gathered.result()

    def moved(self, abort: AbortCall) -> None:
        """Another batcher writes to this handle from now on."""
        self._abort = abort

    def abort(self) -> None:
        """Stop generating and free the blocks at the next step. Safe to call twice, and after the end."""
        if not self._done:
            self._abort(self.request_id)


@dataclass(slots=True)
class Gathered:
    """Collects a request's outputs into one `GenerationResult`."""

    params: SamplingParams
    request_id: str = ""
    completions: dict[int, Completion] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def add(self, output: RequestOutput) -> None:
        self.request_id = output.request_id
        self.num_prompt_tokens = output.num_prompt_tokens
        self.num_cached_tokens = output.num_cached_tokens
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        for delta in output.deltas:
            completion = self.completions.setdefault(delta.index, Completion(delta.index))
            completion.text += delta.text
            completion.token_ids.extend(delta.token_ids)
            completion.logprobs.extend(delta.logprobs or ())
            completion.finish_reason = delta.finish_reason or completion.finish_reason
            completion.stop_reason = delta.stop_reason if delta.stop_reason is not None else completion.stop_reason

    def result(self) -> GenerationResult:
        completions = sorted(self.completions.values(), key=lambda item: item.index)
        generated = sum(len(item.token_ids) for item in completions)
        if len(completions) > self.params.n:
            completions.sort(key=lambda item: -item.cumulative_logprob / max(1, len(item.token_ids)))
            completions = completions[: self.params.n]
            for index, completion in enumerate(completions):
                completion.index = index
        prompt, cached = self.num_prompt_tokens, self.num_cached_tokens
        return GenerationResult(self.request_id, completions, prompt, cached, generated, self.prompt_logprobs)


class RequestWriter:
    """Writes one request's outputs to its handle."""

    def __init__(self, request: Request, handle: RequestHandle, detokenizer: Detokenizer) -> None:
        self.request = request
        self.handle = handle
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._writers = {sequence.index: SequenceWriter(sequence, detokenizer) for sequence in request.sequences}
        self._reported: set[int] = set()
        self._prompt_logprobs_sent = False

    def token(self, update: SequenceUpdate) -> tuple[SequenceDelta, str | None]:
        """Delta of one new token, and the stop string that it completed, if any."""
        sequence = update.sequence
        writer = self._writers[sequence.index]
        assert update.token_id is not None
        text = writer.push(update.token_id)
        logprobs = (update.logprob,) if update.logprob is not None else None
        return SequenceDelta(sequence.index, text, (update.token_id,), logprobs), writer.matched_stop

    def ended(self, sequence: Sequence) -> SequenceDelta | None:
        """The closing delta of a sequence, once."""
        if sequence.index in self._reported:
            return None
        self._reported.add(sequence.index)
        writer = self._writers[sequence.index]
        text = writer.flush() if sequence.finish_reason in ("stop", "length") else ""
        if writer.matched_stop is not None:
            sequence.finish_reason = "stop"
            if sequence.stop_reason is None:
                sequence.stop_reason = writer.matched_stop
        return SequenceDelta(
            sequence.index, text, finish_reason=sequence.finish_reason, stop_reason=sequence.stop_reason
        )

    def write(self, deltas: list[SequenceDelta]) -> None:
        """Send what there is to the client."""
        request = self.request
        prompt_logprobs = None
        if request.prompt_logprobs is not None and not self._prompt_logprobs_sent:
            prompt_logprobs = tuple(request.prompt_logprobs)
            self._prompt_logprobs_sent = True
        prompt, cached = len(request.prompt_token_ids), request.num_cached_tokens
        self.handle.put(
            RequestOutput(request.request_id, tuple(deltas), prompt, cached, prompt_logprobs, finished=request.finished)
        )
