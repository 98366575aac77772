"""What the queue takes, in sequences and tokens, and when it says that there will be room."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from core.batching import intake as intake_module
from core.batching.intake import Intake, Load
from core.batching.sequence import Request, Sequence
from core.errors import ConflictError, InvalidRequestError, QueueFullError, UnavailableError
from core.request import SamplingParams


def request(name: str, tokens: int = 1, count: int = 1) -> Request:
    made = Request(name, [3] * tokens, SamplingParams(n=count), 10)
    made.sequences = [Sequence(made, index, 0, [3] * tokens) for index in range(count)]
    return made


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(intake_module.time, "monotonic", lambda: self.now_s)


def test_every_sequence_counts() -> None:
    intake = Intake(Load(10, 1000), "the queue takes 6 beside 4 running ones")
    intake.submit([request("a", 5, 4), request("b", 7, 4)], 1.0)
    assert intake.load == (8, 48)
    assert intake.num_unfinished == 2
    with pytest.raises(QueueFullError, match="8 sequences are running or waiting, and the queue takes 6"):
        intake.submit([request("c", 1, 3)], 1.0)
    intake.submit([request("c", 1, 2)], 1.0)
    intake.release("a")
    intake.release("a")
    assert intake.load == (6, 30)
    intake.submit([request("d", 1, 4)], 1.0)


def test_the_oldest_requests_that_are_not_over() -> None:
    intake = Intake(Load(10, 1000), "")
    intake.submit([request(name) for name in "abcd"], 1.0)
    intake.release("b")
    assert [each.request_id for each in intake.oldest(2)] == ["a", "c"]
    assert [each.request_id for each in intake.oldest(9)] == ["a", "c", "d"]


def test_prompt_tokens_count_for_every_sequence() -> None:
    intake = Intake(Load(100, 1000), "")
    intake.submit([request("a", 300, 3)], 1.0)
    with pytest.raises(QueueFullError, match=r"Prompts of 900 tokens .* takes 1000"):
        intake.submit([request("b", 101)], 1.0)
    intake.submit([request("b", 100)], 1.0)


def test_all_of_a_batch_or_none() -> None:
    intake = Intake(Load(4, 1000), "")
    intake.submit([request("a")], 1.0)
    with pytest.raises(QueueFullError):
        intake.submit([request(name) for name in "bcde"], 1.0)
    with pytest.raises(ConflictError):
        intake.submit([request("b"), request("a")], 1.0)
    assert intake.load == (1, 1)


@pytest.mark.parametrize(("tokens", "count", "param"), [(1, 11, "n"), (501, 2, "prompt")])
def test_what_never_fits_is_the_requests_fault(tokens: int, count: int, param: str) -> None:
    intake = Intake(Load(10, 1000), "")
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="at a time") as caught:
            intake.submit([request("a", tokens, count)], 1.0)
        assert caught.value.param == param
        assert intake.load == (0, 0)
        intake.submit([request("fills", 1, 10)], 1.0)
        intake.release("fills")


def test_the_hint_follows_the_rate_at_which_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    intake = Intake(Load(20, 10**6), "")
    for index in range(20):
        intake.submit([request(str(index), 10)], 1.0)
    with pytest.raises(QueueFullError) as caught:
        intake.submit([request("more")], 7.5)
    assert caught.value.retry_after_s == 7.5, "nothing has ended yet"
    for index in range(10):  # one every two seconds
        clock.now_s += 2.0
        intake.release(str(index))
        intake.submit([request(f"again {index}", 10)], 1.0)
    with pytest.raises(QueueFullError) as caught:
        intake.submit([request("one more")], 1.0)
    assert caught.value.retry_after_s == pytest.approx(1.8), "one every 1.8 s, from the first end on"
    with pytest.raises(QueueFullError) as caught:
        intake.submit([request("ten", 10, 10)], 1.0)
    assert caught.value.retry_after_s == pytest.approx(18.0)
    clock.now_s += 3600
    with pytest.raises(QueueFullError) as caught:
        intake.submit([request("later")], 4.0)
    assert caught.value.retry_after_s == 4.0, "what was long ago says nothing"


def test_the_hint_follows_the_tokens_where_those_are_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    intake = Intake(Load(1000, 1000), "")
    for index in range(10):
        intake.submit([request(str(index), 100)], 1.0)
    for index in range(5):
        clock.now_s += 1.0
        intake.release(str(index))
    clock.now_s += 1.0
    with pytest.raises(QueueFullError) as caught:
        intake.submit([request("more", 1000)], 1.0)
    assert caught.value.retry_after_s == pytest.approx(5.0), "500 tokens lack, and 100 end in a second"


def test_a_call_that_is_not_begun_in_time_never_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "CALL_S", 0.02)
    intake = Intake(Load(1, 1), "")
    for given_s, waited_s in ((None, 0.02), (0.01, 0.01)):
        with pytest.raises(UnavailableError, match=f"within {waited_s} s, so nothing was done") as caught:
            intake.call_within(list, given_s)
        assert caught.value.retry_after_s == waited_s
        assert intake.inbox.get(timeout=0).future.cancelled()


def test_a_call_that_has_begun_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    intake = Intake(Load(1, 1), "")
    begun = threading.Event()

    def engine() -> None:
        future = intake.inbox.get().future
        future.set_running_or_notify_cancel()
        begun.set()
        time.sleep(0.1)
        future.set_result("done")

    thread = threading.Thread(target=engine)
    thread.start()
    with monkeypatch.context() as late:  # the wait ends before the call does, and not before it has begun
        late.setattr(Future, "result", _once_begun(Future.result, begun))
        assert intake.call_within(list, 0.01) == "done"
    thread.join()


def _once_begun(result: Callable[..., Any], begun: threading.Event) -> Callable[..., Any]:
    def waiting(future: Future[Any], timeout: float | None = None) -> Any:
        begun.wait(30)
        return result(future, timeout)

    return waiting
