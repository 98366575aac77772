"""Models on `meta`: all of their modules, and no numbers."""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import PreTrainedConfig

from core.errors import CheckpointError
from core.logs import get_logger

logger = get_logger(__name__)

BUILDING = threading.RLock()
"""Held while a model is made: transformers changes torch's default dtype meanwhile, for every thread."""


def build_blank(model_class: type[Any], config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A model of the class on `meta`. Raises `CheckpointError` for a config that it cannot build a model of."""
    try:
        with BUILDING, torch.device("meta"):
            return model_class._from_config(config, dtype=dtype)
    except Exception as error:  # whatever the class makes of numbers and names that nobody has checked
        logger.warning("no model can be built of a config", model=config.model_type, error=repr(error))
        raise CheckpointError(
            f"config.json does not describe a {model_class.__name__} that can be built "
            f"({type(error).__name__}; the log has the cause).",
            param="model",
        ) from error
