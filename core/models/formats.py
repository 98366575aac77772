"""Weights in formats that are not served yet, called by their names, with what to do instead."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import UnsupportedModelError

_METHODS = {
    "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors", "mxfp4": "MXFP4", "auto-round": "AutoRound", "torchao": "torchao",
    "hqq": "HQQ", "aqlm": "AQLM", "quanto": "Quanto", "bitnet": "BitNet", "modelopt": "ModelOpt", "gguf": "GGUF",
}  # fmt: skip
_WHOLE_NUMBERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
_INSTEAD = (
    "Weights of this format are not supported here; use the model's bf16, fp16 or fp32 checkpoint in safetensors."
)


def is_gguf_file(file: Path) -> bool:
    """Whether a file is GGUF, whatever its name."""
    try:
        with file.open("rb") if file.is_file() else io.BytesIO() as content:
            return content.read(4) == b"GGUF"
    except OSError:
        return False


def refuse_file(file: Path) -> UnsupportedModelError:
    """The error for a model that is given as a file, by what is in the file."""
    try:
        with file.open("rb") if file.is_file() else io.BytesIO() as content:  # a pipe might never have anything
            start = content.read(9)
    except OSError:
        start = b""  # the name has to do
    if start.startswith(b"GGUF") or file.suffix == ".gguf":
        what = "a GGUF file, which is not supported here. Give a directory with the model's safetensors checkpoint."
    elif file.suffix == ".safetensors" or start[8:9] == b"{":
        what = "a safetensors file alone. Give its directory, with config.json and tokenizer.json."
    elif start.startswith((b"PK", b"\x80")):
        what = "a file of pickled weights, which are never read. Convert them to safetensors, and give the directory."
    else:
        what = "a file. Give a directory with config.json, tokenizer.json and safetensors."
    return UnsupportedModelError(f"{file.name} is {what}", param="model")


def refuse_quantized(name: str, config: Mapping[str, Any], tensors: Mapping[str, str]) -> None:
    """Raise `UnsupportedModelError` for quantized weights: by the `config`, or by the `tensors` and their dtypes."""
    found = _by_config(config) or _by_tensors(tensors)
    if found is not None:
        raise UnsupportedModelError(f"{name} is quantized ({found}). {_INSTEAD}", param="model")


def _by_config(config: Mapping[str, Any]) -> str | None:
    parts = [config, *(value for key, value in config.items() if key == "text_config" and isinstance(value, dict))]
    for part in parts:
        given = next((key for key in ("quantization_config", "compression_config") if part.get(key) is not None), None)
        if given is not None:
            settings = part[given] if isinstance(part[given], dict) else {}
            method = str(settings.get("quant_method") or _unnamed(settings, given))
            bits = settings.get("bits", settings.get("w_bit"))
            return _METHODS.get(method, method) + (f", {bits} bits" if isinstance(bits, int) else "")
        packed = part.get("quantization")
        if isinstance(packed, dict) and "bits" in packed:
            return f"packed by MLX, {packed['bits']} bits"
    return None


def _unnamed(settings: Mapping[str, Any], given: str) -> str:
    if any(key.startswith(("load_in_", "bnb_")) for key in settings):
        return "bitsandbytes"
    return "compressed-tensors" if given == "compression_config" or "config_groups" in settings else "method not named"


def _by_tensors(tensors: Mapping[str, str]) -> str | None:
    """Quantizers leave their own tensors beside those that they pack."""
    endings = {name.rpartition(".")[2] for name in tensors}
    if "qweight" in endings:
        return "GPTQ" if "g_idx" in endings else "AWQ"
    if "weight_packed" in endings:
        return "compressed-tensors"
    if {"absmax", "quant_map"} & endings or any("quant_state" in ending for ending in endings):
        return "bitsandbytes"
    weights = {dtype: name for name, dtype in tensors.items() if name.endswith(("weight", "weight_packed", "_blocks"))}
    packed = next((dtype for dtype in weights if dtype in _WHOLE_NUMBERS), None)
    if packed is not None and "scales" in endings:
        return f"packed by MLX: {weights[packed]} is {packed}"
    eighth = next((dtype for dtype in weights if dtype.startswith(("F8", "F4", "F6"))), None)
    if eighth is not None:
        return f"{'FP8' if eighth.startswith('F8') else eighth}: {weights[eighth]} is {eighth}"
    return None if packed is None else f"{weights[packed]} holds whole numbers ({packed})"
