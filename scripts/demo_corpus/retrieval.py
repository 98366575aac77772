"""Questions and the passages that answer them, for the bundled embedding model; some are never trained on.

A passage is an answer of the demo model's text. A sixth of the passages is held out with all of their questions, and of
the others a fifth of the ways in which people ask for them. What is held out depends on the text alone, so that other
facts, which come and go, change nothing about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from random import Random

from . import pages, product, tables, vary
from .facts import Fact

NEW_PASSAGES, NEW_WORDINGS = 1 / 6, 1 / 5
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
    facts: list[Fact] = []
    asked: list[tuple[str, str]] = []
    unseen: list[tuple[str, str]] = []
    everything = [
        *product.IDENTITY,
        *product.OVERVIEW,
        *product.ENGINE,
        *product.USAGE,
        *product.REFERENCE,
        *_general(),
    ]
    for fact in everything:
        if _place(fact.answer) < NEW_PASSAGES:
            unseen += [(question, fact.answer) for question in _whole_questions(fact)]
            continue
        kept, held = _divide(fact)
        facts.append(kept)
        asked += [(question, fact.answer) for question in _whole_questions(held)]
    passages = tuple(dict.fromkeys(fact.answer for fact in everything))
    trained = {_plain(text) for fact in facts for text in fact.wordings()}
    fresh, new = (
        tuple(pair for pair in dict.fromkeys(pairs) if _plain(pair[0]) not in trained) for pairs in (asked, unseen)
    )
    return Split(tuple(facts), passages, fresh, new)


def _place(text: str) -> float:
    """A number from 0 to 1 that the text decides."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64


def _plain(question: str) -> str:
    """Without what `vary` changes."""
    return question.lower().rstrip(".?!")


def _divide(fact: Fact) -> tuple[Fact, Fact]:
    """A fact with the wordings to train on, and one with those that are held out."""
    few = sum(map(len, fact[1:])) < LEAST_WORDINGS

    def part(held: bool) -> Fact:
        kinds = (fact.questions, fact.topics, fact.tasks)
        chosen = [tuple(text for text in kind if (not few and _place(text) < NEW_WORDINGS) is held) for kind in kinds]
        return Fact(fact.answer, *chosen)

    return part(held=False), part(held=True)


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
    rng, parts = Random(seed), split()
    facts = [fact for fact in parts.facts if any(fact[1:])]
    held = {_plain(question) for question, _ in (*parts.new_wordings, *parts.new_passages)}
    weights = [2 + min(fact.weight, 20) for fact in facts]
    while True:
        chosen: dict[str, Fact] = {}
        while len(chosen) < size:
            fact = rng.choices(facts, weights)[0]
            chosen.setdefault(fact.answer, fact)
        yield [(_asked(rng, fact, held), _asked(rng, fact, held), fact.answer) for fact in chosen.values()]


def page_batches(seed: int, size: int) -> Iterator[list[tuple[str, str]]]:
    """Endless batches of words of a passage of this repository's pages, or its heading, and the passage."""
    rng = Random(seed)
    found = pages.passages()
    while True:
        yield [(_words_of(rng, passage), passage.text) for passage in rng.sample(found, size)]


def _words_of(rng: Random, passage: pages.Passage) -> str:
    if passage.heading and rng.random() < 0.2:
        return passage.heading
    if rng.random() < 0.4:
        return rng.choice(passage.sentences)
    return _span(rng, passage.text)


def _asked(rng: Random, fact: Fact, held: set[str]) -> str:
    """A question that is not held out, or a few words of the passage: what passages have in common with questions that
    nobody has seen."""
    while True:
        if rng.random() >= FROM_PASSAGE:
            text = vary(rng, fact.ask(rng))
        else:
            text = _span(rng, fact.answer)
            text = text if rng.random() < 0.5 else f"What about {text}?"
        if _plain(text) not in held:
            return text


def _span(rng: Random, text: str) -> str:
    words = text.split()
    length = min(len(words), rng.randint(2, 6))
    start = rng.randint(0, len(words) - length)
    return " ".join(word.strip(".,:;") for word in words[start : start + length])
