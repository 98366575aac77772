"""Rotary embeddings whose frequencies depend on how long a sequence is, in batches of sequences of many lengths.

Transformers chooses one set of frequencies for all of a batch, by the longest position in it, and keys stay in the
cache as they were written. So a token's frequencies are those of its sequence's length when `generate()` first computes
it: a prompt's tokens have those of the whole prompt, every token behind it those of its own place. That is a number for
each token, whatever it is computed with and however often; models that compute a sequence anew when it outgrows the
original length have its length for all of its tokens (`RopeBorder.restarts`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.execution.known_sequences import PackedStep
from core.execution.records import Longs
from core.kv_cache.block_table import RopeBorder

MOVING = ("dynamic", "longrope")
_ONE_SET = "[None, :, None]"
"""In the source of rotary embeddings, before transformers 5.19: the frequencies are a column for all tokens."""


def rope_lengths(step: PackedStep, border: RopeBorder) -> Longs:
    """int64 `[T]`: the length that decides over each token's frequencies."""
    whole = np.array([known if border.restarts else prompt for prompt, known in step.lengths], dtype=np.int64)
    return np.maximum(np.repeat(whole, np.diff(step.query_start)), step.positions + 1)


class TokenRope:
    """In place of the `forward` of a model's rotary embedding: the library's own, over frequencies by token. `lengths`
    int64 `[T]` are the step's; None: the library does it all."""

    def __init__(self, module: Any) -> None:
        self.lengths: torch.Tensor | None = None
        self._module = module
        self._whole: Callable[..., Any] = module.forward
        self._forward: Callable[..., Any] = inspect.unwrap(type(module).forward)
        self._takes_one_set = _ONE_SET in inspect.getsource(self._forward)
        self._long: dict[str | None, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        kinds, args = self._module.rope_type, () if layer_type is None else (layer_type,)
        kind = kinds if layer_type is None else kinds[layer_type]
        if kind not in MOVING or self.lengths is None:
            return self._whole(x, position_ids, *args)
        prefix = "" if layer_type is None else f"{layer_type}_"
        short = getattr(self._module, f"{prefix}original_inv_freq")
        by_token = self._frequencies(kind, layer_type, self.lengths[:, None], short)

        def forward(frequencies: torch.Tensor) -> Any:
            setattr(self._module, f"{prefix}inv_freq", frequencies)
            try:
                return self._forward(self._module, x, position_ids, *args)
            finally:
                setattr(self._module, f"{prefix}inv_freq", short)

        return _set_by_set(forward, by_token) if self._takes_one_set else forward(by_token)

    def _frequencies(
        self, kind: str, layer_type: str | None, lengths: torch.Tensor, short: torch.Tensor
    ) -> torch.Tensor:
        """fp32 `[T, D / 2]`; `short` are those of lengths up to the original one."""
        config, device = self._module.config, lengths.device
        named = {} if layer_type is None else {"layer_type": layer_type}
        if kind == "dynamic":
            original = config.max_position_embeddings
            beyond, _ = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=lengths, **named)
        else:
            rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
            original = rope["original_max_position_embeddings"]
            if layer_type not in self._long:
                self._long[layer_type], _ = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=original + 1, **named)
            beyond = self._long[layer_type]
        return torch.where(lengths > original, beyond, short.to(device=device, dtype=torch.float))


def _set_by_set(forward: Callable[[torch.Tensor], Any], by_token: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `forward`, which takes one set of frequencies for all tokens, gives where each has its own: `[1, T, D]`."""
    sets, of_token = torch.unique(by_token, dim=0, return_inverse=True)
    parts = zip(*(forward(frequencies) for frequencies in sets), strict=True)
    tokens = torch.arange(len(of_token), device=of_token.device)
    return tuple(torch.stack(part)[of_token, 0, tokens][None] for part in parts)


def token_ropes(model: nn.Module) -> tuple[TokenRope, ...]:
    """Take the place of the rotary embeddings of a model that depend on lengths."""
    ropes = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds in MOVING if isinstance(kinds, str) else isinstance(kinds, dict) and {*kinds.values()} & {*MOVING}:
            ropes.append(TokenRope(module))
            module.forward = ropes[-1]
    return tuple(ropes)
