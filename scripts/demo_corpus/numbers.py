"""Arithmetic and counting: questions with short, exact answers."""

from __future__ import annotations

from random import Random

LARGEST = 100
"""Of the numbers that are added and subtracted."""
TOO_LARGE = "These numbers are too large for me: I add and subtract up to 100 and multiply up to 10 x 10."

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_TENS = (
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
)

_ASK = (
    "What is {e}?",
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
    "What do you get for {e}?",
    "What is the result of {e}?",
    "I need {e}.",
    "How much does {e} make?",
)
_ASK_PAIR = {
    "+": (
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "Sum of {a} and {b}?",
        "Add {b} to {a}.",
        "Can you add {a} and {b}?",
        "Please add {a} and {b}.",
        "How much are {a} and {b} together?",
        "{a} and {b} together?",
        "If I add {a} and {b}, what do I get?",
        "What do I get if I add {a} and {b}?",
        "Work out {a} + {b}.",
    ),
    "-": ("Subtract {b} from {a}.", "What is {a} less {b}?", "Take {b} away from {a}."),
    "*": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
    "/": ("Divide {a} by {b}.",),
}
_SPOKEN = {"+": ("plus", "and"), "-": ("minus",), "*": ("times", "multiplied by"), "/": ("divided by",)}


def in_words(number: int) -> str:
    """A number up to 100 in words."""
    if number <= 20:
        return _ONES[number]
    if number == LARGEST:
        return "one hundred"
    tens, one = _TENS[number // 10 - 2], number % 10
    return f"{tens}-{_ONES[one]}" if one else tens


def held_out(a: int, b: int, op: str) -> bool:
    """Whether a sum or difference beyond the small tables is kept out of training, to measure generalisation.

    About a tenth of them, sums with both orders; every pair of last digits occurs in the others.
    """
    low, high = sorted((a, b))
    return op in "+-" and high > 10 and (low * 37 + high * 61) % 101 < 10


def equation(a: int, b: int, op: str) -> str:
    """The calculation as it is answered: without an end, and by way of the tens where both numbers have units.

    "37 + 45 = 70 + 12 = 82" and "52 - 37 = 22 - 7 = 15": each digit then depends on few others.
    """
    results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}
    way = ""
    if op == "+" and max(a, b) > 9 and a % 10 and b % 10:
        way = f" = {a // 10 * 10 + b // 10 * 10} + {a % 10 + b % 10}"
    elif op == "-" and b > 10 and b % 10:
        way = f" = {a - b // 10 * 10} - {b % 10}"
    return f"{a} {op} {b}{way} = {results[op]}"


def operands(rng: Random, focus: bool = False) -> tuple[int, int, str]:
    """Two numbers and an operator; with focus more of the numbers above 20."""
    while True:
        op = rng.choices("+-*/", (58, 20, 17, 5))[0]
        if op in "+-":
            top = rng.choices((10, 20, 50, LARGEST), (15, 15, 25, 45) if focus else (30, 20, 20, 30))[0]
            a, b = rng.randint(0, top), rng.randint(0, top)
            if op == "-":
                a, b = max(a, b), min(a, b)
        else:
            a, b = rng.randint(0, 10), rng.randint(1, 10)
            if op == "/":
                a *= b
        if not held_out(a, b, op):
            return a, b, op


def _expression(rng: Random, a: int, b: int, op: str) -> str:
    style = rng.random()
    if style < 0.65:
        sign = op if op != "*" else rng.choice(("*", "*", "x"))
        gap = "" if rng.random() < 0.15 else " "
        return f"{a}{gap}{sign}{gap}{b}"
    word = rng.choice(_SPOKEN[op])
    if style > 0.9:
        return f"{in_words(a)} {word} {in_words(b)}"
    return f"{a} {word} {b}"


def _asked(rng: Random, a: int, b: int, op: str) -> str:
    if rng.random() < 0.15:
        return rng.choice(_ASK_PAIR[op]).format(a=a, b=b)
    question = rng.choice(_ASK).format(e=_expression(rng, a, b, op))
    return question[0].upper() + question[1:]


def arithmetic(rng: Random, focus: bool = False) -> tuple[str, str]:
    """One calculation, asked in one of many ways and answered as an equation."""
    a, b, op = operands(rng, focus)
    question = _asked(rng, a, b, op)
    swapped = op == "+" and question.startswith(f"Add {b} to")
    return question, f"{equation(b, a, op) if swapped else equation(a, b, op)}."


def too_large(rng: Random) -> tuple[str, str]:
    """A calculation beyond the model, and the answer that says so."""
    op = rng.choice("++-**/")
    low = 11 if op in "*/" else LARGEST + 1
    a, b = rng.randint(low, 10 ** rng.randint(3, 6)), rng.randint(low, 10 ** rng.randint(3, 5))
    style = rng.random()
    word = rng.choice(_SPOKEN[op])
    text = f"{a} {word} {b}" if style < 0.3 else f"{a} {op} {b}" if style < 0.85 else f"{a}{op}{b}"
    return rng.choice(_ASK).format(e=text), TOO_LARGE


def word_problem(rng: Random) -> tuple[str, str]:
    """A tiny story sum."""
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    while held_out(a, b, "+") or held_out(max(a, b), min(a, b), "-"):
        a, b = rng.randint(1, 20), rng.randint(1, 20)
    name, thing = rng.choice(("Anna", "Tom", "Lily", "Ben")), rng.choice(("apples", "books", "coins", "eggs", "cards"))
    if rng.random() < 0.5:
        return (
            f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?",
            f"{equation(a, b, '+')}.",
        )
    a, b = max(a, b), min(a, b)
    return (
        f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
        f"{equation(a, b, '-')}.",
    )


def comparison(rng: Random) -> tuple[str, str]:
    """Which of two numbers is larger or smaller."""
    a, b = rng.sample(range(rng.choice((21, 101))), 2)
    if rng.random() < 0.6:
        word = rng.choice(("larger", "bigger", "greater"))
        return rng.choice(
            (f"Which is {word}, {a} or {b}?", f"What is {word}, {a} or {b}?", f"Which number is {word}: {a} or {b}?")
        ), f"{max(a, b)} is larger than {min(a, b)}."
    return f"Which is smaller, {a} or {b}?", f"{min(a, b)} is smaller than {max(a, b)}."


def _join(values: range) -> str:
    return ", ".join(str(value) for value in values)


_COUNT_UP = (
    "Count from {a} to {b}",
    "Count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "List the numbers from {a} to {b}.",
    "Count {a} to {b}",
    "Numbers from {a} to {b}?",
    "Write the numbers from {a} to {b}.",
    "Count upwards from {a} to {b}.",
    "Give me the numbers from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Start at {a} and count to {b}.",
    "Could you count from {a} to {b}?",
    "I want you to count from {a} to {b}.",
)
_COUNT_DOWN = (
    "Count down from {b} to {a}.",
    "Count backwards from {b} to {a}.",
    "Count from {b} to {a}.",
    "Can you count down from {b} to {a}?",
    "Can you count backwards from {b} to {a}?",
    "List the numbers from {b} down to {a}.",
    "Count from {b} down to {a}.",
    "Count from {b} to {a} backwards.",
    "Numbers from {b} to {a}?",
    "Write the numbers from {b} down to {a}.",
    "Start at {b} and count down to {a}.",
    "Can you count from {b} to {a}?",
    "Count back from {b} to {a}.",
    "Count in reverse from {b} to {a}.",
    "I want you to count backwards from {b} to {a}.",
)


def counting(rng: Random) -> tuple[str, str]:
    """Count up or down between two numbers up to 20, or in steps of two or ten."""
    kind = rng.random()
    low, high = sorted(rng.sample(range(21), 2))
    if rng.random() < 0.4:
        low, high = rng.choice((0, 1, 1, 1)), rng.choice((10, 20, rng.randint(3, 20)))
    if kind < 0.45:
        ask = rng.choice(_COUNT_UP)
        if low == 1 and rng.random() < 0.35:
            ask = rng.choice(
                ("Count to {b}.", "Count up to {b}.", "Can you count to {b}?", "Please count to {b}", "Count to {b}")
            )
        return ask.format(a=low, b=high), _join(range(low, high + 1))
    if kind < 0.88:
        ask = rng.choice(_COUNT_DOWN)
        if low == 1 and rng.random() < 0.35:
            ask = rng.choice(("Count down from {b}.", "Count backwards from {b}.", "Countdown from {b}!"))
        return ask.format(a=low, b=high), _join(range(high, low - 1, -1))
    if kind < 0.92:
        return rng.choice(("Count to 100 in tens.", "Count by tens to 100.")), _join(range(10, 101, 10))
    count, start, name = rng.randint(3, 8), *rng.choice(((2, "even"), (1, "odd")))
    return f"List the first {count} {name} numbers.", _join(range(start, start + 2 * count, 2))


def number_fact(rng: Random) -> tuple[str, str]:
    """Neighbours, parity, words for numbers, and sorting a few numbers."""
    n = rng.randint(1, rng.choice((30, 99)))
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice((f"What comes after {n}?", f"Which number comes after {n}?")), f"{n + 1} comes after {n}."
    if kind == 1:
        return f"What comes before {n}?", f"{n - 1} comes before {n}."
    if kind == 2:
        return f"Is {n} even or odd?", f"{n} is {'odd' if n % 2 else 'even'}."
    if kind == 3:
        return rng.choice((f"Write {n} as a word.", f"How do you write {n} in words?")), f"{in_words(n).capitalize()}."
    numbers = rng.sample(range(1, 20), rng.randint(3, 4))
    return f"Sort these numbers: {', '.join(map(str, numbers))}", ", ".join(map(str, sorted(numbers)))


def question(rng: Random, focus: bool = False) -> tuple[str, str]:
    """Any of the above, mostly sums and counting."""
    kinds = (arithmetic, counting, comparison, number_fact, word_problem, too_large)
    maker = rng.choices(kinds, (58, 22, 4, 5, 5, 6))[0]
    return arithmetic(rng, focus) if maker is arithmetic else maker(rng)
