"""Whatever masks let through parses and matches its schema, whichever tokenizer the model has."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import tokenizers
from grammars.schemas import SCHEMAS
from grammars.walks import text_of, walk
from hypothesis import given, settings
from hypothesis import strategies as st
from models.test_tokenizer import byte_level, llama2_like, metaspace
from transformers import PreTrainedTokenizerFast

from core.errors import UnsupportedParameterError
from core.grammars import forms
from core.grammars.compiler import Grammars
from core.models.resolve import DEMO_PATH
from core.models.tokenizer import Tokenizer

WALKS = 3
FORMATS = jsonschema.FormatChecker(["uuid", "ipv4"])
"""Those of which all that llguidance lets through is right: the 29th of February is in every year."""


def made(backend: Callable[[], tokenizers.Tokenizer], **tokens: str) -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token="</s>", **tokens))


@pytest.fixture(scope="module", params=["demo", "byte_level", "llama2_like", "metaspace"])
def grammars(request: pytest.FixtureRequest) -> Grammars:
    kinds = {"byte_level": byte_level, "llama2_like": llama2_like, "metaspace": metaspace}
    tokenizer = Tokenizer.from_directory(DEMO_PATH) if request.param == "demo" else made(kinds[request.param])
    if request.param == "metaspace":  # all else that JSON needs is there as bytes
        with pytest.raises(UnsupportedParameterError, match="single characters"):
            made(without_bytes).grammars([2])
    assert tokenizer.eos_token_id is not None
    return tokenizer.grammars([tokenizer.eos_token_id])


def without_bytes() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0)], 0))
    backend.decoder = tokenizers.decoders.Metaspace()
    return backend


def check(grammars: Grammars, schema: Any, rng: random.Random, walks: int) -> int:
    """How many of the walks came to an end; all that did are right."""
    grammar, ended = forms.compose(forms.json_schema(schema)), 0
    for _ in range(walks):
        tokens = walk(grammars, grammar, rng, limit=400)
        if tokens is not None:
            jsonschema.validate(json.loads(text_of(grammars, tokens)), schema, format_checker=FORMATS)
            ended += 1
    return ended


def test_what_ends_matches_its_schema(grammars: Grammars) -> None:
    rng = random.Random(7)
    never = [schema for schema in SCHEMAS if not check(grammars, schema, rng, WALKS)]
    assert len(never) < len(SCHEMAS) // 6, never


NAMES = st.sampled_from(["a", "b", "long name", "é", '"'])
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
        st.builds(as_object, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 3)),
        st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 2)),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
    )


@settings(max_examples=60)
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
