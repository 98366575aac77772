"""What callers say of their traces, also when they say it wrongly."""

from __future__ import annotations

import pytest

from core.tracing.w3c import Caller, read_caller, read_state, write_state

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_who_calls() -> None:
    assert read_caller(f"00-{TRACE}-{SPAN}-01", None) == Caller(TRACE, SPAN, sampled=True)
    assert read_caller(f" 00-{TRACE}-{SPAN}-00\t", "") == Caller(TRACE, SPAN, sampled=False)


@pytest.mark.parametrize(("flags", "sampled"), [("02", False), ("03", True), ("ff", True), ("fe", False)])
def test_of_the_flags_one_counts(flags: str, sampled: bool) -> None:
    caller = read_caller(f"00-{TRACE}-{SPAN}-{flags}", None)
    assert caller is not None and caller.sampled is sampled


def test_later_versions_may_say_more() -> None:
    assert read_caller(f"cc-{TRACE}-{SPAN}-01-what-comes", None) == Caller(TRACE, SPAN, sampled=True)
    assert read_caller(f"cc-{TRACE}-{SPAN}-01", None) is not None
    assert read_caller(f"cc-{TRACE}-{SPAN}-01.", None) is None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01-{'x' * 600}",
    ],
)
def test_what_is_broken_is_nobody(header: str) -> None:
    assert read_caller(header, "a=1") is None


def test_nothing_is_nobody() -> None:
    assert read_caller(None, "a=1") is None


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a=1", (("a", "1"),)),
        (" a=1 ,, b@c=two words\t", (("a", "1"), ("b@c", "two words"))),
        ("a*/-_0=!~", (("a*/-_0", "!~"),)),
        ("0a@v=1", (("0a@v", "1"),)),
        (",".join(f"k{n}=v" for n in range(32)), tuple((f"k{n}", "v") for n in range(32))),
    ],
)
def test_what_vendors_keep(text: str, pairs: tuple[tuple[str, str], ...]) -> None:
    assert read_state(text) == pairs
    assert read_state(write_state(pairs)) == pairs


@pytest.mark.parametrize(
    "text",
    [
        "a", "a=", "=1", "A=1", "a=1=2", "a=é", "a=1,a=2", "a=1,broken", "a b=1", "a=" + "x" * 257,
        ",".join(f"k{n}=v" for n in range(33)), ",".join(["a=" + "x" * 255, "b=" + "x" * 255, "c=1"]), "a=1\x00",
    ],
)  # fmt: skip
def test_a_state_that_is_broken_in_part_is_dropped(text: str) -> None:
    assert read_state(text) == ()
    caller = read_caller(f"00-{TRACE}-{SPAN}-01", text)
    assert caller is not None and caller.state == ()
