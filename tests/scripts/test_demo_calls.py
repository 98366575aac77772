"""Conversations with functions and small JSON: what the demo model learns them from, and how it is measured."""

from __future__ import annotations

import json
from itertools import islice
from random import Random

import demo_corpus as corpus
import pytest
from demo_corpus import calling, heldout_calls, objects, tool_tables
from demo_corpus.calling import CALL, Message, Tool
from demo_corpus.heldout_calls import CALL_CASES, CallCase, calls_in
from demo_training import evaluation
from demo_training.network import CHAT_TEMPLATE
from transformers import PreTrainedTokenizerFast

from core.models.resolve import DEMO_PATH
from core.parsers.families import recognise

SEED = 13


@pytest.fixture(scope="module")
def talks() -> list[tuple[list[Tool], list[Message]]]:
    rng = Random(SEED)
    return [calling.talk(rng, corpus.vary) for _ in range(600)]


def test_the_chat_template_writes_what_is_trained_on(talks: list[tuple[list[Tool], list[Message]]]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_PATH)
    tokenizer.chat_template = CHAT_TEMPLATE
    for tools, messages in talks[:100]:
        given = [message.openai() for message in messages]
        rendered = tokenizer.apply_chat_template(given, tools=[tool.schema() for tool in tools], tokenize=False)
        assert rendered == "".join(text for text, _ in calling.render_talk(tools, messages))


def test_the_family_of_the_template_is_the_one_that_calls_are_written_in() -> None:
    assert recognise(CHAT_TEMPLATE, {}).tool_parser == "hermes"


def test_a_client_may_leave_out_what_schemas_need_not_have() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_PATH)
    tokenizer.chat_template = CHAT_TEMPLATE
    properties = {"a": {"type": "string"}, "b": {"enum": [1, 2]}}
    tools = [
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "function": {"name": "g", "parameters": {"properties": properties, "required": ["a"]}}},
    ]
    messages = [{"role": "developer", "content": " Short. "}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    listed = "<|system|>Short.\nTools:\nf()\ng(a: string, b?)<|end|>"
    assert text == f"<|bos|>{listed}<|user|>Hi<|end|><|assistant|>"


def test_calls_are_of_functions_that_are_offered(talks: list[tuple[list[Tool], list[Message]]]) -> None:
    calls = 0
    for tools, messages in talks:
        offered = {tool.name: tool for tool in tools}
        asked = " ".join(message.text for message in messages if message.role == "user")
        for message in messages:
            for name, arguments in message.calls:
                parameters = dict(offered[name].parameters)
                assert list(arguments) == list(parameters)
                for parameter, value in arguments.items():
                    assert str(value) in asked
                    assert isinstance(value, str if parameters[parameter] == "string" else int)
                calls += 1
    without = sum(not any(message.calls for message in messages) for _, messages in talks)
    assert calls > 400 and 60 < without < 200


def test_nothing_that_is_held_out_is_generated() -> None:
    text = "".join(part for segments in islice(corpus.documents(SEED, focus=True), 4000) for part, _ in segments)
    assert text.count("<tool_call>") > 500
    assert not [name for name in heldout_calls.NEVER_SHOWN if name in text]
    places = {call[1]["city"] for case in CALL_CASES if "places" in case.kind for call in case.calls}
    assert len(places) == 10 and not places & set(tool_tables.PLACES)
    asked = {message.text for message in (case.messages[0] for case in CALL_CASES if case.value is not None)}
    assert len(asked) == 10 and not [question for question in asked if f"{question}{corpus.END}" in text]


def test_held_out_wordings_are_known_in_any_case() -> None:
    assert corpus.is_held_out("should i take an umbrella in oslo")
    assert not corpus.is_held_out("What is the weather in Oslo?")


def test_small_json_parses_and_is_made_of_the_question() -> None:
    rng = Random(SEED)
    for _ in range(300):
        question, answer = objects.question(rng)
        value = json.loads(answer)
        assert isinstance(value, dict) and json.dumps(value) == answer
        if "capital" not in value and not any(isinstance(each, list) for each in value.values()):
            assert all(
                json.dumps(each).strip('"') in question.lower() or str(each) in question for each in value.values()
            )


def right_answer(case: CallCase) -> str:
    if case.value is not None:
        return json.dumps(case.value)
    calls = (CALL.format(name=name, arguments=json.dumps(arguments)) for name, arguments in case.calls)
    return "\n".join(calls) if case.calls else " ".join(case.words)


@pytest.mark.parametrize("case", CALL_CASES, ids=lambda case: f"{case.messages[0].text}-{len(case.tools)}")
def test_every_case_can_be_met_and_missed(case: CallCase) -> None:
    right = right_answer(case)
    assert case.right(right)
    assert not case.right("")
    assert not case.right(right.replace('"name"', '"nam"') if case.calls else right[1:])
    assert not case.right(right + CALL.format(name="f", arguments="{}"))
    assert case.wanted


def test_what_is_no_json_is_no_call() -> None:
    assert calls_in("<tool_call>\n{\n</tool_call>") == [("", {})]


def test_the_page_counts_and_shows_calls() -> None:
    answered = [(case, right_answer(case) if case.calls else "no") for case in CALL_CASES]
    counts = evaluation.count_calls(answered)
    assert counts["calls: places never shown"] == (10, 10) and counts["small JSON"] == (0, 10)
    text = evaluation.page([], {}, answered)
    assert "| calls: places never shown | 10 of 10 |" in text and "| small JSON | 0 of 10 |" in text
    assert '{"name": "get_weather", "arguments": {"city": "Kyoto"}}' in text
