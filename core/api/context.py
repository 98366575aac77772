"""What every route reaches: the pipeline, the token and the requests under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from flask import current_app

from core.api.live import LiveRequests
from core.errors import ModelNotFoundError

if TYPE_CHECKING:
    from core.engine.model_engine import LoadedModel
    from core.inference_pipeline import InferencePipeline

EXTENSION = "vramancer"


@dataclass(frozen=True, slots=True)
class ApiContext:
    """Made once by `create_app`, kept in the application's extensions."""

    pipeline: InferencePipeline
    token: str
    live: LiveRequests


def api_context() -> ApiContext:
    """The context of the application that answers the current request."""
    return cast(ApiContext, current_app.extensions[EXTENSION])


def served_model(name: str | None) -> LoadedModel:
    """The loaded model, if `name` is one of its names or None.

    Raises:
        ModelNotLoadedError: no model is loaded.
        ModelNotFoundError: another model is asked for.
    """
    model = api_context().pipeline.model
    if name is not None and not model.knows(name):
        raise ModelNotFoundError(f"The model '{name}' is not served here; '{model.name}' is.", param="model")
    return model
