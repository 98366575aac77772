"""Arithmetic and counting: questions with short, exact answers."""

from __future__ import annotations

from random import Random

WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)

_ASK = (
    "What is {e}?",
    "{e}",
    "{e} = ?",
    "How much is {e}?",
    "Calculate {e}.",
    "What is {e}",
    "Compute {e}.",
    "{e}=",
    "Can you calculate {e}?",
    "Tell me what {e} is.",
    "What's {e}?",
    "Solve {e}.",
    "What does {e} equal?",
)
_SPOKEN = {"+": ("plus", "and"), "-": ("minus",), "*": ("times", "multiplied by"), "/": ("divided by",)}


def held_out(a: int, b: int, op: str) -> bool:
    """Whether a sum or difference beyond the small tables is kept out of training, to measure generalisation."""
    return op in "+-" and max(a, b) > 20 and (a * 101 + b * 13 + ord(op)) % 10 == 0


def operands(rng: Random, focus: bool = False) -> tuple[int, int, str, int]:
    """Two numbers, an operator and the result; mostly, and with focus only, from the tables known by heart."""
    while True:
        op = rng.choices("+-*/", (40, 22, 30, 8))[0]
        if op in "+-":
            top = rng.choices((10, 20, 50), (85, 15, 0) if focus else (45, 35, 20))[0]
            a, b = rng.randint(0, top), rng.randint(0, top)
            if op == "-":
                a, b = max(a, b), min(a, b)
            result = a + b if op == "+" else a - b
        else:
            a, b = rng.randint(0, 10), rng.randint(1, 10)
            result = a * b
            if op == "/":
                a, result = result, a
        if not held_out(a, b, op):
            return a, b, op, result


def _expression(rng: Random, a: int, b: int, op: str) -> str:
    style = rng.random()
    if style < 0.65:
        sign = op if op != "*" else rng.choice(("*", "*", "x"))
        gap = "" if rng.random() < 0.15 else " "
        return f"{a}{gap}{sign}{gap}{b}"
    word = rng.choice(_SPOKEN[op])
    if style > 0.9 and max(a, b) <= 20:
        return f"{WORDS[a]} {word} {WORDS[b]}"
    return f"{a} {word} {b}"


def arithmetic(rng: Random, focus: bool = False) -> tuple[str, str]:
    """One calculation, asked in one of many ways and answered as an equation."""
    a, b, op, result = operands(rng, focus)
    question = rng.choice(_ASK).format(e=_expression(rng, a, b, op))
    return question[0].upper() + question[1:], f"{a} {op} {b} = {result}."


def word_problem(rng: Random) -> tuple[str, str]:
    """A tiny story sum."""
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    name, thing = rng.choice(("Anna", "Tom", "Lily", "Ben")), rng.choice(("apples", "books", "coins", "eggs"))
    if rng.random() < 0.5:
        return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?", f"{a} + {b} = {a + b}."
    a, b = max(a, b), min(a, b)
    return f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?", f"{a} - {b} = {a - b}."


def comparison(rng: Random) -> tuple[str, str]:
    """Which of two numbers is larger or smaller."""
    a, b = rng.sample(range(31), 2)
    if rng.random() < 0.6:
        word = rng.choice(("larger", "bigger", "greater"))
        return rng.choice(
            (f"Which is {word}, {a} or {b}?", f"What is {word}, {a} or {b}?", f"Which number is {word}: {a} or {b}?")
        ), f"{max(a, b)} is larger than {min(a, b)}."
    return f"Which is smaller, {a} or {b}?", f"{min(a, b)} is smaller than {max(a, b)}."


def _join(values: range) -> str:
    return ", ".join(str(value) for value in values)


def counting(rng: Random) -> tuple[str, str]:
    """Count up, down or in steps of two."""
    kind = rng.random()
    if kind < 0.65:
        low = 1 if rng.random() < 0.55 else rng.randint(0, 15)
        high = low + rng.choice((2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 11, 14, 19))
        ask = rng.choice(
            (
                "Count from {a} to {b}",
                "Count from {a} to {b}.",
                "Can you count from {a} to {b}?",
                "List the numbers from {a} to {b}.",
                "Count {a} to {b}",
                "Numbers from {a} to {b}?",
                "Write the numbers from {a} to {b}.",
            )
        )
        if low == 1 and rng.random() < 0.3:
            ask = rng.choice(("Count to {b}.", "Count up to {b}.", "Can you count to {b}?", "Please count to {b}"))
        return ask.format(a=low, b=high), _join(range(low, high + 1))
    if kind < 0.85:
        high = rng.choice((3, 5, 10, 10, rng.randint(4, 20)))
        low = rng.choice((1, 1, 0, max(0, high - 5)))
        ask = rng.choice(("Count down from {b} to {a}.", "Count backwards from {b} to {a}.", "Count from {b} to {a}."))
        return ask.format(a=low, b=high), _join(range(high, low - 1, -1))
    count, start, name = rng.randint(3, 8), *rng.choice(((2, "even"), (1, "odd")))
    return f"List the first {count} {name} numbers.", _join(range(start, start + 2 * count, 2))


def number_fact(rng: Random) -> tuple[str, str]:
    """Neighbours, parity, words for numbers, and sorting a few numbers."""
    n = rng.randint(1, 30)
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice((f"What comes after {n}?", f"Which number comes after {n}?")), f"{n + 1} comes after {n}."
    if kind == 1:
        return f"What comes before {n}?", f"{n - 1} comes before {n}."
    if kind == 2:
        return f"Is {n} even or odd?", f"{n} is {'odd' if n % 2 else 'even'}."
    if kind == 3:
        n = min(n, 20)
        return rng.choice((f"Write {n} as a word.", f"How do you write {n} in words?")), f"{WORDS[n].capitalize()}."
    numbers = rng.sample(range(1, 20), rng.randint(3, 4))
    return f"Sort these numbers: {', '.join(map(str, numbers))}", ", ".join(map(str, sorted(numbers)))


def question(rng: Random, focus: bool = False) -> tuple[str, str]:
    """Any of the above; with focus mostly the small tables."""
    if focus and rng.random() < 0.78:
        return arithmetic(rng, focus)
    maker = rng.choices((counting, comparison, number_fact, word_problem), (15, 6, 7, 6))[0]
    return maker(rng) if focus or rng.random() < 0.34 else arithmetic(rng)
