"""Whatever masks let through parses and matches its schema, whichever tokenizer the model has."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import tokenizers
from grammars.walks import text_of, walk
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from benchmarks.schema_suite import suite, validator_of
from benchmarks.vocabularies import NAMES, tokenizer_of
from core.errors import UnsupportedParameterError
from core.grammars import forms
from core.grammars.compiler import GrammarError, Grammars
from core.models.tokenizer import Tokenizer

FORMATS = jsonschema.FormatChecker(["uuid", "ipv4"])
"""Those of which all that llguidance lets through is right: the 29th of February is in every year."""
SUITE = suite()
LACKING = "not to be kept to"


@pytest.fixture(scope="module", params=NAMES)
def grammars(request: pytest.FixtureRequest) -> Grammars:
    tokenizer = tokenizer_of(request.param)
    assert tokenizer.eos_token_id is not None
    return tokenizer.grammars([tokenizer.eos_token_id])


def test_a_vocabulary_without_single_characters_is_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0)], 0))
    backend.decoder = tokenizers.decoders.Metaspace()
    with pytest.raises(UnsupportedParameterError, match="single characters"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")).grammars([1])


def check(grammars: Grammars, schema: Any, rng: random.Random, walks: int) -> int:
    """How many of the walks came to an end; all that did are right."""
    grammar, ended = forms.compose(forms.json_schema(schema)), 0
    for _ in range(walks):
        tokens = walk(grammars, grammar, rng, limit=250)
        if tokens is not None:
            validator_of(schema, FORMATS).validate(json.loads(text_of(grammars, tokens)))
            ended += 1
    return ended


def test_what_ends_matches_its_schema(grammars: Grammars) -> None:
    """All with one keyword, and some of every other family; `benchmarks.schemas` asks the server for all 500."""
    rng = random.Random(7)
    samples = [sample for index, sample in enumerate(SUITE) if sample.family == "one keyword" or index % 20 == 0]
    tried = [sample for sample in samples if sample.family != LACKING]
    never = [sample for sample in tried if not check(grammars, sample.schema, rng, 1)]
    assert len(tried) > 85 and len(never) < len(tried) // 4, never


def test_what_cannot_be_kept_to_is_named() -> None:
    tokenizer = tokenizer_of(NAMES[0])
    grammars = tokenizer.grammars([tokenizer.eos_token_id or 0])
    lacking = [sample.schema for sample in SUITE if sample.family == LACKING]
    assert len(SUITE) == 500 and len(lacking) == 10
    for schema in lacking:
        with pytest.raises(GrammarError, match=r"Unimplemented keys|oneOf|look-around|Unknown format"):
            grammars.matcher(forms.compose(forms.json_schema(schema)))


KEYS = st.sampled_from(["a", "b", "long name", "é", '"'])
LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "string", "maxLength": 4}]),
    st.lists(st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=3)), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.tuples(st.integers(-99, 0), st.integers(0, 99)).map(
        lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
    ),
)


def _larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def as_object(properties: dict[str, Any], count: int) -> dict[str, Any]:
        required = list(properties)[:count]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.one_of(
        st.builds(as_object, st.dictionaries(KEYS, inner, max_size=3), st.integers(0, 3)),
        st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 2)),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
    )


@settings(max_examples=30)
@given(st.recursive(LEAVES, _larger, max_leaves=6), st.integers(0, 2**32))
def test_generated_schemas(grammars: Grammars, schema: Any, seed: int) -> None:
    check(grammars, schema, random.Random(seed), 1)


def test_spaces_come_to_an_end(grammars: Grammars) -> None:
    """A model that likes spaces best writes JSON all the same."""
    space = {token for token, word in enumerate(grammars.vocabulary.tokens) if word and not word.strip()}
    matcher = grammars.matcher(
        forms.compose(forms.json_schema({"type": "array", "items": {"type": "null"}, "maxItems": 2}))
    )
    import numpy as np

    for _ in range(200):
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.nonzero(np.unpackbits(mask, bitorder="little"))[0].tolist()
        if grammars.vocabulary.ends[0] in allowed:
            return
        assert matcher.consume_token(next((token for token in allowed if token in space), allowed[0]))
    pytest.fail("spaces for ever")
