"""What `/set` and the flags of `run` know of sampling: names, types, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.errors import InvalidRequestError
from core.request import SamplingParams

DEFAULT = "default"
"""The word that takes a setting back."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One sampling parameter that may be set."""

    kind: Callable[[str], int | float]
    meaning: str


CHOICES = {
    "temperature": Choice(float, "randomness; 0 always takes the likeliest token"),
    "max_tokens": Choice(int, "longest answer, in tokens"),
    "top_p": Choice(float, "only the likeliest tokens whose shares add up to this"),
    "top_k": Choice(int, "only so many of the likeliest tokens; 0 is off"),
    "min_p": Choice(float, "only tokens at least this share as likely as the likeliest"),
    "seed": Choice(int, "the same seed gives the same answer"),
    "repetition_penalty": Choice(float, "above 1: tokens that have occurred are less likely"),
    "presence_penalty": Choice(float, "taken from tokens of the answer that have occurred"),
    "frequency_penalty": Choice(float, "the same for each time that they have"),
}
"""Ranges are those of `SamplingParams`."""


def read_choice(name: str, text: str) -> int | float:
    """The value that `text` says. Raises `InvalidRequestError` that says what is allowed."""
    kind = CHOICES[name].kind
    try:
        value = kind(text)
    except ValueError as error:
        word = "a whole number" if kind is int else "a number"
        raise InvalidRequestError(f"{name} must be {word}, not {text!r}.", param=name) from error
    SamplingParams(**{name: value}).validate(vocab_size=1)  # type: ignore[arg-type]
    return value


def unknown(kind: str, given: str, known: Iterable[str]) -> str:
    """A sentence on a name that there is not: the nearest one, and all that there are."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    meant = f"; did you mean {near[0]}?" if near else "."
    return f"There is no {kind} {given}{meant} There are: {', '.join(names)}."
