"""Tools and reasoning in chat completions: what the model is shown, and what clients get, whole and in streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from api_client import ApiClient
from fake_pipeline import GRAMMARS, FakePipeline

from core.api.openai.answers import AnswerReader
from core.api.openai.tools import read_offer
from core.parsers.families import OutputFormat
from core.request import Completion

URL = "/v1/chat/completions"
USER = {"role": "user", "content": "a"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says what the weather is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
BODY = {"messages": [USER], "tools": [WEATHER, NOW]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TWO = f'Let me see.\n{CALL}\n<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>'


def family(pipeline: FakePipeline, tool_parser: str | None, reasoning_parser: str | None = None) -> None:
    pipeline.fake_model = replace(pipeline.model, output_format=OutputFormat(tool_parser, reasoning_parser))


@pytest.fixture
def hermes(pipeline: FakePipeline) -> FakePipeline:
    family(pipeline, "hermes")
    return pipeline


Shown = list[tuple[list[dict[str, Any]], dict[str, Any]]]


@pytest.fixture
def shown(hermes: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """The messages and the options that the template was given."""
    seen: Shown = []

    def encode_chat(messages: list[dict[str, Any]], **options: Any) -> list[int]:
        seen.append((messages, options))
        return [97]

    monkeypatch.setattr(hermes.model.tokenizer, "encode_chat", encode_chat)
    return seen


def joined(chunks: list[Any], index: int = 0) -> tuple[dict[str, Any], str]:
    """The message that a stream's chunks make, put together as OpenAI's clients do, and why it ended."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = ""
    for chunk in chunks:
        for choice in chunk["choices"] if chunk != "[DONE]" else ():
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for piece in delta.get("tool_calls", ()):
                if piece["index"] == len(message["tool_calls"]):
                    assert piece["function"]["arguments"] == ""
                    message["tool_calls"].append({key: piece[key] for key in ("id", "type", "function")})
                else:
                    assert set(piece) == {"index", "function"}
                    message["tool_calls"][piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return message, reason


# ---- answers -----------------------------------------------------------------------------------------------------


def test_a_call_is_a_message_of_calls(client: ApiClient, hermes: FakePipeline) -> None:
    hermes.reply = CALL
    (choice,) = client.post(URL, BODY).get_json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call_")
    assert call == {
        "id": call["id"], "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }  # fmt: skip


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_makes_the_same_message(client: ApiClient, hermes: FakePipeline, n: int) -> None:
    hermes.reply = TWO
    whole = client.post(URL, BODY | {"n": n}).get_json()
    chunks = client.events(URL, BODY | {"n": n, "stream_options": {"include_usage": True}})
    assert chunks[-2]["usage"] == whole["usage"]
    ids = set()
    for choice in whole["choices"]:
        message, reason = joined(chunks, choice["index"])
        assert reason == choice["finish_reason"] == "tool_calls"
        assert message["content"] == choice["message"]["content"] == "Let me see.\n"
        functions = [call["function"] for call in message["tool_calls"]]
        assert functions == [call["function"] for call in choice["message"]["tool_calls"]]
        assert [json.loads(item["arguments"]) for item in functions] == [{"city": "Oslo"}, {}]
        ids |= {call["id"] for call in (*message["tool_calls"], *choice["message"]["tool_calls"])}
    assert len(ids) == 4 * n, "every call has an id of its own"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_text_arguments_and_ids_do_not_depend_on_the_pieces(hermes: FakePipeline, size: int) -> None:
    offer = read_offer([WEATHER, NOW], None, None, hermes.model)
    reader = AnswerReader(hermes.model, offer)
    whole, reason = reader.message("chatcmpl-1", Completion(0, TWO, finish_reason="stop"))
    deltas = reader.begin("chatcmpl-1", 0)
    pieces = [TWO[at : at + size] for at in range(0, len(TWO), size)]
    found = [delta for piece in pieces for delta in deltas.feed(piece)] + list(deltas.finish())
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in found]
    streamed = joined(chunks)[0]
    assert (streamed["content"], streamed["tool_calls"]) == (whole["content"], whole["tool_calls"])
    assert deltas.finish_reason("stop") == reason == "tool_calls"


def test_arguments_are_streamed_in_pieces(client: ApiClient, hermes: FakePipeline) -> None:
    hermes.reply = CALL
    deltas = [chunk["choices"][0]["delta"] for chunk in client.events(URL, BODY)[:-1]]
    pieces = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas if "tool_calls" in delta]
    assert len(pieces) > 10
    assert "".join(pieces) == '{"city": "Oslo"}'


@pytest.mark.parametrize(
    "reply", ["Hello", "<tool_call>none</tool_call>", CALL.replace("weather", "unheard-of"), " \n"]
)
def test_an_answer_without_a_call_is_text(client: ApiClient, hermes: FakePipeline, reply: str) -> None:
    hermes.reply = reply
    (choice,) = client.post(URL, BODY).get_json()["choices"]
    assert (choice["message"], choice["finish_reason"]) == (
        {"role": "assistant", "content": reply, "refusal": None}, "stop",
    )  # fmt: skip
    assert joined(client.events(URL, BODY))[0]["content"] == reply


def test_a_call_that_is_cut_off_ended_by_length(client: ApiClient, hermes: FakePipeline) -> None:
    hermes.reply = CALL
    body = BODY | {"max_tokens": CALL.index("slo")}
    (choice,) = client.post(URL, body).get_json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "O'
    message, reason = joined(client.events(URL, body))
    assert (message["tool_calls"][0]["function"]["arguments"], reason) == ('{"city": "O', "length")


def test_one_call_where_parallel_calls_are_not_wanted(client: ApiClient, hermes: FakePipeline) -> None:
    hermes.reply = TWO
    body = BODY | {"parallel_tool_calls": False}
    (choice,) = client.post(URL, body).get_json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]
    assert [call["function"]["name"] for call in joined(client.events(URL, body))[0]["tool_calls"]] == ["weather"]


def test_log_probabilities_come_with_calls(client: ApiClient, hermes: FakePipeline) -> None:
    hermes.reply = CALL
    chunks = client.events(URL, BODY | {"logprobs": True})[:-1]
    shown = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert bytes(byte for item in shown for entry in item["content"] for byte in entry["bytes"]).decode() == CALL


def test_mistrals_ids_have_nine_letters(client: ApiClient, pipeline: FakePipeline) -> None:
    family(pipeline, "mistral")
    pipeline.reply = "[TOOL_CALLS]now{}"
    call_id = client.post(URL, BODY).get_json()["choices"][0]["message"]["tool_calls"][0]["id"]
    assert len(call_id) == 9
    assert call_id.isalnum()


# ---- what the model is shown ---------------------------------------------------------------------------------------


def test_the_template_gets_the_tools(client: ApiClient, shown: Shown) -> None:
    assert client.post(URL, BODY).status_code == 200
    assert shown[0][1]["tools"] == [
        WEATHER,
        {
            "type": "function",
            "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
        },
    ]


def test_tools_of_other_types_are_skipped(client: ApiClient, shown: Shown, hermes: FakePipeline) -> None:
    others = [{"type": "web_search"}, {"type": "custom", "custom": {"name": "x"}}]
    assert client.post(URL, BODY | {"tools": [*others, NOW]}).status_code == 200
    assert [tool["function"]["name"] for tool in shown[0][1]["tools"]] == ["now"]
    assert client.post(URL, BODY | {"tools": others}).status_code == 200
    assert shown[1][1]["tools"] is None


def test_allowed_tools_are_all_shown_and_some_called(client: ApiClient, shown: Shown, hermes: FakePipeline) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NOW]}}
    hermes.reply = TWO
    (choice,) = client.post(URL, BODY | {"tool_choice": allowed}).get_json()["choices"]
    assert len(shown[0][1]["tools"]) == 2
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"]


def test_without_a_choice_to_call_nothing_is_shown_or_read(
    client: ApiClient, shown: Shown, hermes: FakePipeline
) -> None:
    hermes.reply = CALL
    (choice,) = client.post(URL, BODY | {"tool_choice": "none"}).get_json()["choices"]
    assert shown[0][1]["tools"] is None
    assert choice["message"]["content"] == CALL


HISTORY = [
    USER,
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [
        {"id": "call_0123456789", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]},
    {"role": "tool", "tool_call_id": "call_0123456789", "content": "noon"},
]  # fmt: skip


def test_mistrals_template_gets_ids_that_it_takes(client: ApiClient, shown: Shown, hermes: FakePipeline) -> None:
    family(hermes, "mistral")
    assert client.post(URL, {"messages": HISTORY}).status_code == 200
    _, assistant, result = shown[0][0]
    assert assistant["tool_calls"][0]["id"] == result["tool_call_id"]
    assert len(result["tool_call_id"]) == 9
    assert result["tool_call_id"].isalnum()


def test_kimis_template_gets_ids_that_name_functions(client: ApiClient, shown: Shown, hermes: FakePipeline) -> None:
    family(hermes, "kimi_k2")
    assert client.post(URL, {"messages": [*HISTORY, *HISTORY]}).status_code == 200
    _, first, result, _, second, other = shown[0][0]
    assert first["tool_calls"][0]["id"] == result["tool_call_id"] == "functions.now:0"
    assert second["tool_calls"][0]["id"] == other["tool_call_id"] == "functions.now:1"


def test_harmonys_template_gets_thoughts_by_its_name(client: ApiClient, shown: Shown, hermes: FakePipeline) -> None:
    family(hermes, "harmony", "harmony")
    assert client.post(URL, {"messages": HISTORY}).status_code == 200
    assert shown[0][0][1]["thinking"] == "hm"
    both = [USER, {**HISTORY[1], "content": "b"}]
    assert client.post(URL, {"messages": both}).status_code == 200
    assert "thinking" not in shown[1][0][1]


# ---- what is refused -----------------------------------------------------------------------------------------------


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


def schema(**parameters: Any) -> list[dict[str, Any]]:
    return tool(parameters={"type": "object", **parameters})


PARAMETERS = "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("tools", "param", "where"),
    [
        ("x", "tools", ""),
        ([3], "tools[0]", ""),
        ([{"type": 3}], "tools[0]", ""),
        ([NOW, {"type": "function"}], "tools[1].function", ""),
        (tool(name=""), "tools[0].function.name", ""),
        (tool(name="a b"), "tools[0].function.name", ""),
        (tool(name="a" * 65), "tools[0].function.name", ""),
        (tool(description=3), "tools[0].function.description", ""),
        (tool(strict="yes"), "tools[0].function.strict", ""),
        ([NOW, NOW], "tools[1].function.name", ""),
        ([{"type": "function", "function": {"name": f"f{number}"}} for number in range(129)], "tools", ""),
        (tool(description="x" * 600_000), "tools", ""),
        (tool(parameters=3), PARAMETERS, ""),
        (tool(parameters={"type": "string"}), PARAMETERS, "/type"),
        (schema(properties=[]), PARAMETERS, "/properties"),
        (schema(properties={"a": 3}), PARAMETERS, "/properties/a"),
        (schema(properties={"a": {"type": "str"}}), PARAMETERS, "/properties/a/type"),
        (schema(properties={"a/b": {"type": ["string", 3]}}), PARAMETERS, "/properties/a~1b/type"),
        (schema(properties={"a": {"items": {"enum": []}}}), PARAMETERS, "/properties/a/items/enum"),
        (schema(properties={"a": {"anyOf": []}}), PARAMETERS, "/properties/a/anyOf"),
        (schema(properties={"a": {"anyOf": [{"minimum": "1"}]}}), PARAMETERS, "/properties/a/anyOf/0/minimum"),
        (schema(properties={"a": {"maxLength": -1}}), PARAMETERS, "/properties/a/maxLength"),
        (schema(properties={"a": {"prefixItems": [True, None]}}), PARAMETERS, "/properties/a/prefixItems/1"),
        (schema(required="a"), PARAMETERS, "/required"),
        (schema(required=["a", "a"]), PARAMETERS, "/required"),
        (schema(additionalProperties="no"), PARAMETERS, "/additionalProperties"),
        (schema(properties={"a": {"$ref": "#/$defs/b"}}), PARAMETERS, "/properties/a/$ref"),
        (schema(properties={"a": {"$ref": "http://x"}}), PARAMETERS, "/properties/a/$ref"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_malformed_tools_are_refused_where_they_are(
    client: ApiClient, hermes: FakePipeline, tools: Any, param: str, where: str
) -> None:
    error = client.error(URL, BODY | {"tools": tools}, status=400)
    assert error["param"] == param
    assert f" at {where} " in error["message"] if where else error["message"]
    assert not hermes.submitted


def test_good_schemas_are_taken(client: ApiClient, hermes: FakePipeline) -> None:
    properties = {
        "a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "c": True, "d": {},
        "e": {"type": ["integer", "null"], "minimum": 0, "multipleOf": 0.5, "x-vendor": [1]},
        "f": {"type": "array", "items": [{"type": "string"}], "minItems": 1, "uniqueItems": True},
    }  # fmt: skip
    parameters = {"properties": properties, "$defs": {"b": {"enum": [1, None]}}, "additionalProperties": False}
    assert client.post(URL, BODY | {"tools": tool(parameters=parameters, strict=False)}).status_code == 200
    assert client.post(URL, BODY | {"tools": tool(parameters=None, description=None)}).status_code == 200


NAMED = {"type": "function", "function": {"name": "now"}}
REQUIRED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"tool_choice": "required"}, {"weather", "now"}),
        ({"tool_choice": NAMED}, {"now"}),
        ({"tool_choice": REQUIRED}, {"now"}),
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"weather", "now"}),
    ],
)
def test_required_calls_are_constrained(
    client: ApiClient, hermes: FakePipeline, extra: dict[str, Any], names: set[str]
) -> None:
    assert client.post(URL, BODY | extra).status_code == 200
    ((_, params),) = hermes.submitted
    assert params.grammar is not None
    matcher = GRAMMARS.matcher(params.grammar)
    for name in ("weather", "now"):
        head = f'<tool_call>\n{{"name": "{name}", "arguments": {{'.encode()
        assert matcher.validate_tokens(list(head)) == (len(head) if name in names else head.index(name.encode()))
    assert matcher.validate_tokens(list(b"I")) == 0, "text is none"
    call = b'<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    more = matcher.validate_tokens(list(call + b"\n" + call))
    assert (more == len(call)) == ("parallel_tool_calls" in extra or extra["tool_choice"] == NAMED)


@pytest.mark.parametrize(
    ("parameters", "takes_others"),
    [
        ({"type": "object", "properties": {"a": {}}}, False),
        ({"properties": {"a": {}}, "required": ["a"]}, False),
        (None, False),
        ({"type": "object"}, True),
        ({"properties": {"a": {}}, "additionalProperties": True}, True),
        ({"properties": {"a": {}}, "patternProperties": {"^b": {}}}, True),
        ({"properties": {"a": {}}, "required": ["b"]}, True),
    ],
    ids=str,
)
def test_calls_have_the_arguments_that_their_schema_names(
    client: ApiClient, hermes: FakePipeline, parameters: Any, takes_others: bool
) -> None:
    tools = [{"type": "function", "function": {"name": "now", "parameters": parameters}}]
    assert client.post(URL, BODY | {"tools": tools, "tool_choice": "required"}).status_code == 200
    matcher = GRAMMARS.matcher(hermes.submitted[0][1].grammar)
    call = b'<tool_call>\n{"name": "now", "arguments": {%s}}'
    given = b'"a": 1, "b": 2' if parameters and "a" in parameters.get("properties", {}) else b'"b": 2'
    assert (matcher.validate_tokens(list(call % given)) == len(call % given)) == takes_others


def test_a_strict_function_is_constrained_where_it_is_called_and_others_are_free(
    client: ApiClient, hermes: FakePipeline
) -> None:
    tools = [
        *tool(name="weather", strict=True, parameters={"properties": {"n": {"type": "integer"}}, "required": ["n"]}),
        NOW,
    ]
    assert client.post(URL, BODY | {"tools": tools}).status_code == 200
    ((_, params),) = hermes.submitted
    assert params.grammar is not None
    matcher = GRAMMARS.matcher(params.grammar)
    for text, taken in (
        (b"Text, <b>bold</b>.", True),
        (b'I look. <tool_call>\n{"name": "now", "arguments": {"x": 1}}\n</tool_call> So.', True),
        (b'<tool_call>\n{"name": "weather", "arguments": {"n": 1}}\n</tool_call>', True),
        (b'<tool_call>\n{"name": "weather", "arguments": {"n": "1"', False),
        (b'<tool_call>\n{"name": "weather", "arguments": {}', False),
        (b'<tool_call>\n{"name": "other"', False),
    ):
        assert (matcher.validate_tokens(list(text)) == len(text)) == taken, text


def test_plain_tools_leave_the_answer_free(client: ApiClient, hermes: FakePipeline) -> None:
    assert client.post(URL, BODY).status_code == 200
    ((_, params),) = hermes.submitted
    assert params.grammar is None


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("any", "tool_choice"),
        (3, "tool_choice"),
        ({"type": "custom"}, "tool_choice"),
        ({"type": "function"}, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "unheard-of"}}, "tool_choice.function.name"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "allowed_tools": {"tools": []}}, "tool_choice.allowed_tools.mode"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}},
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
    ],
)
def test_wrong_choices(client: ApiClient, hermes: FakePipeline, choice: Any, param: str) -> None:
    error = client.error(URL, BODY | {"tool_choice": choice}, status=400)
    assert (error["code"], error["param"]) == (None, param)


def test_a_choice_needs_tools(client: ApiClient, hermes: FakePipeline) -> None:
    for choice in ("required", NAMED):
        assert client.error(URL, {"messages": [USER], "tool_choice": choice}, status=400)["param"].startswith(
            "tool_choice"
        )


def test_tools_of_a_model_whose_calls_nobody_can_read(client: ApiClient, pipeline: FakePipeline) -> None:
    error = client.error(URL, BODY, status=400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")
    assert "hermes" in error["message"]


def test_an_unknown_parser_is_refused_with_those_there_are(client: ApiClient, pipeline: FakePipeline) -> None:
    for name in ("tool_parser", "reasoning_parser"):
        error = client.error("/api/models/load", {"model": "m", name: "unheard-of"}, status=400)
        assert error["param"] == name
        assert "'harmony'" in error["message"]
        assert not pipeline.loads


# ---- reasoning -----------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nWell, well.\n</think>\n\nHello"


def test_thoughts_are_split_off(client: ApiClient, pipeline: FakePipeline) -> None:
    family(pipeline, None, "think")
    pipeline.reply = THOUGHT
    (choice,) = client.post(URL, {"messages": [USER]}).get_json()["choices"]
    message = {"role": "assistant", "content": "Hello", "refusal": None, "reasoning_content": "Well, well."}
    assert (choice["message"], choice["finish_reason"]) == (message, "stop")
    streamed, reason = joined(client.events(URL, {"messages": [USER]}))
    assert (streamed["content"], streamed["reasoning_content"], reason) == ("Hello", "Well, well.", "stop")


@pytest.mark.parametrize("n", [1, 2])
def test_tokens_of_thoughts_are_counted(client: ApiClient, pipeline: FakePipeline, n: int) -> None:
    body = {"messages": [USER], "n": n}
    assert "completion_tokens_details" not in client.post(URL, body).get_json()["usage"], "it has no thoughts"
    family(pipeline, None, "think")
    assert client.post(URL, body).get_json()["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    pipeline.reply = THOUGHT
    usage = client.post(URL, body).get_json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": n * len("Well, well.")}
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert client.events(URL, body | {"stream_options": options})[-2]["usage"] == usage


@pytest.mark.parametrize(("prompt", "content", "reasoning"), [
    ("<think>", "Hello", "hm"), ("<think>\n", "Hello", "hm"), ("<think></think>", "hm</think>Hello", None),
    ("Hi", "hm</think>Hello", None),
])  # fmt: skip
def test_thoughts_may_begin_in_the_prompt(
    client: ApiClient, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, prompt: str, content: str,
    reasoning: str | None,
) -> None:  # fmt: skip
    family(pipeline, None, "think")
    pipeline.reply = "hm</think>Hello"
    monkeypatch.setattr(pipeline.model.tokenizer, "encode_chat", lambda *_, **__: list(prompt.encode()))
    message = client.post(URL, {"messages": [USER]}).get_json()["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content")) == (content, reasoning)


def test_thoughts_of_a_message_that_goes_on(client: ApiClient, pipeline: FakePipeline) -> None:
    family(pipeline, None, "think")
    pipeline.reply = " and so on</think>Hello"
    for begun, reasoning in (("<think>First", "and so on"), ("<think>First</think>", None)):
        body = {"messages": [USER, {"role": "assistant", "content": begun}], "continue_final_message": True}
        message = client.post(URL, body).get_json()["choices"][0]["message"]
        assert message.get("reasoning_content") == reasoning


def test_thoughts_and_calls(client: ApiClient, pipeline: FakePipeline) -> None:
    family(pipeline, "hermes", "think")
    pipeline.reply = f"<think>{CALL}</think>{CALL}"
    message = client.post(URL, BODY).get_json()["choices"][0]["message"]
    assert (message["reasoning_content"], len(message["tool_calls"])) == (CALL, 1), "calls in thoughts are none"


Effort = Callable[[str, frozenset[str]], Any]


@pytest.fixture
def effort(client: ApiClient, hermes: FakePipeline, shown: Shown, monkeypatch: pytest.MonkeyPatch) -> Effort:
    """Asks with an effort, of a model whose template looks at these variables. Gives what that got, or the error."""

    def ask(value: str, variables: frozenset[str]) -> Any:
        monkeypatch.setattr(hermes.model.tokenizer, "template_variables", variables, raising=False)
        answer = client.post(URL, {"messages": [USER], "reasoning_effort": value})
        return shown[-1][1]["chat_template_kwargs"] if answer.status_code == 200 else answer.get_json()["error"]

    return ask


def test_effort_goes_to_a_template_that_takes_it(effort: Effort, hermes: FakePipeline) -> None:
    family(hermes, "harmony", "harmony")
    assert effort("low", frozenset({"reasoning_effort"})) == {"reasoning_effort": "low"}
    assert effort("none", frozenset({"thinking"})) == {"thinking": False}
    assert effort("none", frozenset({"enable_thinking"})) == {"enable_thinking": False}
    for value, variables in (("low", {"enable_thinking"}), ("low", set()), ("none", set())):
        error = effort(value, frozenset(variables))
        assert (error["code"], error["param"]) == ("unsupported_parameter", "reasoning_effort")
    assert effort("a lot", frozenset())["param"] == "reasoning_effort"


def test_effort_of_a_model_that_does_not_think(effort: Effort) -> None:
    assert effort("none", frozenset()) == {}
    assert effort("high", frozenset())["code"] == "unsupported_parameter"
