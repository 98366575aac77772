"""Models and running requests: what changes the server's state. All of it is refused in read-only mode."""

from __future__ import annotations

from typing import Annotated, Literal

from flask import Blueprint, Response, request
from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from core.api.body import (
    MAX_COUNT,
    MAX_NAME_LENGTH,
    Integer,
    ModelName,
    RequestModel,
    from_validation_error,
    json_response,
    read_body,
    read_request,
    reads,
)
from core.api.context import api_context
from core.api.openai.models import model_card
from core.cluster.choice import divide
from core.config_backend import SELF, BackendKind, UpstreamSettings
from core.devices import parse_devices
from core.errors import ConflictError, DeviceError, InvalidRequestError, ModelNotFoundError, NotFoundError
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
    quantize: Literal["none", "int8", "int4"] | None = None
    quantize_group: Literal[32, 64, 128, 256] | None = None
    tool_parser: ToolParserName | None = None
    reasoning_parser: ReasoningParserName | None = None


class UpstreamRequest(RequestModel):
    """`/api/models/load` with a `url`: another server that answers for `model`, or one more replica of it; see
    `core.config_backend.UpstreamSettings`."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=256)
    url: str = Field(min_length=1, max_length=2048)
    backend: BackendKind = "auto"
    upstream_model: str | None = Field(None, min_length=1, max_length=MAX_NAME_LENGTH)
    api_key: str | None = Field(None, min_length=1, max_length=4096)


class UnloadRequest(RequestModel):
    """`/api/models/unload`: an upstream's model by its name; null: the one that is loaded here."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName | None = None


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
    upstreams = render(api_context().pipeline.upstreams.views())
    return json_response(
        {"object": "list", "loaded": loaded, "data": render(model_views(engine)), "upstreams": upstreams}
    )


@blueprint.post("/api/models/load")
@policy("operator", mutates=True, waits=True)
@reads(LoadRequest, UpstreamRequest)
def load_model() -> Response:
    """Load a model and swap it in; it answers when the model serves. A load that fails leaves the old one serving. With
    a `url` another server's model is served beside it, once that server was found to have it."""
    if "url" in read_body():
        return _load_upstream()
    model = api_context().pipeline.load(**read_request(LoadRequest).model_dump())
    return json_response(
        {
            **model_card(model, model.name), "dtype": model.dtype, "quantization": model.quantization,
            "num_parameters": model.num_parameters,
        }
    )  # fmt: skip


def _load_upstream() -> Response:
    pipeline, fields = api_context().pipeline, read_request(UpstreamRequest)
    try:
        upstream = UpstreamSettings.model_validate(
            {
                "name": fields.model, "url": fields.url, "backend": fields.backend, "model": fields.upstream_model,
                "api_key": fields.api_key,
            }
        )  # fmt: skip
    except ValidationError as error:
        raise from_validation_error(error) from None
    engine = pipeline.current_engine
    ours = engine is not None and engine.model.knows(upstream.name)
    if ours and upstream.url != SELF and pipeline.upstreams.find(upstream.name) is None:
        raise ConflictError(
            f"The model that is loaded here is called '{upstream.name}'. To serve it by several servers, first load "
            f'it with the url "{SELF}".',
            param="model",
        )
    return json_response(render(pipeline.upstreams.add(upstream).view()))


@blueprint.post("/api/models/unload")
@policy("operator", mutates=True, waits=True)
@reads(UnloadRequest, optional=True)
def unload_model() -> Response:
    """Finish what runs, then free the model's memory. With the name of an upstream's model as `model`: serve that no
    more."""
    if request.content_length:
        name = read_request(UnloadRequest).model
        if name is not None and api_context().pipeline.upstreams.find(name) is not None:
            api_context().pipeline.upstreams.remove(name)
            return json_response({"unloaded": name})
        if name is not None and not api_context().pipeline.model.knows(name):
            raise ModelNotFoundError(f"The model '{name}' is not served here.", param="model")
    return json_response({"unloaded": api_context().pipeline.unload().name})


@blueprint.post("/api/pipeline/place")
@policy("operator", mutates=True, waits=True)
@reads(PlaceRequest)
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
