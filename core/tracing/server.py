"""The span of an HTTP request, by OpenTelemetry's semantic conventions for HTTP servers and for generative AI.

What clients write and what models answer is never part of a span.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from opentelemetry.trace import Span, StatusCode

from core.errors import VRAMancerError
from core.request import RequestOutput, SamplingParams, TraceContext
from core.tracing.spans import context_of, current, unix_ns

PROVIDER = "vramancer"
SERVER_ERROR = 500
MAX_REASON = 300
"""Characters of an error."""

Attribute = str | int | float | bool | Sequence[str]


class ServerSpan:
    """Recorded from the request's head to the end of its answer, streams included. The thread's that answers it."""

    def __init__(self, span: Span, epoch_ns: int) -> None:
        self._span = span
        self.context: TraceContext = context_of(span, epoch_ns)
        self._prompts: dict[int, tuple[int, int]] = {}
        self._output_tokens = 0
        self._reasons: list[str] = []
        self._generates = self._failed = False

    def set(self, **attributes: Attribute) -> None:
        """Attributes, with `__` for the dots of their names."""
        self._span.set_attributes({name.replace("__", "."): value for name, value in attributes.items()})

    def generation(self, operation: str, answer_id: str, model: str, params: Sequence[SamplingParams]) -> None:
        """What is asked of the model; prompts have the same parameters."""
        self._generates = True
        self.set(
            gen_ai__operation__name=operation, gen_ai__provider__name=PROVIDER, gen_ai__response__id=answer_id,
            gen_ai__response__model=model,
        )  # fmt: skip
        self._span.set_attributes(_asked(params[0]))
        if len(params) > 1:
            self.set(vramancer__prompts=len(params))

    def saw(self, index: int, message: RequestOutput | VRAMancerError) -> None:
        """What the engine answered to the prompt `index`."""
        if isinstance(message, VRAMancerError):
            self.fail(message)
            return
        self._prompts[index] = message.num_prompt_tokens, message.num_cached_tokens
        for delta in message.deltas:
            self._output_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._reasons.append(delta.finish_reason)

    def left(self) -> None:
        """Its answer is made after the request has been answered."""
        self._generates = False
        self.set(vramancer__answer__background=True)

    def gave_up(self) -> None:
        """The rest of the answer was not made: its client left, or something of it failed."""
        self.set(vramancer__answer__given_up=True)

    def fail(self, error: BaseException) -> None:
        """The first error counts. One that is the client's is no error of the server's span."""
        if self._failed:
            return
        self._failed = True
        if not isinstance(error, VRAMancerError):
            self.set(error__type=type(error).__qualname__)
            self._span.set_status(StatusCode.ERROR)
            return
        self.set(error__type=error.error_code or error.type)
        if error.status >= SERVER_ERROR:
            self._span.set_status(StatusCode.ERROR, error.message[:MAX_REASON])

    def end(self, status: int) -> None:
        """The answer, with this HTTP status, has been sent, or nobody takes it any more."""
        self.set(http__response__status_code=status)
        if self._generates:
            prompts, cached = (sum(counts) for counts in zip(*(self._prompts.values() or [(0, 0)]), strict=True))
            self.set(
                gen_ai__usage__input_tokens=prompts, gen_ai__usage__cache_read__input_tokens=cached,
                gen_ai__usage__output_tokens=self._output_tokens, gen_ai__response__finish_reasons=self._reasons,
            )  # fmt: skip
        if status >= SERVER_ERROR and not self._failed:
            self.set(error__type=str(status))
            self._span.set_status(StatusCode.ERROR)
        self._span.end(unix_ns(self.context, time.monotonic()))
        current.set(None)


def _asked(params: SamplingParams) -> Mapping[str, Attribute]:
    """Parameters that have names there."""
    values: dict[str, Attribute | None] = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or None,
        "frequency_penalty": params.frequency_penalty or None,
        "presence_penalty": params.presence_penalty or None,
        "seed": params.seed,
        "choice.count": params.n if params.n > 1 else None,
    }
    return {f"gen_ai.request.{name}": value for name, value in values.items() if value is not None}
