"""Grammars that are refused, and what compiling one costs others."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from grammars.walks import END, allowed, byte_vocabulary

from core.errors import InvalidRequestError
from core.grammars import compiler, forms
from core.grammars.matching import GrammarState, MaskMaker, MaskOrder
from core.grammars.vocabulary import Vocabulary

HARD = {"allOf": [{"type": "string", "pattern": f"a{number}.*b"} for number in range(30)]}


def of(schema: Any) -> str:
    return forms.compose(forms.json_schema(schema, space=""))


@pytest.mark.parametrize(
    "grammar",
    [
        of(HARD), forms.compose(forms.rules("start: x")), "{", "",
        of({"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "integer"}}} for j in range(4)]}
                      for i in range(10)]}),
    ],
    ids=["time", "unknown", "no JSON", "empty", "size"],
)  # fmt: skip
def test_hostile_grammars_are_refused_and_remembered(grammar: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = byte_vocabulary()
    with pytest.raises(InvalidRequestError) as first:
        grammars.check(grammar, "guided_json")
    assert first.value.param == "guided_json"
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(InvalidRequestError) as again:
        grammars.check(grammar, "guided_json")
    assert again.value.message == first.value.message


def test_grammars_that_are_kept_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = byte_vocabulary()
    monkeypatch.setattr(compiler, "MAX_KEPT", 2)
    for number in range(3):
        grammars.check(of({"const": number}), "a")
    monkeypatch.setattr(subprocess, "run", None)
    for number in (1, 2):
        grammars.check(of({"const": number}), "a")
    with pytest.raises(TypeError):
        grammars.check(of({"const": 0}), "a")


def test_few_long_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = byte_vocabulary()
    texts = [of({"const": f"{number}" * 50}) for number in range(3)]
    monkeypatch.setattr(compiler, "MAX_KEPT_CHARACTERS", len(texts[0]) * 2)
    for text in texts:
        grammars.check(text, "a")
    monkeypatch.setattr(subprocess, "run", None)
    grammars.check(texts[1], "a")
    with pytest.raises(TypeError):
        grammars.check(texts[0], "a")


def test_matchers_of_one_grammar_do_not_meet() -> None:
    grammars = byte_vocabulary()
    maker = MaskMaker(grammars, 257)
    text = forms.compose(forms.choice(["ab", "cd"]))
    first, second = GrammarState(text), GrammarState(text)
    try:
        assert allowed(maker, first, []) == allowed(maker, second, []) == [ord("a"), ord("c")]
        assert allowed(maker, first, [ord("a")]) == [ord("b")]
        assert allowed(maker, second, [ord("c")]) == [ord("d")]
        assert allowed(maker, first, [ord("b")]) == [END]
    finally:
        maker.close()


def test_tokens_that_are_held_come_where_nothing_else_may() -> None:
    grammars = byte_vocabulary()
    maker = MaskMaker(grammars, 257)
    state = GrammarState(forms.compose(forms.regex("a{0,2}")))
    try:
        assert allowed(maker, state, [], held=(END,)) == [ord("a")]
        assert allowed(maker, state, [ord("a")]) == [ord("a"), END]
        assert allowed(maker, state, [ord("a")], held=(END,)) == [END]
    finally:
        maker.close()


def test_what_is_wrong_is_said_of_its_own_sequence() -> None:
    grammars = byte_vocabulary()
    maker = MaskMaker(grammars, 257)
    good, bad = GrammarState(forms.compose(forms.choice(["a"]))), GrammarState("{")
    wrong = GrammarState(forms.compose(forms.choice(["a"])))
    try:
        found = maker.begin([MaskOrder(1, bad, []), MaskOrder(2, good, []), MaskOrder(3, wrong, [7])]).result()
        assert "compiled" in str(found[1]) and "grammar" in str(found[3])
        assert not isinstance(found[2], str)
    finally:
        maker.close()


def test_a_vocabulary_whose_parts_do_not_fit_is_refused() -> None:
    for vocabulary in (Vocabulary(b"ab", b"\x01\x00", (), (0,)), Vocabulary(b"a", b"\x01\x00", (3,), (0,))):
        with pytest.raises(ValueError, match="fit"):
            vocabulary.build()
