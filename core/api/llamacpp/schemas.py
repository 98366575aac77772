"""Bodies of llama.cpp's routes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from core.api.body import Integer, ModelName, Unsupported, whole
from core.api.openai.schemas import ChatMessage, TemplateFields
from core.api.openai.unsupported import NO, OFF, SAMPLERS
from core.api.sampling import LogitBias, SamplingFields

NEVER = -100.0
"""The strongest bias that there is; what llama.cpp writes as false."""


def _biases(value: Any) -> Any:
    """Pairs of a token's id and its bias, or false for never, as an object of them."""
    if not isinstance(value, list):
        return value
    found: dict[str, Any] = {}
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int)):
            raise ValueError("Entries should be pairs of a token id and a bias")
        found[str(pair[0])] = NEVER if pair[1] is False else pair[1]
    return found


class LlamaCompletionRequest(SamplingFields):
    """`/completion`. `prompt` is text, token ids, or a list of both, which is one prompt. The answer keeps to `grammar`
    or to `json_schema`. Where caches are (`id_slot`, `n_keep`, ...) is for the server to know."""

    unsupported: ClassVar[Unsupported] = {
        **{name: accepted for name, accepted in SAMPLERS.items() if name != "repeat_penalty"},
        "cache_prompt": (True,),
        "grammar_lazy": NO,
        "grammar_triggers": ([],),
        "image_data": ([],),
        "lora": ([],),
        "n_indent": OFF,
        "post_sampling_probs": NO,
        "response_fields": ([],),
        "t_max_predict_ms": (0, -1),
        "timings_per_token": NO,
    }

    prompt: Annotated[str | list[int | str], BeforeValidator(whole)] = ""
    n_predict: Integer | None = Field(None, ge=-2)
    n_probs: Integer | None = Field(None, ge=0)
    repeat_penalty: float | None = None
    logit_bias: Annotated[LogitBias, BeforeValidator(_biases)] | None = None
    return_tokens: bool | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None

    @property
    def given_forms(self) -> dict[str, Any]:
        """What the answer keeps to, by name; an empty grammar asks for nothing."""
        return {
            name: value
            for name, value in (("grammar", self.grammar or None), ("json_schema", self.json_schema))
            if value is not None
        }


class InfillRequest(LlamaCompletionRequest):
    """`/infill`: what stands before and after a gap, and after `prompt` in the gap."""

    input_prefix: str
    input_suffix: str
    input_extra: list[dict[str, Any]] | None = None


class ApplyTemplateRequest(TemplateFields):
    """`/apply-template`."""

    model: ModelName | None = None
    messages: list[ChatMessage]
