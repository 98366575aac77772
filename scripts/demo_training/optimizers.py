"""How weights are changed: Muon for the matrices of the layers, AdamW for the rest, and the learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import LlamaForCausalLM

WARM_UP = 0.01
DECAY_FROM = 0.3
"""Shares of training: the learning rate rises until the first and falls from the second on."""


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised, in `dtype`; for weight matrices. Equal shapes share a product."""

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, dtype: torch.dtype, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every matrix."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, members in shapes.items():
                updates = []
                for parameter in members:
                    state = self.state[parameter]
                    buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                steps = self._orthogonal(torch.stack(updates).to(self._dtype)).float()
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for parameter, step in zip(members, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).add_(step, alpha=-scale)

    @staticmethod
    def _orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
        """The nearest matrices with orthogonal rows, by a Newton-Schulz iteration."""
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(rounds):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if tall else x


def build_optimizers(model: LlamaForCausalLM, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Muon, which orthogonalises in `dtype`, for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, 0.02, dtype),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate(progress: float) -> float:
    """Warm-up, a while at the peak, then in a straight line down to zero, as a fraction of the peak."""
    return min(1.0, progress / WARM_UP + 0.02, (1 - min(1.0, progress)) / (1 - DECAY_FROM))


def update(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of every optimizer at a fraction of its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
