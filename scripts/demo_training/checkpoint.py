"""What an interrupted training needs to go on: a file that is replaced whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(slots=True)
class State:
    """Where a training is.

    Attributes:
        seed, tokens: of the text and of a step, which must stay the same.
        step: steps that are over.
        elapsed_s: seconds that they took, interruptions left out.
        average: running mean of the loss, in nats per learnt token.
        began: where in the schedule it began, 0 to 1; above 0 with weights that were trained before.
    """

    seed: int
    tokens: int
    step: int = 0
    elapsed_s: float = 0.0
    average: float = 0.0
    began: float = 0.0


def write_checkpoint(
    path: Path, state: State, tokenizer: str, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Write everything beside `path` and move it there, so that a kill in between leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    content = {
        "state": asdict(state),
        "tokenizer": tokenizer,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(content, beside)
    beside.replace(path)


def read_checkpoint(path: Path) -> tuple[State, dict[str, Any]]:
    """The state, and "tokenizer" (its JSON), "model" and "optimizers" (their state). Nothing in the file is run."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return State(**content.pop("state")), content
