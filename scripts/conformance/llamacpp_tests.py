"""Which of llama.cpp's server tests are run against our server, and why each other one is not."""

from __future__ import annotations

CHOSEN = {
    "test_basic.py": ("test_server_start_simple",),
    "test_chat_completion.py": (
        "test_chat_template_continue_final_message_mutual_exclusion", "test_completion_with_response_format",
        "test_completion_with_json_schema", "test_completion_with_grammar", "test_completion_with_invalid_grammar",
        "test_invalid_chat_completion_req", "test_logprobs", "test_logit_bias",
        "test_chat_completions_multiple_choices",
    ),
    "test_compat_anthropic.py": (
        "test_anthropic_messages_basic", "test_anthropic_messages_with_system",
        "test_anthropic_messages_multipart_content", "test_anthropic_messages_conversation",
        "test_anthropic_messages_streaming", "test_anthropic_count_tokens", "test_anthropic_count_tokens_with_system",
        "test_anthropic_count_tokens_no_max_tokens", "test_anthropic_tool_use_basic", "test_anthropic_tool_result",
        "test_anthropic_tool_result_with_text", "test_anthropic_tool_result_error", "test_anthropic_tool_streaming",
        "test_anthropic_stop_sequences", "test_anthropic_temperature", "test_anthropic_top_p", "test_anthropic_top_k",
        "test_anthropic_missing_messages", "test_anthropic_streaming_content_block_indices",
        "test_anthropic_metadata", "test_anthropic_vs_openai_different_response_format",
    ),
    "test_compat_oai_responses.py": (
        "test_responses_with_openai_library", "test_responses_stream_with_openai_library",
    ),
    "test_completion.py": (
        "test_completion_stream_vs_non_stream", "test_completion_stream_with_openai_library",
        "test_consistent_result_same_seed", "test_different_result_different_seed",
        "test_consistent_result_different_batch_size", "test_nocache_long_input_prompt", "test_json_prompt_no_mtmd",
        "test_json_prompt_mtm_error_when_not_supported", "test_completion_with_tokens_input",
        "test_completion_response_fields", "test_n_probs", "test_n_probs_stream", "test_logit_bias",
    ),
    "test_embedding.py": (
        "test_embedding_single", "test_embedding_multiple", "test_embedding_mixed_input",
        "test_embedding_invalid_input", "test_embedding_pooling_mean", "test_embedding_pooling_mean_multiple",
        "test_embedding_openai_library_single", "test_embedding_openai_library_multiple",
        "test_same_prompt_give_same_result", "test_embedding_openai_library_base64",
    ),
    "test_infill.py": ("test_invalid_input_extra_req",),
    "test_rerank.py": ("test_invalid_rerank_req", "test_rerank_top_n"),
    "test_security.py": (
        "test_access_public_endpoint", "test_incorrect_api_key", "test_openai_library_correct_api_key",
    ),
    "test_tokenize.py": ("test_tokenize_detokenize", "test_tokenize_with_pieces"),
}  # fmt: skip
"""By file. Of those with several cases, `LEFT_OUT` may name some."""

ITS_MODEL = "expects words or numbers of tokens of its model"
ITS_FLAGS = "starts it with flags of its own"
PRIVATE = "a parameter, route or field of llama.cpp's own"
LEFT_OUT = {
    "test_basic.py::test_server_multiple_addresses": ITS_FLAGS,
    "test_basic.py::test_server_props": "expects a GGUF file and its number of slots",
    "test_basic.py::test_server_models": "expects one model, by its name; here an embedding model is served beside",
    "test_basic.py::test_server_slots": ITS_FLAGS,
    "test_basic.py::test_load_split_model": ITS_MODEL,
    "test_basic.py::test_no_ui": ITS_FLAGS,
    "test_basic.py::test_server_model_aliases_and_tags": ITS_FLAGS,
    "test_chat_completion.py::test_chat_completion": ITS_MODEL,
    "test_chat_completion.py::test_chat_completion_cached_tokens": ITS_MODEL,
    "test_chat_completion.py::test_chat_completion_stream": ITS_MODEL,
    "test_chat_completion.py::test_chat_completion_with_openai_library": "expects its build number as fingerprint",
    "test_chat_completion.py::test_chat_template": PRIVATE,
    "test_chat_completion.py::test_chat_template_assistant_prefill": PRIVATE,
    "test_chat_completion.py::test_chat_template_continue_final_message_vllm_compat": PRIVATE,
    "test_chat_completion.py::test_apply_chat_template": "expects a template that is built into it",
    "test_chat_completion.py::test_completion_with_response_format[response_format1": ITS_MODEL,
    "test_chat_completion.py::test_invalid_chat_completion_req[messages7": "refuses two messages of the assistant in a "
    "row, which OpenAI takes",
    "test_chat_completion.py::test_chat_completion_with_timings_per_token": PRIVATE,
    "test_chat_completion.py::test_logprobs_stream": "expects null as the first content, where OpenAI writes an empty "
    "text",
    "test_chat_completion.py::test_context_size_exceeded": "expects its own type of error; here it is OpenAI's",
    "test_chat_completion.py::test_return_progress": PRIVATE,
    "test_chat_completion.py::test_chat_completions_token_count": PRIVATE,
    "test_chat_completion.py::test_verbose_debug": PRIVATE,
    "test_compat_anthropic.py::test_anthropic_tool_result_with_image": "expects a 500 for an image; here it is a 400",
    "test_compat_anthropic.py::test_anthropic_vision": "expects a 500 for an image; here it is a 400",
    "test_compat_anthropic.py::test_anthropic_empty_messages": "takes a conversation without messages, which Anthropic "
    "refuses",
    "test_compat_anthropic.py::test_anthropic_thinking": "a budget below Anthropic's least, or a model or template of "
    "its own",
    "test_compat_oai_responses.py::test_responses_stream_with_llama_telemetry": PRIVATE,
    "test_completion.py::test_completion[": ITS_MODEL,
    "test_completion.py::test_completion_stream[": ITS_MODEL,
    "test_completion.py::test_completion_with_openai_library": "expects its build number as fingerprint",
    "test_completion.py::test_completion_stream_with_openai_library_stops": ITS_MODEL,
    "test_completion.py::test_cache_vs_nocache_prompt": "skipped there",
    "test_completion.py::test_completion_parallel_slots": PRIVATE,
    "test_completion.py::test_completion_unified": ITS_FLAGS,
    "test_completion.py::test_completion_response_fields[I believe the meaning of life is-32": PRIVATE,
    "test_completion.py::test_n_probs_post": PRIVATE,
    "test_completion.py::test_cancel_request": "asks slots, which are sequences that run here",
    "test_completion.py::test_completion_prompt_cache": ITS_MODEL,
    "test_embedding.py::test_embedding_multiple_with_fa": "needs a context above 256 tokens, which the demo model has",
    "test_embedding.py::test_embedding_mixed_input[-": "an empty text, which OpenAI refuses",
    "test_embedding.py::test_embedding_mixed_input[input3": PRIVATE,
    "test_embedding.py::test_embedding_mixed_input[input5": PRIVATE,
    "test_embedding.py::test_embedding_mixed_input[input7": PRIVATE,
    "test_embedding.py::test_embedding_mixed_input[input8": PRIVATE,
    "test_embedding.py::test_embedding_mixed_input[input9": PRIVATE,
    "test_embedding.py::test_embedding_mixed_input[input10": PRIVATE,
    "test_embedding.py::test_embedding_content_text_same_as_string": PRIVATE,
    "test_embedding.py::test_embedding_pooling_none": ITS_FLAGS,
    "test_embedding.py::test_embedding_error_prompt_too_long": "expects its own words",
    "test_embedding.py::test_embedding_usage": ITS_MODEL,
    "test_infill.py::test_infill": "the demo model has no tokens for filling gaps",
    "test_infill.py::test_with_qwen_model": ITS_MODEL,
    "test_rerank.py::test_rerank": "expects the order that its reranker finds",
    "test_rerank.py::test_rerank_tei": "the shape of Hugging Face's text-embeddings-inference",
    "test_rerank.py::test_rerank_usage": ITS_MODEL,
    "test_security.py::test_access_static_assets_without_api_key": "its web pages",
    "test_security.py::test_correct_api_key": "`/completions` is its own route there, and OpenAI's here",
    "test_security.py::test_cors": ITS_FLAGS,
    "test_security.py::test_local_media_file": ITS_MODEL,
    "test_tokenize.py::test_tokenize_with_bos": ITS_MODEL,
    "test_compat_gcp.py": ITS_FLAGS,
    "test_ctx_shift.py": ITS_MODEL,
    "test_ignore_eos.py": "expects how it ignores the end in `generation_settings`",
    "test_kv_keep_only_active.py": ITS_FLAGS,
    "test_lora.py": ITS_FLAGS,
    "test_mcp_servers.py": ITS_FLAGS,
    "test_metrics.py": "metrics by its names",
    "test_proxy.py": ITS_FLAGS,
    "test_router.py": ITS_FLAGS,
    "test_sleep.py": ITS_FLAGS,
    "test_slot_save.py": PRIVATE,
    "test_speculative.py": ITS_FLAGS,
    "test_stream.py": PRIVATE,
    "test_template.py": ITS_FLAGS,
    "test_tool_call.py": ITS_MODEL,
    "test_tools_builtin.py": PRIVATE,
    "test_vision_api.py": ITS_MODEL,
}
"""By the beginning of their ids, the longest counts."""
FORMS = ("test_completion_with_response_format", "test_completion_with_json_schema", "test_completion_with_grammar")
"""Whose words follow from the request; of the others any text is taken."""
NAMES = ("gpt-3.5-turbo", "gpt-3.5-turbo-instruct", "davinci-002", "gpt-4.1", "test")
EMBEDDING_NAMES = ("text-embedding-3-small",)
"""What the tests call the model."""


def reason(file: str, name: str) -> str | None:
    """Why a test is not run; None: it is. Raises `KeyError` for one that neither list knows."""
    found = max((key for key in LEFT_OUT if f"{file}::{name}".startswith(key)), key=len, default=None)
    chosen = name.partition("[")[0] in CHOSEN.get(file, ())
    if found is not None and not (chosen and "[" not in found and found != f"{file}::{name}"):
        return LEFT_OUT[found]
    if chosen:
        return None
    raise KeyError(f"{file}::{name}")
