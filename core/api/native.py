"""VRAMancer's own inference routes: `/api/generate` and `/api/infer`.

Being ours, they refuse fields that they do not know instead of ignoring them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

from flask import Blueprint, Response, request
from pydantic import ConfigDict, Field
from safetensors.numpy import save
from werkzeug.exceptions import NotAcceptable

from core.api.body import Integer, Integers, ModelName, RequestModel, json_response, read_request
from core.api.context import served_model
from core.api.generation import Usage, choice, finite, start_generation, start_inference, stream_response
from core.api.openai.chat import encode_messages
from core.api.openai.schemas import ChatMessage, TemplateFields
from core.api.sampling import SamplingFields, check_token_ids, encode_prompt, sampling_params
from core.batching.sequence import RawAnswer
from core.engine.submission import check_length
from core.errors import ConflictError, InvalidRequestError
from core.request import Completion, RequestOutput, SequenceDelta, TokenLogprob
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


class InferRequest(RequestModel):
    """`/api/infer`: one forward pass over `token_ids`; `positions` last gives one row, all gives one per token."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName | None = None
    token_ids: Integers = Field(min_length=1)
    output: Literal["logits", "hidden_states"] = "logits"
    positions: Literal["last", "all"] = "last"


@blueprint.post("/api/generate")
@policy("user", waits=True)
def generate() -> Response:
    fields = read_request(GenerateRequest)
    model = served_model(fields.model)
    token_ids, param = _prompt_token_ids(fields, model)
    params = sampling_params(fields, model)
    generation = start_generation(
        [(token_ids, params)], model, prefix="gen", priority=fields.priority, names={"prompt": param}
    )
    writer = GenerateWriter(fields, model, generation.id)
    if fields.stream:
        return stream_response(generation, writer)
    with closing(generation):
        (result,) = generation.gather(on_output=writer.clock)
    writer.usage.add_result(result)
    body = writer.head()
    body["outputs"] = [writer.completion(completion) for completion in result.completions]
    if fields.prompt_logprobs is not None:
        body["prompt_logprobs"] = writer.prompt_logprobs(result.prompt_logprobs or ())
    return json_response({**body, **writer.totals()})


def _prompt_token_ids(fields: GenerateRequest, model: LoadedModel) -> tuple[list[int], str]:
    """The prompt, and the name of the field that gives it."""
    given = [name for name in ("prompt", "prompt_token_ids", "messages") if getattr(fields, name) is not None]
    if len(given) != 1:
        raise InvalidRequestError("Give exactly one of prompt, prompt_token_ids and messages.", param="prompt")
    name = given[0]
    if fields.messages is not None:
        template = TemplateFields(chat_template_kwargs=fields.chat_template_kwargs)
        return encode_messages(fields.messages, model, template), name
    prompt = fields.prompt if fields.prompt is not None else fields.prompt_token_ids or []
    return encode_prompt(prompt, model, add_special_tokens=fields.add_special_tokens is not False, param=name), name


class GenerateWriter:
    """Answers of `/api/generate`, whole or in chunks: `{"id", "index", "text", "token_ids", ...}`, then the totals."""

    def __init__(self, fields: GenerateRequest, model: LoadedModel, generation_id: str) -> None:
        self.usage = Usage()
        self._fields = fields
        self._model = model
        self._id = generation_id
        self._started_s = time.perf_counter()
        self._first_s: float | None = None

    def clock(self, output: RequestOutput) -> None:
        """Note when the first token came."""
        if self._first_s is None and any(delta.token_ids for delta in output.deltas):
            self._first_s = time.perf_counter()

    def head(self) -> dict[str, Any]:
        name = self._fields.model or self._model.name
        return {"id": self._id, "object": "generation", "created": int(time.time()), "model": name}

    def completion(self, part: Completion | SequenceDelta) -> dict[str, Any]:
        """One completion, or what it gained."""
        content = {"text": part.text, "token_ids": list(part.token_ids)}
        return choice(part.index, content, self._logprobs(part.logprobs or ()), part.finish_reason, part.stop_reason)

    def totals(self) -> dict[str, Any]:
        """`usage`, and `timings` in seconds as the API saw them: from submission on."""
        now_s = time.perf_counter()
        first_s = self._first_s if self._first_s is not None else now_s
        decode_s = now_s - first_s
        later_tokens = max(0, self.usage.completion_tokens - 1)
        timings = {
            "total_s": now_s - self._started_s,
            "time_to_first_token_s": first_s - self._started_s if self._first_s is not None else None,
            "decode_tok_s": later_tokens / decode_s if decode_s > 0 and later_tokens else None,
        }
        return {"usage": self.usage.to_openai(), "timings": timings}

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self.clock(output)
        self.usage.add_output(index, output)
        if output.prompt_logprobs is not None:
            yield {"id": self._id, "prompt_logprobs": self.prompt_logprobs(output.prompt_logprobs)}
        for delta in output.deltas:
            if delta.text or delta.token_ids or delta.finish_reason is not None:
                yield {"id": self._id, **self.completion(delta)}

    def closing(self) -> Iterator[dict[str, Any]]:
        yield {**self.head(), "done": True, **self.totals()}

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
