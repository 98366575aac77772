"""Random Llama-shaped checkpoints to measure on, built locally: nothing is downloaded.

Two sizes: ``443m`` (442 million parameters) and ``small`` (25 million), both bf16, grouped-query attention, untied
embeddings; for emulated devices ``stages``, a narrow one with much KV per token, ``streaming``, one with little, and
``lending``, the small one with a longer context; for networks ``wide``, a thin one with a 14B model's hidden size.
What the model says is noise; what it costs is what a trained model of its shape costs.
"""

from __future__ import annotations

import getpass
import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LOGIT_STD = 3.0
"""Standard deviation of the logits: wide enough that bf16 noise seldom changes the greedy choice."""


@dataclass(frozen=True)
class Shape:
    """The dimensions of a checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 4096
    head: int | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head or self.hidden // self.heads


SHAPES = {
    "lending": Shape(hidden=512, intermediate=1408, layers=6, heads=8, kv_heads=2, vocab=8192, context=16384),
    "443m": Shape(hidden=1280, intermediate=3200, layers=22, heads=20, kv_heads=5, vocab=32000),
    "stages": Shape(hidden=128, intermediate=352, layers=48, heads=2, kv_heads=2, vocab=2048),
    "streaming": Shape(hidden=256, intermediate=768, layers=24, heads=4, kv_heads=1, vocab=2048),
    "wide": Shape(hidden=5120, intermediate=256, layers=8, heads=4, kv_heads=2, vocab=2048, head=64),
    "small": Shape(hidden=512, intermediate=1408, layers=6, heads=8, kv_heads=2, vocab=8192),
}


def default_workdir() -> Path:
    """The folder the models, logs and converted weights go to unless ``--workdir`` says otherwise."""
    return Path(tempfile.gettempdir()) / f"vramancer-bench-{getpass.getuser()}"


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly ``vocab_size`` tokens, the same on every machine.

    The merges are not learnt from a text but enumerated: all pairs of printable ASCII characters, then as many
    triples as are wanted. Every token id therefore decodes to real text, some of them to bytes that are no UTF-8 alone.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet]
    merges: list[tuple[str, str]] = []
    printable = [chr(code) for code in range(0x21, 0x7F)]
    pairs = [(left, right) for left in ["\u0120", *printable] for right in printable]  # U+0120 is the byte-level space
    triples = ((left + right, last) for left, right in pairs for last in printable)
    for left, right in [*pairs, *triples]:
        if len(tokens) >= vocab_size:
            break
        tokens.append(left + right)
        merges.append((left, right))
    if len(tokens) != vocab_size:
        raise ValueError(f"vocab_size must be between {len(SPECIAL_TOKENS) + 256} and {len(tokens)}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def random_weights(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors under the names of a Hugging Face Llama checkpoint.

    Projections keep the size of what passes through them; the two that add to the residual stream are scaled down by
    the depth. The head's rows for special tokens are zero, so greedy decoding never ends a text.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(std).to(dtype)

    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    into, residual = 1 / math.sqrt(shape.hidden), 1 / math.sqrt(2 * shape.layers)
    weights = {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden, 1.0)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        weights[attention + "q_proj.weight"] = normal(width, shape.hidden, into)
        weights[attention + "k_proj.weight"] = normal(kv_width, shape.hidden, into)
        weights[attention + "v_proj.weight"] = normal(kv_width, shape.hidden, into)
        weights[attention + "o_proj.weight"] = normal(shape.hidden, width, into * residual)
        weights[mlp + "gate_proj.weight"] = normal(shape.intermediate, shape.hidden, into)
        weights[mlp + "up_proj.weight"] = normal(shape.intermediate, shape.hidden, into)
        weights[mlp + "down_proj.weight"] = normal(
            shape.hidden, shape.intermediate, residual / math.sqrt(shape.intermediate)
        )
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden, dtype=dtype)
    weights["model.norm.weight"] = torch.ones(shape.hidden, dtype=dtype)
    head = normal(shape.vocab, shape.hidden, into * LOGIT_STD)
    head[: len(SPECIAL_TOKENS)] = 0
    weights["lm_head.weight"] = head
    return weights


def build_checkpoint(
    directory: Path,
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a complete checkpoint (weights, configuration, tokenizer) into ``directory``, or reuse the one there. With
    a ``tokenizer`` of one's own, which knows how an answer begins and ends, it is written anew.

    It is written beside its place and then renamed, so a build that was interrupted is never taken for a model.
    """
    recipe = {"version": 1, "dtype": str(dtype), "seed": seed, **asdict(shape)}
    marker = directory / "recipe.json"
    if tokenizer is None and marker.is_file() and json.loads(marker.read_text()) == recipe:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=directory.name + ".", dir=directory.parent))
    bos_id, eos_id = BOS_ID, EOS_ID
    if tokenizer is not None:
        bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": PAD_ID}
    try:
        weights = random_weights(shape, dtype, seed)
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"], vocab_size=shape.vocab, hidden_size=shape.hidden,
            intermediate_size=shape.intermediate, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, max_position_embeddings=shape.context,
            tie_word_embeddings=False, dtype=dtype, **ends,
        )  # fmt: skip
        config.save_pretrained(staging)
        GenerationConfig(**ends).save_pretrained(staging)
        (tokenizer or _own_tokenizer(shape)).save_pretrained(staging)
        (staging / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        if directory.exists():
            shutil.rmtree(directory)
        staging.replace(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _own_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(shape.vocab), bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        model_max_length=shape.context,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def resolve_model(name: str, workdir: Path) -> Path:
    """The checkpoint folder for ``443m``, ``small`` or a path; the two named ones are built when missing."""
    if name in SHAPES:
        return build_checkpoint(workdir / "models" / name, SHAPES[name])
    directory = Path(name).expanduser()
    if not (directory / "config.json").is_file():
        raise ValueError(f"{name!r} is neither one of {', '.join(SHAPES)} nor a folder with a config.json")
    return directory


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ``length`` random tokens, none of them special; another seed shares no prefix with this."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL_TOKENS), vocab_size, (count, length), generator=generator)
    return [[int(token) for token in row] for row in ids]
