"""What models of each family write, and what it means: (family, text, events)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from core.parsers.events import Arguments, CallStart, Event, OutputParser, Reasoning, Text, merged
from core.parsers.families import parser_class
from core.parsers.shapes import CallShape

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"anyOf": [{"$ref": "#/$defs/units"}, {"type": "null"}]},
            "detail": {"type": "object"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "exact": {"type": "boolean"},
        },
        "$defs": {"units": {"type": "string", "enum": ["c", "f"]}},
    },
    "now": {},
    "write-file.v2": {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}},
}


def call(name: str, arguments: str) -> list[Event]:
    return [CallStart(name), Arguments(arguments)]


PARIS = '{"city": "Paris", "days": 2}'
OSLO = '{"city": "Oslo"}'
TWO = [*call("weather", PARIS), *call("weather", OSLO)]
THOUGHT = "The user asks for the weather."


def case(family: str, text: str, events: list[Event]) -> tuple[str, str, list[Event]]:
    return family, text, events


RECORDED: list[tuple[str, str, list[Event]]] = [
    case("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>', call("weather", PARIS)),
    case(
        "hermes",
        f'Let me look.\n\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n<tool_call>\n'
        f'{{"name": "weather", "arguments": {OSLO}}}\n</tool_call>',
        [Text("Let me look.\n\n"), *TWO],
    ),
    case(
        "hermes",
        f'a <tool_call>{{"name":"now","arguments":{{}}}}</tool_call> b <tool_call>{{"name":"weather",'
        f'"arguments":{OSLO}}}</tool_call> c',
        [Text("a "), *call("now", "{}"), Text(" b "), *call("weather", OSLO), Text(" c")],
    ),
    case("hermes", '<tool_call>{"arguments": {"city": "Oslo"}, "name": "weather"}</tool_call>', call("weather", OSLO)),
    case("hermes", f'<tool_call>{{"name": "weather", "arguments": {OSLO}}}', call("weather", OSLO)),
    case("hermes", f'<tool_call>{{"name": "weather", "arguments": {OSLO}\n</tool_call>', call("weather", OSLO)),
    case("hermes", f'<tool_call>{{"name": "weather", "arguments": {OSLO}}}}}\n</tool_call>', call("weather", OSLO)),
    case(
        "hermes",
        f'<tool_call>[{{"name": "weather", "arguments": {PARIS}}}, '
        f'{{"name": "weather", "arguments": {OSLO}}}]</tool_call>',
        TWO,
    ),
    case(
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "weather", "arguments": '
        '"{\\"city\\": \\"Oslo\\"}"}}</tool_call>',
        call("weather", OSLO),
    ),
    case(
        "qwen3_coder",
        "I'll check.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>",
        [Text("I'll check.\n"), *call("weather", PARIS)],
    ),
    case(
        "qwen3_coder",
        '<tool_call>\n<function=write-file.v2>\n<parameter=path>\na.py\n</parameter>\n<parameter=text>\nprint("hi")\n'
        "\tx < 1\n\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        [
            *call("write-file.v2", '{"path": "a.py", "text": "print(\\"hi\\")\\n\\tx < 1\\n"}'),
            *call("now", "{}"),
        ],
    ),
    case(
        "qwen3_coder",
        '<function=weather>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=tags>\n["a", "b"]\n</parameter>\n'
        '<parameter=detail>\n{"x": null}\n</parameter>\n<parameter=units>\nc\n</parameter>\n<parameter=other>\n7\n'
        "</parameter>\n</function>",
        call("weather", '{"exact": true, "tags": ["a", "b"], "detail": {"x": null}, "units": "c", "other": 7}'),
    ),
    case("llama3_json", f'{{"name": "weather", "parameters": {PARIS}}}', call("weather", PARIS)),
    case(
        "llama3_json",
        f'{{"name": "weather", "parameters": {PARIS}}}; {{"name": "weather", "parameters": {OSLO}}}',
        TWO,
    ),
    case("llama3_json", f'<|python_tag|>{{"name": "weather", "parameters": {OSLO}}}', call("weather", OSLO)),
    case(
        "llama3_json",
        f'One moment. <|python_tag|>{{"type": "function", "name": "weather", "parameters": {OSLO}}}',
        [Text("One moment. "), *call("weather", OSLO)],
    ),
    case(
        "llama3_json",
        f'<|python_start|>{{"name": "weather", "parameters": {OSLO}}}<|python_end|>',
        call("weather", OSLO),
    ),
    case(
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}, "id": "abc123def"}}, '
        f'{{"name": "weather", "arguments": {OSLO}, "id": "abc123deg"}}]',
        TWO,
    ),
    case("mistral", f"Right.[TOOL_CALLS]weather{PARIS}[TOOL_CALLS]weather{OSLO}", [Text("Right."), *TWO]),
    case("mistral", f"[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{OSLO}", call("weather", OSLO)),
    case("mistral_named", f"[TOOL_CALLS]weather[ARGS]{OSLO}", call("weather", OSLO)),
    case(
        "harmony",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{PARIS}<|call|>",
        [Reasoning(THOUGHT), *call("weather", PARIS)],
    ),
    case(
        "harmony",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant to=functions.weather<|channel|>"
        f"commentary json<|message|>{OSLO}<|call|>",
        [Reasoning(THOUGHT), *call("weather", OSLO)],
    ),
    case(
        "harmony",
        "<|channel|>commentary<|message|>First the weather.<|end|><|start|>assistant<|channel|>final<|message|>Sunny."
        "<|return|>",
        [Text("First the weather.\n\nSunny.")],
    ),
    case(
        "deepseek_v3",
        f"Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{PARIS}\n```"
        f"<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{OSLO}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        [Text("Sure."), *TWO],
    ),
    case(
        "deepseek_v31",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜><｜tool▁call▁begin｜>"
        f"weather<｜tool▁sep｜>{OSLO}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        TWO,
    ),
    case(
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Paris'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        [*call("weather", PARIS), *call("now", "{}")],
    ),
    case(
        "minimax_m2",
        'Let me see.\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        [Text("Let me see.\n"), *call("weather", PARIS), *call("now", "{}")],
    ),
    case(
        "kimi_k2",
        f"I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{PARIS}"
        f"<|tool_call_end|><|tool_call_begin|>functions.weather:1<|tool_call_argument_begin|>{OSLO}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        [Text("I look."), *TWO],
    ),
    case(
        "kimi_k2",
        "<|tool_call_begin|>functions.write-file.v2:12<|tool_call_argument_begin|>{}<|tool_call_end|>",
        call("write-file.v2", "{}"),
    ),
    case(
        "glm",
        "\nChecking.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        [Text("\nChecking.\n"), *call("weather", PARIS), *call("now", "{}")],
    ),
    case(
        "glm",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>",
        call("weather", OSLO),
    ),
    case(
        "granite",
        f'<|tool_call|>[{{"name": "weather", "arguments": {PARIS}}}, {{"name": "weather", "arguments": {OSLO}}}]',
        TWO,
    ),
    case("granite", f'<|tool_call|>[{{"name": "weather", "arguments": {OSLO}}}]<|/tool_call|>', call("weather", OSLO)),
    case("pythonic", "[weather(city='Paris', days=2), weather(city=\"Oslo\")]", TWO),
    case(
        "pythonic",
        "<|python_start|>[weather(city='''O\"slo''', detail={'x': [1, -2.5, None, True]}, tags=[]), "
        "now()]<|python_end|>",
        [
            *call("weather", '{"city": "O\\"slo", "detail": {"x": [1, -2.5, null, true]}, "tags": []}'),
            *call("now", "{}"),
        ],
    ),
    case(
        "pythonic",
        '<|tool_call_start|>[weather(city="Oslo")]<|tool_call_end|>Done.',
        [*call("weather", OSLO), Text("Done.")],
    ),
    case(
        "pythonic",
        f'<|tool_call_start|>[{{"name": "weather", "arguments": {PARIS}}}, {{"name": "weather", "arguments": {OSLO}}}]'
        "<|tool_call_end|>Done.",
        [*TWO, Text("Done.")],
    ),
    case(
        "gemma",
        'Sure.\n```tool_code\nprint(weather(city="Paris", days=2))\nweather(city="Oslo")\n```\n',
        [Text("Sure.\n"), *TWO],
    ),
    case("gemma", '[weather(city="Oslo")]', call("weather", OSLO)),
    case(
        "function_gemma",
        "<start_function_call>call:weather{city:<escape>Paris<escape>,days:2}<end_function_call>",
        call("weather", PARIS),
    ),
    case(
        "gemma4",
        '<|tool_call>call:weather{city:<|"|>Oslo, N<|"|>,detail:{<|"|>x<|"|>:[1,true]}}<tool_call|><|tool_call>'
        "call:now{}<tool_call|>",
        [*call("weather", '{"city": "Oslo, N", "detail": {"x": [1, true]}}'), *call("now", "{}")],
    ),
]

NO_CALLS: list[tuple[str, str]] = [
    ("hermes", "Plain text with < and {braces} and <tool_"),
    ("hermes", '<tool_call>{"name": "unheard-of", "arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>weather in Paris</tool_call> is what I would write"),
    ("hermes", '<tool_call>{"name": "weather", "arguments": 3}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "argum'),
    ("hermes", '<tool_call>{"name": "weather"} {'),
    ("hermes", " \n "),
    ("qwen3_coder", "<tool_call>\n<function=unheard-of>\n</function>\n</tool_call>"),
    ("qwen3_coder", "use <function=weather"),
    ("llama3_json", '{"name": "Bob", "age": 3}'),
    ("llama3_json", '{"city": "Paris"}'),
    ("llama3_json", 'JSON: {"name": "weather", "parameters": {}}'),
    ("llama3_json", "[1, 2, 3]"),
    ("mistral", "[TOOL_CALLS]unheard-of{}"),
    ("mistral", "[TOOL_CALLS] [] none"),
    ("harmony", "no channel at all"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>none<｜tool▁calls▁end｜>"),
    ("deepseek_v32", "<｜DSML｜function_calls>\nnone"),
    ("glm", "<tool_call>unheard-of\n</tool_call>"),
    ("minimax_m2", '<minimax:tool_call>\n<invoke name="unheard-of">\n</invoke>\n</minimax:tool_call>'),
    ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"),
    ("granite", "<|tool_call|>[]"),
    ("pythonic", "[weather] is what I would call"),
    ("pythonic", '[weather("Paris")]'),
    ("pythonic", "I call [weather(city='Paris')]"),
    ("pythonic", "[weather(city='Paris'"),
    ("pythonic", "[weather(city=" + "[" * 200),
    ("pythonic", f"[weather(days={'9' * 5000})]"),
    ("gemma", "```tool_code\nimport os\n```"),
    ("function_gemma", "<start_function_call>call:unheard-of{}<end_function_call>"),
    ("gemma4", "<|tool_call>call:weather{city"),
]


def read(parser: OutputParser, pieces: Iterable[str]) -> list[Event]:
    """All events of an answer that comes in these pieces."""
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merged(events + parser.finish())


def parse(family: str, pieces: Iterable[str], hidden: Iterable[str] = ()) -> list[Event]:
    return read(parser_class(family)(TOOLS, tuple(hidden)), pieces)


def written(shape: CallShape, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model of the family would write them."""
    each = [f"{shape.begin}{name}{shape.middle}{_arguments(shape, given)}{shape.end}" for name, given in calls]
    return shape.first + shape.between.join(each) + shape.last


def _arguments(shape: CallShape, given: dict[str, Any]) -> str:
    if shape.arguments == "json":
        return json.dumps(given, ensure_ascii=False)
    if shape.arguments == "python":
        return ", ".join(f"{key}={value!r}" for key, value in given.items())
    if shape.arguments == "gemma":
        return ",".join(f"{key}:{_gemma(value, shape.quote)}" for key, value in given.items())
    text = ""
    for key, value in given.items():
        is_text = isinstance(value, str)
        head = shape.parameter_begin.format(key=key, is_text=str(is_text).lower())
        text += head + (value if is_text else json.dumps(value, ensure_ascii=False)) + shape.parameter_end
    return text


def _gemma(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return quote + value + quote
    if isinstance(value, list):
        return "[" + ",".join(_gemma(item, quote) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_gemma(item, quote)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def calls_of(events: Iterable[Event]) -> list[tuple[str, Any]]:
    """Names and arguments of the calls among events."""
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append([event.name, ""])
        elif isinstance(event, Arguments):
            calls[-1][1] += event.text
    return [(name, json.loads(arguments)) for name, arguments in calls]


def words_of(text: str) -> list[str]:
    """The numbered words that a random answer is made of."""
    return re.findall(r"§[0-9]+", text)
