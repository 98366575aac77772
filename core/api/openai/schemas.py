"""Bodies of the `/v1` routes: OpenAI's fields, and those that vLLM adds to them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from core.api.body import NOTHING, RequestModel, Unsupported
from core.api.sampling import SamplingFields
from core.errors import InvalidRequestError

# What OpenAI's clients, vLLM's and llama.cpp's may send for both kinds of completion, and what asks for nothing.
UNSUPPORTED: Unsupported = {
    "response_format": ({"type": "text"},),
    "logits_processors": ([],),
    "prompt_logprobs": NOTHING,
    "guided_json": NOTHING,
    "guided_regex": NOTHING,
    "guided_choice": NOTHING,
    "guided_grammar": NOTHING,
    "guided_decoding_backend": NOTHING,
    "guided_whitespace_pattern": NOTHING,
    "structural_tag": NOTHING,
    "structured_outputs": NOTHING,
    "json_schema": NOTHING,
    "grammar": NOTHING,
    "regex": NOTHING,
    "ebnf": NOTHING,
    "use_beam_search": (False,),
    "length_penalty": (1.0, 1),
    "early_stopping": (False,),
    "truncate_prompt_tokens": NOTHING,
    "allowed_token_ids": NOTHING,
    "bad_words": ([],),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "cache_salt": NOTHING,
    "kv_transfer_params": NOTHING,
    "vllm_xargs": NOTHING,
    "lora_path": NOTHING,
    "typical_p": (1.0, 1),
    "mirostat": (0,),
    "xtc_probability": (0.0, 0),
    "dry_multiplier": (0.0, 0),
    "stream_options.continuous_usage_stats": (False,),
}
COMPLETION_UNSUPPORTED: Unsupported = {
    **UNSUPPORTED,
    "suffix": ("",),
    "prompt_embeds": NOTHING,
}
CHAT_UNSUPPORTED: Unsupported = {
    **UNSUPPORTED,
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "audio": NOTHING,
    "modalities": (["text"],),
    "prediction": NOTHING,
    "web_search_options": NOTHING,
    "reasoning_effort": ("none",),
    "include_reasoning": (True,),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "echo": (False,),
    "chat_template": NOTHING,
    "documents": ([],),
    "mm_processor_kwargs": NOTHING,
}


class StreamOptions(RequestModel):
    include_usage: bool | None = None


class OpenAIFields(SamplingFields):
    """What both kinds of completion know beside the sampling parameters."""

    max_tokens: int | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check_stream_options(self) -> None:
        """Raise `InvalidRequestError` if there are any, and nothing to stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")


class CompletionFields(OpenAIFields):
    """A text completion without its prompt."""

    unsupported: ClassVar[Unsupported] = COMPLETION_UNSUPPORTED

    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class CompletionRequest(CompletionFields):
    """`/v1/completions`. `prompt` is text, a list of texts, token ids, or a list of token id lists."""

    prompt: Any = None


class BatchRequest(CompletionFields):
    """`/v1/batch/completions`. Each of `prompts` is text or token ids."""

    unsupported: ClassVar[Unsupported] = {**COMPLETION_UNSUPPORTED, "stream": (False,), "stream_options": NOTHING}

    prompts: list[Any]


class TemplateFields(RequestModel):
    """How messages are put into the model's chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatMessage(RequestModel):
    """`content` is text or a list of text parts; `core.api.openai.chat` looks into it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(OpenAIFields, TemplateFields):
    """`/v1/chat/completions`."""

    unsupported: ClassVar[Unsupported] = CHAT_UNSUPPORTED

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
