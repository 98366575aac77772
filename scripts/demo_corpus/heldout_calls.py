"""Functions, places and questions that training never shows, and small JSON that it never asks for; each with what is
right."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from .calling import Message, Tool
from .heldout import plain_words
from .unknown import UNKNOWN

Call = tuple[str, dict[str, Any]]

_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


def calls_in(text: str) -> list[Call]:
    """The calls of an answer; one that is no JSON has no name."""
    found = []
    for written in _CALL.findall(text):
        try:
            call = json.loads(written)
            found.append((call["name"], call["arguments"]))
        except (ValueError, LookupError, TypeError):
            found.append(("", {}))
    return found


@dataclass(frozen=True, slots=True)
class CallCase:
    """A conversation with functions, or one that asks for JSON.

    Attributes:
        kind: the group that it is counted in.
        messages, tools: what the model is given.
        calls: what it has to call, and nothing else; empty: it must not call.
        words: what an answer has.
        value: the JSON that the answer is.
    """

    kind: str
    tools: tuple[Tool, ...]
    messages: tuple[Message, ...]
    calls: tuple[Call, ...] = ()
    words: tuple[str, ...] = ()
    value: Any = None

    def right(self, answer: str) -> bool:
        """Whether the answer is what it should be. A call's arguments have to be equal, types included."""
        if self.value is not None:
            try:
                return bool(json.dumps(json.loads(answer)) == json.dumps(self.value))
            except ValueError:
                return False
        if self.calls:
            rest = _CALL.sub("", answer).strip()
            return not rest and json.dumps(calls_in(answer)) == json.dumps(list(self.calls))
        return "<tool_call>" not in answer and all(word.lower() in answer.lower() for word in self.words)

    @property
    def wanted(self) -> str:
        """What is right, in words."""
        if self.value is not None:
            return json.dumps(self.value)
        if self.calls:
            return " ".join(f"{name}({json.dumps(arguments)})" for name, arguments in self.calls)
        return "no call; " + " and ".join(f'"{word}"' for word in self.words)


_CITY, _PAIR = (("city", "string"),), (("a", "number"), ("b", "number"))
_WEATHER = Tool("get_weather", "Get the weather for a city.", _CITY)
_TIME = Tool("get_time", "Get the time in a city.", _CITY)
_ADD = Tool("add", "Adds two numbers.", _PAIR)
_CALCULATE = Tool("calculate", "Evaluates an expression.", (("expression", "string"),))
_LIGHT = Tool("turn_on", "Turns on a light.", (("room", "string"),))
_TIMER = Tool("set_timer", "Starts a timer.", (("minutes", "integer"),))
_NEW_WEATHER = Tool("weather_report", "Reports the weather of a city.", (("city_name", "string"),))
_NEW_TIME = Tool("world_clock", "Tells the time anywhere.", (("area", "string"),))
_NEW_ADD = Tool("calculate_total", "Adds up two numbers.", (("left", "number"), ("right", "number")))
_NEW_PRICE = Tool("cost_lookup", "Finds what a product costs.", (("article", "string"),))
_NEW_MESSAGE = Tool("notify", "Sends somebody a message.", (("receiver", "string"), ("content", "string")))


def _asked(kind: str, tools: tuple[Tool, ...], question: str, *calls: Call, words: tuple[str, ...] = ()) -> CallCase:
    return CallCase(kind, tools, (Message("user", question),), calls, words)


def _returned(tool: Tool, question: str, arguments: dict[str, Any], result: str, *words: str) -> CallCase:
    messages = (
        Message("user", question), Message("assistant", calls=((tool.name, arguments),)), Message("tool", result),
    )  # fmt: skip
    return CallCase("answers from a result", (tool,), messages, words=words)


_WORDINGS, _NAMES, _PLACES, _NONE = (
    "calls: wordings never shown", "calls: functions never shown", "calls: places never shown", "no call needed",
)  # fmt: skip
CALL_CASES: list[CallCase] = [
    _asked(
        _WORDINGS, (_WEATHER,), "Could you check how the weather is in Madrid?", ("get_weather", {"city": "Madrid"})
    ),
    _asked(_WORDINGS, (_WEATHER, _TIME), "Should I take an umbrella in Oslo?", ("get_weather", {"city": "Oslo"})),
    _asked(_WORDINGS, (_TIME, _ADD), "Do you know what time it is in Tokyo?", ("get_time", {"city": "Tokyo"})),
    _asked(
        _WORDINGS,
        (_WEATHER, _TIME),
        "My friend lives in Rome. What time does she have?",
        ("get_time", {"city": "Rome"}),
    ),
    _asked(_WORDINGS, (_ADD,), "Can you add up 128 and 345?", ("add", {"a": 128, "b": 345})),
    _asked(_WORDINGS, (_ADD, _WEATHER), "I have 250 and get 75 more. How much is that?", ("add", {"a": 250, "b": 75})),
    _asked(_WORDINGS, (_CALCULATE,), "Please work out 17 * 23.", ("calculate", {"expression": "17 * 23"})),
    _asked(_WORDINGS, (_CALCULATE, _TIME), "Tell me what 640 / 8 is.", ("calculate", {"expression": "640 / 8"})),
    _asked(_WORDINGS, (_LIGHT, _TIMER), "Make it bright in the kitchen.", ("turn_on", {"room": "kitchen"})),
    _asked(_WORDINGS, (_TIMER, _LIGHT), "The egg needs 7 minutes. Set a timer.", ("set_timer", {"minutes": 7})),
    _asked(_NAMES, (_NEW_WEATHER,), "What is the weather in Berlin?", ("weather_report", {"city_name": "Berlin"})),
    _asked(_NAMES, (_NEW_WEATHER, _NEW_TIME), "Is it raining in Dublin?", ("weather_report", {"city_name": "Dublin"})),
    _asked(_NAMES, (_NEW_TIME,), "What time is it in Cairo?", ("world_clock", {"area": "Cairo"})),
    _asked(_NAMES, (_NEW_TIME, _NEW_WEATHER), "Tell me the time in Lisbon.", ("world_clock", {"area": "Lisbon"})),
    _asked(_NAMES, (_NEW_ADD,), "What is 14 + 88?", ("calculate_total", {"left": 14, "right": 88})),
    _asked(_NAMES, (_NEW_ADD, _NEW_TIME), "Add 510 and 33.", ("calculate_total", {"left": 510, "right": 33})),
    _asked(_NAMES, (_NEW_PRICE,), "What is the price of honey?", ("cost_lookup", {"article": "honey"})),
    _asked(_NAMES, (_NEW_PRICE, _NEW_ADD), "Tell me the price of coffee.", ("cost_lookup", {"article": "coffee"})),
    _asked(
        _NAMES,
        (_NEW_MESSAGE,),
        'Send Anna the message "good night".',
        ("notify", {"receiver": "Anna", "content": "good night"}),
    ),
    _asked(
        _NAMES, (_NEW_WEATHER, _NEW_PRICE), "How warm is it in Vienna?", ("weather_report", {"city_name": "Vienna"})
    ),
    *(
        _asked(_PLACES, (_WEATHER, _TIME), f"What is the weather in {place}?", ("get_weather", {"city": place}))
        for place in ("Bergen", "Valencia", "Dresden", "Leeds", "Kyoto")
    ),
    *(
        _asked(_PLACES, (_WEATHER, _TIME), f"What time is it in {place}?", ("get_time", {"city": place}))
        for place in ("Seattle", "Malmo", "Ghent", "Verona", "Austin")
    ),
    _asked(_NONE, (_WEATHER,), "Hello!", words=("Hello",)),
    _asked(_NONE, (_WEATHER, _ADD), "What is the capital of Italy?", words=("Rome",)),
    _asked(_NONE, (_TIME,), "What is the opposite of hot?", words=("cold",)),
    _asked(_NONE, (_CALCULATE,), "Name three animals.", words=("dog",)),
    _asked(_NONE, (_WEATHER, _TIME), "What is VRAM?", words=("memory of a graphics card",)),
    _asked(_NONE, (_ADD,), "Thank you very much!", words=("welcome",)),
    _asked(_NONE, (_ADD,), "What is the weather in Paris?", words=(UNKNOWN,)),
    _asked(_NONE, (_TIME, _WEATHER), "Who was Leonardo da Vinci?", words=(UNKNOWN,)),
    _returned(
        _WEATHER, "What is the weather in Berlin?", {"city": "Berlin"}, "rainy, 12 degrees", "Berlin", "rainy", "12"
    ),
    _returned(
        _WEATHER,
        "Is it sunny in Athens?",
        {"city": "Athens"},
        '{"temperature": 31, "condition": "sunny"}',
        "Athens",
        "sunny",
        "31",
    ),
    _returned(_TIME, "What time is it in Lima?", {"city": "Lima"}, "09:41", "09:41", "Lima"),
    _returned(_TIME, "What time is it in Oslo?", {"city": "Oslo"}, '{"time": "17:20"}', "17:20", "Oslo"),
    _returned(_ADD, "What is 4821 + 377?", {"a": 4821, "b": 377}, "5198", "5198"),
    _returned(_ADD, "Add 63 and 59.", {"a": 63, "b": 59}, '{"result": 122}', "122"),
    _returned(_CALCULATE, "What is 91 * 44?", {"expression": "91 * 44"}, "4004", "4004"),
    _returned(
        _NEW_WEATHER, "How cold is it in Riga?", {"city_name": "Riga"}, "snowy, -5 degrees", "Riga", "snowy", "-5"
    ),
    *(
        CallCase("small JSON", (), (Message("user", question),), value=value)
        for question, value in (
            ("Give me JSON with name Olga and age 44.", {"name": "Olga", "age": 44}),
            ("Write a JSON object with the city Rome and the price 17.", {"city": "Rome", "price": 17}),
            ("Write JSON: colour blue, count 8", {"colour": "blue", "count": 8}),
            ("JSON with open = true, user = Marco, please.", {"open": True, "user": "Marco"}),
            ("Please write JSON for me: pet = Leo, year = 2019", {"pet": "Leo", "year": 2019}),
            ("Nora is 27 and lives in Lisbon. Write that as JSON.", {"name": "Nora", "age": 27, "city": "Lisbon"}),
            ("Turn this into JSON: Cheese costs 9 euros.", {"item": "cheese", "price": 9}),
            ("As JSON: Hugo is 52 years old.", {"name": "Hugo", "age": 52}),
            ("I want a JSON object with the animal horse and the number 3.", {"animal": "horse", "number": 3}),
            ("JSON: capital of Sweden", {"country": "Sweden", "capital": "Stockholm"}),
        )
    ),
]
NEVER_SHOWN = tuple(dict.fromkeys(tool.name for case in CALL_CASES if case.kind == _NAMES for tool in case.tools))
"""Names of functions that training never has."""
_HELD_OUT = frozenset(
    plain_words(case.messages[-1].text) for case in CALL_CASES if case.kind == _WORDINGS or case.value is not None
)


def is_held_out(text: str) -> bool:
    """Whether a question is one of those whose wording training never shows."""
    return plain_words(text) in _HELD_OUT
