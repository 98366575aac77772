"""Which family a model belongs to, by what its template says and by its tokens; and its parsers by name."""

from __future__ import annotations

from typing import get_args

import pytest

from core.errors import InvalidRequestError
from core.parsers.families import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    OutputFormat,
    ReasoningParserName,
    ToolParserName,
    parser_class,
    recognise,
)
from core.parsers.reasoning import TAGS

WITH_TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
TEMPLATES = {
    "hermes": r"""{{ '<tool_call>\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}{{ '}\n</tool_call>' }}""",
    "qwen3_coder": "For each call: <tool_call>\n<function=example>\n<parameter=p>\nvalue\n</parameter>",
    "llama3_json": r"""Respond in the format {"name": function name, "parameters": dictionary of argument name}.
        {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}""",
    "mistral": """{{ "[TOOL_CALLS] [" }}{{ tool_call.function|tojson }}{{ ', "id": "' }}""",
    "mistral_named": "{{- '[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + arguments }}",
    "harmony": "{{- '<|start|>assistant<|channel|>commentary to=functions.' }}{{- 'json<|message|>' }}",
    "deepseek_v3": r"""{{ tool['type'] + '<｜tool▁sep｜>' }}{{ name + '\n' + '```json' + '\n' }}""",
    "deepseek_v31": "{{ tool.name + '<｜tool▁sep｜>' + tool.arguments + '<｜tool▁call▁end｜>' }}",
    "deepseek_v32": """{% set dsml_token = "｜DSML｜" %}<{{ dsml_token }}function_calls>""",
    "glm": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>",
    "granite": "write '<|tool_call|>' followed by a JSON list of tools used",
    "pythonic": "you should put it in the format of [func_name1(params_name1=params_value1), func_name2(params)]",
    "gemma": "put the calls in a block\n```tool_code\n```",
    "function_gemma": "{{ '<start_function_call>call:' + name + '{' }}",
    "minimax_m2": "{%- set toolcall_begin_token = '<minimax:tool_call>' -%}<invoke name=",
    "kimi_k2": "<|tool_call_begin|>{{ tool_call['id'] }}<|tool_call_argument_begin|>{{ arguments }}<|tool_call_end|>",
    "gemma4": "{{- '<|tool_call>call:' + function['name'] + '{' -}}",
}


def test_every_family_is_recognised() -> None:
    assert set(TEMPLATES) == set(TOOL_PARSERS)


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_family_is_recognised_by_its_template(family: str) -> None:
    assert recognise(WITH_TOOLS + TEMPLATES[family], {}).tool_parser == family
    assert recognise(TEMPLATES[family].replace("tools", ""), {}).tool_parser is None, "it takes no tools"


def test_tokens_tell_where_the_template_does_not() -> None:
    for family, token in (
        ("mistral", "[TOOL_CALLS]"),
        ("llama3_json", "<|python_tag|>"),
        ("pythonic", "<|python_start|>"),
    ):
        assert recognise(WITH_TOOLS, {7: token}).tool_parser == family
        assert recognise(WITH_TOOLS, {}, {token}).tool_parser == family
        assert recognise("", {7: token}).tool_parser is None
    assert recognise(WITH_TOOLS, {}).tool_parser is None


@pytest.mark.parametrize("family", TAGS)
def test_thoughts_are_recognised_by_template_or_tokens(family: str) -> None:
    tags = TAGS[family]
    assert recognise(f"{{% if '{tags.close}' in content %}}", {}).reasoning_parser == family
    assert recognise("", {}, {tags.open, tags.close}).reasoning_parser == family
    assert recognise("", {}, {tags.open}).reasoning_parser is None


def test_harmony_is_both() -> None:
    assert recognise(WITH_TOOLS + TEMPLATES["harmony"], {}).reasoning_parser == "harmony"


def test_parsers_are_given_the_special_tokens_that_they_need() -> None:
    special = {1: "</s>", 2: "[TOOL_CALLS]", 3: "[ARGS]", 4: "[THINK]", 5: "[/THINK]", 6: "[INST]"}
    found = recognise(WITH_TOOLS + TEMPLATES["mistral_named"], special)
    assert found == OutputFormat(
        "mistral_named", "mistral", {"[TOOL_CALLS]": 2, "[ARGS]": 3}, {"[THINK]": 4, "[/THINK]": 5}
    )
    ordinary = {**special, 9: "<tool_call>"}
    assert recognise(WITH_TOOLS + TEMPLATES["hermes"], ordinary, tool_parser="hermes").call_tokens == {"<tool_call>": 9}


def test_settings_go_before_what_is_recognised() -> None:
    found = recognise(TEMPLATES["hermes"], {}, {"<think>", "</think>"}, tool_parser="glm", reasoning_parser="kimi")
    assert (found.tool_parser, found.reasoning_parser) == ("glm", "kimi")
    found = recognise(WITH_TOOLS + TEMPLATES["harmony"], {}, tool_parser="none", reasoning_parser="none")
    assert (found.tool_parser, found.reasoning_parser) == (None, None)


def test_an_unknown_name_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(InvalidRequestError, match=r"auto, none, hermes, .*harmony") as refused:
        recognise("", {}, tool_parser="unheard-of")
    assert refused.value.param == "tool_parser"
    with pytest.raises(InvalidRequestError, match=r"auto, none, think, .*harmony"):
        recognise("", {}, reasoning_parser="unheard-of")


def test_settings_know_every_parser() -> None:
    assert get_args(ToolParserName) == ("auto", "none", *TOOL_PARSERS)
    assert set(REASONING_PARSERS) == {*TAGS, "harmony"}
    assert get_args(ReasoningParserName)[:2] == ("auto", "none")
    assert all(parser_class(name).openings for name in TOOL_PARSERS)
