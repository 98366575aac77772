"""The shape of a fact: one answer with the ways people ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

_ABOUT = (
    "What is {t}?",
    "What is {t}?",
    "What's {t}?",
    "Explain {t}.",
    "Can you explain {t}?",
    "Could you explain {t} to me?",
    "How does {t} work?",
    "Tell me about {t}.",
    "Can you tell me about {t}?",
    "Describe {t}.",
    "What does {t} mean?",
    "What does {t} do?",
    "What is meant by {t}?",
    "Define {t}.",
    "I have a question about {t}.",
    "I do not understand {t}.",
    "Tell me more about {t}.",
    "What can you tell me about {t}?",
    "What is {t} in VRAMancer?",
    "How does VRAMancer do {t}?",
    "What is {t} good for?",
    "Why is there {t}?",
    "Does VRAMancer have {t}?",
    "{t}?",
    "{t}",
    "Could you describe {t}?",
    "What is the idea of {t}?",
    "What is the point of {t}?",
    "When is {t} useful?",
    "In short, what is {t}?",
    "Please explain {t} briefly.",
    "Give me a short explanation of {t}.",
    "How would you explain {t}?",
    "What exactly is {t}?",
    "I have heard of {t}.",
    "Teach me about {t}.",
    "What should I know about {t}?",
    "What happens with {t}?",
    "Do you know {t}?",
    "What do you know about {t}?",
)
_TO_DO = (
    "How do I {t}?",
    "How do I {t}?",
    "How can I {t}?",
    "How do you {t}?",
    "How to {t}?",
    "How would I {t}?",
    "How is it possible to {t}?",
    "I want to {t}.",
    "I want to {t}. How?",
    "I would like to {t}.",
    "I need to {t}.",
    "I am trying to {t}.",
    "Can I {t}?",
    "Can I {t} with VRAMancer?",
    "Could I {t}?",
    "May I {t}?",
    "Is it possible to {t}?",
    "Is there a way to {t}?",
    "What is the way to {t}?",
    "What is the best way to {t}?",
    "What do I do to {t}?",
    "What do I have to do to {t}?",
    "What do I type to {t}?",
    "Which command do I use to {t}?",
    "Show me how to {t}.",
    "Tell me how to {t}.",
    "Explain how to {t}.",
    "Please help me {t}.",
    "Does VRAMancer let me {t}?",
    "I do not know how to {t}.",
    "Could you tell me how to {t}?",
    "Could you show me how to {t}?",
    "Do you know how to {t}?",
    "How does one {t}?",
    "How should I {t}?",
    "What would I run to {t}?",
    "What is needed to {t}?",
    "What do I need to {t}?",
    "I have to {t}. What now?",
    "I cannot {t}.",
    "We want to {t}.",
    "Where do I begin if I want to {t}?",
    "Help me {t}.",
    "Let me {t}.",
    "How am I supposed to {t}?",
)


class Fact(NamedTuple):
    """One answer and the questions that it answers.

    Attributes:
        answer: what the model says.
        questions: whole questions.
        topics: what may stand after "What is"; put into many sentences.
        tasks: what may stand after "How do I"; put into many sentences.
    """

    answer: str
    questions: tuple[str, ...]
    topics: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    @property
    def weight(self) -> int:
        """How often it is asked beside others: by how much there is to ask."""
        return len(self.questions) + 2 * len(self.topics) + 2 * len(self.tasks)

    def wordings(self) -> Iterator[str]:
        """All of its questions."""
        yield from self.questions
        for words, forms in ((self.topics, _ABOUT), (self.tasks, _TO_DO)):
            yield from (form.format(t=word) for word in words for form in forms)

    def ask(self, rng: Random) -> str:
        """One of its questions."""
        kinds = [
            (self.questions, ("{t}",), len(self.questions)),
            (self.topics, _ABOUT, 8 * len(self.topics)),
            (self.tasks, _TO_DO, 10 * len(self.tasks)),
        ]
        words, forms, _ = rng.choices(kinds, [min(weight, 30) for *_, weight in kinds])[0]
        text = rng.choice(forms).format(t=rng.choice(words))
        return text[0].upper() + text[1:]


def fact(answer: str, *questions: str, topics: tuple[str, ...] = (), tasks: tuple[str, ...] = ()) -> Fact:
    """Write a fact with its questions as plain arguments."""
    return Fact(answer, questions, topics, tasks)
