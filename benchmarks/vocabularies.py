"""Five tokenizers of the kinds that models have, small, built here: nothing is downloaded.

They differ in how a token's text stands for bytes (byte-level alphabets, or spaces as U+2581 with bytes to fall back
on), in what may be one token (quotes and braces with what is around them, runs of spaces, halves of characters) and in
where control tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from core.models.resolve import DEMO_PATH
from core.models.tokenizer import Tokenizer as OurTokenizer

END = "</s>"
TEXTS = (
    '{"name": "Ada", "tags": ["a", "b"], "size": 1.5e3, "is_open": true, "next": null}',
    '{\n  "items": [\n    {"id": 17, "price": -0.25},\n    {"id": 18, "note": "naïve café 你好 😀"}\n  ]\n}',
    '[{"a":{"b":[[],[{}]]}},"x\\ny","\\u00e9"]', "The quick brown fox jumps over the lazy dog. 2026-12-01T02:03:04Z",
    '{"apiVersion":"v1","kind":"Pod","metadata":{"labels":{"app":"web"}},"spec":{"replicas":3}}',
)  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CONTROL = ["<unk>", "<s>", END]


def byte_level(size: int = 600) -> Tokenizer:
    """As of GPT-2, Llama 3 and Qwen: byte-level BPE, control tokens behind all others."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS * 3, _bpe(size))
    made.add_special_tokens(CONTROL[1:])
    return made


def tekken_like(size: int = 800) -> Tokenizer:
    """As of Mistral's Tekken: a thousand control tokens first (100 here), and a pattern by which text is split, so that
    punctuation, quotes and line ends become tokens together."""
    made = Tokenizer(models.BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    control = [*CONTROL, *(f"<SPECIAL_{number}>" for number in range(3, 100))]
    made.train_from_iterator(TEXTS * 3, _bpe(size, control))
    return made


def byte_fallback() -> Tokenizer:
    """As of Llama 2 and Mistral 7B: SentencePiece's BPE, bytes to fall back on, U+2581 for spaces."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=500, show_progress=False, min_frequency=2))
    pieces, merges = _learnt(learnt)
    names = list(dict.fromkeys([*CONTROL, *BYTES, *pieces, "▁", *(chr(code) for code in range(0x21, 0x7F))]))
    made = Tokenizer(
        models.BPE(
            {name: index for index, name in enumerate(names)},
            merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(CONTROL)
    return made


def unigram() -> Tokenizer:
    """As of Gemma and XLM-R: SentencePiece's Unigram with bytes to fall back on. Runs of spaces and line ends are
    tokens."""
    pieces = ["▁", "▁▁", "▁▁▁▁", "\n", "\n\n", "\n▁▁", '{"', '":', '",', '"}', '"]', "},", "}]", "[]", "{}", '▁"',
              '":▁"', '",▁"', "true", "false", "null", "▁the", "name", "item", "é", "日本", "00"]  # fmt: skip
    characters = [chr(code) for code in range(0x21, 0x7F)]
    table = [(name, 0.0) for name in CONTROL] + [(name, -20.0) for name in BYTES]
    table += [(piece, -2.0 - 1 / len(piece)) for piece in dict.fromkeys([*pieces, *characters])]
    made = Tokenizer(models.Unigram(table, 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(CONTROL)
    return made


def _bpe(size: int, control: Sequence[str] = ()) -> trainers.BpeTrainer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(control), show_progress=False, min_frequency=2
    )


def _learnt(tokenizer: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces in their order, and which pairs become which."""
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


BUILT: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level, "Tekken-like": tekken_like, "SentencePiece BPE": byte_fallback, "Unigram": unigram,
}  # fmt: skip
NAMES = ("the demo model's", *BUILT)


def wrapped(name: str) -> PreTrainedTokenizerFast:
    """One of `BUILT` as transformers has it, which it saves."""
    return PreTrainedTokenizerFast(tokenizer_object=BUILT[name](), bos_token="<s>", eos_token=END)


def tokenizer_of(name: str) -> OurTokenizer:
    """One of `NAMES`."""
    return OurTokenizer(wrapped(name)) if name in BUILT else OurTokenizer.from_directory(DEMO_PATH)
