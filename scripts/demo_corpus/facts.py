"""The shape of a fact: one answer with the ways people ask for it."""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """One answer and the questions that it answers."""

    answer: str
    questions: tuple[str, ...]


def fact(answer: str, *questions: str) -> Fact:
    """Write a fact with its questions as plain arguments."""
    return Fact(answer, questions)
