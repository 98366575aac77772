"""One forward pass over a batch of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from core.embedding.layout import Layout
from core.embedding.pooling import pool

Numbers = npt.NDArray[np.float32]


class Encoder:
    """Transformers' own model in eval mode. With an `activation` it scores pairs, else it gives vectors."""

    def __init__(
        self, model: Any, layout: Layout, device: torch.device, pad_id: int, activation: str | None = None
    ) -> None:
        self._model = model
        self._layout = layout
        self._device = device
        self._pad_id = pad_id
        self._activation = activation

    @torch.inference_mode()
    def __call__(
        self, token_ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]] | None, skips: Sequence[int]
    ) -> Numbers:
        """fp32 on the CPU: vectors `[B, dimensions]`, or scores `[B, 1]`.

        Args:
            token_ids: of each text, or pair of texts.
            type_ids: which of a pair each token belongs to; None where there are no pairs.
            skips: tokens at the beginning of each text that are a prompt's.
        """
        lengths = [len(tokens) for tokens in token_ids]
        inputs = {"input_ids": self._padded(token_ids, self._pad_id)}
        if type_ids is not None:
            inputs["token_type_ids"] = self._padded(type_ids, 0)
        if min(lengths) < max(lengths):
            size = torch.tensor(lengths, device=self._device)
            inputs["attention_mask"] = (torch.arange(max(lengths), device=self._device) < size[:, None]).long()
        if self._activation is not None:
            logits = self._model(**inputs).logits.float()
            return _numbers(torch.sigmoid(logits) if self._activation == "sigmoid" else logits)
        output = self._model(**inputs)
        return _numbers(pool(output.last_hidden_state, lengths, skips, self._layout))

    def _padded(self, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        """int64 `[B, T]`, padded behind."""
        table = np.full((len(rows), max(map(len, rows))), pad, dtype=np.int64)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values
        return torch.from_numpy(table).to(self._device)


def _numbers(tensor: torch.Tensor) -> Numbers:
    values: Numbers = tensor.cpu().numpy()
    return values
