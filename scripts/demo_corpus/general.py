"""General questions made from the tables: definitions, capitals, lists, opposites, spelling, repeating, JSON."""

from __future__ import annotations

from random import Random

from . import tables

_NAMES = (
    "Anna", "Tom", "Lily", "Ben", "Mia", "Leo", "Max", "Luna", "Emma", "Paul", "Sara", "Nina", "Alex", "Sam", "Julia",
    "Peter", "Marie", "Lucas", "Eva", "David", "Jack", "Lisa", "Oscar", "Clara", "Hugo", "Alice", "Bob", "John",
    "Mary", "James", "Linda", "Robert", "Susan", "Michael", "Karen", "William", "Helen", "Thomas", "Laura", "Daniel",
    "Sofia", "Mark", "Ruth", "George", "Nora", "Frank", "Amelia", "Henry", "Olivia", "Adam", "Chloe", "Simon", "Zoe",
    "Martin", "Ella", "Philip", "Grace", "Victor", "Irene", "Andrew", "Rosa", "Carlos", "Elena", "Pablo", "Ines",
    "Diego", "Carmen", "Marco", "Giulia", "Luca", "Bianca", "Jan", "Eva", "Pieter", "Saskia", "Lars", "Freya", "Nils",
    "Astrid", "Omar", "Leila", "Ali", "Yasmin", "Ravi", "Priya", "Arjun", "Meera", "Kenji", "Yuki", "Hiro", "Sakura",
    "Wei", "Mei", "Chen", "Ling", "Kwame", "Ama", "Ivan", "Olga", "Boris", "Tanya", "Felix", "Heidi", "Otto", "Greta",
    "Pierre", "Camille", "Louis", "Chantal", "Tim", "Kate", "Nick", "Jane", "Steve", "Amy", "Ryan", "Megan",
)  # fmt: skip
_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
_SYLLABLES = (
    "ba", "be", "da", "do", "fa", "fi", "ga", "go", "ha", "jo", "ka", "ki", "la", "li", "lo", "ma", "mi", "mo", "na",
    "ni", "no", "pa", "po", "ra", "ri", "ro", "sa", "si", "ta", "ti", "to", "va", "vi", "za", "zu",
)  # fmt: skip
_SPELL = tuple(
    w
    for w in (*tables.OPPOSITES, *tables.PLURALS, "apple", "banana", "hello", "model", "server", "memory")
    if len(w) < 8
)


def name(rng: Random) -> str:
    """A first name that somebody has, or one made up, so that names are copied rather than known."""
    return rng.choice(_NAMES) if rng.random() < 0.6 else invented(rng).capitalize()


def invented(rng: Random) -> str:
    """A word that there is not."""
    return "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 2, 3)))) + rng.choice(("", "", "n", "r", "s", "l", "k"))


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


_ASK_LIST = (
    "List {n} {k}",
    "List {n} {k}",
    "Name {n} {k}",
    "Name {n} {k}",
    "Give me {n} {k}",
    "Tell me {n} {k}",
    "List {n} {k} please",
    "Can you name {n} {k}",
    "Can you list {n} {k}",
    "Could you give me {n} {k}",
    "I need {n} {k}",
    "I want {n} {k}",
    "I would like {n} {k}",
    "Write down {n} {k}",
    "Do you know {n} {k}",
    "What are {n} {k}",
    "Give me a list of {n} {k}",
    "Make a list of {n} {k}",
    "Write a list of {n} {k}",
    "Show me {n} {k}",
    "Could you name {n} {k}",
    "Please tell me {n} {k}",
    "I am looking for {n} {k}",
    "Think of {n} {k}",
    "Let me hear {n} {k}",
    "Which {n} {k} do you know",
)


def listing(rng: Random) -> tuple[str, str]:
    """A list of a few things, as a sentence, numbered, or as JSON."""
    kind = rng.choice((*tables.LISTS, *tables.MAIN_LISTS, *tables.MAIN_LISTS))
    known = tables.LISTS[kind]
    if kind == "planets" and rng.random() < 0.3:
        return rng.choice(_ASK_ALL).format(k="the planets"), sentence_list(list(known))
    if rng.random() < 0.1:
        return rng.choice(_ASK_SOME).format(k=kind), sentence_list(list(known[:5]))
    count = min(len(known), rng.choice((2, 3, 3, 3, 4, 4, 5, 5, 6, 7, 8)))
    items = list(known[:count])
    number = rng.choice((_COUNTS[count], _COUNTS[count], str(count)))
    ask = rng.choice(_ASK_LIST).format(n=number, k=kind)
    style = rng.random()
    if style < 0.10:
        return f"{ask} as a numbered list.", "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    if style < 0.18:
        quoted = ", ".join(f'"{item}"' for item in items)
        return f"{ask} as JSON.", f"[{quoted}]"
    if style < 0.24:
        one = f"Name one of the {kind}." if kind.endswith("ies") else f"Name {article(kind[:-1])}."
        return one, sentence_list(items[:1])
    return ask + rng.choice((".", ".", "", "!")), sentence_list(items)


_ASK_ALL = (
    "List {k}.",
    "Name {k}.",
    "What are {k}?",
    "Tell me {k}.",
    "Can you list {k}?",
    "Can you name {k}?",
    "Which are {k}?",
    "Give me {k}.",
    "What are {k} called?",
    "Write down {k}.",
    "List {k} in order.",
    "What are the names of {k}?",
    "Say {k}.",
    "Recite {k}.",
    "Do you know {k}?",
    "Please list {k}.",
    "Could you tell me {k}?",
    "Show me {k}.",
    "Name all of {k}.",
    "List all {k}.",
)
_ASK_SOME = (
    "What {k} are there?",
    "Which {k} are there?",
    "Say some {k}.",
    "Name some {k}.",
    "List some {k}.",
    "Give me a few {k}.",
    "Which {k} do you know?",
    "Tell me some {k}.",
)


def calendar(rng: Random) -> tuple[str, str]:
    """Days, months and seasons."""
    kind = rng.randrange(5)
    if kind < 3:
        what, items = (
            (("the days of the week", "the days", "the weekdays", "the seven days of the week"), tables.DAYS),
            (("the months", "the months of the year", "the twelve months"), tables.MONTHS),
            (("the seasons", "the four seasons", "the seasons of the year"), tables.SEASONS),
        )[kind]
        return rng.choice(_ASK_ALL).format(k=rng.choice(what)), sentence_list(list(items))
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
        pool = (*tables.OPPOSITES, *tables.PLURALS, *_NAMES, *(invented(rng) for _ in range(60)))
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
    person, age = name(rng), rng.randint(1, 60)
    if kind == "json":
        return rng.choice(
            (
                f"Give me JSON with name {person} and age {age}.",
                f"Write a JSON object with the name {person} and the age {age}.",
                f"Write JSON: name {person}, age {age}",
            )
        ), f'{{"name": "{person}", "age": {age}}}'
    return rng.choice((f"Say hello to {person}.", f"Greet {person}.", f"Say hi to {person}")), f"Hello, {person}!"


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
    return rng.choices(makers, (20, 13, 24, 9, 9, 11, 12, 2))[0](rng)
