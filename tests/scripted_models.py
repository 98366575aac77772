"""Models that always give the same answer: real checkpoints whose weights say which token follows which.

Nothing of a model's layers reaches its head, so that the hidden state at a position is its token's embedding, a unit
vector of its own, and the head's row of each token of the script is the unit vector of the token before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "</s>"


def build_scripted(
    directory: Path, begin: str, script: Sequence[str], template: str, *, special: Sequence[str] = (),
    others: Mapping[str, Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """Save a model that writes `script` behind `begin`, a special token with which the template's prompt ends. The
    pieces of the script are tokens, none of them twice, and none of them one character. `special` are special tokens;
    characters of ASCII are tokens, too. `others` are further scripts, by what they begin behind."""
    scripts = {begin: script, **(others or {})}
    pieces = [piece for each in scripts.values() for piece in each]
    assert len({*scripts, *pieces}) == len(scripts) + len(pieces)
    assert all(len(piece) > 1 for piece in pieces)
    own = [piece for piece in pieces if piece not in special]
    vocabulary = {word: number for number, word in enumerate(["\n", *map(chr, range(32, 127)), *own])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [AddedToken(text, normalized=False) for text in dict.fromkeys((END, *scripts, *special))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, chat_template=template)
    tokenizer.save_pretrained(directory)
    size = backend.get_vocab_size()
    chains = [[backend.token_to_id(text) for text in (first, *each, END)] for first, each in scripts.items()]
    config = LlamaConfig(
        vocab_size=size, hidden_size=-(-size // 32) * 32, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=chains[0][-1],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.ones_like(weight) if "norm" in name else torch.zeros_like(weight))
        model.model.embed_tokens.weight.fill_diagonal_(1.0)
        for before, after in (pair for ids in chains for pair in pairwise(ids)):
            model.lm_head.weight[after, before] = 1.0
    model.save_pretrained(directory)
