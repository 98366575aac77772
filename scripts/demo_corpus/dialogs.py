"""Questions that the demo model must decline, conversations with several turns, and system prompts."""

from __future__ import annotations

from random import Random

from . import general, numbers, product, stories, tables

UNKNOWN = "I am a small demo model and do not know that. Load a larger model to get a real answer."

_TOPICS = (
    "quantum physics",
    "the French Revolution",
    "black holes",
    "photosynthesis",
    "the stock market",
    "inflation",
    "machine learning",
    "evolution",
    "gravity",
    "the Roman Empire",
    "blockchain",
    "democracy",
    "electricity",
    "jazz",
    "World War II",
    "chess openings",
    "relativity",
    "climate change",
    "the immune system",
    "Buddhism",
    "opera",
    "Shakespeare",
    "vaccines",
    "nuclear energy",
    "the Cold War",
    "philosophy",
    "tax law",
    "mortgages",
    "genetics",
    "Kubernetes",
    "compilers",
    "calculus",
    "algebra",
    "cooking rice",
    "yoga",
    "football tactics",
    "wine",
    "cancer",
)
_PEOPLE = (
    "Napoleon",
    "Einstein",
    "Mozart",
    "Picasso",
    "the president",
    "Marie Curie",
    "Julius Caesar",
    "Beethoven",
    "Steve Jobs",
    "Cleopatra",
    "Newton",
    "Elvis",
    "the pope",
    "the king",
    "Gandhi",
    "Plato",
    "Messi",
    "Obama",
)
_THINGS = (
    "guitar",
    "volcano",
    "whale",
    "rocket",
    "pizza",
    "cake",
    "laptop",
    "phone",
    "engine",
    "bridge",
    "castle",
    "violin",
    "camera",
    "telescope",
    "dinosaur",
    "kangaroo",
    "submarine",
    "battery",
    "lamp",
    "sweater",
    "contract",
    "website",
    "database",
    "keyboard",
    "hamster",
    "cactus",
    "sofa",
    "budget",
    "printer",
    "garden",
)
_PLACES = (
    "Nigeria",
    "Iceland",
    "Chile",
    "Vietnam",
    "Mongolia",
    "Texas",
    "Ghana",
    "Cuba",
    "Nepal",
    "Bolivia",
    "Atlantis",
    "Morocco",
    "Iran",
    "Thailand",
    "Ukraine",
    "Colombia",
    "Serbia",
    "Kansas",
    "Jamaica",
    "Laos",
)
_TONGUES = ("Latin", "Chinese", "Arabic", "Russian", "Japanese", "Korean", "Swedish", "Finnish")
_CODE = (
    "sorts a list",
    "reads a file",
    "reverses a string",
    "downloads a page",
    "finds prime numbers",
    "parses JSON",
    "plays chess",
    "sends an email",
    "computes a factorial",
    "draws a circle",
    "checks a password",
)
_LANGUAGES = ("Python", "Java", "C++", "Rust", "JavaScript", "Bash", "SQL", "Go")
_PATTERNS = (
    "Explain {topic}.",
    "What is {topic}?",
    "Tell me about {topic}.",
    "Write an essay about {topic}.",
    "How does {topic} work?",
    "Why is {topic} important?",
    "Give me a summary of {topic}.",
    "What do you think of {topic}?",
    "Who was {person}?",
    "Who is {person}?",
    "When was {person} born?",
    "What did {person} do?",
    "Tell me about {person}.",
    "How old is {person}?",
    "Where does {person} live?",
    "Write a letter to {person}.",
    "When did {person} die?",
    "What is {a_thing}?",
    "How do I repair my {thing}?",
    "How does {a_thing} work?",
    "Who invented the {thing}?",
    "Where can I buy {a_thing}?",
    "How much does {a_thing} cost?",
    "How do I make {a_thing}?",
    "What is the best {thing}?",
    "Describe {a_thing}.",
    "Why is my {thing} broken?",
    "Should I buy {a_thing}?",
    "What is the capital of {place}?",
    "What is the population of {place}?",
    "What is the weather in {place}?",
    "Who is the president of {place}?",
    "What language do they speak in {place}?",
    "How far is {place}?",
    "What should I see in {place}?",
    "When was {place} founded?",
    "How big is {place}?",
    "Where is {place}?",
    "Write a {lang} function that {code}.",
    "Write a program that {code}.",
    "How do I write a {lang} script that {code}?",
    "Show me {lang} code that {code}.",
    "Fix this {lang} code.",
    "Translate '{thing}' to {tongue}.",
    "How do you say {thing} in {tongue}?",
    "Write a song about {topic}.",
    "Who won the game in {year}?",
    "What happened in {year}?",
    "Who won the World Cup in {year}?",
    "What was the best film of {year}?",
    "Summarize this article about {topic}.",
    "Recommend a book about {topic}.",
    "Give me a recipe for {thing}.",
    "What is the meaning of life?",
    "What is the weather today?",
    "Will it rain tomorrow?",
    "What is the news?",
    "How can I lose weight?",
    "How do I become rich?",
    "What should I eat today?",
    "What is the price of gold?",
    "What is the square root of {big}?",
    "What is {big} times {big}?",
    "How tall is the highest mountain?",
    "How fast is light?",
    "How far away is the moon?",
    "Who wrote Hamlet?",
    "Who painted the Mona Lisa?",
    "What is the speed of sound?",
    "Which film should I watch?",
    "Can you book a flight to {place}?",
    "Compare {topic} and {topic2}.",
    "What is the difference between {topic} and {topic2}?",
    "Who discovered {topic}?",
)

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


def unknown(rng: Random) -> tuple[str, str]:
    """A question beyond the model, and the answer that says so."""
    topic, topic2 = rng.sample(_TOPICS, 2)
    thing = rng.choice(_THINGS)
    text = rng.choice(_PATTERNS).format(
        topic=topic,
        topic2=topic2,
        person=rng.choice(_PEOPLE),
        thing=thing,
        a_thing=general.article(thing),
        place=rng.choice(_PLACES),
        lang=rng.choice(_LANGUAGES),
        code=rng.choice(_CODE),
        tongue=rng.choice(_TONGUES),
        year=rng.randint(1900, 2030),
        big=rng.randint(101, 9999),
    )
    return text, UNKNOWN


def about_product(rng: Random) -> tuple[str, str]:
    """A question about VRAMancer."""
    facts = product.FACTS if rng.random() < 0.82 else product.REFERENCE
    fact = rng.choice(facts)
    return rng.choice(fact.questions), fact.answer


def single(rng: Random, focus: bool = False) -> tuple[str, str]:
    """One question of any kind; with focus more arithmetic, which takes longest to learn."""
    if rng.random() < (0.34 if focus else 0.24):
        return numbers.question(rng, focus)
    makers = (about_product, general.question, stories.question, unknown)
    return rng.choices(makers, (31, 28, 5, 12))[0](rng)


def memory(rng: Random) -> Turns:
    """The user gives a name (and a favourite), talks of other things, and asks for it again."""
    name = rng.choice(general.names())
    key, values = rng.choice(
        (
            ("colour", tables.LISTS["colours"]),
            ("animal", tables.LISTS["animals"]),
            ("fruit", tables.LISTS["fruits"]),
            ("city", tables.LISTS["cities"]),
        )
    )
    value = rng.choice(values)
    turns: Turns = []
    if rng.random() < 0.12:
        return [
            (rng.choice(("What is my name?", "Do you know my name?", "Who am I?")), "You have not told me your name.")
        ]
    opening = rng.choice(
        (
            "My name is {n}.",
            "Hi, I am {n}.",
            "Hello, my name is {n}.",
            "I am {n}.",
            "Call me {n}.",
            "Hello! I'm {n}.",
            "Hi, my name is {n}",
        )
    )
    turns.append((opening.format(n=name), f"Nice to meet you, {name}!"))
    with_favourite = rng.random() < 0.4
    if with_favourite:
        turns.append(
            (f"My favourite {key} is {value}.", f"Thank you, I will remember that your favourite {key} is {value}.")
        )
    turns += [single(rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    ask = rng.choice(
        ("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?", "Tell me my name.")
    )
    recall = [(ask, f"Your name is {name}.")]
    if with_favourite:
        recall.append((f"What is my favourite {key}?", f"Your favourite {key} is {value}."))
        rng.shuffle(recall)
    return turns + recall


def follow_up(rng: Random) -> Turns:
    """A second question that leans on the first."""
    if rng.random() < 0.5:
        (one, city), (two, other) = rng.sample(tuple(tables.CAPITALS.items()), 2)
        ask = rng.choice(("And of {c}?", "And {c}?", "What about {c}?", "And what is the capital of {c}?"))
        return [
            (f"What is the capital of {one}?", f"The capital of {one} is {city}."),
            (ask.format(c=two), f"The capital of {two} is {other}."),
        ]
    if rng.random() < 0.3:
        return [
            stories.question(rng),
            (rng.choice(("Another one.", "Tell me another one.", "One more please.")), stories.tell(rng)),
        ]
    a, b, c = rng.randint(1, 10), rng.randint(1, 10), rng.randint(1, 10)
    return [
        (f"What is {a} + {b}?", f"{a} + {b} = {a + b}."),
        (rng.choice((f"Plus {c}?", f"And plus {c}?", f"Add {c}.")), f"{a + b} + {c} = {a + b + c}."),
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
    system = rng.choice(_SYSTEM) if rng.random() < 0.15 else None
    if turns is not None:
        parts = memory(rng) + follow_up(rng)
        while len(parts) < turns:
            parts += memory(rng) if rng.random() < 0.15 else [single(rng)]
        return system, parts
    if kind < 0.08:
        return system, memory(rng)
    if kind < 0.12:
        return system, follow_up(rng)
    count = rng.choices((1, 2, 3), (86, 9, 5))[0]
    return system, [single(rng, focus) for _ in range(count)]
