"""Answers of `/completion`, whole and in events; `stop` is true in the last."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from core.api.generation import Framing, Usage, finite
from core.api.llamacpp.schemas import LlamaCompletionRequest
from core.request import Completion, GenerationResult, RequestOutput, SamplingParams, SequenceDelta, TokenLogprob

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel

MS = 1000.0
NO_SLOT = -1
STOPS = {"length": "limit", "stop": "eos"}


class Events(Framing):
    """Server-sent events without a mark at the end."""

    done = ""


EVENTS = Events()


class LlamaWriter:
    """One completion, the one of this `index`."""

    def __init__(
        self, fields: LlamaCompletionRequest, model: LoadedModel, params: SamplingParams, prompt: Sequence[int],
        index: int = 0,
    ) -> None:  # fmt: skip
        self._index = index
        self._fields = fields
        self._model = model
        self._params = params
        self._prompt = prompt
        self._usage = Usage()
        self._started_s = time.perf_counter()
        self._first_s: float | None = None
        self._text = ""
        self._last = SequenceDelta(0)

    def note(self, output: RequestOutput) -> None:
        """When the first token came."""
        if self._first_s is None and any(delta.token_ids for delta in output.deltas):
            self._first_s = time.perf_counter()

    def whole(self, result: GenerationResult) -> dict[str, Any]:
        self._usage.add_result(result)
        done = result.completions[0]
        self._text = done.text
        self._last = SequenceDelta(0, finish_reason=done.finish_reason, stop_reason=done.stop_reason)
        return {**self._end(), "content": done.text, "tokens": self._tokens(done), **self._probabilities(done.logprobs)}

    def chunks(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What it gained, and its end if that was all."""
        self.note(output)
        self._usage.add_output(0, output)
        for delta in output.deltas:
            self._text += delta.text
            if delta.finish_reason is not None:
                self._last = delta
            if delta.text or delta.token_ids:
                yield {
                    "index": self._index,
                    "content": delta.text,
                    "tokens": list(delta.token_ids),
                    "stop": False,
                    "id_slot": NO_SLOT,
                    "tokens_predicted": self._usage.completion_tokens,
                    "tokens_evaluated": self._usage.prompt_tokens,
                    **self._probabilities(delta.logprobs or ()),
                }
        if output.finished:
            yield {**self._end(), "content": "", "tokens": []}

    def _tokens(self, done: Completion) -> list[int]:
        return list(done.token_ids) if self._fields.return_tokens else []

    def _end(self) -> dict[str, Any]:
        word = self._last.stop_reason if isinstance(self._last.stop_reason, str) else ""
        kind = "word" if word else STOPS.get(self._last.finish_reason or "", "none")
        return {
            "index": self._index,
            "id_slot": NO_SLOT,
            "stop": True,
            "model": self._fields.model or self._model.name,
            "tokens_predicted": self._usage.completion_tokens,
            "tokens_evaluated": self._usage.prompt_tokens,
            "tokens_cached": self._usage.cached_tokens,
            "generation_settings": settings_of(self._params, self._model),
            "prompt": self._model.tokenizer.decode(self._prompt, skip_special_tokens=False),
            "has_new_line": "\n" in self._text,
            "truncated": False,
            "stop_type": kind,
            "stopping_word": word,
            "timings": self._timings(),
        }

    def _timings(self) -> dict[str, Any]:
        """As the API saw them; the first token counts to the prompt's time."""
        now_s = time.perf_counter()
        first_s = self._first_s if self._first_s is not None else now_s
        values: dict[str, Any] = {"cache_n": self._usage.cached_tokens}
        for name, count, seconds in (
            ("prompt", self._usage.prompt_tokens - self._usage.cached_tokens, first_s - self._started_s),
            ("predicted", self._usage.completion_tokens, now_s - first_s),
        ):
            values |= {
                f"{name}_n": count,
                f"{name}_ms": seconds * MS,
                f"{name}_per_token_ms": seconds * MS / count if count else 0.0,
                f"{name}_per_second": count / seconds if seconds else 0.0,
            }
        return values

    def _probabilities(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        if not self._fields.n_probs:
            return {}
        entries = [{**self._entry(item.token_id, item.logprob),
                    "top_logprobs": [self._entry(*top) for top in item.top[: self._fields.n_probs]]}
                   for item in logprobs]  # fmt: skip
        return {"completion_probabilities": entries}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._model.tokenizer
        token = {"id": token_id, "token": tokenizer.token_text(token_id), "logprob": finite(logprob)}
        return {**token, "bytes": list(tokenizer.token_bytes(token_id))}


class LlamaStream:
    """The events of several completions."""

    def __init__(self, writers: Sequence[LlamaWriter]) -> None:
        self._writers = writers

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        return self._writers[index].chunks(output)

    def closing(self) -> Iterator[dict[str, Any]]:
        return iter(())


def settings_of(params: SamplingParams, model: LoadedModel) -> dict[str, Any]:
    """Sampling parameters by llama.cpp's names."""
    return {
        "n_ctx": model.max_model_len,
        "n_predict": params.max_tokens if params.max_tokens is not None else -1,
        "seed": params.seed if params.seed is not None else -1,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repeat_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "stop": list(params.stop),
        "ignore_eos": params.ignore_eos,
        "n_probs": params.logprobs or 0,
    }
