"""The engine thread: bounds, cancelling, failures that stay their own, memory that is given back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding.encoders import HIDDEN, POISON, Gate, save_encoder
from steering import LONGEST_WAIT_S

from core.devices import DeviceBudget, host_device
from core.embedding.engine import EncoderEngine, EncoderInput
from core.embedding.loading import WEIGHTS, WORKSPACE, EncoderInfo, load_encoder
from core.errors import (
    ConflictError,
    EngineDeadError,
    InvalidRequestError,
    OutOfDeviceMemoryError,
    QueueFullError,
    StepFailedError,
)
from core.models.resolve import resolve_model


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[EncoderInfo, Any, DeviceBudget]:
    save_encoder(tmp_path / "encoder")
    budget = DeviceBudget(host_device(1 << 24))
    info, encoder = load_encoder(resolve_model(str(tmp_path / "encoder")), "encoder", budget, max_batch_tokens=64)
    return info, encoder, budget


Start = Callable[..., tuple[EncoderEngine, Gate]]


@pytest.fixture
def start(loaded: tuple[EncoderInfo, Any, DeviceBudget]) -> Iterator[Start]:
    opened: list[tuple[EncoderEngine, Gate]] = []

    def make(max_queue: int = 8, max_queued_tokens: int = 200) -> tuple[EncoderEngine, Gate]:
        info, encoder, budget = loaded
        gate = Gate(encoder)
        engine = EncoderEngine(
            info, gate, budget, max_batch_tokens=64, max_queue=max_queue, max_queued_tokens=max_queued_tokens, threads=1
        )  # type: ignore[arg-type]
        opened.append((engine, gate))
        engine.start()
        return engine, gate

    yield make
    for engine, gate in opened:
        gate.open.set()
        engine.close()


def inputs(*texts: Sequence[int]) -> list[EncoderInput]:
    return [EncoderInput(list(text)) for text in texts]


def test_requests_that_wait_are_computed_in_one_batch(start: Start) -> None:
    engine, gate = start()
    first = engine.submit(inputs([1, 2]), request_id="a", owner="o")
    assert gate.begun.wait(LONGEST_WAIT_S)
    later = [engine.submit(inputs([1, 5 + number, 2]), request_id=f"b{number}", owner="o") for number in range(4)]
    gate.open.set()
    values = [request.result() for request in (first, *later)]
    assert [value.shape for value in values] == [(1, HIDDEN)] * 5
    assert gate.batches == [1, 4]
    assert (engine.stats.batches, engine.stats.inputs, engine.stats.tokens) == (2, 5, 14)
    engine.check_invariants()
    assert engine.stats.held_inputs == 0


def test_what_finds_no_room_is_refused_and_told_when_to_come_back(start: Start) -> None:
    engine, gate = start(max_queue=4)
    held = engine.submit(inputs([1, 2], [1, 2], [1, 2]), request_id="a", owner="o")
    with pytest.raises(QueueFullError, match="3 inputs of 6 tokens are waiting") as refused:
        engine.submit(inputs([1, 2], [1, 2]), request_id="b", owner="o")
    assert refused.value.retry_after_s >= 1
    with pytest.raises(InvalidRequestError, match="5 inputs"):
        engine.submit(inputs(*[[1, 2]] * 5), request_id="b", owner="o")
    with pytest.raises(ConflictError):
        engine.submit(inputs([1, 2]), request_id="a", owner="o")
    gate.open.set()
    held.result()
    engine.submit(inputs([1, 2], [1, 2]), request_id="b", owner="o").result()


def test_tokens_that_wait_are_bounded_too(start: Start) -> None:
    engine, _ = start(max_queued_tokens=60)
    engine.submit(inputs([1] * 40), request_id="a", owner="o")
    with pytest.raises(QueueFullError):
        engine.submit(inputs([1] * 40), request_id="b", owner="o")
    with pytest.raises(InvalidRequestError):
        engine.submit(inputs([1] * 40, [1] * 40), request_id="b", owner="o")


def test_a_request_that_is_cancelled_makes_room_and_is_not_computed(start: Start) -> None:
    engine, gate = start(max_queue=4)
    running = engine.submit(inputs([1, 2]), request_id="a", owner="o")
    assert gate.begun.wait(LONGEST_WAIT_S)
    waiting = engine.submit(inputs([1, 2], [1, 2], [1, 2]), request_id="b", owner="o")
    assert engine.cancel("b")
    assert not engine.cancel("b")
    with pytest.raises(ConflictError, match="cancelled"):
        waiting.result()
    engine.check_invariants()
    after = engine.submit(inputs([1, 2], [1, 2], [1, 2]), request_id="c", owner="o")
    gate.open.set()
    running.result()
    after.result()
    assert gate.batches == [1, 3]


def test_a_request_that_fails_leaves_those_beside_it_alone(start: Start) -> None:
    engine, gate = start()
    first = engine.submit(inputs([1, 2]), request_id="a", owner="o")
    assert gate.begun.wait(LONGEST_WAIT_S)
    good = engine.submit(inputs([1, 5, 2]), request_id="b", owner="o")
    bad = engine.submit(inputs([1, POISON, 2], [1, 6, 2]), request_id="c", owner="o")
    gate.open.set()
    first.result()
    with pytest.raises(StepFailedError):
        bad.result()
    assert np.isfinite(good.result()).all()
    assert engine.alive
    assert engine.stats.failed_batches == 2
    engine.check_invariants()


def test_the_end_is_told_to_who_waits_and_gives_memory_back(
    start: Start, loaded: tuple[EncoderInfo, Any, DeviceBudget]
) -> None:
    budget = loaded[2]
    assert set(budget.used_by_purpose()) == {WEIGHTS, WORKSPACE}
    engine, gate = start()
    running = engine.submit(inputs([1, 2]), request_id="a", owner="o")
    assert gate.begun.wait(LONGEST_WAIT_S)
    waiting = engine.submit(inputs([1, 2]), request_id="b", owner="o")
    closing = threading.Thread(target=engine.close)
    closing.start()
    for request in (running, waiting):
        with pytest.raises(EngineDeadError):
            request.result()
    gate.open.set()
    closing.join(LONGEST_WAIT_S)
    engine.close()
    with pytest.raises(EngineDeadError):
        engine.submit(inputs([1, 2]), request_id="c", owner="o")
    assert not engine.alive
    assert budget.used_by_purpose() == {}


def test_memory_is_reserved_before_anything_is_read(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    resolved = resolve_model(str(tmp_path / "encoder"))
    small = DeviceBudget(host_device(120_000))  # the weights alone fit
    with pytest.raises(OutOfDeviceMemoryError, match="embedding workspace"):
        load_encoder(resolved, "encoder", small, max_batch_tokens=1024)
    assert small.used_by_purpose() == {}
