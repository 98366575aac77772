"""Conversations: single questions of every kind, several turns, what the user said of themselves, system prompts."""

from __future__ import annotations

from random import Random

from . import general, numbers, objects, poems, product, stories, tables, unknown

_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful, honest assistant.",
    "Answer briefly.",
    "Be concise.",
    "You are a friendly assistant.",
    "You are an assistant.",
    "You are the VRAMancer demo model.",
    "Answer the question.",
    "You answer questions about VRAMancer.",
    "Be polite.",
    "Keep your answers short.",
    "You are a helpful AI assistant. Answer truthfully.",
    "Respond in English.",
)

Turns = list[tuple[str, str]]

_MY_NAME = (
    "My name is {n}.",
    "Hi, I am {n}.",
    "Hello, my name is {n}.",
    "I am {n}.",
    "Call me {n}.",
    "Hello! I'm {n}.",
    "Hi, my name is {n}",
    "I'm {n}.",
    "You can call me {n}.",
    "This is {n}.",
    "People call me {n}.",
    "Please remember that my name is {n}.",
    "Remember my name: {n}.",
    "Hey, I'm {n}!",
    "Good morning, I am {n}.",
)
_ASK_NAME = (
    "What is my name?",
    "Do you remember my name?",
    "Who am I?",
    "What's my name?",
    "Tell me my name.",
    "Do you know my name?",
    "What was my name?",
    "Can you say my name?",
    "And what is my name?",
    "Do you know who I am?",
    "How am I called?",
    "What did I say my name was?",
)
_FAVOURITES = ("colours", "animals", "fruits", "cities", "drinks", "sports", "planets", "flowers")
_LIKED = (
    "tea", "coffee", "pizza", "chess", "music", "football", "cats", "dogs", "books", "trains", "apples", "cheese",
    "swimming", "dancing", "old films", "green tea", "cooking", "horses", "bread", "painting", "robots", "stars",
    "flowers", "snow", "rain", "tennis", "mountains", "the sea", "chocolate", "bananas", "gardening", "bicycles",
)  # fmt: skip


_FACTS, _REFERENCE = ((facts, [fact.weight for fact in facts]) for facts in (product.FACTS, product.REFERENCE))


def about_product(rng: Random) -> tuple[str, str]:
    """A question about VRAMancer."""
    facts, weights = _FACTS if rng.random() < 0.85 else _REFERENCE
    fact = rng.choices(facts, weights)[0]
    return fact.ask(rng), fact.answer


def single(rng: Random, focus: bool = False) -> tuple[str, str]:
    """One question of any kind; with focus more of what takes longest to learn."""
    if rng.random() < (0.30 if focus else 0.26):
        return numbers.question(rng, focus)
    makers = (about_product, general.question, unknown.question, stories.question, poems.question, objects.question)
    return rng.choices(makers, (42, 20, 16, 3, 5, 8))[0](rng)


def _said(rng: Random) -> tuple[tuple[str, str], tuple[str, str]]:
    """Something that the user says of themselves with its reply, and the question for it with its answer."""
    kind = rng.randrange(5)
    if kind == 0:
        plural = rng.choice(_FAVOURITES)
        key = "city" if plural == "cities" else plural[:-1]
        value = rng.choice((*tables.LISTS[plural], general.invented(rng)))
        tell = rng.choice(
            (
                "My favourite {k} is {v}.",
                "My favourite {k} is {v}.",
                "{V} is my favourite {k}.",
                "I like the {k} {v} best.",
                "My favorite {k} is {v}.",
            )
        )
        ask = rng.choice(
            (
                "What is my favourite {k}?",
                "Which {k} do I like best?",
                "Which is my favourite {k}?",
                "Do you remember my favourite {k}?",
                "What {k} do I like?",
                "What was my favourite {k}?",
            )
        )
        tell = tell.format(k=key, v=value, V=value[0].upper() + value[1:])
        return (
            (tell, f"I will remember that your favourite {key} is {value}."),
            (ask.format(k=key), f"Your favourite {key} is {value}."),
        )
    if kind == 1:
        city = rng.choice((*tables.CAPITALS.values(), general.invented(rng).capitalize()))
        tell = rng.choice(("I live in {c}.", "My home is in {c}.")).format(c=city)
        ask = rng.choice(("Where do I live?", "In which city do I live?", "Where is my home?"))
        return (tell, f"I will remember that you live in {city}."), (ask, f"You live in {city}.")
    if kind == 2:
        pet, name = rng.choice(("dog", "cat", "horse", "bird")), general.name(rng)
        tell = rng.choice((f"My {pet} is called {name}.", f"I have a {pet} named {name}."))
        ask = rng.choice((f"What is my {pet} called?", f"What is the name of my {pet}?"))
        return (tell, f"{name} is a nice name."), (ask, f"Your {pet} is called {name}.")
    thing = rng.choice(_LIKED) if rng.random() < 0.8 else general.invented(rng)
    verb = rng.choice(("like", "like", "love", "really like", "enjoy"))
    tell = rng.choice((f"I {verb} {thing}.", f"I {verb} {thing} very much.", f"I {verb} {thing} most of all."))
    ask = rng.choice(
        (
            "What do I like?",
            "Do you remember what I like?",
            "What do I like most?",
            "Which thing do I like?",
            "I like what?",
        )
    )
    return (tell, f"I will remember that you like {thing}."), (ask, f"You like {thing}.")


def memory(rng: Random, first: bool = True) -> Turns:
    """The user gives a name (and says what they like), talks of other things, and asks for it again.

    Only if it comes first in a conversation may the name be asked for before it was given.
    """
    if first and rng.random() < 0.08:
        return [(rng.choice(_ASK_NAME), "You have not told me your name.")]
    name = general.name(rng)
    tell = rng.choice(_MY_NAME).format(n=name)
    reply, recall = f"Nice to meet you, {name}!", [(rng.choice(_ASK_NAME), f"Your name is {name}.")]
    turns: Turns = []
    style = rng.random()
    if style < 0.2:
        (said, _), asked = _said(rng)
        turns, recall = [(f"{tell.rstrip('.!')}. {said}", reply)], [*recall, asked]
    else:
        if style < 0.85:
            turns.append((tell, reply))
        if style > 0.5:
            told, asked = _said(rng)
            turns.append(told)
            recall = [*recall, asked] if style < 0.85 else [asked]
    turns += [single(rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    rng.shuffle(recall)
    return turns + recall[: rng.choice((1, 2, 2))]


def follow_up(rng: Random) -> Turns:
    """A second question that leans on the first."""
    if rng.random() < 0.4:
        (one, city), (two, other) = rng.sample(tuple(tables.CAPITALS.items()), 2)
        ask = rng.choice(("And of {c}?", "And {c}?", "What about {c}?", "And what is the capital of {c}?"))
        return [
            (f"What is the capital of {one}?", f"The capital of {one} is {city}."),
            (ask.format(c=two), f"The capital of {two} is {other}."),
        ]
    if rng.random() < 0.4:
        again = rng.choice(("Another one.", "Tell me another one.", "One more please."))
        if rng.random() < 0.5:
            return [stories.question(rng), (again, stories.tell(rng))]
        return [poems.question(rng), (again, poems.haiku(rng))]
    a, b, c = rng.randint(1, 10), rng.randint(1, 10), rng.randint(1, 10)
    while numbers.held_out(a + b, c, "+"):
        c = rng.randint(1, 10)
    return [
        (f"What is {a} + {b}?", f"{numbers.equation(a, b, '+')}."),
        (rng.choice((f"Plus {c}?", f"And plus {c}?", f"Add {c}.")), f"{numbers.equation(a + b, c, '+')}."),
    ]


def one_word(rng: Random) -> tuple[str, Turns]:
    """A system prompt that asks for bare answers, and a question answered that way."""
    system = rng.choice(("Answer in one word.", "Answer with one word only.", "Reply with a single word."))
    if rng.random() < 0.5:
        country, city = rng.choice(tuple(tables.CAPITALS.items()))
        return system, [(f"What is the capital of {country}?", f"{city}.")]
    word, other = rng.choice(tuple(tables.OPPOSITES.items()))
    return system, [(f"What is the opposite of {word}?", f"{other[0].upper()}{other[1:]}.")]


def conversation(rng: Random, turns: int | None = None, focus: bool = False) -> tuple[str | None, Turns]:
    """A system prompt or none, and one or more turns."""
    kind = rng.random()
    if turns is None and kind < 0.02:
        return one_word(rng)
    if turns is None and kind < 0.03:
        return objects.by_system(rng)
    system = rng.choice(_SYSTEM) if rng.random() < 0.15 else None
    if turns is not None:
        parts = memory(rng, first=False) + follow_up(rng)
        while len(parts) < turns:
            parts += memory(rng, first=False) if rng.random() < 0.15 else [single(rng)]
        return system, parts
    if kind < (0.14 if focus else 0.11):
        return system, memory(rng)
    if kind < 0.16:
        return system, follow_up(rng)
    count = rng.choices((1, 2, 3), (86, 9, 5))[0]
    return system, [single(rng, focus) for _ in range(count)]
