"""The scanner takes what is JSON, stops where it ends, and breaks where it cannot be any."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.parsers.json_scan import MAX_DEPTH, JsonScanner

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
CONTAINERS = st.lists(VALUES) | st.dictionaries(st.text(), VALUES)


def scan(text: str, *, piecewise: bool = False, inside_object: bool = False) -> tuple[JsonScanner, str, int]:
    scanner = JsonScanner(inside_object=inside_object)
    if not piecewise:
        return (scanner, *scanner.feed(text, 0, len(text)))
    read, at = "", 0
    while at < len(text) and not (scanner.done or scanner.broken):
        piece, at = scanner.feed(text, at, at + 1)
        read += piece
    return scanner, read, at


@given(value=CONTAINERS, escaped=st.booleans(), indent=st.sampled_from([None, 1]))
def test_json_is_read_to_its_end(value: Any, escaped: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=escaped, indent=indent)
    for piecewise in (False, True):
        scanner, read, at = scan(text + "] rest", piecewise=piecewise)
        assert (scanner.done, scanner.broken, at) == (True, False, len(text))
        assert json.loads(read) == json.loads(text)


PIECES = st.sampled_from([*'{}[],:"\\ \n-+.0123eEtfn', "true", "null", "false", '"a"', '"a":', "\\u00e9", "1.5"])


@given(parts=st.lists(PIECES, max_size=14), begin=st.sampled_from(["{", "["]))
def test_it_is_as_strict_as_json(parts: list[str], begin: str) -> None:
    text = begin + "".join(parts)
    scanner, read, at = scan(text)
    again, read_again, at_again = scan(text, piecewise=True)
    assert (scanner.done, scanner.broken, read, at) == (again.done, again.broken, read_again, at_again)
    if scanner.done:
        json.loads(read)
    for end in range(1, len(text) + 1):
        try:
            json.loads(text[:end], strict=False)
        except json.JSONDecodeError:
            continue
        assert scanner.done, "what JSON takes the scanner takes"
        assert at == len(text[:end].rstrip()), "and no more of it"
        break


@pytest.mark.parametrize(
    "text",
    ["{1: 2}", "[01]", "[1.]", "[1e]", "[.5]", "[+1]", "[-]", "[tru]", "[True]", "['a']", "[1,]", '{"a": 1,}', '{"a"}',
     '["\\x"]', '["\\u12g4"]', "[NaN]", "{]", "[}", '{"a": 1 "b": 2}', "[1 2]", "x", "1"],
)  # fmt: skip
def test_what_is_no_json_breaks(text: str) -> None:
    assert scan(text)[0].broken


def test_depth_is_bounded() -> None:
    assert scan("[" * MAX_DEPTH + "]" * MAX_DEPTH)[0].done
    assert scan("[" * (MAX_DEPTH + 1))[0].broken


def test_the_rest_of_an_object() -> None:
    for text in ("}", ' , "id": "x"}', ', "a": {"b": []} }'):
        scanner, _, at = scan(text + "}", inside_object=True)
        assert (scanner.done, at) == (True, len(text))
    assert scan(' "id"', inside_object=True)[0].broken
