"""Readers of quantized checkpoints, a format a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from core.quantization.reader import Reader, Stored
from core.quantization.readers.awq import AwqReader
from core.quantization.readers.bitsandbytes import BitsAndBytesReader
from core.quantization.readers.compressed_tensors import CompressedTensorsReader
from core.quantization.readers.fp8 import Fp8Reader
from core.quantization.readers.gguf import GgufReader
from core.quantization.readers.gptq import GptqReader
from core.quantization.readers.hqq import HqqReader

_READERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Stored]], Reader]] = {
    "gptq": GptqReader,
    "awq": AwqReader,
    "compressed-tensors": CompressedTensorsReader,
    "fp8": Fp8Reader,
    "fbgemm_fp8": Fp8Reader,
    "bitsandbytes": BitsAndBytesReader,
    "hqq": HqqReader,
    "gguf": GgufReader,
}

METHODS = tuple(_READERS)
"""What `quant_method` may be."""


def find_reader(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> Reader | None:
    """The reader of a checkpoint's format, by `quantization_config` in its config.json; None where that is absent or
    names another format. Raises what the reader raises for a variant that it does not know."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in ("quantization_config", "compression_config"):
            settings = part.get(name)
            if isinstance(settings, dict):
                method = str(settings.get("quant_method") or _unnamed(settings))
                return _READERS[method](settings, stored) if method in _READERS else None
    return None


def _unnamed(settings: Mapping[str, Any]) -> str:
    if any(key.startswith(("load_in_", "bnb_")) for key in settings):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in settings else ""
