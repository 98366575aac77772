"""`POST /tokenize` and `POST /detokenize`, shaped as vLLM's."""

from __future__ import annotations

from typing import ClassVar

from flask import Blueprint, Response

from core.api.body import NOTHING, Integers, ModelName, RequestModel, Unsupported, json_response, read_request
from core.api.context import served_model
from core.api.openai.chat import encode_messages
from core.api.openai.schemas import ChatMessage, TemplateFields
from core.api.sampling import check_token_ids, encode_text
from core.engine.submission import check_length
from core.errors import InvalidRequestError
from core.security.access import policy

blueprint = Blueprint("tokens", __name__)


class TokenizeRequest(TemplateFields):
    """Either `prompt` or `messages`."""

    unsupported: ClassVar[Unsupported] = {"chat_template": NOTHING}

    model: ModelName | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    model: ModelName | None = None
    tokens: Integers


@blueprint.post("/tokenize")
@policy("user", waits=True)
def tokenize() -> Response:
    fields = read_request(TokenizeRequest)
    model = served_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequestError("Give either prompt or messages.", param="prompt")
    if fields.messages is not None:
        tools = None
        if fields.tools:
            from core.api.openai.tools import read_functions

            tools, _ = read_functions(fields.tools)
        token_ids = encode_messages(fields.messages, model, fields, tools)
    else:
        add = fields.add_special_tokens is not False
        token_ids = encode_text(fields.prompt or "", model, add_special_tokens=add, param="prompt")
    names = [model.tokenizer.token_text(token_id) for token_id in token_ids] if fields.return_token_strs else None
    return json_response(
        {"tokens": token_ids, "count": len(token_ids), "max_model_len": model.max_model_len, "token_strs": names}
    )


@blueprint.post("/detokenize")
@policy("user", waits=True)
def detokenize() -> Response:
    fields = read_request(DetokenizeRequest)
    model = served_model(fields.model)
    check_length(len(fields.tokens), model, reserve=0, param="tokens")
    token_ids = check_token_ids(fields.tokens, model, param="tokens")
    return json_response({"prompt": model.tokenizer.decode(token_ids, skip_special_tokens=False)})
