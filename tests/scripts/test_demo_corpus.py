"""The text that the demo model learns from: seeded, true, and without what is held out."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import demo_corpus as corpus
import pytest
from demo_corpus import facts, heldout, numbers, product, tables
from demo_corpus.unknown import UNKNOWN

SEED = 11


def talks(count: int, seed: int = SEED) -> list[str]:
    """Generated documents of every kind as text."""
    sources = (corpus.documents(seed), corpus.documents(seed, focus=True), corpus.long_documents(seed))
    found = [
        segments
        for source, share in zip(sources, (count, count, count // 40), strict=True)
        for segments in islice(source, share)
    ]
    return ["".join(text for text, _ in segments) for segments in found]


def questions(text: str) -> list[str]:
    return re.findall(r"<\|user\|>(.*?)<\|end\|>", text, re.DOTALL)


@pytest.fixture(scope="module")
def generated() -> list[str]:
    return talks(2000)


def every_question(fact: facts.Fact) -> set[str]:
    """All that `Fact.ask` may say, without case and punctuation."""
    forms = [(fact.questions, ("{t}",)), (fact.topics, facts._ABOUT), (fact.tasks, facts._TO_DO)]
    return {heldout.plain_words(form.format(t=word)) for words, shapes in forms for word in words for form in shapes}


def test_the_text_follows_from_the_seed() -> None:
    assert talks(100) == talks(100)
    assert talks(100) != talks(100, SEED + 1)


def test_the_models_own_words_are_what_is_learnt() -> None:
    for segments in islice(corpus.documents(SEED), 500):
        if any(corpus.USER in text for text, _ in segments):
            assert [learnt for _, learnt in segments if learnt], segments
            assert not any(learnt for text, learnt in segments if corpus.USER in text or corpus.SYSTEM in text)


def test_no_held_out_question_is_generated(generated: list[str]) -> None:
    asked = [question for text in generated for question in questions(text)]
    assert len(asked) > 4000
    assert not [question for question in asked if heldout.is_held_out(question)]


def test_what_is_held_out_is_kept_out_even_if_it_is_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = heldout.plain_words("What is your name?")
    wordings = {heldout.plain_words(question) for text in talks(2000) for question in questions(text)}
    assert usual in wordings
    monkeypatch.setattr(heldout, "_HELD_OUT", frozenset({usual}))
    assert usual not in {heldout.plain_words(question) for text in talks(2000) for question in questions(text)}


@pytest.mark.parametrize(
    "text", ["what is a zeppelin", "Please, what is a Zeppelin?", "Hi, what is a zeppelin, please!"]
)
def test_case_and_politeness_do_not_make_another_question(text: str) -> None:
    assert heldout.is_held_out(text)
    assert not heldout.is_held_out(text + " that flies")


def test_sums_are_true_and_never_held_out(generated: list[str]) -> None:
    found = 0
    for text in generated:
        for chain in re.findall(r"(?<![\d.:])\d+ [-+*/] \d+(?: = [\d+ -]*\d)+", text):
            asked, *rest = chain.split(" = ")
            a, op, b = asked.split()
            assert not numbers.held_out(int(a), int(b), op), chain
            assert {eval(part) for part in rest} == {eval(asked)}, chain
            found += 1
    assert found > 1000


def test_the_held_out_tenth_leaves_every_pair_of_last_digits() -> None:
    pairs = [(a, b) for a in range(101) for b in range(101)]
    kept = [(a, b) for a, b in pairs if not numbers.held_out(a, b, "+")]
    assert 0.88 < len(kept) / len(pairs) < 0.92
    assert all(numbers.held_out(a, b, "+") == numbers.held_out(b, a, "+") for a, b in pairs)
    assert len({(a % 10, b % 10) for a, b in kept if min(a, b) > 10}) == 100
    assert not any(numbers.held_out(a, b, "+") for a in range(11) for b in range(11))


def test_all_sums_to_a_hundred_and_all_counts_to_twenty_are_generated() -> None:
    rng = Random(SEED)
    sums = {(a, b) for a, b, op in (numbers.operands(rng, focus=True) for _ in range(80_000)) if op == "+"}
    kept = {(a, b) for a in range(101) for b in range(101) if not numbers.held_out(a, b, "+")}
    assert len(kept - sums) < 0.2 * len(kept)
    counts = {answer for _, answer in (numbers.counting(rng) for _ in range(20_000))}
    for low in range(20):
        up = [str(number) for number in range(low, 21)]
        assert {", ".join(up), ", ".join(reversed(up))} <= counts


def test_a_question_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for fact in product.FACTS + product.REFERENCE:
        for question in every_question(fact):
            assert answers.setdefault(question, fact.answer) == fact.answer, question


def test_a_fact_asks_what_it_lists() -> None:
    rng = Random(SEED)
    for fact in product.FACTS[:20]:
        assert {heldout.plain_words(fact.ask(rng)) for _ in range(50)} <= every_question(fact)


def test_a_name_is_asked_for_only_after_it_was_given(generated: list[str]) -> None:
    for text in generated:
        if "You have not told me your name." in text:
            assert "Nice to meet you" not in text


def test_lists_are_what_was_asked_for(generated: list[str]) -> None:
    everything = "\n".join(generated)
    for items in (tables.DAYS, tables.MONTHS, tables.LISTS["planets"]):
        assert f"{', '.join(items[:-1])} and {items[-1]}." in everything


def test_what_is_not_known_is_said(generated: list[str]) -> None:
    declined = [text for text in generated if UNKNOWN in text]
    assert 0.05 < len(declined) / len(generated) < 0.3
