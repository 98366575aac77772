"""Golden: a model with quantized weights gives what its dequantized weights give in transformers' `generate()`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cluster.nodes import move_to_nodes
from quantization import written
from quantization.gguf_files import write_gguf
from steering import LONGEST_WAIT_S, Brake
from streamed_models import ENGINE, build_deep, weight_bytes
from test_golden_architectures import BLOCK, DEVICES, GREEDY, Reference, check, reference_of, submit_all
from tiny_models import build_tiny
from torch import nn
from transformers import PreTrainedModel

from core.engine.model_engine import ModelEngine
from core.inference_pipeline import InferencePipeline
from core.models.architecture import read_architecture
from core.models.stage_model import measure_bytes
from core.quantization.choice import QuantizeChoice
from core.quantization.linear import QuantLinear
from core.quantization.quantize import quantize
from core.quantization.readers.gguf import BLOCK_TYPES
from core.request import GenerationResult

CASES = {
    "llama": ("int8", 32, ("head",), (2,)),  # tied
    "qwen2": ("int4", 32, ("head", "down_proj"), (1, 3)),  # biases
    "gemma3_text": ("int4", 64, (), (1, 2)),  # tied and scaled; groups longer than a row
    "phi3": ("int8", 128, (), (3,)),  # joined projections, and a head of its own
    "qwen3_moe": ("int4", 32, ("head",), (2,)),  # experts stay
}


def make_reference(name: str, path: Path) -> Reference:
    """A plain checkpoint, and what a model with quantized and dequantized weights makes of the prompts."""
    kind, group, keep, _ = CASES[name]
    model, choice = build_tiny(name, path), QuantizeChoice(kind, group, keep)
    dequantize(model, choice)
    return reference_of(model, path)


def dequantize(model: PreTrainedModel, choice: QuantizeChoice) -> None:
    """Give a model what its weights mean once they are quantized."""
    head = model.get_output_embeddings()
    for module_name, module in model.named_modules():
        if type(module) is nn.Linear and choice.takes(module_name, is_head=module is head):
            module.weight.data.copy_(quantize(module.weight.data, choice.form).dequantize())


@pytest.mark.parametrize("name", CASES)
def test_quantized_on_load(name: str, tmp_path: Path, open_pipeline: Callable[..., InferencePipeline]) -> None:
    reference = make_reference(name, tmp_path)
    kind, group, keep, numbers = CASES[name]
    for stages in numbers:
        pipeline = open_pipeline(
            tmp_path, devices__devices=DEVICES[stages], engine__block_size=BLOCK, engine__kv_cache_tokens=512,
            model__quantize=kind, model__quantize_group=group, model__quantize_keep=keep,
        )  # fmt: skip
        assert len(pipeline.engine.stages) == stages
        check(reference, [handle.result(LONGEST_WAIT_S) for handle in submit_all(pipeline, reference, GREEDY)])
        quantized = [
            module for stage in pipeline.engine.stages for module in stage._model.modules()
            if isinstance(module, QuantLinear)
        ]  # fmt: skip
        assert quantized
        for stage, planned in zip(pipeline.engine.stages, pipeline.engine.plan.placement.stages, strict=True):
            assert stage.weight_bytes == planned.weight_bytes  # what was planned is what is there


EVERYWHERE = {
    "engine__block_size": BLOCK, "engine__kv_cache_tokens": 128, "engine__max_num_batched_tokens": 16,
    "engine__max_batch_size": 8, "model__max_model_len": 128, "model__dtype": "float32",
}  # fmt: skip
"""Settings with which KV and workspace are small beside weights of few bits."""


def serve(open_pipeline: Callable[..., InferencePipeline], path: Path, stages: int, **more: Any) -> InferencePipeline:
    return open_pipeline(path, devices__devices=DEVICES[stages], **{**EVERYWHERE, **more})


def answers(pipeline: InferencePipeline, reference: Reference) -> list[GenerationResult]:
    return [handle.result(LONGEST_WAIT_S) for handle in submit_all(pipeline, reference, GREEDY)]


Written = tuple[PreTrainedModel, Path, dict[str, Any]]


def write_format(directory: Path, name: str) -> Written:
    return written.FORMATS[name](directory), directory, {}


def write_blocks(directory: Path, kinds: dict[str, str]) -> Written:
    """A GGUF file whose head is its embedding."""
    model = build_tiny("llama", directory / "hf", hidden_size=256, intermediate_size=256, head_dim=64)
    return model, write_gguf(model, directory / "tiny.gguf", "llama", kinds=kinds), {}


def write_plain(directory: Path, kind: str, group: int) -> Written:
    """What is quantized on load."""
    model = build_tiny("qwen2", directory, **{**written.SHAPE, "hidden_size": 256})
    dequantize(model, QuantizeChoice(kind, group, ("head",)))
    return model, directory, {"model__quantize": kind, "model__quantize_group": group}


WEIGHTS = ("token_embd", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TYPES = (*BLOCK_TYPES, "F16", "BF16")
FORMATS: dict[str, Callable[[Path], Written]] = {
    **{name: partial(write_format, name=name) for name in written.FORMATS},
    **{
        f"gguf {' '.join(part)}": partial(
            write_blocks, kinds={f"{weight}.weight": part[i % len(part)] for i, weight in enumerate(WEIGHTS)}
        )
        for part in (TYPES[0::2], TYPES[1::2])
    },
    **{
        f"{kind} on load, {group}": partial(write_plain, kind=kind, group=group)
        for kind in ("int8", "int4") for group in (32, 64, 128, 256)
    },
}  # fmt: skip
READERS = ("gptq 4 bits, 64", "gptq act-order", "awq 64", "compressed int4 asymmetric", "compressed int8",
           "compressed fp8", "fp8 blocks", "nf4 nested", "llm.int8", "hqq 4 bits, 64", "int8 on load, 128",
           "int4 on load, 64", *(name for name in FORMATS if name.startswith("gguf")))  # fmt: skip
"""Those that go everywhere; other group sizes spare two of the moves."""
NAMES = [pytest.param(name, marks=() if name in READERS else pytest.mark.slow) for name in FORMATS]


@pytest.mark.parametrize("name", NAMES)
def test_a_format_on_all_placements(
    name: str, tmp_path: Path, open_pipeline: Callable[..., InferencePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one stage, then moved to two, to three, and to one whose layers stream in, each time amid the answers."""
    model, path, settings = FORMATS[name](tmp_path)
    reference = reference_of(model, path)
    pipeline = serve(open_pipeline, path, 1 if name in READERS else 3, **settings)
    assert pipeline.engine.plan.architecture.quantization is not None
    brake = Brake(pipeline, monkeypatch)
    places = [DEVICES[2], DEVICES[3]] if name in READERS else []
    for place in (*places, None):
        if place is None:
            place = f"cpu={_too_little(pipeline.engine)}B"
        brake.steps = 0
        handles = submit_all(pipeline, reference, GREEDY)
        brake.go_on(3)
        assert not any(handle.finished for handle in handles), "nothing is left to be moved"
        pipeline.place(devices=place)
        brake.steps = 1 << 30
        check(reference, [handle.result(LONGEST_WAIT_S) for handle in handles])
        check(reference, answers(pipeline, reference))
        stages = pipeline.engine.stages
        assert len(stages) == place.count("=")
        assert (stages[0].stream is not None) == (place not in DEVICES.values())


def _too_little(engine: ModelEngine) -> int:
    """Bytes that lack those of a layer."""
    costs, stages = engine.plan.problem.costs, engine.plan.placement.stages
    weights, kv = sum(stage.weight_bytes for stage in stages), sum(stage.kv_bytes for stage in stages)
    return weights + kv + max(stage.workspace_bytes for stage in stages) - min(costs.layer_bytes)


def test_quantized_layers_stream(tmp_path: Path, open_pipeline: Callable[..., InferencePipeline]) -> None:
    """The device holds less than the quantized model takes, and much less than the plain one."""
    model, choice = build_deep("llama", tmp_path), QuantizeChoice("int8", 32, ("head",))
    dequantize(model, choice)
    reference = reference_of(model, tmp_path)
    weights = measure_bytes(read_architecture(tmp_path, quantize=choice))
    whole = weights.embedding + sum(weights.layers) + weights.after
    assert whole < weight_bytes(tmp_path) / 2
    pipeline = open_pipeline(
        tmp_path, **ENGINE, devices__devices=f"cpu={int(0.85 * whole)}B", model__quantize="int8",
        model__quantize_group=32,
    )  # fmt: skip
    assert all(stage.stream is not None for stage in pipeline.engine.stages)
    check(reference, answers(pipeline, reference))


def test_stages_of_quantized_layers_on_nodes(tmp_path: Path, open_pipeline: Callable[..., InferencePipeline]) -> None:
    reference = make_reference("qwen2", tmp_path)
    kind, group, keep, _ = CASES["qwen2"]
    settings = {"model__quantize": kind, "model__quantize_group": group, "model__quantize_keep": keep}
    pipeline = serve(open_pipeline, tmp_path, 2, **settings)
    nodes = move_to_nodes(pipeline.engine, [1])
    try:
        check(reference, answers(pipeline, reference))
        assert not nodes.lost
    finally:
        nodes.close()
