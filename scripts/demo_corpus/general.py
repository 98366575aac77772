"""General questions made from the tables: definitions, capitals, lists, opposites, spelling, repeating, JSON."""

from __future__ import annotations

from random import Random

from . import tables

_NAMES = (
    "Anna",
    "Tom",
    "Lily",
    "Ben",
    "Mia",
    "Leo",
    "Max",
    "Luna",
    "Emma",
    "Paul",
    "Sara",
    "Nina",
    "Alex",
    "Sam",
    "Julia",
    "Peter",
    "Marie",
    "Lucas",
    "Eva",
    "David",
    "Jack",
    "Lisa",
    "Oscar",
    "Clara",
    "Hugo",
    "Alice",
    "Bob",
)
_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_SPELL = tuple(
    w
    for w in (*tables.OPPOSITES, *tables.PLURALS, "apple", "banana", "hello", "model", "server", "memory")
    if len(w) < 8
)


def names() -> tuple[str, ...]:
    """First names that people in the dialogs have."""
    return _NAMES


def article(word: str) -> str:
    """A word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def sentence_list(items: list[str]) -> str:
    """Items joined to one sentence: "Apple, banana and orange."."""
    text = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    return text[0].upper() + text[1:] + "."


def capital(rng: Random) -> tuple[str, str]:
    """The capital of a country, or the country of a capital."""
    country = rng.choice(tuple(tables.CAPITALS))
    city = tables.CAPITALS[country]
    if rng.random() < 0.15:
        return f"{city} is the capital of which country?", f"{city} is the capital of {country}."
    ask = rng.choice(
        (
            "What is the capital of {c}?",
            "Which city is the capital of {c}?",
            "Capital of {c}?",
            "Tell me the capital of {c}.",
            "What's the capital of {c}?",
            "Name the capital of {c}.",
            "Do you know the capital of {c}?",
            "What is the capital city of {c}?",
            "capital of {c}",
        )
    )
    return ask.format(c=country), f"The capital of {country} is {city}."


def listing(rng: Random) -> tuple[str, str]:
    """A list of a few things, as a sentence, numbered, or as JSON."""
    kind = rng.choice(tuple(tables.LISTS))
    count = rng.choice((2, 3, 3, 3, 4, 5, 5, 6))
    items = list(tables.LISTS[kind][:count])
    number = rng.choice((_COUNTS[count], _COUNTS[count], str(count)))
    ask = rng.choice(
        (
            "List {n} {k}",
            "Name {n} {k}",
            "Give me {n} {k}",
            "Tell me {n} {k}",
            "List {n} {k} please",
            "Can you name {n} {k}",
            "I need {n} {k}",
            "Write down {n} {k}",
        )
    ).format(n=number, k=kind)
    style = rng.random()
    if style < 0.12:
        return f"{ask} as a numbered list.", "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    if style < 0.24:
        quoted = ", ".join(f'"{item}"' for item in items)
        return f"{ask} as JSON.", f"[{quoted}]"
    if style < 0.32:
        return rng.choice((f"Name {article(kind[:-1])}.", f"Tell me {article(kind[:-1])}.")) if not kind.endswith(
            "ies"
        ) else f"Name one of the {kind}.", sentence_list(items[:1])
    return ask + rng.choice((".", ".", "")), sentence_list(items)


def calendar(rng: Random) -> tuple[str, str]:
    """Days, months and seasons."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(
            ("List the days of the week.", "What are the days of the week?", "Name the days of the week.")
        ), sentence_list(list(tables.DAYS))
    if kind == 1:
        return rng.choice(
            ("List the months of the year.", "What are the months?", "Name the months.", "Name the twelve months.")
        ), sentence_list(list(tables.MONTHS))
    if kind == 2:
        return rng.choice(("What are the seasons?", "Name the four seasons.", "List the seasons.")), sentence_list(
            list(tables.SEASONS)
        )
    ring = rng.choice((tables.DAYS, tables.MONTHS))
    index = rng.randrange(len(ring))
    step, word = rng.choice(((1, "after"), (-1, "before")))
    unit = "day" if ring is tables.DAYS else "month"
    ask = rng.choice((f"What comes {word} {ring[index]}?", f"Which {unit} comes {word} {ring[index]}?"))
    return ask, f"{ring[(index + step) % len(ring)]} comes {word} {ring[index]}."


def word_fact(rng: Random) -> tuple[str, str]:
    """Opposites, plurals, colours, sounds and legs."""
    kind = rng.choices(("opposite", "plural", "colour", "sound", "legs"), (35, 20, 25, 10, 10))[0]
    if kind == "opposite":
        word, other = rng.choice(tuple(tables.OPPOSITES.items()))
        if rng.random() < 0.4:
            word, other = other, word
        return rng.choice(
            (
                f"What is the opposite of {word}?",
                f"Opposite of {word}?",
                f"Name the opposite of {word}.",
                f"Tell me the opposite of {word}.",
            )
        ), f"The opposite of {word} is {other}."
    if kind == "plural":
        word, other = rng.choice(tuple(tables.PLURALS.items()))
        return rng.choice((f"What is the plural of {word}?", f"Plural of {word}?")), f"The plural of {word} is {other}."
    if kind == "colour":
        thing, colour = rng.choice(tuple(tables.OBJECT_COLOURS.items()))
        word = rng.choice(("color", "colour"))
        return rng.choice(
            (
                f"What {word} is {thing}?",
                f"What is the {word} of {thing}?",
                f"Which {word} is {thing}?",
                f"What {word} does {thing} have?",
            )
        ), f"{thing[0].upper()}{thing[1:]} is {colour}."
    if kind == "sound":
        word, answer = rng.choice(tuple(tables.SOUNDS.items()))
        return f"What sound does {article(word)} make?", answer
    word, legs = rng.choice(tuple(tables.LEGS.items()))
    return (
        f"How many legs does {article(word)} have?",
        f"{article(word)[0].upper()}{article(word)[1:]} has {legs or 'no'} legs.",
    )


def definition(rng: Random) -> tuple[str, str]:
    """What a common thing is."""
    word, answer = rng.choice(tuple(tables.DEFINITIONS.items()))
    thing = answer.split(f" {word} ")[0].lower() + f" {word}" if f" {word} " in answer else word
    return rng.choice(
        (
            f"What is {thing}?",
            f"Define {word}.",
            f"Explain what {thing} is.",
            f"What does {word} mean?",
            f"Tell me about {thing}.",
            f"Describe {thing}.",
            f"What's {thing}?",
        )
    ), answer


def copying(rng: Random) -> tuple[str, str]:
    """Repeat, spell, change case: answers made from the question's own words."""
    kind = rng.choices(("repeat", "spell", "upper", "letters", "json", "greet"), (30, 20, 10, 10, 15, 15))[0]
    word = rng.choice(_SPELL)
    if kind == "repeat":
        pool = (*tables.OPPOSITES, *tables.PLURALS, *_NAMES)
        text = " ".join(rng.sample(pool, rng.randint(1, 4)))
        return rng.choice(
            (f"Repeat: {text}", f"Repeat after me: {text}", f"Say: {text}", f"Echo {text}", f'Say "{text}"')
        ), text
    if kind == "spell":
        return rng.choice((f"Spell {word}.", f"How do you spell {word}?", f"Spell the word {word}.")), "-".join(
            word.upper()
        )
    if kind == "upper":
        return rng.choice((f"Write {word} in capital letters.", f"Write {word} in upper case.")), word.upper()
    if kind == "letters":
        return rng.choice(
            (f"How many letters are in {word}?", f"How many letters does {word} have?")
        ), f"The word {word} has {len(word)} letters."
    name, age = rng.choice(_NAMES), rng.randint(1, 60)
    if kind == "json":
        return rng.choice(
            (
                f"Give me JSON with name {name} and age {age}.",
                f"Write a JSON object with the name {name} and the age {age}.",
                f"Write JSON: name {name}, age {age}",
            )
        ), f'{{"name": "{name}", "age": {age}}}'
    return rng.choice((f"Say hello to {name}.", f"Greet {name}.", f"Say hi to {name}")), f"Hello, {name}!"


def abroad(rng: Random) -> tuple[str, str]:
    """Hello, thank you and goodbye in four languages."""
    language = rng.choice(tuple(tables.GREETINGS_ABROAD))
    index = rng.randrange(3)
    phrase = ("hello", "thank you", "goodbye")[index]
    ask = rng.choice(("Say {p} in {g}.", "How do you say {p} in {g}?", "What is {p} in {g}?", "Translate {p} to {g}."))
    return ask.format(p=phrase, g=language), f"{tables.GREETINGS_ABROAD[language][index]}."


def small_talk(rng: Random) -> tuple[str, str]:
    """Greetings, thanks and other small talk."""
    answer, questions = rng.choice(tables.SMALL_TALK)
    return rng.choice(questions), answer


def question(rng: Random) -> tuple[str, str]:
    """Any of the above."""
    makers = (small_talk, capital, listing, calendar, word_fact, definition, copying, abroad)
    return rng.choices(makers, (24, 14, 15, 5, 13, 14, 12, 3))[0](rng)
