"""`GET /v1/models` and `GET /v1/models/<id>`: the loaded model, under each of its names,
and the models for embeddings and reranking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from core.api.body import json_response
from core.api.context import api_context, served_model
from core.errors import ModelNotFoundError, ModelNotLoadedError
from core.security.access import policy

if TYPE_CHECKING:
    from core.embedding.loading import EncoderInfo
    from core.engine.submission import LoadedModel

blueprint = Blueprint("openai_models", __name__)


@blueprint.get("/v1/models")
@policy("viewer")
def list_models() -> Response:
    """The chat model, if one is loaded, and then those for embeddings and reranking."""
    pipeline = api_context().pipeline
    cards = [model_card(engine.info, engine.info.name) for engine in pipeline.encoders.all()]
    try:
        model = pipeline.model
    except ModelNotLoadedError:
        return json_response({"object": "list", "data": cards})
    names = dict.fromkeys((model.name, *model.aliases))
    return json_response({"object": "list", "data": [*(model_card(model, name) for name in names), *cards]})


@blueprint.get("/v1/models/<path:name>")
@policy("viewer")
def get_model(name: str) -> Response:
    for engine in api_context().pipeline.encoders.all():
        if engine.info.knows(name):
            return json_response(model_card(engine.info, name))
    try:
        model = served_model(name)
    except ModelNotLoadedError as error:
        raise ModelNotFoundError(f"The model '{name}' is not served here.", param="model") from error
    return json_response(model_card(model, name))


def model_card(model: LoadedModel | EncoderInfo, name: str) -> dict[str, Any]:
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
