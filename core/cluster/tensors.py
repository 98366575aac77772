"""Tensors as payloads, without a copy where they are in main memory."""

from __future__ import annotations

import torch

from core.errors import ProtocolError
from core.network.frames import DTYPES, Header

DTYPE_OF: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES if name != "bytes"}
"""By the names that frames have for them."""
NAME_OF = {dtype: name for name, dtype in DTYPE_OF.items()}


def payload_of(tensor: torch.Tensor) -> tuple[memoryview, str, tuple[int, ...]]:
    """Bytes, dtype and shape of a tensor in main memory. The bytes are the tensor's own if it is contiguous."""
    data = tensor.detach().contiguous()
    return data.reshape(-1).view(torch.uint8).numpy().data, NAME_OF[data.dtype], tuple(data.shape)


def buffer_for(header: Header) -> tuple[torch.Tensor, memoryview]:
    """An empty tensor for what a header announces, and its bytes. Raises `ProtocolError` for what is none."""
    tensor = empty_for(header, torch.device("cpu"))
    return tensor, tensor.reshape(-1).view(torch.uint8).numpy().data


def empty_for(header: Header, device: torch.device) -> torch.Tensor:
    """An empty tensor for what a header announces. Raises `ProtocolError` for what is none."""
    if header.dtype == "bytes":
        raise ProtocolError(f"{header.opcode.name} is a tensor, not bytes")
    return torch.empty(header.shape, dtype=DTYPE_OF[header.dtype], device=device)
