"""`POST /v1/responses`, and what may be asked of a response that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from functools import cache
from typing import Any, cast

from flask import Blueprint, Response, current_app, g, request
from pydantic import Field, ValidationError

from core.api.body import Integer, RequestModel, from_validation_error, json_response, read_request, reads
from core.api.context import api_context
from core.api.generation import Generation, stream_response
from core.api.openai.chat import ChatJob
from core.api.openai.schemas import ChatRequest
from core.api.responses.answers import ResponseEvents, ResponseWriter
from core.api.responses.background import BackgroundResponses
from core.api.responses.items import NAMES, messages_of, read_items
from core.api.responses.schemas import ResponseRequest
from core.api.responses.store import ResponseStore, Stored
from core.api.translated import chat_request, choice_of, client_names
from core.errors import ContextLengthError, InvalidRequestError, NotFoundError, UnsupportedParameterError
from core.security.access import policy

blueprint = Blueprint("responses", __name__)
STORE = "vramancer_responses"
BACKGROUND = "vramancer_background_responses"
RUNNING = ("queued", "in_progress")


def response_store() -> ResponseStore:
    """Of the application that answers the current request."""
    return cast(ResponseStore, current_app.extensions[STORE])


def current_background() -> BackgroundResponses:
    """Of the application that answers the current request."""
    return cast(BackgroundResponses, current_app.extensions[BACKGROUND])


@blueprint.post("/v1/responses")
@policy("user", waits=True)
@reads(ResponseRequest)
def create_response() -> Response:
    """A response, kept for its caller unless `store` is false; one in the background is made after the answer."""
    fields = read_request(ResponseRequest)
    store, owner = response_store(), g.principal.owner
    fields.check_background()
    kept_items = cache(lambda: store.items(owner))
    items = read_items(fields.input if fields.input is not None else [], lambda item_id: kept_items().get(item_id))
    conversation = [*_earlier(fields, store, owner), *items]
    with client_names(NAMES):
        job = _prepare(fields, messages_of(conversation, fields.instructions))
    if fields.background:
        with current_background().place(owner) as place:
            generation, writer = _begin(fields, job, store, items)
            generation.leave_request()
            queued = writer.queue()
            place.begin(generation, writer)
        return json_response(queued)
    generation, writer = _begin(fields, job, store, items)
    if fields.stream:
        response = stream_response(generation, writer, ResponseEvents(writer))
        response.call_on_close(writer.abandoned)
        return response
    with closing(generation):
        (result,) = generation.gather()
    return json_response(writer.response(result))


def _begin(
    fields: ResponseRequest, job: ChatJob, store: ResponseStore, items: list[dict[str, Any]]
) -> tuple[Generation, ResponseWriter]:
    """Submit it. The writer keeps the response for its caller, unless it is not to be stored."""
    owner = g.principal.owner
    with client_names(NAMES):
        generation = job.start("resp", {"prompt": "input", "max_tokens": "max_output_tokens"})
    kept = False

    def keep(response: dict[str, Any]) -> None:
        nonlocal kept
        if fields.store is False:
            return
        running = generation.id if response["status"] in RUNNING else None
        (store.replace if kept else store.put)(owner, Stored(dict(response), items, running))
        kept = True

    return generation, ResponseWriter(fields, job, generation.id, keep)


def _earlier(fields: ResponseRequest, store: ResponseStore, owner: str) -> list[dict[str, Any]]:
    """Items of the conversation that goes on."""
    if fields.previous_response_id is None:
        return []
    try:
        if store.get(owner, fields.previous_response_id).response["status"] in RUNNING:
            raise InvalidRequestError(
                f"The response {fields.previous_response_id!r} is not complete yet.", param="previous_response_id"
            )
        return store.conversation(owner, fields.previous_response_id)
    except NotFoundError as error:
        raise InvalidRequestError(
            error.message, param="previous_response_id", code="previous_response_not_found"
        ) from None


def _prepare(fields: ResponseRequest, messages: list[dict[str, Any]]) -> ChatJob:
    """The job; with truncation auto, of as much of the conversation's end as fits, from one of the user's messages
    on."""
    if fields.truncation != "auto":
        return ChatJob.prepare(_chat(fields, messages), always_read=True)
    system = [message for message in messages[:1] if message["role"] == "system"]
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"] or [len(system)]
    starts[0] = len(system)
    low, high = 0, len(starts) - 1
    found: ChatJob | None = None
    while low <= high:
        middle = 0 if found is None and low == 0 and high == len(starts) - 1 else (low + high) // 2
        job = _fitting(fields, [*system, *messages[starts[middle] :]])
        if job is None:
            low = middle + 1
        else:
            found, high = job, middle - 1
    return found or ChatJob.prepare(_chat(fields, [*system, *messages[starts[-1] :]]), always_read=True)


def _fitting(fields: ResponseRequest, messages: list[dict[str, Any]]) -> ChatJob | None:
    try:
        job = ChatJob.prepare(_chat(fields, messages), always_read=True)
    except ContextLengthError:
        return None
    return job if job.fits else None


def _chat(fields: ResponseRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    if not messages:
        raise InvalidRequestError("input must not be empty.", param="input")
    body: dict[str, Any] = {
        "model": fields.model,
        "messages": messages,
        "stream": fields.stream,
        "max_tokens": fields.max_output_tokens,
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "tools": [_tool(tool, index) for index, tool in enumerate(fields.tools)] if fields.tools else None,
        "tool_choice": _choice(fields.tool_choice),
        "parallel_tool_calls": fields.parallel_tool_calls,
        "reasoning_effort": fields.reasoning.effort if fields.reasoning else None,
        "response_format": _format(fields),
    }
    if fields.wants_logprobs:
        body |= {"logprobs": True, "top_logprobs": fields.top_logprobs or 0}
    return chat_request(body)


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A function as chat completions have it. Tools of other types are skipped there: they run at OpenAI's."""
    if tool.get("type") != "function":
        return {"type": tool.get("type", "")}
    return {
        "type": "function",
        "function": {name: tool.get(name) for name in ("name", "description", "parameters", "strict")},
    }


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        named = [choice_of("function", tool.get("name")) if isinstance(tool, dict) else tool for tool in tools or ()]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    return choice_of("function", choice.get("name")) if choice.get("type") == "function" else choice


def _format(fields: ResponseRequest) -> dict[str, Any] | None:
    given = fields.text.format if fields.text is not None else None
    if given is None or given.get("type") != "json_schema":
        return given
    schema = {name: given[name] for name in ("name", "description", "schema", "strict") if name in given}
    return {"type": "json_schema", "json_schema": schema}


class ItemsQuery(RequestModel):
    """Which items: `limit` of them, after the one of id `after`, last first unless `order` is asc."""

    limit: Integer = Field(20, ge=1, le=100)
    order: str = Field("desc", pattern="^(asc|desc)$")
    after: str | None = None


@blueprint.get("/v1/responses/<response_id>")
@policy("user")
def get_response(response_id: str) -> Response:
    if request.args.get("stream", "").lower() == "true":
        raise UnsupportedParameterError("Streams of responses are not kept: only whole ones are.", param="stream")
    return json_response(response_store().get(g.principal.owner, response_id).response)


@blueprint.get("/v1/responses/<response_id>/input_items")
@policy("user")
def list_input_items(response_id: str) -> Response:
    """What the response was asked with, without what came before it in the conversation."""
    query = _items_query()
    items = response_store().get(g.principal.owner, response_id).items
    if query.order == "desc":
        items = items[::-1]
    if query.after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == query.after]
        if not places:
            raise InvalidRequestError(f"No item is called {query.after[:64]!r}.", param="after")
        items = items[places[0] + 1 :]
    shown = items[: query.limit]
    return json_response(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(items) > len(shown),
        }
    )


def _items_query() -> ItemsQuery:
    values: dict[str, Any] = {name: request.args[name] for name in ItemsQuery.model_fields if name in request.args}
    if str(values.get("limit", "")).isdecimal():
        values["limit"] = int(values["limit"][:9])
    try:
        return ItemsQuery.model_validate(values)
    except ValidationError as error:
        raise from_validation_error(error) from None


@blueprint.delete("/v1/responses/<response_id>")
@policy("user", mutates=True)
def delete_response(response_id: str) -> Response:
    stored = response_store().get(g.principal.owner, response_id)
    response_store().delete(g.principal.owner, response_id)
    if stored.response["background"] and stored.generation_id is not None:
        api_context().pipeline.cancel(stored.generation_id)  # nobody could read it
    return json_response({"id": response_id, "object": "response", "deleted": True})


@blueprint.post("/v1/responses/<response_id>/cancel")
@policy("user", mutates=True)
def cancel_response(response_id: str) -> Response:
    """End a response that is being streamed, or made in the background, with what there is by then. One that has been
    cancelled is answered as it is."""
    stored = response_store().get(g.principal.owner, response_id)
    if stored.response["background"] and stored.response["status"] == "cancelled":
        return json_response(stored.response)
    if stored.generation_id is None or not api_context().pipeline.cancel(stored.generation_id):
        raise InvalidRequestError("The response has ended; only one that runs can be cancelled.", param="response_id")
    return json_response({**stored.response, "status": "cancelled"})
