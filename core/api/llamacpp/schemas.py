"""Bodies of llama.cpp's routes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from core.api.body import Integer, ModelName, Unsupported, whole
from core.api.openai.schemas import ChatMessage, TemplateFields
from core.api.openai.unsupported import NO, OFF, SAMPLERS
from core.api.sampling import SamplingFields

NEVER = -100.0
"""The strongest bias that there is; what llama.cpp writes as false."""


def _biases(value: Any) -> Any:
    """Pairs of a token's id, or of a text, and the bias, as a list or an object; false means never."""
    pairs = (
        [[int(key) if key.isdecimal() else key, bias] for key, bias in value.items()]
        if isinstance(value, dict)
        else value
    )
    if not isinstance(pairs, list):
        raise ValueError("Input should be an object or a list of pairs")  # noqa: TRY004 (pydantic's)
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError("Entries should be pairs of a token id or a text and a bias")
    return [(token, NEVER if bias is False else bias) for token, bias in pairs]


Bias = tuple[int | str, float]
Biases = Annotated[
    list[Bias], BeforeValidator(_biases, json_schema_input_type=dict[str, float | Literal[False]] | list[Bias])
]  # fmt: skip


class PromptObject(BaseModel):
    """A text as an object. Pictures and sounds, which may stand beside it, are not read."""

    prompt_string: str
    multimodal_data: list[Any] | None = Field(None, max_length=0)


Prompt = str | list[int | str]
Given = Prompt | PromptObject


def _prompts(value: Any) -> Any:
    """One prompt, or a list of them; objects as their text. Raises ValueError."""
    value = whole(value)
    if not isinstance(value, list) or any(isinstance(part, int) for part in value):
        return _prompt(value)
    return [_prompt(part) for part in value]


def _prompt(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("prompt_string"), str):
        if value.get("multimodal_data"):
            raise ValueError("multimodal_data is not read by this server")
        return value["prompt_string"]
    parts = value if isinstance(value, list) else []
    known = all(isinstance(part, (int, str)) and not isinstance(part, bool) for part in parts)
    if not (known and isinstance(value, (str, list))):
        raise ValueError("must be a text, token ids, a list of both, or a list of such prompts")
    return value


class LlamaCompletionRequest(SamplingFields):
    """`/completion`. `prompt` is text, token ids, or a list of both, which is one prompt; or a list of prompts. The
    answer keeps to `grammar` or to `json_schema`. `logit_bias` names tokens by their ids, or those of a text. Where
    caches are (`id_slot`, `n_keep`, ...) is for the server to know."""

    unsupported: ClassVar[Unsupported] = {
        **{name: accepted for name, accepted in SAMPLERS.items() if name != "repeat_penalty"},
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

    prompt: Annotated[Any, BeforeValidator(_prompts, json_schema_input_type=Given | list[Given])] = ""
    n_predict: Integer | None = Field(None, ge=-2)
    n_probs: Integer | None = Field(None, ge=0)
    repeat_penalty: float | None = None
    logit_bias: Biases | None = None  # type: ignore[assignment]  # more than others take
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


class Extra(BaseModel):
    """A text from elsewhere, such as another file of the project."""

    text: str
    filename: str | None = None


class InfillRequest(LlamaCompletionRequest):
    """`/infill`: what stands before and after a gap, and after `prompt` in the gap."""

    input_prefix: str
    input_suffix: str
    input_extra: list[Extra] | None = None


class ApplyTemplateRequest(TemplateFields):
    """`/apply-template`."""

    model: ModelName | None = None
    messages: list[ChatMessage]
