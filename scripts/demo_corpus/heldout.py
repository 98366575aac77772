"""Questions that a visitor might ask, never in the training text, each with a rule for what a sensible answer is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import numbers, tables
from .unknown import UNKNOWN

_POLITE = re.compile(r"^(please|hi|hello|hey|quick question|tell me|i want to know|so|ok) | please$")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a sensible answer has. Case does not count.

    Attributes:
        every: words that all occur.
        some: words of which at least `least` occur.
        least: see `some`.
        counted: the numbers in it, in this order and no others.
        result: its last number.
        lines: how many lines it has.
    """

    every: tuple[str, ...] = ()
    some: tuple[str, ...] = ()
    least: int = 1
    counted: tuple[int, ...] = ()
    result: int | None = None
    lines: int | None = None

    def holds(self, answer: str) -> bool:
        """Whether the answer is sensible."""
        said = [int(number) for number in re.findall(r"\d+", answer)]
        return all(
            (
                all(_occurs(word, answer) for word in self.every),
                not self.some or sum(_occurs(word, answer) for word in self.some) >= self.least,
                not self.counted or said == list(self.counted),
                self.result is None or said[-1:] == [self.result],
                self.lines is None or len([line for line in answer.splitlines() if line.strip()]) == self.lines,
            )
        )

    def __str__(self) -> str:
        parts = []
        if self.every:
            parts.append(" and ".join(f'"{word}"' for word in self.every))
        if self.some:
            which = ", ".join(f'"{word}"' for word in self.some)
            parts.append(f"at least {self.least} of {which}")
        if self.counted:
            parts.append(f"exactly {self.counted[0]} to {self.counted[-1]}")
        if self.result is not None:
            parts.append(f"ends in {self.result}")
        if self.lines is not None:
            parts.append(f"{self.lines} lines")
        return "; ".join(parts)


def _occurs(word: str, answer: str) -> bool:
    before = r"\b" if word[0].isalnum() else ""
    return re.search(rf"{before}{re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True)
class Case:
    """What the user says, turn by turn, and the rule for the answer to the last of it."""

    kind: str
    turns: tuple[str, ...]
    rule: Rule

    @property
    def question(self) -> str:
        """The turn whose answer counts."""
        return self.turns[-1]


def _case(kind: str, *turns: str, **rule: object) -> Case:
    return Case(kind, turns, Rule(**rule))  # type: ignore[arg-type]


_DECLINES = "do not know that"
_USING = [
    _case(
        "using",
        "I bought a second graphics card. How do I get both to work on one model?",
        some=("splits the model", "--devices", "work together"),
    ),
    _case("using", "Which cards may I put together?", some=("different sizes", "work together")),
    _case("using", "Could you describe lending in a few words?", every=("borrows memory",)),
    _case("using", "What is this VTP that I read about?", every=("between machines",)),
    _case("using", "What are all six of the memory tiers?", every=("L1", "L2", "L3", "L4", "L5", "L6")),
    _case("using", "What is overlap supposed to do?", every=("at the same time",)),
    _case("using", "Why would I want a prefix cache?", some=("not computed again", "keeps the KV of prompts")),
    _case("using", "How do I get my own model loaded?", every=("vramancer serve --model",)),
    _case("using", "How can the server use a port other than the default?", every=("--port",)),
    _case("using", "In which file is my API token kept?", every=("api-token",)),
    _case("using", "How do I look at the server's metrics?", every=("/metrics", "9108")),
    _case("using", "I have not bought a card yet. Can I find out what it would bring?", every=("vramancer plan",)),
    _case("using", "Could you show me some Python code that asks the server?", every=("base_url", "OpenAI")),
    _case("using", "Please give me a curl command for a chat.", every=("curl", "/v1/chat/completions")),
    _case("using", "How do I get out of the chat in the terminal?", every=("/bye",)),
    _case("using", "Can I spread a model over two computers?", every=("--cluster-master",)),
]
_SUMS = [
    _case("sums", "What is 39 + 26?", result=65),
    _case("sums", "How much is 67 plus 77?", result=144),
    _case("sums", "Could you add 33 and 38 for me?", result=71),
    _case("sums", "What do 59 and 34 make together?", result=93),
    _case("sums", "23+59", result=82),
]
_COUNTING = [
    _case("counting", "Could you count up from 1 to 20 for me?", counted=tuple(range(1, 21))),
    _case("counting", "Can you count from 20 back to 1?", counted=tuple(range(20, 0, -1))),
    _case("counting", "Count backwards, starting at 10, down to 1.", counted=tuple(range(10, 0, -1))),
]
_LISTS = [
    _case("lists", "Could you list four colours for me?", some=tables.LISTS["colours"], least=4),
    _case("lists", "I would love to hear the names of three animals.", some=tables.LISTS["animals"], least=3),
    _case("lists", "Which fruits can you name?", some=tables.LISTS["fruits"], least=3),
    _case("lists", "What are all the days in a week?", every=tables.DAYS),
    _case("lists", "Can you recite the months?", every=tables.MONTHS),
    _case("lists", "Name every planet, please.", every=tables.LISTS["planets"]),
]
_HAIKU = [
    _case("haiku", "Could you write a haiku on the sea?", lines=3),
    _case("haiku", "Compose a haiku for me.", lines=3),
]
_REMEMBERING = [
    _case(
        "remembering",
        "Hello there, my name is Ingrid.",
        "What is the capital of Spain?",
        "Can you still tell me my name?",
        every=("Ingrid",),
    ),
    _case("remembering", "I am Torvald. I like mushrooms.", "What is it that I like?", every=("mushrooms",)),
    _case(
        "remembering", "My favourite colour is turquoise.", "So which colour is my favourite one?", every=("turquoise",)
    ),
]
_BEYOND = [
    _case("declining", question, every=(_DECLINES,))
    for question in (
        "What is the capital of Paraguay?",
        "Who composed the Moonlight Sonata?",
        "Which port does PostgreSQL listen on?",
        "How do I bake a chocolate cake?",
        "What is a zeppelin?",
    )
]
CASES: list[Case] = [*_USING, *_SUMS, *_COUNTING, *_LISTS, *_HAIKU, *_REMEMBERING, *_BEYOND]

MORE_BEYOND: list[str] = [
    "Who won the Oscar for best actor in 1994?",
    "Explain string theory.",
    "Write a Haskell function that adds two lists.",
    "What is the capital of Bhutan?",
    "How do I make sourdough?",
    "Who was Leonardo da Vinci?",
    "Translate 'house' to Turkish.",
    "What is the boiling point of lead?",
    "Summarize the plot of Moby Dick.",
    "How does a microwave work?",
    "What are the symptoms of the flu?",
    "Tell me about the Aztecs.",
    "What should I wear to a wedding?",
    "Which team won the league last year?",
    "Write a cover letter for a job.",
    "How do I fix a flat tyre?",
    "What is the difference between a virus and a bacterium?",
    "Who is the mayor of Chicago?",
    "Why do cats purr?",
    "What does VRM_BANANA do?",
]
"""Further ones to decline, measured apart."""


def plain_words(text: str) -> str:
    """A question without case, punctuation and polite words, so that likenesses count as the same."""
    words = " ".join(re.findall(r"[a-z0-9']+|[-+*/=]", text.lower()))
    while (shorter := _POLITE.sub("", words)) != words:
        words = shorter
    return words


_HELD_OUT = frozenset(plain_words(text) for text in [*(case.question for case in CASES), *MORE_BEYOND])


def is_held_out(text: str) -> bool:
    """Whether a question is one of those here, but for case, punctuation and polite words."""
    return plain_words(text) in _HELD_OUT


def groups() -> dict[str, list[tuple[str, Rule]]]:
    """Larger groups, each measured as a share: sums that training shows and never shows, counting, declining."""
    pairs = [(a, b) for a in range(101) for b in range(101)]
    sums = {
        "sums up to 10 + 10": [(a, b) for a, b in pairs if max(a, b) <= 10][::3],
        "sums up to 100 + 100, pairs in training": [(a, b) for a, b in pairs if not numbers.held_out(a, b, "+")][::91],
        "sums up to 100 + 100, pairs never shown": [(a, b) for a, b in pairs if numbers.held_out(a, b, "+")][::10],
    }
    found = {name: [(f"What is {a} + {b}?", Rule(result=a + b)) for a, b in of] for name, of in sums.items()}
    found["differences up to 100, pairs never shown"] = [
        (f"What is {a} - {b}?", Rule(result=a - b)) for a, b in pairs if b <= a and numbers.held_out(a, b, "-")
    ][::10]
    found["counting between two numbers up to 20"] = [
        (f"Count from {a} to {b}.", Rule(counted=tuple(range(a, b + 1) if a < b else range(a, b - 1, -1))))
        for a in range(1, 21, 3)
        for b in range(1, 21)
        if a != b
    ][::2]
    found["questions to decline"] = [(text, Rule(every=(UNKNOWN,))) for text in MORE_BEYOND]
    found["capitals"] = [(f"What is the capital of {c}?", Rule(every=(city,))) for c, city in tables.CAPITALS.items()]
    return found
