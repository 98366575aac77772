"""Keys: pages, selecting, asking before a request is cancelled."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from scripts.captures import example_facts
from scripts.live_example import seen_after
from vramancer.cli.live.answers import Request
from vramancer.cli.live.controls import ANY, DEVICES, OVERVIEW, REQUESTS, TIERS, Act, Controls
from vramancer.cli.live.watch import Seen


def seen_with(*names: str) -> Seen:
    seen = seen_after(example_facts(), 0)
    queue = msgspec.structs.replace(seen.look.queue, requests=tuple(Request(name) for name in names))
    return dataclasses.replace(seen, look=dataclasses.replace(seen.look, queue=queue))


THREE = seen_with("a", "b", "c")


def pressed(keys: str, controls: Controls | None = None, seen: Seen = THREE) -> Controls:
    controls = controls or Controls()
    for key in keys.split():
        assert controls.press(key, seen) is None, key
    return controls


@pytest.mark.parametrize(
    ("keys", "page"),
    [
        ("2", DEVICES), ("3", REQUESTS), ("4", TIERS), ("3 1", OVERVIEW), ("tab", DEVICES), ("tab tab tab", TIERS),
        ("s-tab", TIERS), ("4 tab", OVERVIEW), ("5", OVERVIEW), ("2 any", DEVICES),
    ],
)  # fmt: skip
def test_pages(keys: str, page: int) -> None:
    assert pressed(keys).page == page


def test_help_comes_and_goes() -> None:
    assert pressed("?").help
    assert not pressed("? ?").help
    assert not pressed("? escape").help
    assert not pressed("? 2").help


def test_acts() -> None:
    assert Controls().press("q", THREE) == (Act.LEAVE, "")
    assert Controls().press("space", THREE) == (Act.PAUSE, "")
    assert Controls().press(ANY, THREE) is None


@pytest.mark.parametrize(
    ("keys", "selected"),
    [
        ("3", "a"), ("3 down", "b"), ("3 down down down", "c"), ("3 down up", "a"), ("3 up", "a"), ("3 j j k", "b"),
        ("3 end", "c"), ("3 end home", "a"), ("3 pagedown", "c"), ("2 down", "a"), ("3 ? down", "a"),
    ],
)  # fmt: skip
def test_arrows_select_a_request(keys: str, selected: str) -> None:
    assert pressed(keys).selected == selected


def test_arrows_scroll_the_other_pages() -> None:
    assert pressed("2 down down").scroll == 2
    assert pressed("2 pagedown up").scroll == 9
    assert pressed("2 up").scroll == 0
    assert pressed("2 down 4").scroll == 0, "a page begins at its top"


def test_the_selection_follows_its_request() -> None:
    controls = pressed("3 down")
    controls.settle(seen_with("b", "c"))
    assert controls.selected == "b"
    controls.settle(seen_with("x", "y", "b"))
    assert controls.selected == "b"
    controls.settle(seen_with("x", "y"))
    assert controls.selected == "y", "what is in its place, or the last"
    controls.settle(seen_with())
    assert controls.selected is None
    controls.settle(seen_with("z"))
    assert controls.selected == "z"


def test_a_request_is_cancelled_after_a_question() -> None:
    controls = pressed("3 down c")
    assert controls.asking == "b"
    assert controls.press("y", seen_with("x")) == (Act.CANCEL, "b"), "the one that was asked about"
    assert controls.asking is None
    assert controls.note == "cancelling b"


@pytest.mark.parametrize("key", ["n", "q", "space", "escape", "c", "enter", "1", ANY])
def test_any_other_key_keeps_it(key: str) -> None:
    controls = pressed("3 c")
    assert controls.press(key, THREE) is None
    assert (controls.asking, controls.page, controls.note) == (None, REQUESTS, "nothing is cancelled")
    pressed("down", controls)
    assert controls.note == ""


def test_there_is_nothing_to_cancel() -> None:
    assert pressed("3 c", seen=seen_with()).note == "there is no request"
    assert pressed("c").note == "requests are cancelled on page 3"
    assert pressed("c").asking is None
    assert pressed("3 ? c").asking is None
