"""`/completion`, `/infill`, `/apply-template`, `/props` and `/slots`; `/tokenize` and `/detokenize` are in
`core.api.tokens`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import cast

from flask import Blueprint, Response

from core.api.body import json_response, read_request, reads
from core.api.context import api_context, served_model
from core.api.generation import EngineRequest, start_generation, stream_response
from core.api.llamacpp.answers import EVENTS, LlamaStream, LlamaWriter, settings_of
from core.api.llamacpp.infill import infill_prompt
from core.api.llamacpp.schemas import (
    ApplyTemplateRequest,
    InfillRequest,
    LlamaCompletionRequest,
    Prompt,
)
from core.api.openai.chat import encode_messages
from core.api.sampling import SamplingFields, check_token_ids, encode_prompt, encode_text, sampling_params
from core.api.translated import Names, client_names
from core.engine.submission import LoadedModel, check_length
from core.errors import InvalidRequestError
from core.request import SamplingParams
from core.security.access import policy
from core.views.status import queue_view

blueprint = Blueprint("llamacpp", __name__)

NAMES: Names = (
    (r"^max_tokens$", "n_predict"), (r"^repetition_penalty$", "repeat_penalty"), (r"^logprobs$", "n_probs"),
)  # fmt: skip


@blueprint.post("/completion")
@policy("user", waits=True)
@reads(LlamaCompletionRequest)
def complete() -> Response:
    """A completion, or a list of them for a list of prompts. `n_predict` beyond the context means as many as fit."""
    fields = read_request(LlamaCompletionRequest)
    model = served_model(fields.model)
    return _complete(fields, model, _prompts(fields.prompt, model))


@blueprint.post("/infill")
@policy("user", waits=True)
@reads(InfillRequest)
def infill() -> Response:
    """What belongs between two texts, of models that have tokens for it."""
    fields = read_request(InfillRequest)
    model = served_model(fields.model)
    before = "".join(part.text for part in fields.input_extra or ()) + fields.input_prefix
    if not isinstance(fields.prompt, str):
        raise InvalidRequestError("prompt must be a string here.", param="prompt")
    token_ids = infill_prompt(before, fields.input_suffix, fields.prompt, model)
    check_length(len(token_ids), model)
    return _complete(fields, model, token_ids)


def _complete(fields: LlamaCompletionRequest, model: LoadedModel, prompts: list[int] | list[list[int]]) -> Response:
    """The answer to one prompt, or a list of those to several."""
    several = [prompt for prompt in prompts if isinstance(prompt, list)]
    with client_names(NAMES):
        params = _params(fields, model)
        requests = [_fitted(params, prompt, model) for prompt in several or [cast("list[int]", prompts)]]
        generation = start_generation(requests, model, prefix="cmpl", priority=fields.priority)
    writers = [
        LlamaWriter(fields, model, params, token_ids, index) for index, (token_ids, params) in enumerate(requests)
    ]
    if fields.stream:
        return stream_response(generation, LlamaStream(writers), EVENTS)
    with closing(generation):
        results = generation.gather(on_output=lambda index, output: writers[index].note(output))
    shown = [writer.whole(result) for writer, result in zip(writers, results, strict=True)]
    return json_response(shown if several else shown[0])


def _params(fields: LlamaCompletionRequest, model: LoadedModel) -> SamplingParams:
    if fields.repeat_penalty is not None:
        fields = fields.model_copy(update={"repetition_penalty": fields.repeat_penalty})
    params = sampling_params(
        fields,
        model,
        logprobs=fields.n_probs or None,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=_logit_bias(fields, model),
        max_tokens=fields.n_predict if fields.n_predict is not None and fields.n_predict >= 0 else None,
        grammar=_grammar(fields, model),
    )
    if params.num_sequences != 1:
        raise InvalidRequestError("This route gives one completion of a prompt.", param="n")
    return params


def _logit_bias(fields: LlamaCompletionRequest, model: LoadedModel) -> dict[int, float]:
    """Of a text, all its tokens have the bias."""
    found: dict[int, float] = {}
    for token, bias in fields.logit_bias or ():
        ids = (
            encode_text(token, model, add_special_tokens=False, param="logit_bias")
            if isinstance(token, str)
            else [token]
        )
        found |= dict.fromkeys(ids, bias)
    return found


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


def _fitted(params: SamplingParams, token_ids: list[int], model: LoadedModel) -> EngineRequest:
    room = max(1, model.max_model_len - len(token_ids))
    return token_ids, replace(params, max_tokens=min(params.max_tokens or room, room))


def _prompts(given: Prompt | list[Prompt], model: LoadedModel) -> list[int] | list[list[int]]:
    """Token ids of one prompt, or of each of a list. A list with ids in it is one prompt."""
    if isinstance(given, str) or not given or any(isinstance(part, int) for part in given):
        return _prompt(cast("Prompt", given), model)
    if len(given) > (limit := api_context().pipeline.settings.api.max_batch_prompts):
        raise InvalidRequestError(f"prompt takes at most {limit} prompts, got {len(given)}.", param="prompt")
    return [_prompt(cast("Prompt", part), model) for part in given]


def _prompt(prompt: Prompt, model: LoadedModel) -> list[int]:
    """Token ids of a prompt; of a list, what its texts and ids make together."""
    if isinstance(prompt, str):
        return encode_prompt(prompt, model, add_special_tokens=True, param="prompt")
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
@reads(ApplyTemplateRequest)
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
