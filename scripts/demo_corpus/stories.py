"""Short stories from a small grammar, told on request or as the continuation of a plain text."""

from __future__ import annotations

from random import Random

HEROES: dict[str, tuple[str, str]] = {
    "fox": ("in a forest", "He"),
    "cat": ("in a village", "She"),
    "dog": ("on a farm", "He"),
    "bird": ("in a tall tree", "She"),
    "bear": ("in a forest", "He"),
    "mouse": ("in a little house", "She"),
    "robot": ("in a big city", "He"),
    "dragon": ("in a cave", "She"),
    "rabbit": ("in a garden", "He"),
    "horse": ("on a farm", "She"),
    "girl": ("in a village", "She"),
    "boy": ("in a village", "He"),
}
NAMES = {"He": ("Max", "Tom", "Leo", "Ben"), "She": ("Lily", "Anna", "Mia", "Luna")}
TRAITS = ("small", "brave", "kind", "clever", "young")
FINDS: dict[str, tuple[str, str]] = {
    "a golden key": ("opened an old door", "Behind the door was a room full of books"),
    "a lost lamb": ("took it home", "The lamb's mother was very happy"),
    "a shiny stone": ("showed it to a friend", "They looked at it together until the sun went down"),
    "an old map": ("followed it over the hills", "At the end of the way there was a beautiful lake"),
    "a little boat": ("sailed down the river", "The water was calm and the sun was warm"),
    "a red balloon": ("gave it to a sad child", "The child smiled and said thank you"),
    "a hungry bird": ("shared some bread", "The bird sang a song to say thank you"),
}
ENDINGS = (
    "From that day on, they were best friends.",
    "{name} went home and slept well.",
    "{name} was very happy that day.",
    "And they all lived happily ever after.",
)

_ASK = (
    "Tell me a short story.",
    "Tell me a story.",
    "Write a short story.",
    "Write me a story.",
    "A story please.",
    "Can you tell me a story?",
    "I want to hear a story.",
    "Tell a story",
    "Please write a short story.",
    "Once upon a time",
)
_ASK_ABOUT = (
    "Tell me a story about a {h}.",
    "Write a short story about a {h}.",
    "Tell me a short story about a {h}.",
    "Can you write a story about a {h}?",
    "Story about a {h}",
)


def tell(rng: Random, hero: str | None = None, sentences: int | None = None) -> str:
    """One story of six sentences, or only its beginning."""
    hero = hero or rng.choice(tuple(HEROES))
    place, pronoun = HEROES[hero]
    name = rng.choice(NAMES[pronoun])
    find = rng.choice(tuple(FINDS))
    did, then = FINDS[find]
    parts = [
        f"Once upon a time, there was a {rng.choice(TRAITS)} {hero} named {name}.",
        f"{pronoun} lived {place}.",
        f"One day, {name} went for a walk and found {find}.",
        f"{name} {did}.",
        f"{then}.",
        rng.choice(ENDINGS).format(name=name),
    ]
    return " ".join(parts[:sentences])


def question(rng: Random) -> tuple[str, str]:
    """A request for a story, and the story."""
    if rng.random() < 0.55:
        return rng.choice(_ASK), tell(rng)
    hero = rng.choice(tuple(HEROES))
    return rng.choice(_ASK_ABOUT).format(h=hero), tell(rng, hero)
