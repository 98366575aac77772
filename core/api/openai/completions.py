"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from core.api.body import json_response, read_request, reads
from core.api.context import api_context, others_answer, served_model
from core.api.generation import (
    ChoiceStream,
    EngineRequest,
    Generation,
    Usage,
    choice,
    envelope,
    finite,
    start_generation,
    stream_response,
)
from core.api.openai.schemas import CompletionFields, CompletionRequest
from core.api.sampling import default_max_tokens, encode_prompt, sampling_params
from core.api.upstreams import answered
from core.defaults import COMPLETION_MAX_TOKENS
from core.errors import InvalidRequestError
from core.request import GenerationResult, RequestOutput, SequenceDelta, TokenLogprob
from core.security.access import policy

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel
    from core.models.tokenizer import Tokenizer

blueprint = Blueprint("openai_completions", __name__)


@blueprint.post("/v1/completions")
@policy("user", waits=True)
@reads(CompletionRequest)
def create_completion() -> Response:
    return answered("completions", _complete_here) if others_answer() else _complete_here()


def _complete_here() -> Response:
    fields = read_request(CompletionRequest)
    model = served_model(fields.model)
    prompt = fields.prompt if fields.prompt is not None else _beginning(fields, model)
    prompts = split_prompts(prompt, limit=api_context().pipeline.settings.api.max_batch_prompts)
    job = CompletionJob.prepare(fields, prompts, model, param="prompt")
    generation = job.start(prefix="cmpl", param="prompt")
    head = envelope(generation.id, "text_completion", model, fields.model)
    if fields.stream:
        return stream_response(generation, CompletionStream(job, head))
    with closing(generation):
        results = generation.gather()
    usage = Usage()
    choices = []
    for index, result in enumerate(results):
        job.count(usage, result)
        choices += job.choices(index, result, first=index * job.n)
    return json_response({**head, "choices": choices, "usage": usage.to_openai()})


def _beginning(fields: CompletionRequest, model: LoadedModel) -> list[int]:
    """A prompt that is null: the model begins a text, as at OpenAI."""
    if "prompt" not in fields.model_fields_set:
        raise InvalidRequestError("prompt is missing.", param="prompt")
    first = model.tokenizer.encode("")
    if not first:
        raise InvalidRequestError(f"{model.name} has no token that begins a text: give a prompt.", param="prompt")
    return first


def split_prompts(prompt: Any, *, limit: int) -> list[str | list[int]]:
    """The prompts in OpenAI's four forms: text, texts, token ids, lists of token ids."""
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        return [prompt]
    prompts = prompt if isinstance(prompt, list) else [prompt]
    check_prompts(prompts, limit=limit, param="prompt")
    return prompts


def check_prompts(prompts: list[Any], *, limit: int, param: str) -> None:
    """Raise `InvalidRequestError` unless there is a prompt, all are texts or all lists of ids, and not too many."""
    if not prompts:
        raise InvalidRequestError(f"{param} must not be empty.", param=param)
    if len(prompts) > limit:
        raise InvalidRequestError(f"{param} takes at most {limit} prompts, got {len(prompts)}.", param=param)
    if all(isinstance(item, str) for item in prompts):
        return
    if not all(isinstance(item, list) and all(type(token) is int for token in item) for item in prompts):
        raise InvalidRequestError(f"{param} must be text or token ids, or a list of one of them.", param=param)


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """What a text completion asks for, prompt by prompt, and how its choices are shown."""

    fields: CompletionFields
    model: LoadedModel
    prompts: Sequence[str | list[int]]
    requests: Sequence[EngineRequest]

    @classmethod
    def prepare(
        cls, fields: CompletionFields, prompts: Sequence[str | list[int]], model: LoadedModel, *, param: str
    ) -> CompletionJob:
        """Check and tokenize. Raises `InvalidRequestError`."""
        fields.check_stream_options()
        form: dict[str, str] = {}
        if fields.has_form:
            from core.api.openai.structured import grammar_of, read_form

            found = read_form(fields)
            form = {"grammar": grammar_of(found, model)} if found is not None else {}
        requests = []
        for prompt in prompts:
            token_ids = encode_prompt(
                prompt, model, add_special_tokens=fields.add_special_tokens is not False, param=param
            )
            max_tokens = fields.limit
            if max_tokens is None:
                max_tokens = default_max_tokens(token_ids, model, COMPLETION_MAX_TOKENS)
            params = sampling_params(
                fields,
                model,
                {"max_tokens": fields.limit_name},
                max_tokens=1 if max_tokens == 0 else max_tokens,  # the engine generates one; `choices` drops it again
                prompt_logprobs=fields.logprobs if fields.echo else None,
                **form,
            )
            requests.append((token_ids, params))
        return cls(fields, model, prompts, requests)

    def start(self, *, prefix: str, param: str) -> Generation:
        names = {"prompt": param, "max_tokens": self.fields.limit_name}
        return start_generation(self.requests, self.model, prefix=prefix, priority=self.fields.priority, names=names)

    @property
    def n(self) -> int:
        return self.fields.n or 1

    @property
    def prompt_only(self) -> bool:
        """Whether nothing is to be generated (`max_tokens` 0): with `echo` the prompt is shown, else nothing."""
        return self.fields.limit == 0

    def count(self, usage: Usage, result: GenerationResult) -> None:
        usage.add_result(replace(result, num_generated_tokens=0) if self.prompt_only else result)

    def choices(self, prompt_index: int, result: GenerationResult, *, first: int) -> list[dict[str, Any]]:
        """The choices of one prompt, numbered from `first`."""
        choices = []
        for completion in result.completions:
            writer = ChoiceWriter(self, prompt_index)
            text, logprobs = writer.echo(result.prompt_logprobs)
            if not self.prompt_only:
                text += completion.text
                logprobs = _joined(logprobs, writer.logprobs(completion.token_ids, completion.logprobs))
            reasons = ("length", None) if self.prompt_only else (completion.finish_reason, completion.stop_reason)
            choices.append(choice(first + completion.index, {"text": text}, logprobs, *reasons))
        return choices


class ChoiceWriter:
    """Text and log-probabilities of one choice, in the order in which they come."""

    def __init__(self, job: CompletionJob, prompt_index: int) -> None:
        self._job = job
        self._prompt = job.prompts[prompt_index]
        self._token_ids = list(job.requests[prompt_index][0])
        self._offsets: TextOffsets | None = None
        self._echoed_characters = 0

    def echo(self, prompt_logprobs: Sequence[TokenLogprob | None] | None) -> tuple[str, dict[str, list[Any]] | None]:
        """The prompt's text and log-probabilities, if the client wants the prompt back."""
        fields, tokenizer = self._job.fields, self._job.model.tokenizer
        if not fields.echo:
            return "", None
        prompt, num_added = self._prompt, 0
        if isinstance(prompt, str):
            text = prompt
            num_added = tokenizer.num_in_front(prompt, self._token_ids)
        else:  # the answer may finish a character that the prompt begins
            text = "".join(map(tokenizer.stream([], skip_special_tokens=False).push, prompt))
        self._echoed_characters = len(text)
        if fields.logprobs is None or prompt_logprobs is None:
            return text, None
        offsets = TextOffsets(tokenizer, [], skip_special_tokens=False, num_added=num_added)
        return text, completion_logprobs(tokenizer, self._token_ids, prompt_logprobs, offsets, num_top=fields.logprobs)

    def logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None
    ) -> dict[str, list[Any]] | None:
        """Log-probabilities of generated tokens, if the client wants them."""
        fields, tokenizer = self._job.fields, self._job.model.tokenizer
        if fields.logprobs is None:
            return None
        if self._offsets is None:
            skip = fields.skip_special_tokens is not False
            self._offsets = TextOffsets(tokenizer, self._token_ids, skip, first=self._echoed_characters)
        return completion_logprobs(tokenizer, token_ids, logprobs or (), self._offsets, num_top=fields.logprobs)


def _joined(first: dict[str, list[Any]] | None, second: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in first}


class CompletionStream(ChoiceStream):
    """Chunks of a streamed text completion: text as it comes, then one chunk per choice with its finish reason."""

    def __init__(self, job: CompletionJob, head: dict[str, Any]) -> None:
        super().__init__(head, **job.fields.usage_chunks)
        self._job = job
        self._writers: dict[int, ChoiceWriter] = {}

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self._usage.add_prompt(index, output)
        first = index * self._job.n
        if first not in self._writers:  # the first output of this prompt
            for number in range(first, first + self._job.n):
                writer = self._writers[number] = ChoiceWriter(self._job, index)
                text, logprobs = writer.echo(output.prompt_logprobs)
                if text:
                    yield self._chunk(choice(number, {"text": text}, logprobs))
        for delta in output.deltas:
            yield from self._delta_chunks(first + delta.index, delta)

    def _delta_chunks(self, number: int, delta: SequenceDelta) -> Iterator[dict[str, Any]]:
        if not self._job.prompt_only:
            self._usage.add_delta(delta)
            logprobs = self._writers[number].logprobs(delta.token_ids, delta.logprobs) if delta.token_ids else None
            if delta.text or logprobs is not None:
                yield self._chunk(choice(number, {"text": delta.text}, logprobs))
        if delta.finish_reason is not None:
            reason = "length" if self._job.prompt_only else delta.finish_reason
            yield self._chunk(choice(number, {"text": ""}, None, reason, delta.stop_reason))


class TextOffsets:
    """Where each token's text begins in a choice's text, in characters.

    Counted by detokenizing step by step, because a token's own text need not be what it adds: a character may be
    spread over several tokens, which then all begin where it does. The first `num_added` tokens are no part of it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool, first: int = 0,
        num_added: int = 0,
    ) -> None:  # fmt: skip
        self._stream = tokenizer.stream(list(prompt_token_ids), skip_special_tokens=skip_special_tokens)
        self._length = first
        self._num_added = num_added

    def push(self, token_id: int) -> int:
        offset = self._length
        if self._num_added:
            self._num_added -= 1
            return offset
        self._length += len(self._stream.push(token_id))
        return offset


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Iterable[int],
    logprobs: Iterable[TokenLogprob | None],
    offsets: TextOffsets,
    *,
    num_top: int,
) -> dict[str, list[Any]]:
    """`logprobs` of a text completion: four lists, one entry per token; the first token of a prompt has none."""
    values: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        values["tokens"].append(token_name(tokenizer, token_id))
        values["text_offset"].append(offsets.push(token_id))
        if logprob is None:
            values["token_logprobs"].append(None)
            values["top_logprobs"].append(None)
            continue
        values["token_logprobs"].append(finite(logprob.logprob))
        # The token itself is always among them, so there may be one more than asked for.
        top = {**dict(logprob.top[:num_top]), token_id: logprob.logprob}
        names: dict[str, float] = {}
        for top_id, value in sorted(top.items(), key=lambda item: -item[1]):
            names.setdefault(token_name(tokenizer, top_id), finite(value))
        values["top_logprobs"].append(names)
    return values


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; one that is part of a character is written as OpenAI does, `bytes:\\xe2\\x82`."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token_id))
