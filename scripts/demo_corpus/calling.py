"""Conversations in which the demo model is offered functions: it calls one, says what came of it, or needs none.

Calls are written as Hermes and Qwen write them. `render_talk` is what the chat template makes of the same messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from . import dialogs, general, numbers, tool_tables
from .tool_tables import KINDS, WEIGHTS, Kind
from .unknown import TOPICS, UNKNOWN

BOS, END = "<|bos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
CALL = '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
RESULT = "<tool_response>\n{}\n</tool_response>"
_SYSTEM = (
    "You are a helpful assistant.", "Use the tools where they help.", "You can call functions.", "Be concise.",
    "You are a helpful assistant with tools.", "Answer briefly.",
)  # fmt: skip
_ALSO = ("And in {0}?", "And {0}?", "What about {0}?", "And for {0}?", "The same for {0}, please.")
_ABOUT_TOOLS = (
    "weather", "time", "date", "day is", "price", "cost", "translat", "far", "people", "population", "search", "light",
    "message", "how big", " say ", "timer", "language",
)  # fmt: skip

Segments = list[tuple[str, bool]]
Vary = Callable[[Random, str], str]


class Tool(NamedTuple):
    """A function as a client offers it; `parameters` are names with their JSON types, all of them required."""

    name: str
    about: str
    parameters: tuple[tuple[str, str], ...]

    def schema(self) -> dict[str, Any]:
        """In OpenAI's form."""
        properties = {name: {"type": kind} for name, kind in self.parameters}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.about, "parameters": parameters},
        }

    def line(self) -> str:
        """As the chat template shows it to the model."""
        return f"{self.name}({', '.join(f'{name}: {kind}' for name, kind in self.parameters)}): {self.about}"


class Message(NamedTuple):
    """Of a conversation. `calls` are names of functions with their arguments."""

    role: str
    text: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()

    def openai(self) -> dict[str, Any]:
        """In OpenAI's form."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for n, (name, arguments) in enumerate(self.calls)
            ]
        return message


def render_talk(tools: list[Tool], messages: list[Message]) -> Segments:
    """A conversation in the chat format; the assistant's words are what is learnt."""
    first = messages[0].text + "\n" if messages[0].role == "system" else ""
    listed = "".join(f"\n{tool.line()}" for tool in tools)
    segments: Segments = [(f"{BOS}{SYSTEM}{first}Tools:{listed}{END}", False)]
    for message in messages[1 if first else 0 :]:
        if message.role == "assistant":
            calls = "\n".join(CALL.format(name=name, arguments=json.dumps(of)) for name, of in message.calls)
            segments += [(ASSISTANT, False), (f"{message.text}{calls}{END}", True)]
        else:
            text = RESULT.format(message.text) if message.role == "tool" else message.text
            segments.append((f"{USER}{text}{END}", False))
    return segments


def _draw(rng: Random, source: str) -> Any:
    """A value of a parameter."""
    if source == "place":
        return rng.choice(tool_tables.PLACES) if rng.random() < 0.8 else general.invented(rng).capitalize()
    if source == "number":
        return rng.randint(0, rng.choice((10, 100, 100, 1000, 10_000)))
    if source == "expression":
        sign, one, two = rng.choice("++-**/"), _draw(rng, "number"), rng.randint(1, rng.choice((10, 100, 1000)))
        return f"{one * two if sign == '/' else one} {sign} {two}"
    if source == "minutes":
        return rng.randint(1, 60)
    if source == "name":
        return general.name(rng)
    pools = {
        "room": tool_tables.ROOMS, "item": tool_tables.ITEMS, "saying": tool_tables.SAYINGS,
        "language": tool_tables.LANGUAGES, "topic": TOPICS,
    }  # fmt: skip
    return rng.choice(pools[source])


def _result(rng: Random, kind: Kind, values: list[Any]) -> tuple[str, str]:
    """What a function gives back, plain or as JSON, and the words of it that the answer has."""
    if kind.results == "weather":
        sky, degrees = rng.choice(tool_tables.CONDITIONS), rng.randint(-9, 39)
        said = f"{sky}, {degrees} degrees"
        shape = rng.random()
        if shape < 0.35:
            return said, said
        if shape < 0.5:
            return sky, sky
        names = rng.choice((("temperature", "condition"), ("degrees", "sky"), ("temp", "weather")))
        both = {names[0]: degrees, names[1]: sky}
        return json.dumps(both if shape < 0.85 else {"city": values[0], **both}), said
    a, b = ([*values, 0, 0])[:2]
    operation = str(a).split() if kind.results == "expression" else []
    said = {
        "time": lambda: f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
        "sum": lambda: str(a + b),
        "product": lambda: str(a * b),
        "expression": lambda: _calculated(*operation),
        "km": lambda: f"{rng.randint(10, 9000)} km",
        "large": lambda: str(rng.randint(1000, 9_000_000)),
        "euros": lambda: f"{rng.randint(1, 99)} euros",
        "pages": lambda: f"{rng.randint(2, 90)} pages about {a}",
        "ok": lambda: rng.choice(("ok", "done", "true", "OK")),
        "foreign": lambda: " ".join(general.invented(rng) for _ in range(rng.randint(1, 3))),
        "date": lambda: f"20{rng.randint(24, 32)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
    }[kind.results]()
    if rng.random() < 0.35:
        value = int(said) if said.isdigit() else said
        return json.dumps({rng.choice(("result", "result", "value", "output", "answer")): value}), said
    return said, said


def _is_held_out(kind: Kind, values: list[Any]) -> bool:
    """Whether the values are a sum or difference that is kept out of training."""
    if kind.results == "expression":
        one, sign, two = values[0].split()
        return numbers.held_out(int(one), int(two), sign)
    return kind.results == "sum" and numbers.held_out(*values, "+")


def _calculated(a: str, sign: str, b: str) -> str:
    one, two = int(a), int(b)
    return str({"+": one + two, "-": one - two, "*": one * two, "/": one // two}[sign])


def make_tool(rng: Random, kind: Kind) -> Tool:
    """A function of this kind; one in three has a name that says nothing, and so has one parameter in three: what
    stands in a call has to be read, it cannot be guessed."""
    name = rng.choice(kind.names)
    if rng.random() < 0.33:
        name = rng.choice((general.invented(rng), f"{general.invented(rng)}_{rng.choice(kind.names).split('_')[-1]}"))
    picked: list[tuple[str, str]] = []
    number = rng.randrange(6)
    for names in kind.parameters:
        parameter, _, type_ = names[number % len(names)].partition(":")
        if rng.random() < 0.33:
            parameter = rng.choice((general.invented(rng), f"{general.invented(rng)}_{parameter}"))
        while parameter in (taken for taken, _ in picked):
            parameter = general.invented(rng)
        picked.append((parameter, type_ or "string"))
    return Tool(name, rng.choice(kind.about), tuple(picked))


def _used(rng: Random, kind: Kind, tool: Tool, vary: Vary, ask: str | None = None) -> list[Message]:
    """A question, the call, what came of it, and the answer."""
    values = [_draw(rng, source) for source in kind.values]
    while _is_held_out(kind, values):
        values = [_draw(rng, source) for source in kind.values]
    plain = (ask or rng.choice(kind.asks)).format(*values)
    asked = vary(rng, plain)
    if any(str(value) not in asked for value in values):
        asked = plain
    arguments = {name: value for (name, _), value in zip(tool.parameters, values, strict=True)}
    returned, said = _result(rng, kind, values)
    answer = kind.answer.format(*values, r=said)
    return [
        Message("user", asked),
        Message("assistant", calls=((tool.name, arguments),)),
        Message("tool", returned),
        Message("assistant", answer),
    ]


def _both(rng: Random, kind: Kind, tool: Tool) -> list[Message]:
    """A question about two places, and two calls at once."""
    one, two = rng.sample(tool_tables.PLACES, 2)
    ask = rng.choice([ask for ask in kind.asks if ask.count("{0}") == 1 and ask.endswith(("?", "{0}."))])
    name = tool.parameters[0][0]
    results = [_result(rng, kind, [place]) for place in (one, two)]
    answer = " ".join(
        kind.answer.format(place, r=said) for place, (_, said) in zip((one, two), results, strict=True)
    )  # fmt: skip
    return [
        Message("user", ask.format(f"{one} and {two}" if rng.random() < 0.6 else f"{one} and in {two}")),
        Message("assistant", calls=((tool.name, {name: one}), (tool.name, {name: two}))),
        *(Message("tool", returned) for returned, _ in results),
        Message("assistant", answer),
    ]


def _plain(rng: Random, vary: Vary, calculates: bool) -> list[Message]:
    """A question for which none of the functions is needed, and its answer."""
    while True:
        question, answer = dialogs.single(rng)
        about = question.lower()
        if any(word in about for word in _ABOUT_TOOLS) or (calculates and any(c.isdigit() for c in about)):
            continue
        return [Message("user", vary(rng, question)), Message("assistant", answer)]


def talk(rng: Random, vary: Vary) -> tuple[list[Tool], list[Message]]:
    """One conversation with functions; what people ask is put in other words by `vary`."""
    names = list(KINDS)
    chosen = rng.choices(names, [WEIGHTS.get(name, 4) for name in names])[0]
    others = rng.sample([name for name in names if name != chosen], rng.choice((0, 0, 1, 1, 2, 3)))
    if chosen in ("add", "multiply", "calculate"):
        others = [name for name in others if name not in ("add", "multiply", "calculate")]
    kind, tool = KINDS[chosen], make_tool(rng, KINDS[chosen])
    tools = [tool, *(make_tool(rng, KINDS[name]) for name in others)]
    calculates = bool({chosen, *others} & {"add", "multiply", "calculate"})
    system = [Message("system", rng.choice(_SYSTEM))] if rng.random() < 0.25 else []
    style = rng.random()
    if style < 0.56 or (style < 0.72 and chosen not in ("weather", "time")):
        messages = _used(rng, kind, tool, vary)
    elif style < 0.64:
        messages = _used(rng, kind, tool, vary) + _used(rng, kind, tool, vary, rng.choice(_ALSO))
    elif style < 0.72:
        messages = _both(rng, kind, tool)
    elif style < 0.80:
        messages = _plain(rng, vary, calculates) + _used(rng, kind, tool, vary)
    elif style < 0.93:
        messages = _plain(rng, vary, calculates)
    else:
        tools = tools[1:] or [make_tool(rng, KINDS[rng.choice([name for name in names if name != chosen])])]
        if chosen in ("add", "multiply", "calculate", "date"):
            messages = _plain(rng, vary, True)
        else:
            messages = [_used(rng, kind, tool, vary)[0], Message("assistant", UNKNOWN)]
    rng.shuffle(tools)
    return tools, system + messages
