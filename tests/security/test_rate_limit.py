"""How often callers may call: at what pace, whom it concerns, and how much is remembered of them."""

from __future__ import annotations

import threading

import pytest

from core.errors import RateLimitError
from core.security import access
from core.security.access import WRONG_TOKENS_PER_MINUTE, CallerLimits, RateLimit, network_of


class Clock:
    def __init__(self) -> None:
        self.now_s = 5000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_minutes_worth_may_come_at_once_and_then_at_its_pace() -> None:
    clock = Clock()
    limit = RateLimit(30, clock)
    assert [limit.take("a") for _ in range(30)] == [0.0] * 30
    assert limit.take("a") == pytest.approx(2.0)
    assert limit.take("a") == pytest.approx(2.0), "what is refused does not count"
    assert limit.take("b") == 0.0
    clock.now_s += 1.5
    assert limit.take("a") == pytest.approx(0.5)
    clock.now_s += 0.5
    assert limit.take("a") == 0.0
    assert limit.take("a") > 0
    clock.now_s += 60
    assert [limit.take("a") for _ in range(30)] == [0.0] * 30


def test_whoever_comes_when_told_gets_in() -> None:
    clock = Clock()
    limit = RateLimit(7, clock)
    for _ in range(50):
        wait_s = limit.take("a")
        if wait_s:
            clock.now_s += wait_s
            assert limit.take("a") == 0.0
    assert clock.now_s - 5000 == pytest.approx((50 - 7) * 60 / 7)


def test_however_many_callers_there_are_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_CALLERS", 100)
    limit = RateLimit(1, Clock())
    for index in range(10_000):
        assert limit.take(f"address {index}") == 0.0
    assert len(limit) == 100
    assert limit.take("address 9999") > 0, "those that came last are the ones"
    assert limit.take("address 0") == 0.0


def test_a_caller_that_goes_on_calling_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_CALLERS", 10)
    limit = RateLimit(100, Clock())
    for index in range(100):
        assert limit.take("busy") == 0.0
        limit.take(f"address {index}")
    assert limit.take("busy") > 0


def test_many_threads_get_as_much_as_one() -> None:
    limit, passed = RateLimit(500, Clock()), []

    def call() -> None:
        passed.extend(limit.take("a") for _ in range(200))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed.count(0.0) == 500


def test_wrong_tokens_are_counted_apart_from_requests() -> None:
    limits = CallerLimits(1000, Clock())
    for _ in range(WRONG_TOKENS_PER_MINUTE):
        limits.check_stranger("10.0.0.1", wrong_token=True)
    with pytest.raises(RateLimitError, match="wrong tokens") as caught:
        limits.check_stranger("10.0.0.1", wrong_token=True)
    assert caught.value.retry_after_s == pytest.approx(60 / WRONG_TOKENS_PER_MINUTE)
    limits.check_stranger("10.0.0.1", wrong_token=False)
    limits.check_stranger("10.0.0.2", wrong_token=True)
    limits.check_key("default")


@pytest.mark.parametrize(
    ("address", "caller"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("", ""),
        (None, ""),
        ("a socket's path", ""),
    ],
)
def test_who_is_one_caller(address: str | None, caller: str) -> None:
    assert network_of(address) == caller
