"""Embeddings beside sentence-transformers, on the same random BERT, the same texts and threads, in one process.

    pip install -e '.[bench]'
    python -m benchmarks.embeddings           # equal lengths, mixed lengths, and mixed ones as many small requests
    python -m benchmarks.embeddings --size base --turns 9

Sentence-transformers gets all texts in one call, as fast as it can be: it sorts them by length, and pads each batch of
32. In the last row texts come from clients that wait for each other, as they do at a server over it, which computes one
call at a time; ours computes requests together that wait at the same time. Both take turns; what counts is the median
of the turns' ratios. Vectors are compared too. On a machine that is busy with other work, `--threads 1 --clock
processor` says what each costs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from core.config_schema import EmbeddingSettings
from core.devices import DeviceBudget, host_device
from core.embedding.engine import EncoderEngine, EncoderInput
from core.embedding.loading import EncoderInfo, load_encoder
from core.models.resolve import ResolvedModel

SIZES = {"mini": (6, 384, 1536, 12), "base": (12, 768, 3072, 12)}
"""Layers, hidden size, intermediate size, heads; of MiniLM and of BERT base."""
VOCABULARY, LONGEST = 30_000, 512
BUDGET_BYTES = 8 << 30

Texts = Sequence[str]


def build(size: str, path: Path) -> None:
    """A random model in the layout of sentence-transformers; its tokens are words."""
    layers, hidden, inner, heads = SIZES[size]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=LONGEST,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).eval().save_pretrained(path)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(4, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=LONGEST,
    ).save_pretrained(path)  # fmt: skip
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, place) in enumerate(kinds)
    ]
    (path / "1_Pooling").mkdir()
    (path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LONGEST}), encoding="utf-8")


def make_texts(count: int, *, mixed: bool) -> list[str]:
    """128 tokens each; or log-normally distributed around 60 tokens, from 4 to 512."""
    rng = random.Random(1)

    def length() -> int:
        return 126 if not mixed else max(2, min(LONGEST - 2, round(rng.lognormvariate(4.1, 1.0))))

    return [" ".join(f"w{rng.randrange(4, VOCABULARY)}" for _ in range(length())) for _ in range(count)]


class Ours:
    """The engine behind `/v1/embeddings`, without HTTP."""

    def __init__(self, path: Path, threads: int) -> None:
        budget, settings = DeviceBudget(host_device(BUDGET_BYTES)), EmbeddingSettings()
        self._info: EncoderInfo
        self._info, encoder = load_encoder(
            ResolvedModel(path.name, path), str(path), budget, max_batch_tokens=settings.max_batch_tokens
        )
        self._engine = EncoderEngine(
            self._info, encoder, budget, max_batch_tokens=settings.max_batch_tokens, max_queue=settings.max_queue,
            max_queued_tokens=settings.max_queued_tokens, threads=threads,
        )  # fmt: skip
        self._engine.start()
        self._ids = iter(range(1 << 40))

    def __call__(self, texts: Texts) -> Any:
        inputs = [EncoderInput(self._info.tokenizer.encode(text)) for text in texts]
        return self._engine.submit(inputs, request_id=str(next(self._ids)), owner="benchmark").result()

    def padding(self) -> float:
        """Share of what was computed."""
        stats = self._engine.stats
        return stats.padding_tokens / max(1, stats.tokens + stats.padding_tokens)

    def close(self) -> None:
        self._engine.close()


def one_by_one(encode: Callable[[Texts], Any]) -> Callable[[Texts], Any]:
    """A call at a time."""
    lock = threading.Lock()

    def call(texts: Texts) -> Any:
        with lock:
            return encode(texts)

    return call


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def timed(
    encode: Callable[[Texts], Any], requests: Sequence[Texts], clients: int, clock: Callable[[], float]
) -> tuple[float, list[Any]]:
    """Seconds, and the vectors of each request."""
    began_s = clock()
    if clients == 1:
        found = [encode(each) for each in requests]
    else:
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(encode, requests))
    return clock() - began_s, found


def compare(
    name: str, ours: Ours, theirs: Callable[[Texts], Any], requests: Sequence[Texts], clients: int, limits: Any
) -> None:
    """Print a row: rates, and the median and the range of the ratios."""
    count = sum(map(len, requests))
    ratios, rates, clock = [], [], CLOCKS[limits.clock]
    for turn in range(limits.turns + 1):
        (our_s, found), (their_s, wanted) = (timed(each, requests, clients, clock) for each in (ours, theirs))
        if turn:  # the first one warms up
            ratios.append(their_s / our_s)
            rates.append((count / our_s, count / their_s))
    off = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))
    our_rate, their_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    print(
        f"| {name} | {our_rate:.1f} | {their_rate:.1f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) | {off:.1e} |",
        flush=True,
    )


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mini", help="of the model (default %(default)s)")
    parser.add_argument("--texts", type=int, default=256, help="in a turn (default %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of both, after one to warm up (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both (default %(default)s)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: of all threads, where others use the machine"
    )
    limits = parser.parse_args()
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        parser.error(f"there is no {error.name} to compare with: pip install -e '.[bench]'")

    torch.set_num_threads(limits.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / limits.size
        path.mkdir()
        build(limits.size, path)
        ours, model = Ours(path, limits.threads), SentenceTransformer(str(path), device="cpu")

        def theirs(texts: Texts) -> Any:
            torch.set_num_threads(limits.threads)  # of this thread
            return model.encode(list(texts), show_progress_bar=False)

        print(f"{limits.size}, {limits.texts} texts, {limits.threads} threads\n")
        print("| texts | ours, texts/s | sentence-transformers | ratio (range) | largest difference |")
        print("|---|---|---|---|---|")
        equal, mixed = (make_texts(limits.texts, mixed=each) for each in (False, True))
        compare("equal lengths, one request", ours, theirs, [equal], 1, limits)
        compare("mixed lengths, one request", ours, theirs, [mixed], 1, limits)
        small = [mixed[start : start + 4] for start in range(0, len(mixed), 4)]
        compare("mixed lengths, requests of 4 from 16 clients", ours, one_by_one(theirs), small, 16, limits)
        print(f"\n{100 * ours.padding():.1f} % of what ours computed was padding")
        ours.close()


if __name__ == "__main__":
    main()
