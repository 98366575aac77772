"""Haiku: three lines of five, seven and five syllables, put together from lines written for this."""

from __future__ import annotations

from random import Random

HAIKU: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "snow": (
        ("Snow falls on the roof", "White snow, a white field", "First snow of the year"),
        ("the garden sleeps without sound", "a small bird leaves one thin track", "all the roads are soft and new"),
        ("winter holds its breath", "the night is so bright", "no one is awake"),
    ),
    "rain": (
        ("Rain on the window", "Rain through the whole night", "Grey clouds, a warm rain"),
        ("each drop finds its own slow way", "the street shines like a river", "the frogs sing in the tall grass"),
        ("I stay here and read", "the leaves drink it all", "then the sun comes back"),
    ),
    "the sea": (
        ("Waves come and waves go", "The sea in the dark", "Salt wind on my face"),
        ("a white sail far out alone", "the moon draws a silver road", "the gulls cry over the sand"),
        ("the tide forgets us", "the shore listens still", "small shells in my hand"),
    ),
    "spring": (
        ("The first warm morning", "Green leaves after rain", "Spring wind in the trees"),
        ("a bee hums in the blossoms", "the old tree is young again", "children run across the field"),
        ("the ice is all gone", "the whole garden sings", "everything begins"),
    ),
    "autumn": (
        ("Red leaves on the path", "Mist over the field", "The last apple falls"),
        ("the wind sweeps them to the gate", "a flock of birds heads for home", "the evenings are growing long"),
        ("the year turns slowly", "smoke from a far house", "the kettle is warm"),
    ),
    "the moon": (
        ("The moon in the pond", "Full moon on the hill", "A thin moon rises"),
        ("a frog jumps and it trembles", "the owl calls once and is still", "the cat walks along the wall"),
        ("then all is quiet", "night without an end", "my shadow goes home"),
    ),
    "a cat": (
        ("The cat on the chair", "A cat in the sun", "Soft paws on the floor"),
        ("she dreams of mice and twitches", "she opens one eye and yawns", "she looks at me and says no"),
        ("the day may go on", "the bird flies away", "dinner must be soon"),
    ),
    "computers": (
        ("The fans are humming", "Two cards, one model", "The screen is still dark"),
        ("layer by layer it thinks", "each one does what it does best", "a small light blinks in the rack"),
        ("one word, then the next", "the answer is here", "it waits for a key"),
    ),
}
"""By topic: lines to begin with, to go on with and to end with."""

OTHER_NAMES = {
    "winter": "snow", "the winter": "snow", "the ocean": "the sea", "water": "the sea", "waves": "the sea",
    "flowers": "spring", "nature": "spring", "trees": "autumn", "leaves": "autumn", "the night": "the moon",
    "cats": "a cat", "my cat": "a cat", "a computer": "computers", "GPUs": "computers", "VRAMancer": "computers",
    "a graphics card": "computers", "the rain": "rain", "the weather": "rain", "clouds": "rain",
}  # fmt: skip
"""Topics that take the lines of another."""

_ANY_TOPIC = ("love", "my dog", "a train", "music", "the city", "dragons", "time", "tea", "a friend", "silence", "work")
"""Topics without lines of their own, which get any."""

_ASK = (
    "Write a haiku.",
    "Write me a haiku.",
    "Tell me a haiku.",
    "A haiku please.",
    "Can you write a haiku?",
    "Make a haiku.",
    "Give me a haiku.",
    "I want a haiku.",
    "Write a short haiku.",
    "Do you know a haiku?",
    "Haiku",
)
_ASK_ABOUT = (
    "Write a haiku about {t}.",
    "Write me a haiku about {t}.",
    "A haiku about {t}, please.",
    "Can you write a haiku about {t}?",
    "Make a haiku about {t}.",
    "Give me a haiku about {t}.",
    "Haiku about {t}",
    "Tell me a haiku about {t}.",
    "I would like a haiku about {t}.",
    "Write a short haiku about {t}.",
)


def haiku(rng: Random, topic: str | None = None) -> str:
    """Three lines about a topic of `HAIKU`, or about any of them."""
    lines = HAIKU[topic or rng.choice(tuple(HAIKU))]
    return "\n".join(rng.choice(choices) for choices in lines)


def question(rng: Random) -> tuple[str, str]:
    """A request for a haiku, and the haiku."""
    roll = rng.random()
    if roll < 0.4:
        return rng.choice(_ASK), haiku(rng)
    if roll < 0.5:
        return rng.choice(_ASK_ABOUT).format(t=rng.choice(_ANY_TOPIC)), haiku(rng)
    topic = rng.choice((*HAIKU, *OTHER_NAMES))
    return rng.choice(_ASK_ABOUT).format(t=topic), haiku(rng, OTHER_NAMES.get(topic, topic))
