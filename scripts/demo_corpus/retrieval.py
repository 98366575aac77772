"""Questions and the passages that answer them, for the bundled embedding model; some wordings are never trained on.

A passage is an answer of the demo model's text. Of the ways in which people ask for it a fifth is held out, and of the
passages themselves a tenth, with all of their questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from . import product, tables, vary
from .facts import Fact

SPLIT_SEED = 11
LEAST_WORDINGS = 4
"""A passage with fewer keeps all of them for training."""
FROM_PASSAGE = 0.3
"""Share of the questions that are words of their passage."""
_CAPITAL = ("What is the capital of {t}?", "capital of {t}", "Which city is the capital of {t}?", "{t}'s capital")
_DEFINED = ("What is {t}?", "Define {t}.", "What does {t} mean?", "{t}", "Explain {t}.")
_LISTED = ("Name some {t}.", "Which {t} are there?", "List {t}", "Give me a few {t}.")


@dataclass(frozen=True, slots=True)
class Split:
    """What is trained on, and questions that are not, each with its passage. `passages` are all that are searched."""

    facts: tuple[Fact, ...]
    passages: tuple[str, ...]
    new_wordings: tuple[tuple[str, str], ...]
    new_passages: tuple[tuple[str, str], ...]


def split() -> Split:
    """The same at every call."""
    rng = Random(SPLIT_SEED)
    facts: list[Fact] = []
    asked: list[tuple[str, str]] = []
    unseen: list[tuple[str, str]] = []
    everything = [*product.IDENTITY, *product.OVERVIEW, *product.ENGINE, *product.USAGE, *product.REFERENCE]
    for fact in everything:
        if rng.random() < 0.1:
            unseen += [(question, fact.answer) for question in _whole_questions(fact)]
            continue
        kept, held = _divide(rng, fact)
        facts.append(kept)
        asked += [(question, fact.answer) for question in _whole_questions(held)]
    facts += _general()
    passages = tuple(dict.fromkeys([*(fact.answer for fact in everything), *(fact.answer for fact in facts)]))
    trained = {_plain(text) for fact in facts for text in fact.wordings()}
    fresh, new = (
        tuple(pair for pair in dict.fromkeys(pairs) if _plain(pair[0]) not in trained) for pairs in (asked, unseen)
    )
    return Split(tuple(facts), passages, fresh, new)


def _plain(question: str) -> str:
    """Without what `vary` changes."""
    return question.lower().rstrip(".?!")


def _divide(rng: Random, fact: Fact) -> tuple[Fact, Fact]:
    """A fact with the wordings to train on, and one with those that are held out."""
    words = [(kind, text) for kind, texts in enumerate(fact[1:]) for text in texts]
    rng.shuffle(words)
    held = words[: round(len(words) / 5)] if len(words) >= LEAST_WORDINGS else []
    return tuple(  # type: ignore[return-value]
        Fact(
            fact.answer, *(tuple(t for k, t in words if k == kind and ((k, t) in held) is chosen) for kind in range(3))
        )
        for chosen in (False, True)
    )


def _whole_questions(fact: Fact) -> list[str]:
    """One question for each wording, in its plainest form."""
    return [
        *fact.questions, *(f"What is {topic}?" for topic in fact.topics), *(f"How do I {task}?" for task in fact.tasks)
    ]  # fmt: skip


def _general() -> Iterator[Fact]:
    for country, city in tables.CAPITALS.items():
        yield Fact(f"The capital of {country} is {city}.", tuple(form.format(t=country) for form in _CAPITAL))
    for word, meaning in tables.DEFINITIONS.items():
        yield Fact(meaning, tuple(form.format(t=word) for form in _DEFINED))
    for kind, things in tables.LISTS.items():
        listed = f"{kind[0].upper()}{kind[1:]}: {', '.join(things)}."
        yield Fact(listed, tuple(form.format(t=kind) for form in _LISTED))


def batches(seed: int, size: int) -> Iterator[list[tuple[str, str, str]]]:
    """Endless batches of a question, the same asked otherwise, and the passage; no passage twice in a batch."""
    rng = Random(seed)
    facts = split().facts
    weights = [2 + min(fact.weight, 20) for fact in facts]
    while True:
        chosen: dict[str, Fact] = {}
        while len(chosen) < size:
            fact = rng.choices(facts, weights)[0]
            chosen.setdefault(fact.answer, fact)
        yield [(_asked(rng, fact), _asked(rng, fact), fact.answer) for fact in chosen.values()]


def _asked(rng: Random, fact: Fact) -> str:
    """A question, or a few words of the passage: what passages have in common with questions that nobody has seen."""
    if rng.random() >= FROM_PASSAGE:
        return vary(rng, fact.ask(rng))
    words = fact.answer.split()
    length = min(len(words), rng.randint(2, 6))
    start = rng.randint(0, len(words) - length)
    picked = [word.strip(".,:;") for word in words[start : start + length]]
    return " ".join(picked) if rng.random() < 0.5 else f"What about {' '.join(picked)}?"
