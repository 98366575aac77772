"""The text on which the bundled demo model is trained.

All of it is written or generated here, so the project owns it. `documents()` yields an endless, seeded stream of
conversations and plain texts as segments, each marked by whether the model has to learn to write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from . import calling, dialogs, general, heldout, heldout_calls, numbers, poems, product, stories, tables

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BOS, END, SYSTEM, USER, ASSISTANT]

Segments = list[tuple[str, bool]]
TOOL_SHARE = 0.34
"""Of the documents: conversations in which functions are offered."""
RECALL_SHARE = 0.12

_POLITE = ("Please", "Hi,", "Hello,", "Hey,", "Quick question:", "Tell me,", "I want to know:", "So,", "Ok,")


_BEFORE = (
    "I am new here.",
    "I have a question.",
    "I just installed VRAMancer.",
    "One more thing.",
    "Sorry to ask.",
    "I am a beginner.",
    "Thanks.",
    "Good.",
    "Now something else.",
    "I am curious.",
)


def vary(rng: Random, text: str) -> str:
    """The same question as people really type it: lower case, no punctuation, a polite word, a sentence before it."""
    if rng.random() < 0.04:
        return f"{rng.choice(_BEFORE)} {text}"
    roll = rng.random()
    if roll < 0.55:
        return text
    if roll < 0.68:
        return text[0].lower() + text[1:]
    if roll < 0.80:
        return text.rstrip(".?!") or text
    if roll < 0.88:
        return (text[0].lower() + text[1:]).rstrip(".?!") or text
    if roll < 0.94 and len(text) > 6:
        return f"{rng.choice(_POLITE)} {text[0].lower() + text[1:] if not text.startswith('VRM') else text}"
    if roll < 0.97 and text[-1] in ".?":
        return f"{text[:-1]}, please{text[-1]}"
    return text.lower() if "VRM_" not in text else text


def is_held_out(question: str) -> bool:
    """Whether it is kept out of training, to be asked afterwards."""
    return heldout.is_held_out(question) or heldout_calls.is_held_out(question)


def render(system: str | None, turns: list[tuple[str, str]]) -> Segments:
    """A conversation in the chat format; the assistant's words are what is learnt."""
    segments: Segments = [(BOS, False)]
    if system:
        segments.append((f"{SYSTEM}{system}{END}", False))
    for question, answer in turns:
        segments.append((f"{USER}{question}{END}{ASSISTANT}", False))
        segments.append((f"{answer}{END}", True))
    return segments


def chat(rng: Random, turns: int | None = None, focus: bool = False) -> Segments:
    """One conversation in which no question is held out."""
    while True:
        system, parts = dialogs.conversation(rng, turns, focus)
        asked = [(vary(rng, question), answer) for question, answer in parts]
        if not any(is_held_out(question) for question, _ in parts + asked):
            return render(system, asked)


def tool_chat(rng: Random) -> Segments:
    """One conversation with functions in which no question is held out."""
    while True:
        tools, messages = calling.talk(rng, vary)
        asked = [message.text for message in messages if message.role == "user"]
        if not any(map(is_held_out, asked)):
            return calling.render_talk(tools, messages)


def plain(rng: Random) -> Segments:
    """A plain text, for completion without a chat."""
    kind = rng.randrange(8)
    if kind == 0:
        text = " ".join(stories.tell(rng) for _ in range(rng.choice((1, 1, 2))))
    elif kind == 1:
        pairs = rng.sample(tuple(tables.CAPITALS.items()), 4)
        text = " ".join(f"The capital of {country} is {city}." for country, city in pairs)
    elif kind == 2:
        text = "\n".join(numbers.arithmetic(rng)[1].rstrip(".") for _ in range(5))
    elif kind == 3:
        text = " ".join(general.word_fact(rng)[1] for _ in range(4))
    elif kind == 4:
        start = rng.choice((1, 1, rng.randint(0, 10)))
        text = rng.choice(
            (
                ", ".join(str(n) for n in range(start, start + rng.randint(8, 20))),
                ", ".join(tables.DAYS),
                ", ".join(tables.MONTHS),
            )
        )
    elif kind == 5:
        text = poems.haiku(rng)
    elif kind == 6:
        text = " ".join(fact.answer for fact in rng.sample(product.OVERVIEW + product.ENGINE, 3))
    else:
        text = " ".join(rng.sample(tuple(tables.DEFINITIONS.values()), 4))
    return [(BOS, False), (text + END, True)]


def drill(rng: Random) -> Segments:
    """A dozen equations of which only what follows the first "=" is learnt: the quickest way to calculating."""
    segments: Segments = [(BOS, False)]
    for _ in range(12):
        asked, way = numbers.equation(*numbers.operands(rng, focus=True)).split(" =", 1)
        segments += [(f"{asked} =", False), (way, True), ("\n", False)]
    return segments


def recall(rng: Random) -> Segments:
    """Words without a meaning that have to be copied, by their place or by what stands before them: the quickest way to
    names and numbers that come back as they were said."""

    def word() -> str:
        return rng.choice((general.invented, general.name, lambda rng: str(rng.randint(0, 9999)), _spelt))(rng)

    form = rng.random()
    if form < 0.35:
        return _signatures(rng)
    if form < 0.55:
        said = " ".join(word() for _ in range(rng.randint(4, 9)))
        return [(f"{BOS}{said}\n", False), (said + END, True)]
    pairs = {word(): word() for _ in range(rng.randint(3, 6))}
    segments: Segments = [(BOS + "".join(f"{key}: {value}\n" for key, value in pairs.items()), False)]
    for key in rng.sample(list(pairs), len(pairs)):
        segments += [(f"{key}:", False), (f" {pairs[key]}\n", True)]
    return segments


def _signatures(rng: Random) -> Segments:
    """Functions as they are offered, and calls, of which the names of the parameters are learnt."""
    offered = {
        rng.choice((general.invented, _spelt))(rng): [
            rng.choice((general.invented, general.invented, _spelt))(rng) for _ in range(rng.choice((1, 1, 2)))
        ]
        for _ in range(rng.randint(1, 4))
    }
    lines = (f"\n{name}({', '.join(f'{each}: string' for each in of)})" for name, of in offered.items())
    segments: Segments = [(f"{BOS}{SYSTEM}Tools:{''.join(lines)}{END}", False)]
    for name in rng.sample(list(offered), len(offered)):
        segments.append((f'{ASSISTANT}<tool_call>\n{{"name": "{name}", "arguments": ', False))
        for number, each in enumerate(offered[name]):
            segments += [(', "' if number else '{"', False), (f'{each}":', True), (f" {rng.randint(0, 99)}", False)]
        segments.append(("}}\n</tool_call>" + END, False))
    return segments


def _spelt(rng: Random) -> str:
    """A name as functions and their parameters have them."""
    return f"{general.invented(rng)}_{general.invented(rng)}"


def documents(seed: int | str, focus: bool = False) -> Iterator[Segments]:
    """Endless conversations and plain texts; with focus more of what takes longest to learn."""
    rng = Random(seed)
    while True:
        roll = rng.random()
        if roll < (0.08 if focus else 0.03):
            yield drill(rng)
        elif roll < 0.11:
            yield plain(rng)
        elif roll < 0.11 + RECALL_SHARE:
            yield recall(rng)
        elif roll < 0.11 + RECALL_SHARE + TOOL_SHARE:
            yield tool_chat(rng)
        else:
            yield chat(rng, focus=focus)


def long_documents(seed: int | str) -> Iterator[Segments]:
    """Endless long conversations, so that far positions are learnt as well."""
    rng = Random(seed)
    while True:
        yield chat(rng, rng.randint(12, 30))
