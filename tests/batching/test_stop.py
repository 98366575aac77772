from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.batching.stop import StopChecker

SMALL_TEXT = st.text(alphabet="abé", max_size=30)
STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4).map(tuple)


def expected(text, stops, include_stop):
    """The stop string that ends first, the longest of those that end together; by trying everything."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def run(pieces, stops, include_stop):
    checker, emitted = StopChecker(stops, include_stop), ""
    for piece in pieces:
        new, matched = checker.push(piece)
        emitted += new
        if matched is not None:
            assert checker.flush() == ""
            return emitted, matched
    return emitted + checker.flush(), None


@given(st.lists(SMALL_TEXT, max_size=12), STOPS, st.booleans())
def test_any_split_gives_the_text_up_to_the_first_stop(pieces, stops, include_stop):
    assert run(pieces, stops, include_stop) == expected("".join(pieces), stops, include_stop)


@given(st.text(alphabet="ab", max_size=60), st.lists(st.text(alphabet="ab", min_size=1, max_size=9), max_size=3))
def test_single_characters_and_repetitive_stops(text, stops):
    assert run(text, tuple(stops), False) == expected(text, tuple(stops), False)


@given(SMALL_TEXT, STOPS)
def test_holds_back_exactly_what_may_begin_a_stop(text, stops):
    checker = StopChecker(stops, False)
    emitted, matched = checker.push(text)
    if matched is None:
        beginnings = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
        assert emitted == text[: len(text) - max(beginnings, default=0)]


PIECES = st.lists(st.tuples(SMALL_TEXT, st.booleans()), max_size=12)


@given(PIECES, STOPS, st.booleans())
def test_hidden_text_completes_stops_that_name_it(pieces, stops, include_stop):
    """Pieces marked hidden end in `#`, which only stop strings with a `#` see."""
    stops = tuple(stop.replace("é", "#") for stop in stops)
    pieces = [("#", True) if hidden else (text, False) for text, hidden in pieces]
    checker, emitted = StopChecker(stops, include_stop, {"#"}), ""
    for text, hidden in pieces:
        new, matched = checker.push(text, hidden=hidden)
        emitted += new
        if matched is not None:
            break
    else:
        emitted, matched = emitted + checker.flush(), None
    whole = "".join(text for text, _ in pieces)
    assert (emitted, matched) == expected_of_both(whole, stops, include_stop)


def expected_of_both(whole, stops, include_stop):
    """As `expected`, where `#` is hidden."""
    for end in range(1, len(whole) + 1):
        shown = whole[:end].replace("#", "")
        ending = [stop for stop in stops if "#" in stop and whole[:end].endswith(stop)]
        if whole[end - 1] != "#":
            ending += [stop for stop in stops if "#" not in stop and shown.endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return shown[: len(shown) - len(stop.replace("#", ""))] + stop * include_stop, stop
    return whole.replace("#", ""), None


def test_partial_stop_never_leaks():
    checker = StopChecker(("</answer>",), False)
    assert checker.push("42</ans") == ("42", None)
    assert checker.push("wer") == ("", None)
    assert checker.push("> more") == ("", "</answer>")
    assert checker.push("anything") == ("", "</answer>")
    assert checker.flush() == ""


def test_partial_stop_is_released_when_it_turns_out_not_to_be_one():
    checker = StopChecker(("abc", "bd"), False)
    assert checker.push("xab") == ("x", None)
    assert checker.push("e") == ("abe", None)
    assert checker.push("ab") == ("", None)
    assert checker.flush() == "ab"
    assert checker.flush() == ""


def test_include_stop():
    assert StopChecker(("\n\n",), True).push("one\n\ntwo") == ("one\n\n", "\n\n")


def test_no_stops_pass_everything():
    checker = StopChecker((), False)
    assert checker.push("text") == ("text", None)
    assert checker.flush() == ""


class Counted(str):
    """Text that counts how often a character of it is looked at."""

    looks = 0

    def __getitem__(self, index):
        Counted.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("tail", ["b", "c"])
def test_many_long_repetitive_stops_stay_cheap(monkeypatch, tail):
    """64 stops of 1024 characters that differ late, over text that keeps all of them nearly matching: a few looks for
    each character of the text and of the stop, where comparing anew would take a thousand."""
    monkeypatch.setattr(Counted, "looks", 0)
    stops = tuple(Counted("a" * (959 + i) + "b" + "a" * (64 - i)) for i in range(64))
    emitted, matched = run(["a" * 4] * 1000 + [tail, "x"], stops, False)
    assert len(stops) * 4000 <= Counted.looks <= len(stops) * 4 * (4002 + 1024)
    assert matched is None
    assert emitted == "a" * 4000 + tail + "x"


@pytest.mark.parametrize("cut", [1, 2, 100])
@pytest.mark.parametrize(
    ("stop", "text"), [("aaab", "xaaaab"), ("aaaab", "aaaaaaab"), ("abcabcd", "abcabcabcd"), ("ababac", "abababac")]
)
def test_a_stop_that_begins_within_its_own_beginning_is_found(stop, text, cut):
    """What has matched so far may end with a beginning of the stop string that is several characters long."""
    pieces = [text[start : start + cut] for start in range(0, len(text), cut)]
    assert run(pieces, (stop,), False) == (text.removesuffix(stop), stop)
