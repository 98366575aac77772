"""`POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import re
from contextlib import closing

from flask import Blueprint, Response, g, request

from core.api.anthropic.answers import EVENTS, MessageWriter
from core.api.anthropic.conversation import NAMES, read_conversation
from core.api.anthropic.schemas import CountRequest, MessagesRequest
from core.api.body import json_response, read_request, reads
from core.api.generation import stream_response
from core.api.openai.chat import ChatJob
from core.api.translated import client_names
from core.errors import InvalidRequestError
from core.security.access import policy

blueprint = Blueprint("anthropic", __name__)

VERSION_HEADER = "anthropic-version"
VERSION = re.compile(r"20\d\d-\d\d-\d\d")
OLDEST_VERSION = "2023-06-01"
"""Before it, events had no names. Of later ones, requests and answers are the same in what this server has of them."""


@blueprint.post("/v1/messages")
@policy("user", waits=True)
@reads(MessagesRequest)
def create_message() -> Response:
    """A message. `max_tokens` beyond the context means as many as fit; the answer then ends for
    `model_context_window_exceeded` if it comes to that."""
    _check_version()
    fields = read_request(MessagesRequest)
    with client_names(NAMES):
        job = ChatJob.prepare(read_conversation(fields), always_read=True)
        capped = job.cap()
        generation = job.start("msg", {"prompt": "messages"})
    writer = MessageWriter(fields, job, generation.id, capped=capped)
    if fields.stream:
        return stream_response(generation, writer, EVENTS)
    with closing(generation):
        (result,) = generation.gather()
    return json_response(writer.message(result))


@blueprint.post("/v1/messages/count_tokens")
@policy("user", waits=True)
@reads(CountRequest)
def count_tokens() -> Response:
    """How many tokens a message's prompt has: exactly as many as the model would be given."""
    _check_version()
    fields = read_request(CountRequest)
    with client_names(NAMES):
        job = ChatJob.prepare(read_conversation(fields), always_read=True)
    return json_response({"input_tokens": len(job.token_ids)})


def _check_version() -> None:
    version = request.headers.get(VERSION_HEADER, OLDEST_VERSION)
    if not VERSION.fullmatch(version) or version < OLDEST_VERSION:
        raise InvalidRequestError(f"{VERSION_HEADER} must be a date from {OLDEST_VERSION} on.", param=VERSION_HEADER)


@blueprint.after_request
def _name_request(response: Response) -> Response:
    """Anthropic's clients look for the request's id here."""
    response.headers["request-id"] = g.request_id
    return response
