"""Models and running requests: what changes the server's state. All of it is refused in read-only mode."""

from __future__ import annotations

from typing import Literal

from flask import Blueprint, Response
from pydantic import ConfigDict, Field

from core.api.answers import json_response
from core.api.body import read_request
from core.api.context import api_context
from core.api.openai.models import model_card
from core.api.schema import MAX_COUNT, MAX_NAME_LENGTH, RequestModel
from core.errors import NotFoundError

blueprint = Blueprint("management", __name__)


class LoadRequest(RequestModel):
    """`/api/models/load`: what is left out is as in the settings."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)
    num_gpus: int | None = Field(None, ge=1, le=1024)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    devices: str | None = Field(None, min_length=1, max_length=4096)
    max_model_len: int | None = Field(None, ge=1, le=MAX_COUNT)


@blueprint.get("/api/models")
def list_models() -> Response:
    models = api_context().pipeline.available_models()
    loaded = next((entry["id"] for entry in models if entry["loaded"]), None)
    return json_response({"object": "list", "loaded": loaded, "data": models})


@blueprint.post("/api/models/load")
def load_model() -> Response:
    """Load a model and swap it in; it answers when the model serves. A load that fails leaves the old one serving."""
    fields = read_request(LoadRequest)
    model = api_context().pipeline.load(
        fields.model,
        num_gpus=fields.num_gpus,
        dtype=fields.dtype,
        devices=fields.devices,
        max_model_len=fields.max_model_len,
    )
    return json_response(
        {**model_card(model, model.name), "dtype": model.dtype, "num_parameters": model.num_parameters}
    )


@blueprint.post("/api/models/unload")
def unload_model() -> Response:
    """Finish what runs, then free the model's memory."""
    return json_response({"unloaded": api_context().pipeline.unload().name})


@blueprint.post("/api/requests/<request_id>/cancel")
@blueprint.delete("/api/requests/<request_id>")
def cancel_request(request_id: str) -> Response:
    """End a running request by its answer's id or by its `X-Request-ID`; its client gets what there is by then."""
    context = api_context()
    engine_ids = context.live.engine_ids(request_id)
    cancelled = [engine_id for engine_id in engine_ids if context.pipeline.cancel(engine_id)]
    if not cancelled:
        raise NotFoundError(f"No running request is called '{request_id}'.", param="request_id")
    return json_response({"id": request_id, "object": "request", "cancelled": cancelled})
