#!/usr/bin/env python3
"""Train the bundled embedding model from scratch, on questions and passages of `demo_corpus`.

    python scripts/train_demo_embedding.py               a few minutes on one core; writes core/models/demo_embedding
    python scripts/train_demo_embedding.py --evaluate    measures the one that is there, and writes RETRIEVAL.md

A question shall be nearer to its own passage, and to another wording of itself, than to everything else in the batch
(InfoNCE). Text, tokenizer, weights and order come from one seed. The layout is that of sentence-transformers: BERT's
weights, mean pooling, vectors of length 1.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from demo_corpus import retrieval
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parent.parent / "core" / "models" / "demo_embedding"
VOCABULARY, WIDTH, INNER, LAYERS, HEADS, CONTEXT = 3072, 128, 384, 2, 4, 256
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEMPERATURE = 0.05
WARM_UP = 0.05
REPORT_EVERY = 50

Vectors = npt.NDArray[np.float32]


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """WordPiece over lower-case text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    texts = list(retrieval.split().passages)
    stream = retrieval.batches(seed, 64)
    texts += [text for _ in range(100) for asked in next(stream) for text in asked[:2]]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=CONTEXT,
    )  # fmt: skip


def build_model(vocabulary: int) -> BertModel:
    """Untrained. Dropout is what keeps it from learning the wordings by heart."""
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=CONTEXT, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def embed(model: BertModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Vectors of length 1, `[texts, WIDTH]`."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None].float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def loss_of(asked: torch.Tensor, again: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """InfoNCE: each question finds its passage, each passage its question, and the same question asked otherwise."""
    own = torch.arange(len(asked))
    found, other = asked @ passages.T / TEMPERATURE, asked @ again.T / TEMPERATURE
    each = [nn.functional.cross_entropy(scores, own) for scores in (found, found.T, other)]
    return each[0] + each[1] + 0.5 * each[2]


def train(limits: argparse.Namespace) -> None:
    """From nothing to files in --out."""
    torch.manual_seed(limits.seed)
    torch.set_num_threads(limits.threads)
    tokenizer = build_tokenizer(limits.seed)
    model = build_model(len(tokenizer)).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=limits.rate, weight_decay=0.05)
    stream, began = retrieval.batches(limits.seed, limits.batch), time.monotonic()
    for step in range(limits.steps):
        done = step / limits.steps
        for group in optimizer.param_groups:
            group["lr"] = limits.rate * min(1.0, (done + 1e-3) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * done))
        questions, others, passages = zip(*next(stream), strict=True)
        count = len(questions)
        # Apart from the passages, which are longer: what is padded is computed too.
        short = embed(model, tokenizer, questions + others)
        loss = loss_of(short[:count], short[count:], embed(model, tokenizer, passages))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % REPORT_EVERY == 0:
            print(f"step {step}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{limits.steps} steps, {time.process_time():.0f} s of processor time", flush=True)
    save(model, tokenizer, limits.out)


def save(model: BertModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """As sentence-transformers lays a model out."""
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    kind = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{kind}Normalize"},
    ]
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}
    write_json(out / "modules.json", modules)
    write_json(out / "1_Pooling" / "config.json", pooling)
    write_json(out / "sentence_bert_config.json", {"max_seq_length": CONTEXT, "do_lower_case": False})


def write_json(file: Path, content: object) -> None:
    """With the folder that it is in."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -- measuring ---------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """What a bag of words has."""
    return re.findall(r"[a-z0-9_]+", text.lower())


def bag_of_words(passages: Sequence[str]) -> Callable[[Sequence[str]], Vectors]:
    """Tf-idf, the baseline: weights come from the passages, vectors have length 1."""
    seen = Counter(word for passage in passages for word in set(words(passage)))
    index = {word: number for number, word in enumerate(seen)}
    weight = np.array([1 + math.log((1 + len(passages)) / (1 + count)) for count in seen.values()], dtype=np.float32)

    def vectors(texts: Sequence[str]) -> Vectors:
        table = np.zeros((len(texts), len(index)), dtype=np.float32)
        for row, text in zip(table, texts, strict=True):
            for word, count in Counter(words(text)).items():
                if word in index:
                    row[index[word]] = (1 + math.log(count)) * weight[index[word]]
        lengths: Vectors = np.linalg.norm(table, axis=1, keepdims=True)
        unit: Vectors = table / np.maximum(lengths, 1e-9)
        return unit

    return vectors


def recall(
    embedding: Callable[[Sequence[str]], Vectors], pairs: Sequence[tuple[str, str]], passages: Sequence[str]
) -> tuple[float, float]:
    """Shares of the questions whose own passage is the nearest, and among the five nearest, of all passages."""
    place = {passage: number for number, passage in enumerate(passages)}
    scores = embedding([question for question, _ in pairs]) @ embedding(passages).T
    own = np.array([place[passage] for _, passage in pairs])
    better = (scores > scores[np.arange(len(pairs)), own][:, None]).sum(axis=1)
    return float((better < 1).mean()), float((better < 5).mean())


def evaluate(limits: argparse.Namespace) -> None:
    """Print recall beside the baseline's, and write it beside the model."""
    torch.set_num_threads(limits.threads)
    model = BertModel.from_pretrained(limits.out, add_pooling_layer=False).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(limits.out)

    @torch.inference_mode()
    def ours(texts: Sequence[str]) -> Vectors:
        vectors: Vectors = embed(model, tokenizer, texts).numpy()
        return vectors

    split = retrieval.split()
    baseline = bag_of_words(split.passages)
    rows = []
    groups = (("new wordings of passages that were trained on", split.new_wordings),
              ("passages that were never trained on", split.new_passages))  # fmt: skip
    for name, pairs in groups:
        measured = [*recall(ours, pairs, split.passages), *recall(baseline, pairs, split.passages)]
        rows.append(f"| {name} | {len(pairs)} | " + " | ".join(f"{100 * value:.0f} %" for value in measured) + " |")
    about = (
        f"Questions that training never showed, each against all {len(split.passages)} passages. Written by "
        "`scripts/train_demo_embedding.py --evaluate`."
    )
    text = "\n".join(
        [
            "# Retrieval of the bundled embedding model", "",
            about, "",
            "| questions about | number | recall@1 | recall@5 | bag of words (tf-idf): recall@1 | recall@5 |",
            "|---|---|---|---|---|---|", *rows, "",
        ]
    )  # fmt: skip
    print(text)
    (limits.out / "RETRIEVAL.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Read the options and train, or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the model")
    parser.add_argument("--steps", type=int, default=700, help="of training (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="passages in a step (default %(default)s)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of text, weights and order (default %(default)s)")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out instead of training one")
    limits = parser.parse_args()
    if not limits.evaluate:
        train(limits)
    evaluate(limits)


if __name__ == "__main__":
    main()
