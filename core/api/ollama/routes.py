"""`/api/chat`, `/api/tags`, `/api/show`, `/api/ps` and `/api/version`."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

from flask import Blueprint, Response, request

from core.api.body import json_response, read_request, reads
from core.api.context import api_context, served_model
from core.api.generation import OPENAI, Framing, stream_response
from core.api.ollama.answers import CHAT_LINES, ChatWriter, now_text
from core.api.ollama.conversation import NAMES, plain_name, read_conversation
from core.api.ollama.schemas import OllamaChatRequest, ShowRequest
from core.api.openai.chat import ChatJob
from core.api.translated import client_names
from core.engine.submission import LoadedModel
from core.errors import InvalidRequestError
from core.security.access import policy

blueprint = Blueprint("ollama", __name__)

SSE = "text/event-stream"
NEVER = "9999-12-31T23:59:59Z"
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def framing(lines: Framing) -> Framing:
    """Server-sent events for who asks for them by name, else lines."""
    named = any(kind == SSE for kind, _ in request.accept_mimetypes)
    return OPENAI if named else lines


@blueprint.post("/api/chat")
@policy("user", waits=True)
@reads(OllamaChatRequest)
def chat() -> Response:
    """An answer, in lines unless `stream` is false. `num_predict` beyond the context means as many as fit."""
    fields = read_request(OllamaChatRequest, untyped=True)
    if not fields.messages:
        return json_response(loaded_answer(fields.model, {"message": {"role": "assistant", "content": ""}}))
    with client_names(NAMES):
        job = ChatJob.prepare(read_conversation(fields), always_read=True)
        job.cap()
        generation = job.start("chatcmpl", {"prompt": "messages"})
    writer = ChatWriter(job, fields.model, generation.id)
    if fields.stream is not False:
        return stream_response(generation, writer, framing(CHAT_LINES))
    with closing(generation):
        (result,) = generation.gather(on_output=lambda _, output: writer.clock.note(output))
    return json_response(writer.whole(result))


def loaded_answer(name: str, content: dict[str, Any]) -> dict[str, Any]:
    """What a request without a prompt gets: in Ollama it loads the model, which is loaded here."""
    served_model(plain_name(name))
    return {"model": name, "created_at": now_text(), **content, "done": True, "done_reason": "load"}


@blueprint.get("/api/tags")
@policy("viewer")
def tags() -> Response:
    return json_response({"models": [_card(model) for model in _served()]})


@blueprint.get("/api/ps")
@policy("viewer")
def running() -> Response:
    """The loaded model, which stays loaded; `size_vram` is 0 where all of it is on processors."""
    models = []
    for model in _served():
        engine = api_context().pipeline.current_engine
        devices = engine.plan.devices if engine is not None else ()
        on_cards = any(device.kind != "cpu" for device in devices)
        size = _size_bytes(model)
        more = {"expires_at": NEVER, "size_vram": size if on_cards else 0, "context_length": model.max_model_len}
        models.append({**_card(model), **more})
    return json_response({"models": models})


@blueprint.get("/api/version")
@policy("viewer")
def version() -> Response:
    """This program's, not Ollama's."""
    return json_response({"version": api_context().version or "0.0.0"})


@blueprint.post("/api/show")
@policy("user")
@reads(ShowRequest)
def show() -> Response:
    fields = read_request(ShowRequest, untyped=True)
    name = fields.model or fields.name
    if not name:
        raise InvalidRequestError("model must name a model.", param="model")
    model = served_model(plain_name(name))
    config = _config(model)
    family = str(config.get("model_type", "unknown"))
    info = {
        "general.architecture": family,
        "general.parameter_count": model.num_parameters,
        f"{family}.context_length": model.max_model_len,
    }
    for key, given in (("embedding_length", "hidden_size"), ("block_count", "num_hidden_layers"),
                       ("attention.head_count", "num_attention_heads"), ("vocab_size", "vocab_size")):  # fmt: skip
        if isinstance(config.get(given), int):
            info[f"{family}.{key}"] = config[given]
    output = model.output_format
    able = [("completion", True), ("tools", output.tool_parser), ("thinking", output.reasoning_parser)]
    card = _card(model)
    return json_response(
        {
            "modelfile": "",
            "parameters": "\n".join(f"{key} {value}" for key, value in model.generation_defaults.items()),
            "template": model.tokenizer.template_source,
            "details": card["details"],
            "model_info": info,
            "capabilities": [name for name, can in able if can],
            "modified_at": card["modified_at"],
        }
    )


def _served() -> list[LoadedModel]:
    engine = api_context().pipeline.current_engine
    return [engine.model] if engine is not None else []


def _card(model: LoadedModel) -> dict[str, Any]:
    family = str(_config(model).get("model_type", "unknown"))
    modified = datetime.fromtimestamp(model.created, timezone.utc).isoformat().replace("+00:00", "Z")
    identity = f"{model.name}|{model.num_parameters}|{model.dtype}"
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": modified,
        "size": _size_bytes(model),
        "digest": hashlib.sha256(identity.encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": _parameters(model.num_parameters),
            "quantization_level": model.quantization
            or {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(model.dtype, model.dtype),
        },
    }


def _size_bytes(model: LoadedModel) -> int:
    """Of the weights as they are served."""
    return model.weight_bytes or model.num_parameters * DTYPE_BYTES.get(model.dtype, 2)


def _parameters(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


def _config(model: LoadedModel) -> dict[str, Any]:
    """The checkpoint's `config.json`; empty where there is none any more."""
    try:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
