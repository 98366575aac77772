"""The thread that computes one encoder's requests, in batches over all of them.

A request is some inputs. They wait, are computed with those next to them by length (`core.embedding.packing`), and the
request is done once all of its inputs are. What waits and runs is bounded, in inputs and in tokens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from core.devices import DeviceBudget
from core.embedding.encoder import Encoder, Numbers
from core.embedding.loading import EncoderInfo, release
from core.embedding.packing import Place, WaitingInputs
from core.errors import (
    ConflictError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    StepFailedError,
    VRAMancerError,
)
from core.logs import get_logger

logger = get_logger(__name__)

MAX_RETRY_AFTER_S = 60.0
RATE_BATCHES = 64
"""So many batches say how fast it goes lately."""
END_S = 10.0
"""For the batch that is computed when the engine ends."""


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """One text, or a pair; `type_ids`: which of a pair a token belongs to. The first `skip` tokens are a prompt's."""

    token_ids: Sequence[int]
    type_ids: Sequence[int] | None = None
    skip: int = 0


@dataclass(slots=True)
class EncoderStats:
    """Counts since the engine started, and what waits; written by the engine thread and `submit`."""

    inputs: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    batches: int = 0
    failed_batches: int = 0
    busy_s: float = 0.0
    waiting_inputs: int = 0
    held_inputs: int = 0
    held_tokens: int = 0


class EncoderRequest:
    """A request's inputs and, once it is `done`, its values. `wait` and `abort` may be called in any thread."""

    def __init__(self, request_id: str, owner: str, inputs: Sequence[EncoderInput], engine: EncoderEngine) -> None:
        self.request_id = request_id
        self.owner = owner
        self.inputs = tuple(inputs)
        self.num_tokens = sum(len(each.token_ids) for each in inputs)
        self.values: list[Numbers | None] = [None] * len(self.inputs)
        self.left = len(self.inputs)
        self.error: VRAMancerError | None = None
        self._engine = engine
        self._done = threading.Event()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it is done by then."""
        return self._done.wait(timeout_s)

    def result(self) -> Numbers:
        """fp32 `[inputs, dimensions]`. Waits. Raises what it failed with, and `ConflictError` if it was aborted."""
        self._done.wait()
        if self.error is not None:
            raise self.error
        return np.stack([row for row in self.values if row is not None])

    def abort(self) -> None:
        """Nobody wants it any more. What is being computed is dropped."""
        self._engine.cancel(self.request_id)

    def finish(self, error: VRAMancerError | None = None) -> None:
        """Called by the engine, once."""
        self.error = error
        self._done.set()


@dataclass(slots=True)
class _Rate:
    """Tokens a second of late, from what batches took."""

    batches: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RATE_BATCHES))

    def wait_s(self, tokens: int) -> float:
        """Seconds until so many tokens are computed."""
        done, spent_s = (sum(part) for part in zip(*self.batches, strict=True)) if self.batches else (0, 0.0)
        return min(MAX_RETRY_AFTER_S, max(1.0, tokens * spent_s / done)) if done else 1.0


class EncoderEngine:
    """Serves one encoder. Thread-safe; `start` it, and `close` it to give its memory back."""

    def __init__(
        self, info: EncoderInfo, encoder: Encoder, budget: DeviceBudget, *, max_batch_tokens: int, max_queue: int,
        max_queued_tokens: int, threads: int,
    ) -> None:  # fmt: skip
        self.info = info
        self.stats = EncoderStats()
        self.error: BaseException | None = None
        self._encoder = encoder
        self._budget = budget
        self._max_batch_tokens = max_batch_tokens
        self._max_inputs = max_queue
        self._max_tokens = max(max_queued_tokens, info.max_model_len)
        self._torch_threads = threads
        self._waiting = WaitingInputs()
        self._numbers: dict[str, int] = {}
        self._requests: dict[int, EncoderRequest] = {}
        self._next = 0
        self._closed: VRAMancerError | None = None
        self._rate = _Rate()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"vrm-{info.kind}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, inputs: Sequence[EncoderInput], *, request_id: str, owner: str) -> EncoderRequest:
        """Queue a request's inputs, all or none.

        Raises `InvalidRequestError` for what never fits, `QueueFullError` for what does not now, `ConflictError` for an
        id that is taken, or what the engine was closed with.
        """
        request = EncoderRequest(request_id, owner, inputs, self)
        self._check_size(request)
        with self._changed:
            if self._closed is not None:
                raise self._closed
            stats = self.stats
            if (
                stats.held_inputs + len(inputs) > self._max_inputs
                or stats.held_tokens + request.num_tokens > self._max_tokens
            ):
                raise QueueFullError(
                    f"{stats.held_inputs} inputs of {stats.held_tokens} tokens are waiting for {self.info.name}, which "
                    f"takes {self._max_inputs} of {self._max_tokens} at a time; try again later.",
                    retry_after_s=self._rate.wait_s(request.num_tokens),
                )
            if request_id in self._numbers:
                raise ConflictError(f"A request with id {request_id} is running already.")
            number, self._next = self._next, self._next + 1
            self._numbers[request_id], self._requests[number] = number, request
            self._waiting.add(number, [len(each.token_ids) for each in inputs])
            stats.held_inputs += len(inputs)
            stats.held_tokens += request.num_tokens
            stats.waiting_inputs = len(self._waiting)
            self._changed.notify()
        return request

    def _check_size(self, request: EncoderRequest) -> None:
        if not request.inputs:
            raise InvalidRequestError("The input is empty.", param="input")
        if len(request.inputs) > self._max_inputs or request.num_tokens > self._max_tokens:
            raise InvalidRequestError(
                f"The request has {len(request.inputs)} inputs of {request.num_tokens} tokens; this server takes "
                f"{self._max_inputs} of {self._max_tokens} at a time.",
                param="input",
            )

    def cancel(self, request_id: str) -> bool:
        """Abort a request. False if there is none."""
        with self._changed:
            number = self._numbers.get(request_id)
            if number is None:
                return False
            self._end(number, ConflictError("The request was cancelled."))
        return True

    def close(self, reason: VRAMancerError | None = None) -> None:
        """End the thread, tell what still runs the `reason`, give the memory back. Safe to call twice."""
        reason = reason or EngineDeadError("The server is shutting down.")
        self._close(reason)
        if self._thread.is_alive():
            self._thread.join(END_S)
        release(self._budget)

    def _close(self, reason: VRAMancerError) -> None:
        with self._changed:
            self._closed = self._closed or reason
            for number in list(self._requests):
                self._end(number, reason)
            self._changed.notify()

    def check_invariants(self) -> None:
        """Audit what waits, and the ledger."""
        with self._changed:
            self._waiting.check_invariants()
            held = sum(len(request.inputs) for request in self._requests.values())
            if held != self.stats.held_inputs or len(self._numbers) != len(self._requests):
                raise AssertionError(f"{held} inputs are held, and {self.stats.held_inputs} are counted")
        self._budget.check_invariants()

    # -- the engine thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._torch_threads)
        try:
            while (batch := self._next_batch()) is not None:
                self._compute(batch)
        except BaseException as error:  # health tells it, and whoever waits is told
            logger.error("an encoder's thread has ended", model=self.info.name, error=repr(error), exc_info=error)
            self.error = error
            self._close(EngineDeadError(f"The thread of {self.info.name} has ended; restart the server."))

    def _next_batch(self) -> list[tuple[Place, EncoderInput]] | None:
        """Waits. None once the engine is closed."""
        with self._changed:
            while not len(self._waiting) and self._closed is None:
                self._changed.wait()
            if self._closed is not None:
                return None
            places = self._waiting.take(self._max_batch_tokens)
            self.stats.waiting_inputs = len(self._waiting)
            return [(place, self._requests[place.request].inputs[place.number]) for place in places]

    def _compute(self, batch: list[tuple[Place, EncoderInput]]) -> None:
        """A batch that fails is computed again request by request, so that one request's failure stays its own."""
        began_s = time.perf_counter()
        try:
            values = self._forward([item for _, item in batch])
        except Exception as error:  # whatever transformers raises
            self.stats.failed_batches += 1
            numbers = dict.fromkeys(place.request for place, _ in batch)
            if len(numbers) > 1:
                for number in numbers:
                    self._compute([(place, item) for place, item in batch if place.request == number])
                return
            logger.error("a batch failed", model=self.info.name, error=repr(error), exc_info=error)
            with self._changed:
                self._end(next(iter(numbers)), StepFailedError(f"{self.info.name} failed: {type(error).__name__}."))
            return
        self._deliver(batch, values, time.perf_counter() - began_s)

    def _forward(self, items: list[EncoderInput]) -> Numbers:
        pairs = any(item.type_ids is not None for item in items)
        types = [item.type_ids or [0] * len(item.token_ids) for item in items] if pairs else None
        return self._encoder([item.token_ids for item in items], types, [item.skip for item in items])

    def _deliver(self, batch: list[tuple[Place, EncoderInput]], values: Numbers, took_s: float) -> None:
        tokens = sum(place.length for place, _ in batch)
        with self._changed:
            stats = self.stats
            stats.batches += 1
            stats.inputs += len(batch)
            stats.tokens += tokens
            stats.padding_tokens += len(batch) * batch[0][0].length - tokens
            stats.busy_s += took_s
            self._rate.batches.append((tokens, took_s))
            for (place, _), row in zip(batch, values, strict=True):
                request = self._requests.get(place.request)
                if request is None:
                    continue  # it was aborted meanwhile
                request.values[place.number] = row
                request.left -= 1
                if not request.left:
                    self._end(place.request)

    def _end(self, number: int, error: VRAMancerError | None = None) -> None:
        """Called with the lock. The request is over; its id may be used again."""
        request = self._requests.pop(number, None)
        if request is None:
            return
        del self._numbers[request.request_id]
        self._waiting.remove(number)
        stats = self.stats
        stats.held_inputs -= len(request.inputs)
        stats.held_tokens -= request.num_tokens
        stats.waiting_inputs = len(self._waiting)
        request.finish(error)
