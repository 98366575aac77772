"""Golden: a model with quantized weights gives what its dequantized weights give in transformers' `generate()`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from steering import LONGEST_WAIT_S
from test_golden_architectures import BLOCK, DEVICES, GREEDY, Reference, check, reference_of, submit_all
from tiny_models import build_tiny
from torch import nn

from core.inference_pipeline import InferencePipeline
from core.quantization.choice import QuantizeChoice
from core.quantization.linear import QuantLinear
from core.quantization.quantize import quantize

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
