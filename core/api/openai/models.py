"""`GET /v1/models` and `GET /v1/models/<id>`: the loaded model, under each of its names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from core.api.body import json_response
from core.api.context import api_context, served_model
from core.errors import ModelNotFoundError, ModelNotLoadedError
from core.security.access import policy

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel

blueprint = Blueprint("openai_models", __name__)


@blueprint.get("/v1/models")
@policy("viewer")
def list_models() -> Response:
    """Empty while no model is loaded."""
    try:
        model = api_context().pipeline.model
    except ModelNotLoadedError:
        return json_response({"object": "list", "data": []})
    names = dict.fromkeys((model.name, *model.aliases))
    return json_response({"object": "list", "data": [model_card(model, name) for name in names]})


@blueprint.get("/v1/models/<path:name>")
@policy("viewer")
def get_model(name: str) -> Response:
    try:
        model = served_model(name)
    except ModelNotLoadedError as error:
        raise ModelNotFoundError(f"The model '{name}' is not served here.", param="model") from error
    return json_response(model_card(model, name))


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
