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
from steering import LONGEST_WAIT_S
from streamed_models import ENGINE, build_deep, weight_bytes
from test_golden_architectures import BLOCK, DEVICES, GREEDY, Reference, check, reference_of, submit_all
from tiny_models import build_tiny
from torch import nn
from transformers import PreTrainedModel

from core.inference_pipeline import InferencePipeline
from core.models.architecture import read_architecture
from core.models.stage_model import measure_bytes
from core.quantization.choice import QuantizeChoice
from core.quantization.linear import QuantLinear
from core.quantization.quantize import quantize
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
    head = model.get_output_embeddings()
    for module_name, module in model.named_modules():
        if type(module) is nn.Linear and choice.takes(module_name, *module.weight.shape, is_head=module is head):
            module.weight.data.copy_(quantize(module.weight.data, choice.form).dequantize())
    return reference_of(model, path)


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


WRITTEN: dict[str, tuple[Callable[[Path], PreTrainedModel], int]] = {
    "gptq act-order": (partial(written.gptq, bits=4, group=32, act_order=True), 2),
    "awq": (partial(written.awq, group=64), 3),
    "compressed-tensors": (partial(written.compressed, bits=4, group=32, symmetric=False), 1),
    "fp8": (partial(written.fp8, rows=128, columns=128), 2),
    "nf4": (partial(written.nf4, nested=True), 3),
    "llm.int8": (written.llm_int8, 1),
    "hqq": (partial(written.hqq, bits=4, group=64), 2),
}  # fmt: skip


def serve(open_pipeline: Callable[..., InferencePipeline], path: Path, stages: int, **more: Any) -> InferencePipeline:
    return open_pipeline(
        path, devices__devices=DEVICES[stages], engine__block_size=BLOCK, engine__kv_cache_tokens=512, **more
    )


def answers(pipeline: InferencePipeline, reference: Reference) -> list[GenerationResult]:
    return [handle.result(LONGEST_WAIT_S) for handle in submit_all(pipeline, reference, GREEDY)]


@pytest.mark.parametrize("name", WRITTEN)
def test_quantized_checkpoints(name: str, tmp_path: Path, open_pipeline: Callable[..., InferencePipeline]) -> None:
    write, stages = WRITTEN[name]
    reference = reference_of(write(tmp_path), tmp_path)
    pipeline = serve(open_pipeline, tmp_path, stages)
    assert len(pipeline.engine.stages) == stages
    check(reference, answers(pipeline, reference))


def test_gguf_moves_while_it_serves(tmp_path: Path, open_pipeline: Callable[..., InferencePipeline]) -> None:
    """A tied head and an embedding of blocks, on one stage, on two and three, and back."""
    model = build_tiny("llama", tmp_path / "hf", hidden_size=256, intermediate_size=256, head_dim=64)
    file = write_gguf(model, tmp_path / "tiny.gguf", "llama", "Q4_K", kinds={"token_embd.weight": "Q6_K"})
    reference = reference_of(model, file)
    pipeline = serve(open_pipeline, file, 1, model__dtype="float32")
    check(reference, answers(pipeline, reference))
    for stages in (2, 3, 1):
        moved = pipeline.place(devices=DEVICES[stages], layers={1: None, 2: "2,2", 3: "1,2,1"}[stages])
        assert len(pipeline.engine.stages) == stages
        assert stages != 3 or moved.kept_bytes > 0  # the first two parts are there already
        check(reference, answers(pipeline, reference))


def test_quantized_layers_stream(tmp_path: Path, open_pipeline: Callable[..., InferencePipeline]) -> None:
    """The device holds less than the quantized model takes, and much less than the plain one."""
    model, choice = build_deep("llama", tmp_path), QuantizeChoice("int8", 32, ("head",))
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data.copy_(quantize(module.weight.data, choice.form).dequantize())
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
