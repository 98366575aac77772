"""Calls in what models of each family write: whole, cut anywhere, malformed, and at random."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parsers.recorded import NO_CALLS, RECORDED, TOOLS, calls_of, parse, words_of, written

from core.parsers.events import Arguments, CallStart, Event, Reasoning, Text, merged
from core.parsers.families import TOOL_PARSERS, parser_class
from core.parsers.reader import MAX_ATTEMPT

each_family = pytest.mark.parametrize("family", TOOL_PARSERS)
each_recorded = pytest.mark.parametrize(("family", "text", "events"), RECORDED)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges)]


def test_every_family_is_recorded() -> None:
    assert {family for family, _, _ in RECORDED} == set(TOOL_PARSERS)


@each_recorded
def test_what_a_family_writes_is_understood(family: str, text: str, events: list[Event]) -> None:
    assert parse(family, [text]) == events
    assert parse(family, text) == events, "in single characters"
    assert all(parse(family, [text[:place], text[place:]]) == events for place in range(len(text)))


@given(recorded=st.sampled_from(RECORDED), places=st.lists(st.integers(0, 2000), max_size=8), others=st.data())
def test_events_do_not_depend_on_where_the_stream_is_cut(
    recorded: tuple[str, str, list[Event]], places: list[int], others: st.DataObject
) -> None:
    """Also where one family's parser reads another's text, and text that breaks off."""
    _, text, _ = recorded
    family = others.draw(st.sampled_from(TOOL_PARSERS))
    text = text[: others.draw(st.integers(0, len(text)))]
    assert parse(family, cut(text, places)) == parse(family, [text])


@pytest.mark.parametrize(("family", "text"), NO_CALLS, ids=lambda value: value[:40])
def test_what_is_no_call_is_text(family: str, text: str) -> None:
    assert parse(family, [text]) == parse(family, text) == [Text(text)]


@each_recorded
def test_a_call_of_a_tool_that_was_not_offered_is_text(family: str, text: str, events: list[Event]) -> None:
    parser = parser_class(family)({"another": {}})
    found = merged([*parser.feed(text), *parser.finish()])
    assert not any(isinstance(event, (CallStart, Arguments)) for event in found)
    if family != "harmony":  # whose markup is never text
        assert found == [Text(text)]


# ---- shapes ------------------------------------------------------------------------------------------------------

WORDS = st.text("ab é\"'\\{}[](),:;=\n<>", min_size=1, max_size=12)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": WORDS, "days": st.integers(-5, 10**12), "exact": st.booleans(), "tags": st.lists(WORDS, max_size=3),
        "detail": st.dictionaries(st.sampled_from(["x", "yy"]), st.none() | st.integers() | WORDS),
    },
)  # fmt: skip
CALLS = st.lists(st.tuples(st.sampled_from(["weather", "now"]), ARGUMENTS), min_size=1, max_size=3)


@each_family
@given(calls=CALLS, places=st.lists(st.integers(0, 2000), max_size=4))
def test_a_call_in_the_familys_shape_is_that_call(
    family: str, calls: list[tuple[str, dict[str, Any]]], places: list[int]
) -> None:
    shape = parser_class(family).shape
    if shape.arguments == "tagged":  # strings of tools without a schema are read as what they look like
        calls = [("weather", given) for _, given in calls]
    text = written(shape, calls)
    assert calls_of(parse(family, cut(text, places))) == calls


ESCAPED = """[weather(city="a\\'\\"\\n\\xe9\\u00e9\\U0001F600", detail={'x': ["b\\\\", '''\\t''']})]"""
"""A call whose strings have every kind of escape."""


@each_family
def test_an_answer_may_break_off_anywhere(family: str) -> None:
    """Also within an escape: no character of it is lost, and nothing fails."""
    shape = parser_class(family).shape
    calls: list[tuple[str, dict[str, Any]]] = [("weather", {"city": 'a\\"\n\u00e9', "tags": ["\\", "x"]})]
    text = ESCAPED if shape.arguments == "python" else written(shape, calls)
    for end in range(len(text)):
        events = parse(family, text[:end])
        assert events == parse(family, [text[:end]])
        if shape.arguments == "python":  # a list is a call once it is whole
            assert events == ([Text(text[:end])] if end else [])


# ---- streaming ---------------------------------------------------------------------------------------------------

STREAMS = [family for family in TOOL_PARSERS if parser_class(family).shape.arguments in ("json", "tagged")]


@pytest.mark.parametrize("family", STREAMS)
def test_arguments_come_while_they_are_written(family: str) -> None:
    text = written(parser_class(family).shape, [("write-file.v2", {"path": "a", "text": "long " * 100})])
    parser = parser_class(family)(TOOLS)
    seen = ""
    for position, letter in enumerate(text):
        seen += "".join(event.text for event in parser.feed(letter) if isinstance(event, Arguments))
        come = text[: position + 1].count("long ")
        assert seen.count("long ") >= come - 1, "at most one is kept back"


def test_text_comes_while_it_is_written() -> None:
    for family in TOOL_PARSERS:
        parser = parser_class(family)(TOOLS)
        for letter in "Hello, this is no call.":
            assert parser.feed(letter) == [Text(letter)]


@pytest.mark.parametrize(
    ("family", "text", "name", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Par', "weather", '{"city": "Par'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"a": x}}</tool_call>', "weather", '{"a": x}}'),
        ("mistral", '[TOOL_CALLS]weather{"city": "Par', "weather", '{"city": "Par'),
        ("qwen3_coder", "<function=weather>\n<parameter=city>\nPar", "weather", '{"city": "Par'),
        ("qwen3_coder", "<function=weather>\n<parameter=days>\n12", "weather", '{"days": 12'),
        ("qwen3_coder", "<function=weather>\n<parameter=days>\n12\n</parameter>\n", "weather", '{"days": 12'),
        ("qwen3_coder", "<function=weather>\n", "weather", "{"),
        ("glm", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Par", "weather", '{"city": "Par'),
        ("harmony", '<|channel|>commentary to=functions.weather<|message|>{"city": "Par', "weather", '{"city": "Par'),
    ],
)
def test_arguments_that_break_off_or_are_no_json_are_what_the_model_wrote(
    family: str, text: str, name: str, arguments: str
) -> None:
    assert parse(family, [text]) == [CallStart(name), Arguments(arguments)]


def test_text_between_arguments_ends_the_call_and_is_text() -> None:
    text = "<function=weather>\n<parameter=days>\n1\n</parameter>\nand so on</function>"
    assert parse("qwen3_coder", [text]) == [
        CallStart("weather"),
        Arguments('{"days": 1}'),
        Text("\nand so on</function>"),
    ]


def test_line_breaks_within_strings_are_escaped() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "a\n\tb\x01"}}</tool_call>'
    assert parse("hermes", [text]) == [CallStart("weather"), Arguments('{"city": "a\\n\\tb\\u0001"}')]


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "\\ud800"}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "now"}</tool_call>'),
        ("function_gemma", '<start_function_call>call:now{a:"\\ud800"}<end_function_call>'),
        ("qwen3_coder", '<function=now>\n<parameter=a>\n"\\ud800"\n</parameter>\n</function>'),
    ],
)
def test_half_of_a_surrogate_pair_stays_escaped(family: str, text: str) -> None:
    events = parse(family, [text])
    assert calls_of(events) == [("now", {"a": "\ud800"})]
    assert all(event.text.encode() for event in events if isinstance(event, Arguments))
    assert parse("pythonic", ["[now(a='\\ud800')]"]) == [Text("[now(a='\\ud800')]")]


def test_control_tokens_that_were_kept_for_the_parser_are_not_shown() -> None:
    text = "a[TOOL_CALLS]none[ARGS]b"
    assert parse("mistral", [text], ("[TOOL_CALLS]", "[ARGS]")) == [Text("anoneb")]
    assert parse("mistral", text, ("[TOOL_CALLS]", "[ARGS]")) == [Text("anoneb")]
    assert parse("harmony", ["a<|end|>b<|message|>c"], parser_class("harmony").markup) == [Text("abc")]


# ---- bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", ['{"name": "now"}', '{"name": "now", "arguments": null}', '{"function": {"name": "now"}}']
)
def test_a_call_without_arguments_has_none(call: str) -> None:
    for family, text in (("hermes", f"<tool_call>{call}</tool_call>"), ("llama3_json", call)):
        assert parse(family, [text]) == [CallStart("now"), Arguments("{}")]
    other = '{"name": "now", "note": "else"}'
    assert parse("llama3_json", [other]) == [Text(other)]


@pytest.mark.parametrize("family", ["hermes", "pythonic", "function_gemma"])
@pytest.mark.parametrize("size", [MAX_ATTEMPT // 2, MAX_ATTEMPT + 1000])
def test_so_much_is_kept_back_and_no_more(family: str, size: int) -> None:
    long = "x" * size
    text = {
        "hermes": f'<tool_call>{{"id": "{long}", "arguments": {{}}, "name": "now"}}</tool_call>',
        "pythonic": f"[now(a='{long}')]",
        "function_gemma": f"<start_function_call>call:now{{a:<escape>{long}<escape>}}<end_function_call>",
    }[family]
    events = parse(family, [text])
    assert parse(family, [text[:900], *text[900:]]) == events
    assert any(isinstance(event, CallStart) for event in events) == (size < MAX_ATTEMPT)
    if size > MAX_ATTEMPT:
        assert events == [Text(text)]


# ---- anything ----------------------------------------------------------------------------------------------------

JSON_PIECES = [
    '{"name": "weather", ',
    '"arguments": ',
    '"parameters": ',
    "{",
    "}",
    "[",
    "]",
    ",",
    '"',
    ":",
    "\\",
    "\n",
    "{}",
]
PYTHON_PIECES = [
    "'\\ud800'",
    '"\\ud800"',
    "weather(",
    "city=",
    "'",
    ")",
    "now()",
    "print(",
    "1e999",
    "\\u",
    "```",
    "call:",
    "{",
    "}",
]


def pieces_of(family: str) -> list[str]:
    found = parser_class(family)
    shape = found.shape
    parts = (shape.first, shape.begin, shape.middle, shape.end, shape.between, shape.last, shape.parameter_end)
    more = [shape.parameter_begin.format(key="city", is_text="true")] if shape.parameter_begin else []
    return [part for part in (*found.openings, *found.markup, *parts, *more) if part]


@each_family
def test_random_answers_raise_nothing_and_lose_nothing(family: str) -> None:
    """10,000 over all families, of the family's own markup, JSON, Python, tools and numbered words."""
    chance = random.Random(family)
    alphabet = [*pieces_of(family), *JSON_PIECES, *PYTHON_PIECES, *TOOLS]
    for _ in range(10_000 // len(TOOL_PARSERS) + 1):
        parts = [
            chance.choice(alphabet) if chance.random() < 0.8 else f"§{number} "
            for number in range(chance.randrange(40))
        ]
        text = "".join(parts)
        if chance.random() < 0.3:
            text = text[chance.randrange(len(text) + 1) :]
        events = parse(family, [text])
        assert parse(family, text) == events
        shown = "".join(event.name if isinstance(event, CallStart) else event.text for event in events)
        assert words_of(shown) == words_of(text), text
        shown.encode()  # it is text
        if not any(isinstance(event, (CallStart, Reasoning)) for event in events) and family != "harmony":
            assert shown == text


@each_family
@given(text=st.text(max_size=200), places=st.lists(st.integers(0, 200), max_size=5))
def test_any_text_is_text(family: str, text: str, places: list[int]) -> None:
    assert "".join(event.text for event in parse(family, cut(text, places)) if isinstance(event, Text)) == text
