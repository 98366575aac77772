"""`/completion`, `/infill`, `/apply-template`, `/props` and `/slots`; `/tokenize` and `/detokenize` are in
`core.api.tokens`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from flask import Blueprint, Response

from core.api.body import json_response, read_request
from core.api.context import api_context, served_model
from core.api.generation import start_generation, stream_response
from core.api.llamacpp.answers import EVENTS, LlamaWriter, settings_of
from core.api.llamacpp.infill import infill_prompt
from core.api.llamacpp.schemas import ApplyTemplateRequest, InfillRequest, LlamaCompletionRequest
from core.api.openai.chat import encode_messages
from core.api.sampling import SamplingFields, check_token_ids, encode_prompt, encode_text, sampling_params
from core.api.translated import Names, client_names
from core.engine.submission import LoadedModel, check_length
from core.errors import InvalidRequestError
from core.security.access import policy
from core.views.status import queue_view

blueprint = Blueprint("llamacpp", __name__)

NAMES: Names = (
    (r"^max_tokens$", "n_predict"), (r"^repetition_penalty$", "repeat_penalty"), (r"^logprobs$", "n_probs"),
)  # fmt: skip


@blueprint.post("/completion")
@policy("user", waits=True)
def complete() -> Response:
    """A completion. `n_predict` beyond the context means as many as fit."""
    fields = read_request(LlamaCompletionRequest)
    model = served_model(fields.model)
    return _complete(fields, model, _prompt(fields.prompt, model))


@blueprint.post("/infill")
@policy("user", waits=True)
def infill() -> Response:
    """What belongs between two texts, of models that have tokens for it."""
    fields = read_request(InfillRequest)
    model = served_model(fields.model)
    before = "".join(str(part.get("text", "")) for part in fields.input_extra or ()) + fields.input_prefix
    if not isinstance(fields.prompt, str):
        raise InvalidRequestError("prompt must be a string here.", param="prompt")
    token_ids = infill_prompt(before, fields.input_suffix, fields.prompt, model)
    check_length(len(token_ids), model)
    return _complete(fields, model, token_ids)


def _complete(fields: LlamaCompletionRequest, model: LoadedModel, token_ids: list[int]) -> Response:
    if fields.repeat_penalty is not None:
        fields = fields.model_copy(update={"repetition_penalty": fields.repeat_penalty})
    with client_names(NAMES):
        params = sampling_params(
            fields,
            model,
            logprobs=fields.n_probs or None,
            repetition_penalty=fields.repeat_penalty
            if fields.repeat_penalty is not None
            else fields.repetition_penalty,
            max_tokens=fields.n_predict if fields.n_predict is not None and fields.n_predict >= 0 else None,
        )
        if params.num_sequences != 1:
            raise InvalidRequestError("This route gives one completion.", param="n")
        room = max(1, model.max_model_len - len(token_ids))
        params = replace(params, max_tokens=min(params.max_tokens or room, room), grammar=_grammar(fields, model))
        generation = start_generation([(token_ids, params)], model, prefix="cmpl", priority=fields.priority)
    writer = LlamaWriter(fields, model, params, token_ids)
    if fields.stream:
        return stream_response(generation, writer, EVENTS)
    with closing(generation):
        (result,) = generation.gather(on_output=writer.note)
    return json_response(writer.whole(result))


def _grammar(fields: LlamaCompletionRequest, model: LoadedModel) -> str | None:
    """What the answer keeps to, compiled once."""
    given = fields.given_forms
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequestError("An answer can keep to grammar or to json_schema, not to both.", param="json_schema")
    from core.api.openai.structured import form_of, grammar_of

    ((param, value),) = given.items()
    return grammar_of(form_of("grammar" if param == "grammar" else "json", value, param), model)


def _prompt(prompt: str | list[int | str], model: LoadedModel) -> list[int]:
    """Token ids of a prompt; of a list, what its texts and ids make together."""
    if isinstance(prompt, str):
        return encode_prompt(prompt, model, add_special_tokens=True, param="prompt")
    if prompt and all(isinstance(part, str) for part in prompt):
        raise InvalidRequestError("prompt is one prompt here; /v1/batch/completions takes many.", param="prompt")
    token_ids: list[int] = []
    for index, part in enumerate(prompt):
        if isinstance(part, str):
            token_ids += encode_text(part, model, add_special_tokens=index == 0, param="prompt")
        else:
            token_ids.append(part)
    return encode_prompt(check_token_ids(token_ids, model, param="prompt"), model, add_special_tokens=False,
                         param="prompt")  # fmt: skip


@blueprint.post("/apply-template")
@policy("user", waits=True)
def apply_template() -> Response:
    """The prompt that messages make, as text."""
    fields = read_request(ApplyTemplateRequest)
    model = served_model(fields.model)
    tools = None
    if fields.tools:
        from core.api.openai.tools import read_functions

        tools, _ = read_functions(fields.tools)
    token_ids = encode_messages(fields.messages, model, fields, tools)
    return json_response({"prompt": model.tokenizer.decode(token_ids, skip_special_tokens=False)})


@blueprint.get("/props")
@policy("viewer")
def props() -> Response:
    """What is served and how; nothing here can be changed. A slot is a sequence that runs at the same time."""
    context = api_context()
    model = served_model(None)
    tokenizer = model.tokenizer
    params = sampling_params(SamplingFields.model_validate({}), model)
    eos = tokenizer.token_text(tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else ""
    return json_response(
        {
            "default_generation_settings": {"n_ctx": model.max_model_len, "params": settings_of(params, model)},
            "total_slots": context.pipeline.settings.engine.max_batch_size,
            "model_alias": model.name,
            "model_path": model.name,
            "chat_template": tokenizer.template_source,
            "eos_token": eos,
            "modalities": {"vision": False, "audio": False},
            "build_info": f"vramancer {context.version or ''}".strip(),
        }
    )


@blueprint.get("/slots")
@policy("viewer")
def slots() -> Response:
    """The sequences that run, the oldest first, without what they hold; `/props` says how many may."""
    pipeline = api_context().pipeline
    model = served_model(None)
    shown = queue_view(pipeline.current_engine, pipeline.state()).requests
    return json_response(
        [
            {
                "id": index,
                "id_task": item.id,
                "n_ctx": model.max_model_len,
                "is_processing": item.state == "running",
                "n_prompt_tokens": item.prompt_tokens,
                "next_token": [{"n_decoded": item.generated_tokens}],
            }
            for index, item in enumerate(shown)
        ]
    )
