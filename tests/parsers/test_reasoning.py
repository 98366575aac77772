"""Thoughts, told from the answer: whole, cut anywhere, begun in the prompt, and never ended."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parsers.recorded import TOOLS, call, read

from core.parsers.answers import AnswerParser, tokens_to_keep
from core.parsers.events import Event, Reasoning, Text
from core.parsers.families import OutputFormat, recognise
from core.parsers.reasoning import TAGS, ThinkParser, is_open_at_end

each_family = pytest.mark.parametrize("family", TAGS)


def split(family: str, text: str, *, is_open: bool = False, whole: bool = True) -> list[Event]:
    return read(ThinkParser(TAGS[family], is_open=is_open), [text] if whole else text)


@each_family
@pytest.mark.parametrize("whole", [True, False])
def test_thoughts_are_split_off(family: str, whole: bool) -> None:
    begin, end = TAGS[family].open, TAGS[family].close
    expected = [Reasoning("Well,\n\nwell."), Text("Hello <think>\n")]
    for text in (f"{begin}Well,\n\nwell.{end}Hello <think>\n", f"\n{begin}\nWell,\n\nwell.\n{end}\n\nHello <think>\n"):
        assert split(family, text, whole=whole) == expected
        assert split(family, text.lstrip("\n").removeprefix(begin), is_open=True, whole=whole) == expected
        assert split(family, text, is_open=True, whole=whole) == expected, "the tag once more"


@pytest.mark.parametrize(
    ("text", "is_open", "events"),
    [
        ("Hello", False, [Text("Hello")]),
        ("Hello <think>x</think>", False, [Text("Hello <think>x</think>")]),
        (" \n", False, [Text(" \n")]),
        ("", False, []),
        ("<think>never ends", False, [Reasoning("never ends")]),
        ("never ends", True, [Reasoning("never ends")]),
        ("<think></think>", False, []),
        ("<think>a</think>\n", False, [Reasoning("a")]),
        ("</think>Hello", True, [Text("Hello")]),
        ("<thin", False, [Text("<thin")]),
        ("a </thi", True, [Reasoning("a </thi")]),
    ],
)
def test_edges(text: str, is_open: bool, events: list[Event]) -> None:
    assert split("think", text, is_open=is_open) == split("think", text, is_open=is_open, whole=False) == events


@each_family
@given(parts=st.lists(st.sampled_from(["a", " ", "\n", "<", "open", "close"]), max_size=12), is_open=st.booleans())
def test_nothing_but_white_space_is_lost(family: str, parts: list[str], is_open: bool) -> None:
    tags = {"open": TAGS[family].open, "close": TAGS[family].close}
    text = "".join(tags.get(part, part) for part in parts)
    events = split(family, text, is_open=is_open)
    assert events == split(family, text, is_open=is_open, whole=False)
    shown = "".join(event.text for event in events if isinstance(event, (Text, Reasoning)))
    for tag in tags.values():
        shown, text = shown.replace(tag.strip(), ""), text.replace(tag.strip(), "")
    assert "".join(shown.split()) == "".join(text.split())


def test_where_a_prompt_ends() -> None:
    tags = TAGS["think"]
    assert is_open_at_end(tags, "<|assistant|><think>\n")
    assert not is_open_at_end(tags, "<|assistant|>")
    assert not is_open_at_end(tags, "<think>\n\n</think>\n\n")
    assert is_open_at_end(TAGS["gemma4"], "<|channel>thought\n")


CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


@pytest.mark.parametrize("whole", [True, False])
def test_thoughts_then_calls(whole: bool) -> None:
    both = OutputFormat("hermes", "think")
    text = f"<think>{CALL}</think>Look: {CALL}"
    pieces = [text] if whole else text
    events = [Reasoning(CALL), Text("Look: "), *call("now", "{}")]
    assert read(AnswerParser(both, TOOLS), pieces) == events
    assert read(AnswerParser(both, {}), pieces) == [Reasoning(CALL), Text(f"Look: {CALL}")]
    assert read(AnswerParser(OutputFormat("hermes", None), TOOLS), CALL) == call("now", "{}")


def test_a_message_that_goes_on_may_be_within_thoughts() -> None:
    for continued, events in (("<think>so", [Reasoning("a"), Text("b")]), ("<think>so</think>", [Text("a</think>b")])):
        parser = AnswerParser(OutputFormat(None, "think"), {}, prompt_end="<think>", continued=continued)
        assert read(parser, "a</think>b") == events


def test_special_tokens_are_kept_for_what_reads_them() -> None:
    known = OutputFormat("mistral", "mistral", {"[TOOL_CALLS]": 7}, {"[THINK]": 8, "[/THINK]": 9})
    assert sorted(tokens_to_keep(known, has_tools=True)) == [7, 8, 9]
    assert sorted(tokens_to_keep(known, has_tools=False)) == [8, 9]
    assert read(AnswerParser(known, {}), ["[THINK]a[/THINK]b[/THINK]c"]) == [Reasoning("a"), Text("bc")]


def test_parts_of_tags_may_be_special_tokens() -> None:
    found = recognise("{{ '<|channel>thought\n<channel|>' }}", {1: "<|channel>", 2: "<channel|>", 3: "<|turn>"})
    assert (found.reasoning_parser, found.thought_tokens) == ("gemma4", {"<|channel>": 1, "<channel|>": 2})
    assert read(AnswerParser(found, {}), "<|channel>thought\na<channel|>b") == [Reasoning("a"), Text("b")]


def test_random_answers_of_models_that_think_and_call() -> None:
    chance = random.Random(1)
    parts = ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "now", "arguments": {', "}", "\n", "word "]
    for _ in range(2000):
        text = "".join(chance.choices(parts, k=chance.randrange(12)))
        both = OutputFormat("hermes", "think")
        events = read(AnswerParser(both, TOOLS), [text])
        assert read(AnswerParser(both, TOOLS), text) == events
        shown = "".join(event.text for event in events if not hasattr(event, "name"))
        assert shown.count("word") == text.count("word")
