"""`GET /v1/models` and `GET /v1/models/<id>`: the loaded model, under each of its names, the models for embeddings and
reranking, and those of upstreams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from core.api.body import json_response
from core.api.context import api_context, served_model
from core.api.upstreams import stub_answers
from core.errors import ModelNotFoundError, ModelNotLoadedError
from core.security.access import policy
from core.upstreams.group import GroupView
from core.upstreams.stub import STUB_NAME

if TYPE_CHECKING:
    from core.embedding.loading import EncoderInfo
    from core.engine.submission import LoadedModel

blueprint = Blueprint("openai_models", __name__)


@blueprint.get("/v1/models")
@policy("viewer")
def list_models() -> Response:
    """Our own models, as far as they are loaded, and those that other servers answer for."""
    pipeline = api_context().pipeline
    others = pipeline.upstreams.views()
    taken = {group.name for group in others}
    encoders = [engine.info for engine in pipeline.encoders.all() if engine.info.name not in taken]
    cards = [*(model_card(info, info.name) for info in encoders), *(upstream_card(group) for group in others)]
    try:
        model = pipeline.model
    except ModelNotLoadedError:
        if stub_answers():
            cards.append({"id": STUB_NAME, "object": "model", "created": 0, "owned_by": STUB_NAME})
        return json_response({"object": "list", "data": cards})
    names = [name for name in dict.fromkeys((model.name, *model.aliases)) if name not in taken]
    return json_response({"object": "list", "data": [*(model_card(model, name) for name in names), *cards]})


@blueprint.get("/v1/models/<path:name>")
@policy("viewer")
def get_model(name: str) -> Response:
    group = api_context().pipeline.upstreams.find(name)
    if group is not None:
        return json_response(upstream_card(group.view()))
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


def upstream_card(group: GroupView) -> dict[str, Any]:
    """A model that other servers answer for; `available` says whether one of them would be asked now."""
    first = group.replicas[0]
    return {
        "id": group.name,
        "object": "model",
        "created": 0,
        "owned_by": first.backend,
        "root": first.model or group.name,
        "parent": None,
        "available": group.available,
    }
