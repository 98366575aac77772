"""Models and running requests: what changes the server's state. All of it is refused in read-only mode."""

from __future__ import annotations

from typing import Annotated, Literal

from flask import Blueprint, Response
from pydantic import AfterValidator, ConfigDict, Field

from core.api.body import MAX_COUNT, MAX_NAME_LENGTH, Integer, RequestModel, json_response, read_request
from core.api.context import api_context
from core.api.openai.models import model_card
from core.cluster.choice import divide
from core.devices import parse_devices
from core.errors import DeviceError, InvalidRequestError, NotFoundError
from core.parsers.families import ReasoningParserName, ToolParserName
from core.placement.engine import parse_layers
from core.security.access import policy
from core.views.render import render
from core.views.status import model_views

blueprint = Blueprint("management", __name__)


class LoadRequest(RequestModel):
    """`/api/models/load`: the arguments of `InferencePipeline.load`; what is left out is as in the settings."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=MAX_NAME_LENGTH)
    num_gpus: Integer | None = Field(None, ge=1, le=1024)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    devices: str | None = Field(None, min_length=1, max_length=4096)
    max_model_len: Integer | None = Field(None, ge=1, le=MAX_COUNT)
    tool_parser: ToolParserName | None = None
    reasoning_parser: ReasoningParserName | None = None


def _device_list(text: str) -> str:
    try:
        here, _ = divide(text)  # others are looked for once it is known which there are
        if here:
            parse_devices(here)
    except DeviceError as error:
        raise InvalidRequestError(error.message, param="devices") from error
    return text


def _layer_list(text: str) -> str:
    parse_layers(text)
    return text


class PlaceRequest(RequestModel):
    """`/api/pipeline/place`: the arguments of `InferencePipeline.place`; what is left out is as in the settings.
    `layers` by hand go before `placement`."""

    model_config = ConfigDict(extra="forbid")

    devices: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_device_list)] | None = None
    placement: str | None = Field(None, min_length=1, max_length=64)
    layers: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_layer_list)] | None = None
    objective: Literal["throughput", "latency"] | None = None
    dry_run: bool = False


@blueprint.get("/api/models")
@policy("viewer")
def list_models() -> Response:
    engine = api_context().pipeline.current_engine
    loaded = engine.model.name if engine is not None else None
    return json_response({"object": "list", "loaded": loaded, "data": render(model_views(engine))})


@blueprint.post("/api/models/load")
@policy("operator", mutates=True, waits=True)
def load_model() -> Response:
    """Load a model and swap it in; it answers when the model serves. A load that fails leaves the old one serving."""
    model = api_context().pipeline.load(**read_request(LoadRequest).model_dump())
    return json_response(
        {**model_card(model, model.name), "dtype": model.dtype, "num_parameters": model.num_parameters}
    )


@blueprint.post("/api/models/unload")
@policy("operator", mutates=True, waits=True)
def unload_model() -> Response:
    """Finish what runs, then free the model's memory."""
    return json_response({"unloaded": api_context().pipeline.unload().name})


@blueprint.post("/api/pipeline/place")
@policy("operator", mutates=True, waits=True)
def place_model() -> Response:
    """Put the running model on other devices or cuts while requests go on. `dry_run` shows the plan, its prediction and
    what would have to move, and changes nothing."""
    return json_response(render(api_context().pipeline.place(**read_request(PlaceRequest).model_dump())))


@blueprint.post("/api/requests/<request_id>/cancel")
@blueprint.delete("/api/requests/<request_id>")
@policy("user", mutates=True)
def cancel_request(request_id: str) -> Response:
    """End a running request by its answer's id or by its `X-Request-ID`; its client gets what there is by then."""
    context = api_context()
    engine_ids = context.live.engine_ids(request_id)
    cancelled = [engine_id for engine_id in engine_ids if context.pipeline.cancel(engine_id)]
    if not cancelled:
        raise NotFoundError(f"No running request is called '{request_id}'.", param="request_id")
    return json_response({"id": request_id, "object": "request", "cancelled": cancelled})
