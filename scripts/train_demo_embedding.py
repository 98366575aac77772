#!/usr/bin/env python3
"""Train the bundled embedding model from scratch, on questions and passages of `demo_corpus`.

    python scripts/train_demo_embedding.py               under a minute on one core; writes core/models/demo_embedding
    python scripts/train_demo_embedding.py --evaluate    measures the one that is there, and writes RETRIEVAL.md

A text's vector is the mean of its words' vectors: a bag of words in fewer dimensions. It begins as one, with a random
direction for each word piece and the weight that rare words have in tf-idf. Then a question shall be nearer to its
own passage, and to another wording of itself, than to everything else in the batch (InfoNCE), and words of a passage
of this repository's pages nearer to that passage. What is written lies between the beginning and the end of training,
which costs little of what was learnt and keeps what holds for passages that were never seen (Wortsman et al., "Robust
fine-tuning of zero-shot models", 2022).

The layout is that of sentence-transformers: BERT without layers, mean pooling, vectors of length 1. Text, tokenizer,
weights and order come from one seed and the pages.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from demo_corpus import pages, retrieval
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parent.parent / "core" / "models" / "demo_embedding"
VOCABULARY, WIDTH, CONTEXT = 3200, 512, 256
FILL = 2
"""Of the dimensions, those that carry what a layer norm takes out again; their outputs are 0."""
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NOTHING = 1e-3
"""Length of the vector of a text without words, beside about 1 of a rare word."""
TEMPERATURE = 0.05
DROPPED = 0.15
"""Share of word pieces that are left out at each look, so that no single one decides."""
WARM_UP = 10
"""Steps."""
KEPT = 0.4
"""How far between the beginning and the end of training the result lies; found on passages kept out for that."""
REPORT_EVERY = 20

Vectors = npt.NDArray[np.float32]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over lower-case text, without the passages that are held out."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    facts = retrieval.split().facts
    texts = [fact.answer for fact in facts] * 3 + [text for fact in facts for text in fact.wordings()]
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *(passage.text for passage in pages.passages())], trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=CONTEXT,
    )  # fmt: skip


def directions(shares: torch.Tensor, rarities: torch.Tensor, rounds: int = 4) -> torch.Tensor:
    """Unit vectors, `[vocabulary, WIDTH - FILL]`, that are as good as random ones and disturb each other less.

    More pieces than dimensions cannot all be orthogonal. Those that stand in many texts (`shares`, of all) and count
    there (`rarities`) are turned away from each other, until together they fill all dimensions alike (a tight frame).
    """
    found = nn.functional.normalize(torch.randn(len(shares), WIDTH - FILL), dim=1)
    pull = ((shares + 0.5 / len(shares)).sqrt() * rarities)[:, None]
    for _ in range(rounds):
        drawn = found * pull
        sizes, axes = torch.linalg.eigh(drawn.T @ drawn)
        evened = (axes * sizes.clamp_min(1e-4 * sizes.max()).rsqrt()) @ axes.T
        found = nn.functional.normalize(found @ evened, dim=1)
    return found


class Words(nn.Module):
    """A vector for each word piece; a text's is the sum of its pieces', brought to the length 1."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: Random) -> None:
        super().__init__()
        self._backend = tokenizer.backend_tokenizer
        self._rng = rng
        self._ids: dict[str, list[int]] = {}
        facts = retrieval.split().facts
        texts = [fact.answer for fact in facts] + [text for fact in facts for text in fact.questions]
        rarities = 1 - (1 + self._counts(texts, len(tokenizer))).log() / math.log(1 + len(texts))
        texts += [passage.text for passage in pages.passages()]
        shares = self._counts(texts, len(tokenizer)) / len(texts)
        self.begin = directions(shares, rarities) * rarities[:, None]
        self.table = nn.EmbeddingBag.from_pretrained(self.begin.clone(), freeze=False, mode="sum")

    def _counts(self, texts: Sequence[str], vocabulary: int) -> torch.Tensor:
        """In how many of the texts each piece stands."""
        seen = Counter(number for text in texts for number in set(self._pieces(text)))
        return torch.tensor([float(seen.get(number, 0)) for number in range(vocabulary)])

    def _pieces(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self._backend.encode(text, add_special_tokens=False).ids or [1]
        return self._ids[text]

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of length 1, `[texts, WIDTH - FILL]`."""
        chosen = [
            [n for n in self._pieces(text) if self._rng.random() >= DROPPED] or self._pieces(text) for text in texts
        ]
        starts = [0, *accumulate(len(pieces) for pieces in chosen[:-1])]
        flat = torch.tensor([number for pieces in chosen for number in pieces])
        return nn.functional.normalize(self.table(flat, torch.tensor(starts)), dim=1)

    def result(self) -> torch.Tensor:
        """The table to ship, `[vocabulary, WIDTH - FILL]`."""
        table = self.begin + KEPT * (self.table.weight.detach() - self.begin)
        for name in SPECIAL:
            number = self._backend.token_to_id(name)
            if name != "[UNK]":
                table[number] = NOTHING * nn.functional.normalize(self.begin[number], dim=0) if name == "[CLS]" else 0.0
        return table


def near(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """InfoNCE: each row of `left` is nearest to its own row of `right`."""
    return nn.functional.cross_entropy(left @ right.T / TEMPERATURE, torch.arange(len(left)))


def train(limits: argparse.Namespace) -> None:
    """From nothing to files in --out."""
    torch.manual_seed(limits.seed)
    torch.set_num_threads(limits.threads)
    tokenizer = build_tokenizer()
    words = Words(tokenizer, Random(limits.seed))
    print(f"{len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.Adam(words.parameters(), lr=limits.rate)
    asked, read = retrieval.batches(limits.seed, limits.batch), retrieval.page_batches(limits.seed, limits.batch)
    began = time.monotonic()
    for step in range(limits.steps):
        for group in optimizer.param_groups:
            group["lr"] = limits.rate * min(1.0, (step + 1) / WARM_UP) * (1 - step / limits.steps)
        questions, others, answers = (words(texts) for texts in zip(*next(asked), strict=True))
        parts, passages = (words(texts) for texts in zip(*next(read), strict=True))
        loss = near(questions, answers) + near(answers, questions) + 0.5 * near(questions, others)
        loss = loss + near(parts, passages) + near(passages, parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % REPORT_EVERY == 0:
            print(f"step {step}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{limits.steps} steps, {time.process_time():.0f} s of processor time", flush=True)
    save(as_bert(words.result()), tokenizer, limits.out)


def as_bert(table: torch.Tensor) -> BertModel:
    """A BERT without layers whose outputs are the rows of the table, all times the same number; in fp16.

    All that it computes is a layer norm, which takes out mean and length. `FILL` more numbers make every row's mean 0
    and all rows as long as each other, so that the norm changes nothing; its weights then hide them.
    """
    sums, squares = table.sum(1), table.square().sum(1)
    length = (squares + sums.square() / 2).max() * 1.01
    spread = ((length - squares - sums.square() / 2) / 2).sqrt()
    rows = torch.cat([table, torch.stack([spread - sums / 2, -spread - sums / 2], 1)], 1) * (WIDTH / length).sqrt()
    config = BertConfig(
        vocab_size=len(table), hidden_size=WIDTH, intermediate_size=1, num_hidden_layers=0, num_attention_heads=1,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.copy_(rows)
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
        model.embeddings.LayerNorm.weight[-FILL:] = 0.0
    return model.half().eval()


def embed(model: BertModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Vectors of length 1, `[texts, WIDTH]`."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"][:, :, None].float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def save(model: BertModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """As sentence-transformers lays a model out."""
    model.save_pretrained(out)
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
    model = BertModel.from_pretrained(limits.out, add_pooling_layer=False, dtype="auto").eval()
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
    parser.add_argument("--steps", type=int, default=60, help="of training (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="passages in a step (default %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of text, weights and order (default %(default)s)")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out instead of training one")
    limits = parser.parse_args()
    if not limits.evaluate:
        train(limits)
    evaluate(limits)


if __name__ == "__main__":
    main()
