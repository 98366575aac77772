"""Which dtype a model is served in, by name: a rule without torch, for plans of cards that are not here too."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import DeviceError

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def choose_dtype(dtype: str, asked: str, lacking: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """What a checkpoint in `dtype` is served in, and what there is to say of it. bf16 (`asked` is "auto") becomes fp16
    if there are devices `lacking` bf16: one model has one dtype.
    Raises `DeviceError` if bf16 is asked for where a device has none.
    """
    if dtype != "bfloat16" or not lacking:
        return dtype, ()
    names = ", ".join(lacking)
    if asked != "auto":
        raise DeviceError(
            f"dtype bfloat16 needs compute capability 8.0, which is more than that of {names}. Use float16 or auto, "
            f"or leave the device out.",
            param="dtype",
        )
    note = f"float16 in place of bfloat16, which {names} cannot compute with; numbers beyond 65,504 overflow"
    return "float16", (note,)
