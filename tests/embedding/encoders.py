"""Tiny random encoders, saved in the layout of sentence-transformers, and what transformers alone makes of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from steering import LONGEST_WAIT_S
from tiny_models import VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

HIDDEN = 32
LONGEST = 48


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """`w5` .. `w95` are the tokens of the same numbers, between [CLS] (1) and [SEP] (2)."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"w{number}" for number in range(5, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _config(config_class: type[Any], **more: Any) -> Any:
    return config_class(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        pad_token_id=0, initializer_range=0.3, **more,
    )  # fmt: skip


def write(path: Path, **files: Any) -> None:
    """JSON files; `__` in a name stands for a folder."""
    for name, content in files.items():
        file = path / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")


def lay_out(path: Path, mode: str | None, *, normalize: bool = True, **pooling: Any) -> None:
    """sentence-transformers' files beside a model's own."""
    kinds = ["Transformer", *(["Pooling"] if mode is not None else []), *(["Normalize"] if normalize else [])]
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": places[kind], "type": f"sentence_transformers.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    write(path, modules=modules, sentence_bert_config={"max_seq_length": LONGEST})
    if mode is not None:
        write(
            path, **{"1_Pooling__config": {f"pooling_mode_{mode}": True, "word_embedding_dimension": HIDDEN, **pooling}}
        )


def save_encoder(path: Path, mode: str | None = "mean_tokens", *, kind: str = "bert", **layout: Any) -> Any:
    """A random model on disk; returns transformers' own, in eval mode."""
    torch.manual_seed(1)
    if kind == "roberta":
        model: Any = RobertaModel(_config(RobertaConfig, max_position_embeddings=66), add_pooling_layer=False)
    else:
        model = BertModel(_config(BertConfig, max_position_embeddings=64), add_pooling_layer=False)
    _stir(model)
    model.eval().save_pretrained(path)
    bert_tokenizer().save_pretrained(path)
    lay_out(path, mode, **layout)
    return model


def save_reranker(path: Path, *, num_labels: int = 1, **more: Any) -> Any:
    torch.manual_seed(2)
    config = _config(BertConfig, max_position_embeddings=64, num_labels=num_labels, **more)
    model = BertForSequenceClassification(config).eval()
    _stir(model)
    model.save_pretrained(path)
    bert_tokenizer().save_pretrained(path)
    return model


def _stir(model: Any) -> None:
    """Norms and biases at their defaults would hide a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def text(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


@torch.inference_mode()
def reference(
    model: Any, token_ids: Sequence[int], mode: str, *, normalize: bool = True, skip: int = 0
) -> torch.Tensor:
    """One text's vector, alone, by hand: `[H]`."""
    hidden = model(input_ids=torch.tensor([list(token_ids)])).last_hidden_state[0]
    counted = hidden[skip:]
    if mode == "mean_tokens":
        vector = counted.mean(0)
    elif mode == "cls_token":
        vector = counted[0]
    elif mode == "max_tokens":
        vector = counted.max(0).values
    elif mode == "weightedmean_tokens":
        weights = torch.arange(1 + skip, len(token_ids) + 1).float()[:, None]
        vector = (counted * weights).sum(0) / weights.sum()
    else:
        assert mode == "lasttoken"
        vector = hidden[-1]
    return vector / vector.norm() if normalize else vector


POISON = 13


class Gate:
    """An encoder that waits for `open`, and fails on a token."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.open = threading.Event()
        self.begun = threading.Event()
        self.batches: list[int] = []

    def __call__(self, token_ids: Sequence[Sequence[int]], types: Any, skips: Sequence[int]) -> Any:
        self.begun.set()
        assert self.open.wait(LONGEST_WAIT_S)
        self.batches.append(len(token_ids))
        if any(POISON in each for each in token_ids):
            raise RuntimeError("poison")
        return self._encoder(token_ids, types, skips)
