"""`POST /tokenize` and `POST /detokenize`, shaped as vLLM's, and as llama.cpp's for its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from flask import Blueprint, Response

from core.api.body import NOTHING, Integers, ModelName, RequestModel, Unsupported, json_response, read_request, reads
from core.api.context import served_model
from core.api.openai.chat import encode_messages
from core.api.openai.schemas import ChatMessage, TemplateFields
from core.api.sampling import check_token_ids, encode_text
from core.engine.submission import check_length
from core.errors import InvalidRequestError
from core.security.access import policy

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel

blueprint = Blueprint("tokens", __name__)


class TokenizeRequest(TemplateFields):
    """Either `prompt` or `messages`; or llama.cpp's `content`, without tokens in front unless `add_special`."""

    unsupported: ClassVar[Unsupported] = {"chat_template": NOTHING}

    model: ModelName | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    content: str | None = None
    add_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(RequestModel):
    model: ModelName | None = None
    tokens: Integers


@blueprint.post("/tokenize")
@policy("user", waits=True)
@reads(TokenizeRequest)
def tokenize() -> Response:
    fields = read_request(TokenizeRequest)
    model = served_model(fields.model)
    if fields.content is not None:
        return json_response({"tokens": _pieces(fields, fields.content, model)})
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


def _pieces(fields: TokenizeRequest, content: str, model: LoadedModel) -> list[int] | list[dict[str, Any]]:
    """Ids, or ids with their texts; a text that is part of a character is given as its bytes."""
    if fields.prompt is not None or fields.messages is not None:
        raise InvalidRequestError("Give content alone, or prompt or messages.", param="content")
    token_ids = encode_text(content, model, add_special_tokens=fields.add_special is True, param="content")
    if not fields.with_pieces:
        return token_ids
    found: list[dict[str, Any]] = []
    for token_id in token_ids:
        text = model.tokenizer.token_text(token_id)
        found.append(
            {"id": token_id, "piece": list(model.tokenizer.token_bytes(token_id)) if "\ufffd" in text else text}
        )
    return found


@blueprint.post("/detokenize")
@policy("user", waits=True)
@reads(DetokenizeRequest)
def detokenize() -> Response:
    fields = read_request(DetokenizeRequest)
    model = served_model(fields.model)
    check_length(len(fields.tokens), model, reserve=0, param="tokens")
    token_ids = check_token_ids(fields.tokens, model, param="tokens")
    text = model.tokenizer.decode(token_ids, skip_special_tokens=False)
    return json_response({"prompt": text, "content": text})
