"""VRAMancer's own inference routes: `/api/generate` and `/api/infer`.

Being ours, they refuse fields that they do not know instead of ignoring them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flask import Blueprint, Response, request
from pydantic import ConfigDict, Field, model_validator
from safetensors.numpy import save
from werkzeug.exceptions import NotAcceptable

from core.api.body import Integer, Integers, ModelName, RequestModel, Unsupported, json_response, read_request, reads
from core.api.context import served_model
from core.api.generation import Usage, choice, finite, start_generation, start_inference, stream_response
from core.api.ollama.answers import LINES, Clock, now_text, totals
from core.api.ollama.conversation import NAMES as OPTION_NAMES
from core.api.ollama.conversation import plain_name, think_fields
from core.api.ollama.routes import framing, loaded_answer
from core.api.ollama.schemas import Format, Options, Think
from core.api.openai.answers import AnswerReader
from core.api.openai.chat import encode_messages
from core.api.openai.schemas import ChatMessage, TemplateFields
from core.api.sampling import SamplingFields, check_token_ids, encode_prompt, sampling_params
from core.api.translated import AnswerPieces, client_names
from core.batching.sequence import RawAnswer
from core.engine.submission import check_length
from core.errors import ConflictError, InvalidRequestError
from core.parsers.events import Reasoning, Text
from core.request import Completion, RequestOutput, SamplingParams, SequenceDelta, TokenLogprob
from core.security.access import policy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from core.engine.submission import LoadedModel

JSON_TYPE = "application/json"
BINARY_TYPES = ("application/x-safetensors", "application/octet-stream")
MAX_JSON_VALUES = 1_000_000  # some 20 MB of text
MAX_BINARY_BYTES = 512 * 1024 * 1024
FLOAT32_BYTES = 4

blueprint = Blueprint("native", __name__)


class GenerateRequest(SamplingFields):
    """`/api/generate`: exactly one of `prompt`, `prompt_token_ids` and `messages`, and all of `SamplingParams`.

    `max_tokens` left out runs to the end of the context. `logprobs` and `prompt_logprobs` are numbers of alternatives.
    With fields of Ollama's (`system`, `raw`, `options`, `think`, `format`, `keep_alive`), `prompt` is what the user
    says, put into the chat template with `system`; with `raw` true it is the prompt itself, as it is without them.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = None
    prompt_token_ids: Integers | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_tokens: Integer | None = None
    logprobs: Integer | None = None
    prompt_logprobs: Integer | None = None
    detokenize: bool | None = None
    system: str | None = None
    raw: bool | None = None
    options: Options | None = None
    think: Think | None = None
    format: Format | None = None
    keep_alive: float | str | None = None

    unsupported: ClassVar[Unsupported] = {
        "context": ([],), "images": ([],), "suffix": ("",), "template": ("",),
    }  # fmt: skip
    """What Ollama knows beside these."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, body: Any) -> Any:
        """What asks for nothing."""
        return {name: value for name, value in body.items() if name not in cls.unsupported}

    @property
    def is_ollamas(self) -> bool:
        """Whether it is read as Ollama reads it, which fields of its own tell: the prompt is then a message of the
        user's, unless it is `raw`."""
        given = (self.system, self.raw, self.options, self.think, self.format or None, self.keep_alive)
        return any(value is not None for value in given)


class InferRequest(RequestModel):
    """`/api/infer`: one forward pass over `token_ids`; `positions` last gives one row, all gives one per token."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName | None = None
    token_ids: Integers = Field(min_length=1)
    output: Literal["logits", "hidden_states"] = "logits"
    positions: Literal["last", "all"] = "last"


@blueprint.post("/api/generate")
@policy("user", waits=True)
@reads(GenerateRequest)
def generate() -> Response:
    fields = read_request(GenerateRequest, untyped=True)
    if fields.is_ollamas and not (fields.prompt or fields.prompt_token_ids or fields.messages):
        return json_response(loaded_answer(fields.model or served_model(None).name, {"response": ""}))
    if fields.options is not None:
        fields = fields.model_copy(update=fields.options.sampling)
    if fields.is_ollamas and fields.model is not None:
        fields = fields.model_copy(update={"model": plain_name(fields.model)})
    model = served_model(fields.model)
    with client_names(OPTION_NAMES if fields.options is not None else ()):
        token_ids, param = _prompt_token_ids(fields, model)
        reader = AnswerReader(model, None) if fields.is_ollamas and param == "messages" else None
        kept: tuple[int, ...] = ()
        if reader is not None:
            kept = reader.kept_tokens
            reader.read_prompt(token_ids, None)
        params = sampling_params(fields, model, kept_special_tokens=kept)
        if fields.is_ollamas and params.max_tokens is not None:  # a limit that an answer may never come to
            room = max(1, model.max_model_len - len(token_ids))
            params = replace(params, max_tokens=min(params.max_tokens, room))
        if fields.format:
            params = _in_format(params, fields.format, model, reader)
        generation = start_generation(
            [(token_ids, params)], model, prefix="gen", priority=fields.priority, names={"prompt": param}
        )
    pieces = AnswerPieces(reader.begin(generation.id, 0)) if reader is not None else None
    writer = GenerateWriter(fields, model, generation.id, pieces)
    if fields.stream:
        return stream_response(generation, writer, framing(LINES))
    with closing(generation):
        (result,) = generation.gather(on_output=lambda _, output: writer.clock.note(output))
    writer.usage.add_result(result)
    body = writer.head()
    body["outputs"] = [writer.completion(completion) for completion in result.completions]
    if fields.prompt_logprobs is not None:
        body["prompt_logprobs"] = writer.prompt_logprobs(result.prompt_logprobs or ())
    return json_response({**body, **writer.response(result.completions[0]), **writer.totals(), "done": True})


def _in_format(
    params: SamplingParams, wanted: Format, model: LoadedModel, reader: AnswerReader | None
) -> SamplingParams:
    """An answer that is JSON, of a schema if `wanted` is one."""
    from core.api.openai.constrained import constrain_to
    from core.api.openai.structured import form_of

    form = form_of("json_object", True, "format") if wanted == "json" else form_of("json", wanted, "format")
    return constrain_to(params, form, model, reader)


def _prompt_token_ids(fields: GenerateRequest, model: LoadedModel) -> tuple[list[int], str]:
    """The prompt, and the name of the field that gives it; `messages` too for a prompt that is made a message."""
    given = [name for name in ("prompt", "prompt_token_ids", "messages") if getattr(fields, name) is not None]
    if len(given) != 1:
        raise InvalidRequestError("Give exactly one of prompt, prompt_token_ids and messages.", param="prompt")
    name, messages = given[0], fields.messages
    if fields.is_ollamas and not fields.raw and fields.prompt is not None:
        name, messages = "messages", [ChatMessage(role="user", content=fields.prompt)]
    if messages is not None:
        if fields.system is not None:
            messages = [ChatMessage(role="system", content=fields.system), *messages]
        thoughts = think_fields(fields.think, model)
        kwargs = {**thoughts.get("chat_template_kwargs", {}), **(fields.chat_template_kwargs or {})}
        effort = thoughts.get("reasoning_effort")
        template = TemplateFields(chat_template_kwargs=kwargs or None, reasoning_effort=effort)
        return encode_messages(messages, model, template), name
    prompt = fields.prompt if fields.prompt is not None else fields.prompt_token_ids or []
    return encode_prompt(prompt, model, add_special_tokens=fields.add_special_tokens is not False, param=name), name


class GenerateWriter:
    """Answers of `/api/generate`, whole or in chunks: `{"id", "index", "text", "token_ids", ...}`, then the totals; and
    beside these what Ollama has of the first completion: `response`, `thinking`, `done`, ..."""

    def __init__(
        self, fields: GenerateRequest, model: LoadedModel, generation_id: str, pieces: AnswerPieces | None = None
    ) -> None:
        self.usage = Usage()
        self.clock = Clock()
        self._pieces = pieces
        self._reason: str | None = None
        self._fields = fields
        self._model = model
        self._id = generation_id

    def head(self) -> dict[str, Any]:
        name = self._fields.model or self._model.name
        return {"id": self._id, "object": "generation", "created": int(time.time()), "model": name,
                "created_at": now_text()}  # fmt: skip

    def completion(self, part: Completion | SequenceDelta) -> dict[str, Any]:
        """One completion, or what it gained."""
        content = {"text": part.text, "token_ids": list(part.token_ids)}
        return choice(part.index, content, self._logprobs(part.logprobs or ()), part.finish_reason, part.stop_reason)

    def totals(self) -> dict[str, Any]:
        """`usage`, and `timings` in seconds as the API saw them: from submission on."""
        now_s = time.perf_counter()
        started_s, noted_s = self.clock.started_s, self.clock.first_s
        first_s = noted_s if noted_s is not None else now_s
        decode_s = now_s - first_s
        later_tokens = max(0, self.usage.completion_tokens - 1)
        timings = {
            "total_s": now_s - started_s,
            "time_to_first_token_s": first_s - started_s if noted_s is not None else None,
            "decode_tok_s": later_tokens / decode_s if decode_s > 0 and later_tokens else None,
        }
        ollamas = totals(self.clock, self.usage, self._reason)
        return {**ollamas, "usage": self.usage.to_openai(), "timings": timings}

    def response(self, part: Completion | SequenceDelta) -> dict[str, Any]:
        """What Ollama calls the text; thoughts apart, where the prompt was a message."""
        if part.index:
            return {"response": ""}
        self._reason = part.finish_reason or self._reason
        if self._pieces is None:
            return {"response": part.text}
        pieces = [*self._pieces.feed(part.text)]
        if part.finish_reason is not None:
            pieces += self._pieces.finish()
        text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
        thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        return {"response": text, "thinking": thoughts} if thoughts else {"response": text}

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self.clock.note(output)
        self.usage.add_output(index, output)
        if output.prompt_logprobs is not None:
            yield {"id": self._id, "prompt_logprobs": self.prompt_logprobs(output.prompt_logprobs)}
        for delta in output.deltas:
            if delta.text or delta.token_ids or delta.finish_reason is not None:
                yield {**self._line(), **self.completion(delta), **self.response(delta), "done": False}

    def closing(self) -> Iterator[dict[str, Any]]:
        yield {**self.head(), "response": "", "done": True, **self.totals()}

    def _line(self) -> dict[str, Any]:
        return {"id": self._id, "model": self._fields.model or self._model.name, "created_at": now_text()}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]] | None:
        return [self._logprob(item) for item in logprobs] if self._fields.logprobs is not None else None

    def prompt_logprobs(self, logprobs: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
        """One entry per prompt token; the first is None, because nothing comes before it."""
        return [self._logprob(item) if item is not None else None for item in logprobs]

    def _logprob(self, item: TokenLogprob) -> dict[str, Any]:
        entry = self._token(item.token_id, item.logprob)
        entry["top"] = [self._token(*top) for top in item.top]
        return entry

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token_id": token_id, "token": self._model.tokenizer.token_text(token_id), "logprob": finite(logprob)}


@blueprint.post("/api/infer")
@policy("user", waits=True)
@reads(InferRequest)
def infer() -> Response:
    """Logits or hidden states, float32: as JSON, or as a safetensors file if the client accepts one."""
    fields = read_request(InferRequest)
    accepted = (
        request.accept_mimetypes.best_match((JSON_TYPE, *BINARY_TYPES)) if request.accept_mimetypes else JSON_TYPE
    )
    if accepted is None:
        raise NotAcceptable(f"This route answers {JSON_TYPE} or {' or '.join(BINARY_TYPES)}.")
    model = served_model(fields.model)
    check_length(len(fields.token_ids), model, reserve=0, param="token_ids")
    token_ids = check_token_ids(fields.token_ids, model, param="token_ids")
    as_json = accepted == JSON_TYPE
    rows = len(token_ids) if fields.positions == "all" else 1
    if fields.output == "logits":
        _check_size(rows * model.vocab_size, as_json=as_json)
    raw = RawAnswer(fields.output, fields.positions)
    generation = start_inference(token_ids, raw, model)
    with closing(generation):
        (result,) = generation.gather()
    if result.completions[0].finish_reason != "stop":
        raise ConflictError("The request was cancelled.")
    values = raw.values()
    _check_size(values.size, as_json=as_json)
    if not as_json:
        return Response(save({fields.output: values}), mimetype=accepted)
    body = {
        "object": "tensor",
        "model": fields.model or model.name,
        "output": fields.output,
        "shape": list(values.shape),
        "dtype": "float32",
        "data": _rows(values),
    }
    return json_response(body)


def _check_size(num_values: int, *, as_json: bool) -> None:
    limit = MAX_JSON_VALUES if as_json else MAX_BINARY_BYTES // FLOAT32_BYTES
    if num_values > limit:
        hint = f", or send Accept: {BINARY_TYPES[0]}" if as_json else ""
        raise InvalidRequestError(
            f"The result would have {num_values} values, more than the {limit} that are sent at once: "
            f"ask for fewer tokens or for the last position{hint}.",
            param="positions",
        )


def _rows(values: npt.NDArray[np.float32]) -> list[list[float | None]]:
    """Nested lists; what is not finite becomes null, since JSON has no infinity."""
    rows: list[list[float]] = values.tolist()
    return [[value if math.isfinite(value) else None for value in row] for row in rows]
