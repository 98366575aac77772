"""The held-out questions, their rules, and the page that reports on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import pytest
from demo_corpus.heldout import CASES, Rule, groups
from demo_corpus.unknown import UNKNOWN
from demo_training import evaluation
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from core.models.resolve import DEMO_PATH


def test_there_are_forty_of_all_kinds() -> None:
    assert len(CASES) == len({case.question for case in CASES}) == 40
    kinds = Counter(case.kind for case in CASES)
    assert set(kinds) == {"using", "sums", "counting", "lists", "haiku", "remembering", "declining"}
    assert evaluation.WANTED == 32


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.question)
def test_every_rule_can_be_missed(case: evaluation.Case) -> None:
    assert not case.rule.holds("")
    assert case.rule.holds(UNKNOWN) == (case.kind == "declining")
    assert str(case.rule)


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (Rule(every=("L1", "L6")), "l1 and L6.", "L1 and L60"),
        (Rule(every=("/metrics",)), "http://127.0.0.1:9108/metrics", "/metric"),
        (Rule(every=("--port",)), "add --port 8080", "add --ports"),
        (Rule(some=("red", "blue", "green"), least=2), "Red, blue", "red, red and bored"),
        (Rule(counted=(3, 2, 1)), "3, 2, 1", "3, 2, 1, 0"),
        (Rule(result=82), "37 + 45 = 70 + 12 = 82.", "37 + 45 = 70 + 82 = 72."),
        (Rule(result=2), "It is 2.", "It is 12."),
        (Rule(lines=3), "a\nb\n\nc\n", "a\nb"),
    ],
)
def test_rules(rule: Rule, right: str, wrong: str) -> None:
    assert rule.holds(right)
    assert not rule.holds(wrong)


def test_groups_have_what_their_names_say() -> None:
    found = groups()
    assert all(len(asked) >= 20 for asked in found.values())
    assert all(
        rule.holds(f"It is {eval(question.removeprefix('What is ').rstrip('?'))}.")
        for name, asked in found.items()
        if name.startswith(("sums", "differences"))
        for question, rule in asked
    )


def test_conversations_go_on_with_the_models_own_answers() -> None:
    heard: list[list[dict[str, str]]] = []

    def answers(conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        heard.extend([dict(message) for message in talk] for talk in conversations)
        return [f"to {talk[-1]['content']}" for talk in conversations]

    answered = evaluation.answer_cases(answers)
    assert [case for case, _ in answered] == CASES
    assert all(answer == f"to {case.question}" for case, answer in answered)
    longest = max(heard, key=len)
    assert [message["role"] for message in longest] == ["user", "assistant", "user", "assistant", "user"]
    assert longest[1]["content"] == f"to {longest[0]['content']}"


def test_the_page_shows_every_answer_and_the_score(capsys: pytest.CaptureFixture[str]) -> None:
    def answers(conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        return [UNKNOWN for _ in conversations]

    counts = evaluation.answer_groups(answers)
    assert counts["questions to decline"] == (20, 20) and counts["capitals"][0] == 0
    assert "capitals: 0 of 32" in capsys.readouterr().out
    text = evaluation.page(evaluation.answer_cases(answers), counts)
    assert "5 of 40 sensibly" in text and "| questions to decline | 20 of 20 |" in text
    assert text.count(UNKNOWN) == 40 and all(case.question in text for case in CASES)
    assert text.count("**no**") == 35


@pytest.fixture(scope="module")
def shipped() -> list[tuple[evaluation.Case, str]]:
    """What the model that comes with VRAMancer answers."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(DEMO_PATH), PreTrainedTokenizerFast.from_pretrained(DEMO_PATH)
    return evaluation.answer_cases(evaluation.answerer(model, tokenizer))


def test_the_shipped_model_answers_as_many_as_are_wanted(shipped: list[tuple[evaluation.Case, str]]) -> None:
    assert sum(case.rule.holds(answer) for case, answer in shipped) >= evaluation.WANTED


def test_the_shipped_answers_are_the_shipped_models(shipped: list[tuple[evaluation.Case, str]]) -> None:
    text = (DEMO_PATH / "ANSWERS.md").read_text(encoding="utf-8")
    assert int(re.findall(rf"(\d+) of {len(CASES)} sensibly", text)[0]) >= evaluation.WANTED
    shown = sum("\n".join(f"    {line}" for line in answer.splitlines()) in text for _, answer in shipped)
    assert shown >= evaluation.WANTED  # another processor may round the others otherwise


def test_the_shipped_answers_are_to_these_questions() -> None:
    text = (DEMO_PATH / "ANSWERS.md").read_text(encoding="utf-8")
    for case in CASES:
        assert f"**{' / '.join(case.turns)}** (sensible: " in text, "run scripts/train_demo_model.py --evaluate"
        assert f"; rule: {case.rule})" in text, "run scripts/train_demo_model.py --evaluate"
