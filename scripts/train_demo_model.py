#!/usr/bin/env python3
"""Train the bundled demo model from scratch, on text that `demo_corpus` generates.

    python scripts/train_demo_model.py --out core/models/demo

writes the tokenizer, the model and their settings in the layout of a Hugging Face checkpoint. The model is stored in
float32: it is small enough for that, and float32 is the type that every CPU computes quickly. Everything is seeded.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import demo_corpus as corpus
import torch
from demo_corpus.heldout import evaluate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 2048
SHORT, LONG = 256, 1024
IGNORED = -100
FOCUS_FROM = 0.5  # the share of training after which the mix leans to what takes longest to learn
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}{{ '<|system|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% else %}{{ '<|user|>' }}{% endif %}"
    "{{ (message['content'] or '') | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(seed: int, documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives it, and every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=corpus.SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = ("".join(text for text, _ in segments) for segments in islice(corpus.documents(seed), documents))
    marks = str.maketrans({"<": "\n", ">": "\n", "|": "\n"})
    tokenizer.train_from_iterator((text.translate(marks) for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BOS} $A", special_tokens=[(corpus.BOS, tokenizer.token_to_id(corpus.BOS))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=corpus.BOS,
        eos_token=corpus.END,
        pad_token=corpus.PAD,
        additional_special_tokens=[corpus.SYSTEM, corpus.USER, corpus.ASSISTANT],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model: Llama-shaped, six layers, grouped-query attention, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.3,
        top_p=0.9,
        max_new_tokens=256,
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, segments: corpus.Segments) -> tuple[list[int], list[int]]:
    """Token ids of a document, and the labels: the ids that the model has to write, `IGNORED` elsewhere."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in segments:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        labels += tokens if learnt else [IGNORED] * len(tokens)
    return ids, labels


def rows(
    documents: Iterator[corpus.Segments], tokenizer: PreTrainedTokenizerFast, length: int
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Documents packed into rows of one length: ids, labels, and the number of the document within the row."""
    ids: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    count = 0
    for segments in documents:
        new_ids, new_labels = encode(tokenizer, segments)
        new_ids, new_labels = new_ids[:length], new_labels[:length]
        if len(ids) + len(new_ids) > length:
            gap = length - len(ids)
            yield ids + [tokenizer.pad_token_id] * gap, labels + [IGNORED] * gap, owner + [count] * gap
            ids, labels, owner, count = [], [], [], 0
        ids += new_ids
        labels += new_labels
        owner += [count] * len(new_ids)
        count += 1


def batches(
    documents: Iterator[corpus.Segments], tokenizer: PreTrainedTokenizerFast, length: int, tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, shifted labels, positions that restart with each document, and the mask that keeps documents apart."""
    stream = rows(documents, tokenizer, length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    index = torch.arange(length)
    while True:
        packed = torch.tensor(list(islice(stream, max(1, tokens // length))))
        ids, labels, owner = packed.unbind(1)
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
        same = owner[:, :, None] == owner[:, None, :]
        starts = torch.where(torch.nn.functional.pad(owner[:, 1:] != owner[:, :-1], (1, 0), value=True), index, 0)
        positions = index - starts.cummax(1).values
        yield ids, labels, positions, (same & causal)[:, None]


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised, in float32; for weight matrices. Equal shapes share a product."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every matrix."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, members in shapes.items():
                updates = []
                for parameter in members:
                    state = self.state[parameter]
                    buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                steps = self._orthogonal(torch.stack(updates))
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for parameter, step in zip(members, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).add_(step, alpha=-scale)

    @staticmethod
    def _orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
        """The nearest matrices with orthogonal rows, by a Newton-Schulz iteration."""
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(rounds):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if tall else x


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate(progress: float) -> float:
    """Warm-up, then a long cosine down to zero, as a fraction of the peak."""
    return min(1.0, progress / 0.01 + 0.02) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint, under names that older releases of transformers read as well."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")
    for file in out.iterdir():
        file.chmod(0o644)


def begin(arguments: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A new tokenizer and model, or those of a checkpoint to go on from."""
    if not arguments.resume:
        tokenizer = build_tokenizer(arguments.seed)
        return tokenizer, build_model(tokenizer)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.resume)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = build_model(tokenizer)
    model.load_state_dict(LlamaForCausalLM.from_pretrained(arguments.resume).state_dict())
    return tokenizer, model


def update(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of every optimizer at a fraction of its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train(arguments: argparse.Namespace) -> None:
    """Build everything, run the training loop, and write the checkpoint now and then and at the end."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = begin(arguments)
    model.to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    optimizers = build_optimizers(model)
    short = batches(corpus.documents(arguments.seed + 1), tokenizer, SHORT, arguments.tokens)
    focus = batches(corpus.documents(arguments.seed + 3, focus=True), tokenizer, SHORT, arguments.tokens)
    long = batches(corpus.long_documents(arguments.seed + 2), tokenizer, LONG, arguments.tokens)
    began = saved = time.monotonic()
    step, average = 0, 0.0
    while step < arguments.steps:
        elapsed = (time.monotonic() - began) / 60
        done = max(step / arguments.steps, elapsed / arguments.minutes if arguments.minutes else 0.0)
        progress = arguments.start + (1 - arguments.start) * done
        if progress >= 1:
            break
        stream = long if step % 16 == 15 else focus if progress > FOCUS_FROM else short
        ids, labels, positions, mask = (t.to(device) for t in next(stream))
        hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)[0]
        wanted = labels != IGNORED
        loss = nn.functional.cross_entropy(model.lm_head(hidden[wanted]).float(), labels[wanted])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update(optimizers, learning_rate(progress))
        step += 1
        average = loss.item() if step == 1 else 0.95 * average + 0.05 * loss.item()
        if step % 20 == 0 or step == 1:
            rate = step * arguments.tokens / (time.monotonic() - began)
            print(
                f"step {step} {100 * progress:.1f}% loss {average:.4f} {rate:.0f} tok/s {elapsed:.1f} min", flush=True
            )
        if time.monotonic() - saved > 60 * arguments.save_every:
            save(model, tokenizer, arguments.out)
            saved = time.monotonic()
    save(model, tokenizer, arguments.out)
    print(f"done: {step} steps in {(time.monotonic() - began) / 60:.1f} min, loss {average:.4f}", flush=True)


def main() -> None:
    """Read the options and train."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root / "core" / "models" / "demo", help="folder to write")
    parser.add_argument("--steps", type=int, default=2600, help="optimizer steps at most (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=None, help="stop after this time; the schedule follows it")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument(
        "--save-every", type=float, default=4.0, help="minutes between checkpoints (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=7, help="seed of corpus and weights (default %(default)s)")
    parser.add_argument("--resume", type=Path, default=None, help="checkpoint to go on from (default: none)")
    parser.add_argument("--start", type=float, default=0.0, help="point of the schedule to begin at, 0 to 1")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out instead of training one")
    arguments = parser.parse_args()
    if arguments.evaluate:
        torch.set_num_threads(arguments.threads)
        evaluate(
            LlamaForCausalLM.from_pretrained(arguments.out), PreTrainedTokenizerFast.from_pretrained(arguments.out)
        )
        return
    train(arguments)


if __name__ == "__main__":
    main()
