"""Small JSON objects: from what the question names, from a sentence, or as the form of an answer."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from . import general, numbers, tables, tool_tables

_PLAIN = (
    "Give me JSON with {w}.", "Write JSON: {w}", "Write a JSON object with {w}.", "JSON with {w}, please.",
    "A JSON object with {w}.", "Make JSON with {w}.", "Return JSON with {w}.", "I need JSON with {w}.",
    "Can you write JSON with {w}?", "Please give me a JSON object with {w}.",
)  # fmt: skip
_SENTENCE = (
    "{s} Write that as JSON.", "{s} Give me that as JSON.", "As JSON: {s}", "Turn this into JSON: {s}",
    "Write this as JSON: {s}", "{s} As a JSON object, please.",
)  # fmt: skip
_ASKS_JSON = ("Answer in JSON.", "Answer with JSON only.", "Reply in JSON.", "Always answer as JSON.")


def _value(rng: Random, key: str) -> Any:
    if key in ("age", "count", "price", "year", "size", "number", "id"):
        return rng.randint(1, 2030 if key in ("year", "id") else 99)
    if key in ("ok", "open", "admin", "done"):
        return rng.random() < 0.5
    pools = {
        "colour": tables.LISTS["colours"], "animal": tables.LISTS["animals"], "fruit": tables.LISTS["fruits"],
        "city": tool_tables.PLACES, "drink": tables.LISTS["drinks"], "country": tables.LISTS["countries"],
        "day": tables.DAYS, "month": tables.MONTHS, "item": tool_tables.ITEMS, "language": tool_tables.LANGUAGES,
    }  # fmt: skip
    if key == "word":
        return general.invented(rng)
    return rng.choice(pools[key]) if key in pools else general.name(rng)


_KEYS = (
    "name", "name", "age", "age", "city", "city", "colour", "animal", "fruit", "drink", "country", "day", "month",
    "item", "language", "count", "price", "year", "size", "number", "id", "ok", "open", "admin", "done", "pet", "user",
    "word",
)  # fmt: skip


def _named(rng: Random) -> tuple[str, str]:
    """Keys and values are in the question."""
    keys = list(dict.fromkeys(rng.sample(_KEYS, rng.choice((1, 2, 2, 2, 3)))))
    values = {key: _value(rng, key) for key in keys}
    style = rng.randrange(4)
    shown = [f"{key} {json.dumps(value).strip(chr(34))}" for key, value in values.items()]
    if style == 0:
        shown = [part.replace(" ", ": ", 1) for part in shown]
    elif style == 1:
        shown = [f"the {part}" for part in shown]
    elif style == 2:
        shown = [part.replace(" ", " = ", 1) for part in shown]
    joined = ", ".join(shown) if style in (0, 2) else f"{', '.join(shown[:-1])} and {shown[-1]}".removeprefix(" and ")
    return rng.choice(_PLAIN).format(w=joined), json.dumps(values)


def _of_sentence(rng: Random) -> tuple[str, str]:
    """A sentence about somebody or something."""
    name, age, city = general.name(rng), rng.randint(1, 90), rng.choice(tool_tables.PLACES)
    item, price, colour = rng.choice(tool_tables.ITEMS), rng.randint(1, 99), rng.choice(tables.LISTS["colours"])
    pet = rng.choice(("dog", "cat", "horse", "bird"))
    text, values = rng.choice(
        (
            (f"{name} is {age} years old.", {"name": name, "age": age}),
            (f"{name} is {age} and lives in {city}.", {"name": name, "age": age, "city": city}),
            (f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}),
            (f"{name} lives in {city}.", {"name": name, "city": city}),
            (f"{item.capitalize()} costs {price} euros.", {"item": item, "price": price}),
            (f"{name} has a {pet} and likes {colour}.", {"name": name, "pet": pet, "colour": colour}),
        )
    )
    return rng.choice(_SENTENCE).format(s=text), json.dumps(values)


def _known(rng: Random) -> tuple[str, str]:
    """Something that the model knows, in JSON."""
    if rng.random() < 0.6:
        country, city = rng.choice(tuple(tables.CAPITALS.items()))
        ask = rng.choice(
            ("The capital of {c} as JSON.", "What is the capital of {c}? Answer in JSON.", "JSON: capital of {c}")
        )
        return ask.format(c=country), json.dumps({"country": country, "capital": city})
    kind = rng.choice(tuple(tables.LISTS))
    items = list(tables.LISTS[kind][: rng.choice((2, 3, 4))])
    count = general._COUNTS[len(items)]
    ask = rng.choice(("A JSON object with {n} {k}.", "Give me {n} {k} as a JSON object.", "{n} {k} in a JSON object"))
    text = ask.format(n=count, k=kind)
    return text[0].upper() + text[1:], json.dumps({kind.replace(" ", "_"): items})


def question(rng: Random) -> tuple[str, str]:
    """Any of them."""
    return rng.choices((_named, _of_sentence, _known), (55, 30, 15))[0](rng)


def by_system(rng: Random) -> tuple[str, list[tuple[str, str]]]:
    """A system message that asks for JSON, and a question that is answered so."""
    if rng.random() < 0.5:
        country, city = rng.choice(tuple(tables.CAPITALS.items()))
        asked, answer = f"What is the capital of {country}?", {"capital": city}
    else:
        a, b, op = numbers.operands(rng)
        result = numbers.equation(a, b, op).rsplit("= ", 1)[1]
        asked, answer = f"What is {a} {op} {b}?", {"result": int(result)}
    return rng.choice(_ASKS_JSON), [(asked, json.dumps(answer))]
