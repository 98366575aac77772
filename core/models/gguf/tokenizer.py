"""A tokenizer from a GGUF file's metadata, and where answers end.

transformers builds the vocabulary; how text is split before it is llama.cpp's `tokenizer.ggml.pre`, a name that stands
for a regular expression. Names that are not known are refused: another split gives other tokens without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.errors import CheckpointError, UnsupportedModelError
from core.logs import get_logger
from core.models.gguf.header import GgufHeader
from core.models.gguf.metadata import Metadata

logger = get_logger(__name__)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_SMALL}*|\p{{N}}|{_REST}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_SMALL}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_SMALL}*{_SHORT}"
    rf"|\p{{N}}{{1,3}}|{_REST}"
)
_SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names of GPT-2's split, with every digit alone."""

_GPT2 = ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe")

_ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>",
    "<eos>", "<EOT>", "<|return|>", "<|call|>",
)  # fmt: skip
"""Control tokens that end a turn, whatever the one that the file calls its end: as in llama.cpp."""

_CONTROL = 3


def write_tokenizer(header: GgufHeader, file: Path, directory: Path) -> None:
    """Put the tokenizer of a model into a directory, with its chat template and a generation_config.json. `file` has
    the metadata. Raises `UnsupportedModelError` for kinds of tokenizers that are not known, and `CheckpointError`."""
    kind, pre = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"Tokenizers of the kind {kind!r} are not read from GGUF files.", param="model")
    if kind == "gpt2" and pre not in (*_SPLITS, *_SINGLE_DIGITS, *_GPT2):
        raise UnsupportedModelError(f"{file.name} splits text as {pre!r} does, which is not known.", param="model")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the class and the Rust library make of metadata that nobody has checked
        logger.warning("a tokenizer cannot be built", file=str(file), error=repr(error))
        raise CheckpointError(f"No tokenizer can be built from {file.name}.", param="model") from error
    if kind == "gpt2":
        _split(tokenizer, pre)
    tokenizer.save_pretrained(str(directory))
    (directory / "generation_config.json").write_text(json.dumps(_generation(header)))


def _split(tokenizer: Any, pre: str) -> None:
    if pre in _SPLITS:
        first: Any = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
    elif pre in _SINGLE_DIGITS:
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        return
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in _SINGLE_DIGITS)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytewise])


def _generation(header: GgufHeader) -> dict[str, Any]:
    data = Metadata(header)
    tokens, kinds = (header.metadata.get(f"tokenizer.ggml.{name}") or [] for name in ("tokens", "token_type"))
    named = {index for index, (token, kind) in enumerate(zip(tokens, kinds)) if kind == _CONTROL and token in _ENDS}  # noqa: B905  no types, no control tokens
    given = {token for name in ("eos", "eot", "eom") if (token := data.token(name)) is not None}
    ends = sorted(named | given)
    return {"bos_token_id": data.token("bos"), "eos_token_id": ends or None, "pad_token_id": data.token("padding")}
