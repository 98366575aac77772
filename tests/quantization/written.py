"""Tiny checkpoints in quantized formats, written by their published layouts, and models of what their weights mean.

Everything here is plain numpy, one number at a time where that is clearer, and shares nothing with the readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny
from torch import nn
from transformers import PreTrainedModel

Array = np.ndarray[Any, Any]
Tensors = dict[str, torch.Tensor]

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def write_quantized(
    path: Path, settings: dict[str, Any], write: Callable[[Array], tuple[Tensors, Array]], *, name: str = "qwen2",
    keep: tuple[str, ...] = ("lm_head",),
) -> PreTrainedModel:  # fmt: skip
    """A checkpoint whose linear layers are what `write` makes of their weights `[n, k]`: tensors, by what follows the
    module's name, and what they mean. Returns the model with these meanings."""
    model = build_tiny(name, path, **SHAPE)
    tensors = load_file(path / "model.safetensors")
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module_name not in keep:
            found, meaning = write(module.weight.detach().numpy())
            tensors.pop(f"{module_name}.weight")
            tensors |= {f"{module_name}.{key}": tensor.contiguous() for key, tensor in found.items()}
            module.weight.data.copy_(torch.from_numpy(meaning.astype(np.float32)))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return model


def rounded(weight: Array, bits: int, group: int, *, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes `[n, k]`, scales in fp16 and zeros `[n, groups]`."""
    n, k = weight.shape
    grouped = weight.reshape(n, k // group, group)
    top = (1 << bits) - 1
    if symmetric:
        scale = np.abs(grouped).max(-1) * 2 / top
        zero = np.full(scale.shape, 1 << (bits - 1))
    else:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scale = (high - low) / top
        zero = np.rint(-low / scale)
    half = scale.astype(np.float16)
    codes = np.clip(np.rint(grouped / half.astype(np.float32)[..., None]) + zero[..., None], 0, top)
    return codes.reshape(n, k).astype(np.int64), half, zero.astype(np.int64)


def meant(codes: Array, scale: Array, zero: Array, group: int) -> Array:
    spread = [np.repeat(each.astype(np.float64), group, axis=1) for each in (scale, zero)]
    return np.asarray(spread[0] * (codes - spread[1]))


def words(numbers: Array, bits: int) -> Array:
    """The numbers of each row as a stream of bits, lowest first, in int32 words."""
    rows = []
    for row in numbers:
        stream = 0
        for index, number in enumerate(row.tolist()):
            stream |= number << (bits * index)
        count = -(-len(row) * bits // 32)
        rows.append([(stream >> (32 * index)) & 0xFFFFFFFF for index in range(count)])
    return np.array(rows, dtype=np.uint32).view(np.int32)


def as_tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


# -- formats ---------------------------------------------------------------------------------------------------------


def gptq(path: Path, bits: int, group: int, *, act_order: bool = False, v2: bool = False) -> PreTrainedModel:
    rng = np.random.default_rng(bits)

    def write(weight: Array) -> tuple[Tensors, Array]:
        k = weight.shape[1]
        order = rng.permutation(k) if act_order else np.arange(k)
        codes, scale, zero = rounded(weight[:, order], bits, group, symmetric=False)
        groups, back = np.empty(k, dtype=np.int32), np.argsort(order)
        groups[order] = np.arange(k) // group
        kept = zero if v2 else (zero - 1) % (1 << bits)
        tensors = {
            "qweight": words(codes[:, back], bits).T, "qzeros": words(kept.T, bits), "scales": scale.T, "g_idx": groups,
        }  # fmt: skip
        return {name: as_tensor(each) for name, each in tensors.items()}, meant(codes, scale, zero, group)[:, back]

    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }  # fmt: skip
    return write_quantized(path, settings, write)


def awq(path: Path, group: int) -> PreTrainedModel:
    def columns(numbers: Array) -> Array:
        """Eight columns in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7."""
        grouped = numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(grouped.reshape(len(numbers), -1), 4)

    def write(weight: Array) -> tuple[Tensors, Array]:
        codes, scale, zero = rounded(weight, 4, group, symmetric=False)
        tensors = {"qweight": columns(codes.T), "qzeros": columns(zero.T), "scales": scale.T}
        return {name: as_tensor(each) for name, each in tensors.items()}, meant(codes, scale, zero, group)

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return write_quantized(path, settings, write)


def compressed(
    path: Path, bits: int, group: int | None, *, symmetric: bool = True, packed: bool = True, ordered: bool = False
) -> PreTrainedModel:
    rng = np.random.default_rng(bits)

    def write(weight: Array) -> tuple[Tensors, Array]:
        n, k = weight.shape
        size = group or k
        order = rng.permutation(k) if ordered else np.arange(k)
        codes, scale, zero = rounded(weight[:, order], bits, size, symmetric=symmetric)
        meaning, half, back = meant(codes, scale, zero, size), 1 << (bits - 1), np.argsort(order)
        tensors = {"weight_scale": as_tensor(scale)}
        if packed:
            tensors["weight_packed"] = as_tensor(words(codes[:, back], bits))
            tensors["weight_shape"] = torch.tensor([n, k])
        else:
            tensors["weight"] = as_tensor((codes[:, back] - half).astype(np.int8))
        if not symmetric:
            points = words(zero.T, bits).T if packed else (zero - half).astype(np.int8)
            tensors["weight_zero_point"] = as_tensor(points)
        if ordered:
            groups = np.empty(k, dtype=np.int32)
            groups[order] = np.arange(k) // size
            tensors["weight_g_idx"] = as_tensor(groups)
        return tensors, meaning[:, back]

    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel",
        "group_size": group, "actorder": "group" if ordered else None,
    }  # fmt: skip
    settings = {
        "quant_method": "compressed-tensors", "format": "pack-quantized" if packed else "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
    }  # fmt: skip
    return write_quantized(path, settings, write)


def _eight_bits(weight: Array, scale: Array, rows: int, columns: int) -> tuple[torch.Tensor, Array]:
    """FP8 numbers, and what they mean with one scale for each block."""
    n, k = weight.shape
    spread = np.repeat(np.repeat(scale, rows, 0), columns, 1)[:n, :k]
    numbers = torch.from_numpy(weight / spread).to(torch.float8_e4m3fn)
    return numbers, numbers.double().numpy() * spread.astype(np.float64)


def fp8(path: Path, rows: int, columns: int) -> PreTrainedModel:
    """Blocks as DeepSeek has them."""

    def write(weight: Array) -> tuple[Tensors, Array]:
        n, k = weight.shape
        shape = (-(-n // rows), -(-k // columns))
        scale = np.random.default_rng(n).uniform(0.001, 0.003, shape).astype(np.float32)
        numbers, meaning = _eight_bits(weight, scale, rows, columns)
        return {"weight": numbers, "weight_scale_inv": as_tensor(scale)}, meaning

    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [rows, columns]}
    return write_quantized(path, settings, write)


def fp8_scaled(path: Path, method: str) -> PreTrainedModel:
    """A scale for each row, or for the whole tensor."""

    def write(weight: Array) -> tuple[Tensors, Array]:
        n, k = weight.shape
        rows = 1 if method != "fp8" else n
        scale = np.abs(weight).reshape(n // rows, -1).max(1, keepdims=True).astype(np.float32) / 448
        numbers, meaning = _eight_bits(weight, scale, rows, k)
        kept = as_tensor(scale) if rows == 1 else as_tensor(scale).reshape(())
        return {"weight": numbers, "weight_scale": kept}, meaning

    settings: dict[str, Any] = {"quant_method": method}
    if method == "compressed-tensors":
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        settings |= {
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    return write_quantized(path, settings, write)


NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(path: Path, *, nested: bool) -> PreTrainedModel:
    def write(weight: Array) -> tuple[Tensors, Array]:
        n, k = weight.shape
        blocks = weight.reshape(-1, 64)
        absmax = np.abs(blocks).max(1).astype(np.float32)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [n, k]}
        tensors = {"weight.quant_map": NF4.clone()}
        if nested:
            map_, offset = np.linspace(-1, 1, 256, dtype=np.float32), np.float32(absmax.mean())
            upper = np.array([np.abs(each - offset).max() for each in np.split(absmax, range(256, len(absmax), 256))])
            upper = upper.astype(np.float32)
            parts = (absmax - offset) / np.repeat(upper, 256)[: len(absmax)]
            codes = np.abs(parts[:, None] - map_).argmin(1).astype(np.uint8)
            absmax = map_[codes] * np.repeat(upper, 256)[: len(absmax)] + offset
            tensors |= {
                "weight.absmax": as_tensor(codes), "weight.nested_absmax": as_tensor(upper),
                "weight.nested_quant_map": as_tensor(map_),
            }  # fmt: skip
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        else:
            tensors["weight.absmax"] = as_tensor(absmax)
        codes = np.abs(blocks[..., None] / absmax[:, None, None] - NF4.numpy()).argmin(-1).astype(np.uint8).flatten()
        tensors["weight"] = as_tensor(((codes[0::2] << 4) | codes[1::2])[:, None])
        raw = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
        tensors["weight.quant_state.bitsandbytes__nf4"] = as_tensor(raw.copy())
        return tensors, (NF4.numpy()[codes].reshape(-1, 64) * absmax[:, None]).reshape(n, k)

    settings = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
    }  # fmt: skip
    return write_quantized(path, settings, write)


def llm_int8(path: Path) -> PreTrainedModel:
    def write(weight: Array) -> tuple[Tensors, Array]:
        most = np.abs(weight).max(1).astype(np.float32)
        codes = np.rint(weight * 127 / most[:, None]).astype(np.int8)
        tensors = {
            "weight": as_tensor(codes),
            "SCB": as_tensor(most),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return tensors, codes.astype(np.float64) * most[:, None] / 127

    return write_quantized(path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, write)


def hqq(path: Path, bits: int, group: int) -> PreTrainedModel:
    def write(weight: Array) -> tuple[Tensors, Array]:
        n, k = weight.shape
        grouped = weight.reshape(-1, group)
        low, high = grouped.min(1, keepdims=True), grouped.max(1, keepdims=True)
        scale = ((high - low) / ((1 << bits) - 1)).astype(np.float16)
        zero = (-low / scale.astype(np.float32)).astype(np.float16)
        wide = [each.astype(np.float32) for each in (scale, zero)]
        codes = np.clip(np.rint(grouped / wide[0] + wide[1]), 0, (1 << bits) - 1).astype(np.uint8)
        parts = np.split(codes, 8 // bits)
        packed = sum(part << (8 - bits * (index + 1)) for index, part in enumerate(parts))
        tensors = {
            "W_q": as_tensor(np.asarray(packed, dtype=np.uint8)), "scale": as_tensor(scale), "zero": as_tensor(zero),
            "nbits": torch.tensor(bits), "group_size": torch.tensor(group), "axis": torch.tensor(1),
            "shape": torch.tensor([n, k]),
        }  # fmt: skip
        return tensors, ((codes.astype(np.float64) - wide[1]) * wide[0]).reshape(n, k)

    params = {"nbits": bits, "group_size": group, "axis": 1, "channel_wise": True}
    return write_quantized(path, {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}}, write)


FORMATS: dict[str, Callable[[Path], PreTrainedModel]] = {
    **{f"gptq {bits} bits, {group}": partial(gptq, bits=bits, group=group)
       for bits, group in ((2, 32), (3, 64), (4, 32), (4, 64), (4, 128), (8, 128))},
    "gptq act-order": partial(gptq, bits=4, group=32, act_order=True),
    "gptq v2": partial(gptq, bits=4, group=64, v2=True),
    **{f"awq {group}": partial(awq, group=group) for group in (32, 64, 128)},
    **{f"compressed int4 {group}": partial(compressed, bits=4, group=group) for group in (32, 64, 128, None)},
    "compressed int4 asymmetric": partial(compressed, bits=4, group=32, symmetric=False),
    "compressed int4 act-order": partial(compressed, bits=4, group=64, ordered=True),
    "compressed int8 packed": partial(compressed, bits=8, group=128),
    "compressed int8": partial(compressed, bits=8, group=None, packed=False),
    "compressed int8 asymmetric": partial(compressed, bits=8, group=None, packed=False, symmetric=False),
    "compressed fp8": partial(fp8_scaled, method="compressed-tensors"),
    "fp8 blocks": partial(fp8, rows=128, columns=128),
    "fp8 small blocks": partial(fp8, rows=48, columns=64),
    "fp8 tensor": partial(fp8_scaled, method="fp8"),
    "fp8 rows": partial(fp8_scaled, method="fbgemm_fp8"),
    "nf4": partial(nf4, nested=False),
    "nf4 nested": partial(nf4, nested=True),
    "llm.int8": llm_int8,
    **{f"hqq {bits} bits, {group}": partial(hqq, bits=bits, group=group)
       for bits, group in ((2, 32), (4, 64), (8, 128))},
}  # fmt: skip
