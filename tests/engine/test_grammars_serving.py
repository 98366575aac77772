"""Answers that keep to grammars: the same tokens wherever they are computed, and neighbours that notice nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from cluster.nodes import move_to_nodes
from steering import LONGEST_WAIT_S, arriving_together

from core.batching.output import RequestHandle
from core.errors import DeviceLostError, InvalidRequestError, StepFailedError
from core.grammars import forms
from core.inference_pipeline import InferencePipeline
from core.request import GenerationResult, SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
Tokens = list[list[int]]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["card", "machine"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["kind", "size", "parts"],
    "additionalProperties": False,
}  # fmt: skip
JSON = forms.compose(forms.json_schema(SCHEMA, space=""))
WORDS = forms.compose(forms.regex("(ab|ba){3,9}[0-9]{2}"))
ENDLESS = forms.compose(forms.regex("(ab|ba)*"))
PLAIN = SamplingParams(max_tokens=24, temperature=0.0)
KEPT = (
    replace(PLAIN, grammar=JSON, max_tokens=60),
    replace(PLAIN, grammar=JSON, max_tokens=60, temperature=1.0, seed=3, n=2, logprobs=2),
    replace(PLAIN, grammar=WORDS, temperature=1.0, seed=4, frequency_penalty=0.5, logit_bias={5: 3.0}, max_tokens=40),
)
FREE = (PLAIN, replace(PLAIN, temperature=1.0, seed=5), replace(PLAIN, logprobs=1, ignore_eos=True))
PROMPTS = ("What is VRAM?", "Say something.", "The layers of a model", "Two cards", "A", "Hello there, machine.")


def start(open_pipeline: OpenPipeline, **settings: Any) -> InferencePipeline:
    given = {
        "devices__devices": "cpu=256MiB", "engine__block_size": 4, "engine__kv_cache_tokens": 2048,
        "engine__breaker_failures": 100,
    }  # fmt: skip
    return open_pipeline(None, **{**given, **settings})


def submit(pipeline: InferencePipeline, params: tuple[SamplingParams, ...]) -> list[RequestHandle]:
    encode = pipeline.model.tokenizer.encode
    with arriving_together(pipeline):
        return [
            pipeline.submit(encode(text), each)
            for text, each in zip(PROMPTS, params, strict=False)
        ]  # fmt: skip


def tokens(handles: list[RequestHandle]) -> list[Tokens]:
    return [[list(each.token_ids) for each in handle.result(LONGEST_WAIT_S).completions] for handle in handles]


@pytest.fixture(scope="module")
def expected(shared: Callable[[], InferencePipeline]) -> tuple[list[Tokens], list[Tokens]]:
    """Tokens on one device: of all requests together, and of those without a grammar by themselves."""
    pipeline = shared()
    return tokens(submit(pipeline, (*KEPT, *FREE))), tokens(
        [pipeline.submit(pipeline.model.tokenizer.encode(text), params)
         for text, params in zip(PROMPTS[3:], FREE, strict=True)]
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared() -> Iterator[Callable[[], InferencePipeline]]:
    from plain_settings import CACHE_DIR, make_settings

    with ExitStack() as opened:

        def load() -> InferencePipeline:
            settings = make_settings(devices__devices="cpu=256MiB", runtime__cache_dir=CACHE_DIR)
            pipeline = InferencePipeline(settings)
            opened.callback(pipeline.shutdown)
            pipeline.load()
            return pipeline

        yield load


def test_neighbours_have_the_tokens_that_they_have_alone(expected: tuple[list[Tokens], list[Tokens]]) -> None:
    together, alone = expected
    assert together[3:] == alone


def test_answers_that_end_by_themselves_match(open_pipeline: OpenPipeline) -> None:
    pipeline = start(open_pipeline)
    ended = 0
    for seed in range(6):
        params = replace(PLAIN, grammar=JSON, max_tokens=80, temperature=1.5, seed=seed, n=3)
        for found in (
            pipeline.submit(pipeline.model.tokenizer.encode("A card"), params).result(LONGEST_WAIT_S).completions
        ):
            if found.finish_reason == "stop":
                jsonschema.validate(json.loads(found.text), SCHEMA)
                ended += 1
            else:
                assert found.finish_reason == "length"
    assert ended >= 12


@pytest.mark.parametrize("cohorts", [1, 3])
@pytest.mark.parametrize("devices", ["cpu=64MiB,cpu=64MiB", "cpu=64MiB,cpu=64MiB,cpu=64MiB"])
def test_stages_change_no_token(
    open_pipeline: OpenPipeline, expected: tuple[list[Tokens], list[Tokens]], devices: str, cohorts: int
) -> None:
    layers = ",".join(["3", "3"] if devices.count("cpu") == 2 else ["2", "1", "3"])
    pipeline = start(
        open_pipeline, devices__devices=devices, engine__cohorts=cohorts, devices__layers=layers,
    )  # fmt: skip
    assert len(pipeline.engine.stages) == devices.count("cpu")
    assert tokens(submit(pipeline, (*KEPT, *FREE))) == expected[0]


def test_a_last_stage_on_another_node_changes_no_token(
    open_pipeline: OpenPipeline, expected: tuple[list[Tokens], list[Tokens]]
) -> None:
    pipeline = start(open_pipeline, devices__devices="cpu=64MiB,cpu=64MiB", devices__layers="3,3")
    nodes = move_to_nodes(pipeline.engine, [1])
    try:
        assert tokens(submit(pipeline, (*KEPT, *FREE))) == expected[0]
    finally:
        pipeline.shutdown()
        nodes.close()


def test_preemption_changes_no_token(
    open_pipeline: OpenPipeline, expected: tuple[list[Tokens], list[Tokens]]
) -> None:  # fmt: skip
    pipeline = start(open_pipeline, engine__kv_cache_tokens=128, model__max_model_len=100)
    assert tokens(submit(pipeline, (*KEPT, *FREE))) == expected[0]
    assert pipeline.engine.batcher.scheduler.num_preemptions


@pytest.mark.parametrize("error", [RuntimeError("a kernel broke"), DeviceLostError("no answer", device="cpu")])
def test_a_step_that_fails_changes_no_token(
    open_pipeline: OpenPipeline, expected: tuple[list[Tokens], list[Tokens]], monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:  # fmt: skip
    pipeline = start(open_pipeline)
    stage = pipeline.engine.stages[-1]
    forward, calls = stage.forward, iter(range(10_000))

    def sometimes(*given: Any) -> Any:
        if next(calls) in (7, 15):
            raise error
        return forward(*given)

    monkeypatch.setattr(stage, "forward", sometimes)
    assert tokens(submit(pipeline, (*KEPT, *FREE))) == expected[0]
    assert next(calls) > 15


def test_moving_the_model_changes_no_token(
    open_pipeline: OpenPipeline, expected: tuple[list[Tokens], list[Tokens]]
) -> None:  # fmt: skip
    pipeline = start(open_pipeline)
    handles = submit(pipeline, (*KEPT, *FREE))
    handles[0].get(LONGEST_WAIT_S)
    pipeline.place(devices="cpu=64MiB,cpu=64MiB", layers="3,3")
    assert len(pipeline.engine.stages) == 2
    rest = [[list(each.token_ids) for each in handle.result(LONGEST_WAIT_S).completions] for handle in handles[1:]]
    assert rest == expected[0][1:]


def generate(pipeline: InferencePipeline, **params: Any) -> GenerationResult:
    prompt = pipeline.model.tokenizer.encode("Say something.")
    return pipeline.submit(prompt, SamplingParams(**params)).result(LONGEST_WAIT_S)


def test_what_ends_answers_early_or_late(open_pipeline: OpenPipeline) -> None:
    pipeline = start(open_pipeline)
    plain = generate(pipeline, temperature=0.0, grammar=ENDLESS, max_tokens=64).completions[0]
    for late in ({"ignore_eos": True}, {"min_tokens": 30}):
        (found,) = generate(pipeline, temperature=0.0, grammar=ENDLESS, max_tokens=32, **late).completions
        assert len(found.token_ids) >= 30 > len(plain.token_ids) or plain.finish_reason == "length"
        assert not set(found.token_ids[:30]) & set(pipeline.model.eos_token_ids)
    (forced,) = generate(
        pipeline, grammar=forms.compose(forms.choice(["yes"])), max_tokens=32, min_tokens=30, ignore_eos=True
    ).completions
    assert (forced.text, forced.finish_reason) == ("yes", "stop"), "more than that is not allowed"
    (stopped,) = generate(pipeline, grammar=JSON, max_tokens=60, stop=(":",)).completions
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ('{"kind"', "stop", ":")
    (cut,) = generate(pipeline, grammar=JSON, max_tokens=4).completions
    assert cut.finish_reason == "length"
    banned = pipeline.model.tokenizer.encode("y", add_special_tokens=False)[0]
    (biased,) = generate(
        pipeline, grammar=forms.compose(forms.choice(["y", "n"])), max_tokens=4, logit_bias={banned: -100.0}
    ).completions
    assert biased.text == "n"


def test_a_grammar_that_cannot_be_kept_to_is_refused_before_anything_is_queued(open_pipeline: OpenPipeline) -> None:
    pipeline = start(open_pipeline)
    with pytest.raises(InvalidRequestError, match="nobody"):
        generate(pipeline, grammar=forms.compose(forms.rules("start: nobody")))
    assert not pipeline.engine.batcher.num_unfinished


def test_a_grammar_that_becomes_too_much_ends_its_own_request_alone(open_pipeline: OpenPipeline) -> None:
    """Every branch of it is open at once."""
    branches = [
        {"type": "object", "properties": {f"k{number}": {"type": "string"} for number in range(20)}}
    ] * 100  # fmt: skip
    grammar = forms.compose(
        forms.json_schema({"anyOf": [{**each, "title": str(i)} for i, each in enumerate(branches)]})
    )
    pipeline = start(open_pipeline)
    (alone,) = tokens([pipeline.submit(pipeline.model.tokenizer.encode(PROMPTS[3]), FREE[0])])
    with arriving_together(pipeline):
        bad = pipeline.submit(pipeline.model.tokenizer.encode("A"), replace(PLAIN, grammar=grammar))
        good = pipeline.submit(pipeline.model.tokenizer.encode(PROMPTS[3]), FREE[0])
    with pytest.raises(StepFailedError, match="grammar"):
        bad.result(LONGEST_WAIT_S)
    assert tokens([good]) == [alone]
