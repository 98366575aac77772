"""`GET /v1/models` and `GET /v1/models/<id>`: the loaded model, under each of its names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from core.api.body import json_response
from core.api.context import api_context
from core.errors import ModelNotFoundError
from core.security.access import policy

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel

blueprint = Blueprint("openai_models", __name__)


@blueprint.get("/v1/models")
@policy("viewer")
def list_models() -> Response:
    """Empty while no model is loaded."""
    pipeline = api_context().pipeline
    if not pipeline.loaded:
        return json_response({"object": "list", "data": []})
    model = pipeline.model
    names = dict.fromkeys((model.name, *model.aliases))
    return json_response({"object": "list", "data": [model_card(model, name) for name in names]})


@blueprint.get("/v1/models/<path:name>")
@policy("viewer")
def get_model(name: str) -> Response:
    pipeline = api_context().pipeline
    if not pipeline.loaded or not pipeline.model.knows(name):
        raise ModelNotFoundError(f"The model '{name}' is not served here.", param="model")
    return json_response(model_card(pipeline.model, name))


def model_card(model: LoadedModel, name: str) -> dict[str, Any]:
    """A model as OpenAI's clients list it, with what vLLM adds."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "vramancer",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }
