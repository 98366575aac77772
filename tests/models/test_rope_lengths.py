"""Rotary frequencies that depend on a sequence's length: what is served equals `generate()` of a fresh model, alone and
beside sequences of other lengths, up to the original length, beyond it, and across it while decoding."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from steering import LONGEST_WAIT_S, arriving_together, with_each_step
from tiny_models import VOCAB, build_tiny
from transformers import AutoModelForCausalLM

from core.errors import ContextLengthError
from core.execution.stage import Stage
from core.inference_pipeline import InferencePipeline
from core.kv_cache.block_table import RopeBorder
from core.models.architecture import read_architecture
from core.request import GenerationResult, SamplingParams

ORIGINAL, NEW = 16, 12
LENGTHS = (5, 15, 16, 17, 23, 9, 30)
"""Prompts that stay below, cross while decoding (9, 15, 16), and begin beyond."""
SHORT, LONG = [1.0, 1.1, 1.2, 1.5], [1.0, 3.0, 7.0, 11.0]
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0)
_LISTS = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": ORIGINAL, "rope_theta": 1e2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e2},
        },
    ),
    "longrope": (
        "llama",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "longrope", "factor": 4.0, **_LISTS}},
    ),
    "longrope that starts anew at the border": (
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": ORIGINAL,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "su", **_LISTS},
        },
    ),
    "one kind of layers alone": (
        "gemma3_text",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {
                "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
    ),
}

OpenPipeline = Callable[..., InferencePipeline]


@dataclass
class Reference:
    path: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]


@pytest.fixture(scope="module", params=sorted(MODELS))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What `generate()` makes of each prompt, with a model that has seen no other: it keeps frequencies."""
    path = tmp_path_factory.mktemp("rope")
    name, changes = MODELS[request.param]
    build_tiny(name, path, **changes)
    generator = torch.Generator().manual_seed(3)
    longest = torch.randint(3, VOCAB, (max(LENGTHS),), generator=generator).tolist()
    made = Reference(path, [longest[:length] for length in LENGTHS], [], [])  # each begins like the others
    # Where it starts anew, transformers before 5.20 went on from the last token alone. Without a cache it never did.
    border = read_architecture(path).rope
    cached = border is None or not border.restarts or Version(transformers.__version__) >= Version("5.20")
    for prompt in made.prompts:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, output_logits=True,
                return_dict_in_generate=True, use_cache=cached,
            )  # fmt: skip
        chosen = out.sequences[0, len(prompt) :].tolist()
        rows = torch.stack([row[0] for row in out.logits]).log_softmax(dim=-1)
        made.tokens.append(chosen)
        made.logprobs.append([rows[at, token].item() for at, token in enumerate(chosen)])
    return made


def check(reference: Reference, results: list[GenerationResult]) -> None:
    for index, result in enumerate(results):
        for completion in result.completions:
            assert completion.token_ids == reference.tokens[index], f"prompt of {LENGTHS[index]}"
            got = [item.logprob for item in completion.logprobs]
            assert got == pytest.approx(reference.logprobs[index], abs=2e-4)


def together(pipeline: InferencePipeline, reference: Reference, params: SamplingParams = GREEDY) -> list[Any]:
    with arriving_together(pipeline):
        handles = [pipeline.submit(prompt, params) for prompt in reference.prompts]
    return [handle.result(LONGEST_WAIT_S) for handle in handles]


@pytest.mark.parametrize("devices", ["cpu=64MiB", "cpu=64MiB,cpu=64MiB"])
def test_alone_packed_cached_and_forked(reference: Reference, devices: str, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(
        reference.path, devices__devices=devices, engine__block_size=4, engine__kv_cache_tokens=1024
    )
    check(reference, [pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S) for prompt in reference.prompts])
    hits = pipeline.engine.batcher.stats.hit_tokens
    check(reference, together(pipeline, reference))
    assert pipeline.engine.batcher.stats.hit_tokens > hits
    forked = SamplingParams(n=2, max_tokens=NEW, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0)
    check(reference, together(pipeline, reference, forked))


def test_steps_that_are_padded(
    reference: Reference, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU's are: rows that are nobody's stand behind those that decode."""
    monkeypatch.setattr(Stage, "pads_steps", True)
    pipeline = open_pipeline(reference.path, engine__block_size=4, engine__kv_cache_tokens=1024)
    check(reference, together(pipeline, reference))
    check(reference, [pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S) for prompt in reference.prompts])


def test_a_model_that_moves_goes_on_beyond_the_border(reference: Reference, open_pipeline: OpenPipeline) -> None:
    """Requests are adopted by another engine in the middle of decoding."""
    pipeline = open_pipeline(reference.path, engine__block_size=4, engine__kv_cache_tokens=1024)
    steps = iter(range(1000))
    moved: list[threading.Thread] = []

    def move() -> None:
        if next(steps) == 6:
            moved.append(threading.Thread(target=pipeline.place, kwargs={"devices": "cpu=64MiB,cpu=64MiB"}))
            moved[0].start()

    with with_each_step(pipeline, move):
        results = together(pipeline, reference)
    moved[0].join(LONGEST_WAIT_S)
    check(reference, results)
    assert len(pipeline.engine.stages) == 2
    check(reference, together(pipeline, reference))


def test_in_pieces_and_computed_again(reference: Reference, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(
        reference.path, engine__block_size=4, engine__kv_cache_tokens=48, engine__max_num_batched_tokens=7
    )
    check(reference, together(pipeline, reference))
    assert pipeline.engine.batcher.stats.preemptions > 0


def test_the_frequencies_matter(reference: Reference) -> None:
    """Without what is beyond the border, other numbers would come."""
    architecture = read_architecture(reference.path)
    assert architecture.rope is not None and architecture.rope.tokens == ORIGINAL
    model = AutoModelForCausalLM.from_pretrained(reference.path, attn_implementation="eager").eval()
    ids = torch.tensor([max(reference.prompts, key=len)])
    with torch.inference_mode():
        (right,) = model(ids, use_cache=False).logits[:, -1].log_softmax(-1)
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if "original_inv_freq" in name:
                    setattr(module, name.replace("original_", ""), buffer)
                    module.forward = partial(inspect.unwrap(type(module).forward), module)  # type: ignore[assignment]
        (wrong,) = model(ids, use_cache=False).logits[:, -1].log_softmax(-1)
    assert (right - wrong).abs().max() > 1e-2


def test_the_old_name_of_longrope_is_known(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    for named in ("type", "rope_type"):
        scaling = {named: "su", **_LISTS}
        (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
        assert read_architecture(tmp_path).rope == RopeBorder(ORIGINAL)
        assert read_architecture(tmp_path).config.rope_parameters["rope_type"] == "longrope"


def test_beyond_what_the_factor_stretches_a_prompt_is_refused(
    reference: Reference, open_pipeline: OpenPipeline
) -> None:
    pipeline = open_pipeline(reference.path, engine__kv_cache_tokens=1024)
    assert pipeline.model.max_model_len == 64
    with pytest.raises(ContextLengthError):
        pipeline.submit([5] * 64, GREEDY)


@pytest.mark.parametrize(
    ("border", "same", "different"),
    [
        (RopeBorder(16), [(17, 20), (30, 31)], [(16, 40), (17, 20)]),
        (RopeBorder(16, exact=True), [(17, 20), (17, 40)], [(17, 20), (18, 20)]),
        (RopeBorder(16, restarts=True), [(5, 17), (40, 41)], [(5, 16), (5, 17)]),
    ],
)
def test_cached_blocks_are_shared_among_equal_frequencies_alone(
    border: RopeBorder, same: list[tuple[int, int]], different: list[tuple[int, int]]
) -> None:
    assert border.variant(*same[0]) == border.variant(*same[1]) != b""
    assert border.variant(*different[0]) != border.variant(*different[1])
    assert border.variant(9, 12) == border.variant(16, 16) == b""
