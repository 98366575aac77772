#!/usr/bin/env python3
"""Train the bundled demo model from scratch, on text that `demo_corpus` generates.

    python scripts/train_demo_model.py               trains for 100 minutes and writes core/models/demo
    python scripts/train_demo_model.py --fast        the same in 60, on a processor that multiplies bf16
    python scripts/train_demo_model.py --resume      goes on after Ctrl-C, a kill or a reboot
    python scripts/train_demo_model.py --fast --minutes 25 --start core/models/demo --seed 8
                                                     teaches a trained one what has changed in the text
    python scripts/train_demo_model.py --evaluate    asks what training never showed, and writes ANSWERS.md

The result is a tokenizer, a model and their settings in the layout of a Hugging Face checkpoint. The model is stored in
float32: it is small enough for that, and float32 is the type that every CPU computes quickly. Text and weights come
from one seed. A checkpoint is written every few minutes into a folder that git ignores; --out is written at the end
alone.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_training.batches import IGNORED, Batch, Lessons
from demo_training.checkpoint import State, read_checkpoint, write_checkpoint
from demo_training.evaluation import (
    WANTED,
    answer_calls,
    answer_cases,
    answer_groups,
    answerer,
    count_calls,
    page,
)  # fmt: skip
from demo_training.network import build_model, build_tokenizer, save, wrap
from demo_training.optimizers import build_optimizers, learning_rate, update
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
KEPT = ".training/demo/checkpoint.pt"
REPORT_EVERY = 20


class Training:
    """A model, what changes it, and how far that has come."""

    def __init__(self, state: State, tokenizer: PreTrainedTokenizerFast, limits: argparse.Namespace) -> None:
        self.state = state
        self.tokenizer = tokenizer
        self.limits = limits
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: LlamaForCausalLM = build_model(tokenizer).to(self.device).train()
        body = self.model.model
        self.body: Callable[..., Any] = torch.compile(body, dynamic=False) if limits.fast else body
        self.optimizers = build_optimizers(self.model, torch.bfloat16 if limits.fast else torch.float32)
        self.lessons = Lessons(tokenizer, state.seed, state.tokens)
        self.interrupted = False

    @classmethod
    def begin(cls, limits: argparse.Namespace) -> Training:
        """A new one."""
        return cls(State(limits.seed, limits.tokens), build_tokenizer(limits.seed), limits)

    @classmethod
    def start(cls, limits: argparse.Namespace) -> Training:
        """One that keeps the tokenizer and the weights in `limits.start`."""
        tokenizer = Tokenizer.from_file(str(limits.start / "tokenizer.json"))
        training = cls(State(limits.seed, limits.tokens, began=limits.began), wrap(tokenizer), limits)
        training.model.load_state_dict(LlamaForCausalLM.from_pretrained(limits.start).state_dict())
        return training

    @classmethod
    def go_on(cls, limits: argparse.Namespace) -> Training:
        """The one that was interrupted; its seed and tokens per step are the checkpoint's."""
        state, content = read_checkpoint(limits.checkpoint)
        training = cls(state, wrap(Tokenizer.from_str(content["tokenizer"])), limits)
        training.model.load_state_dict(content["model"])
        for optimizer, kept in zip(training.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        return training

    @property
    def progress(self) -> float:
        """The share of training that is over, 0 to 1."""
        by_time = self.state.elapsed_s / (60 * self.limits.minutes)
        over = max(by_time, self.state.step / self.limits.steps if self.limits.steps else 0.0)
        return min(1.0, self.state.began + (1 - self.state.began) * over)

    def interrupt(self, *_: object) -> None:
        """Stop after the step that is under way."""
        self.interrupted = True

    def run(self) -> bool:
        """Train to the end, or until interrupted; whether the end was reached."""
        began, kept = time.monotonic() - self.state.elapsed_s, time.monotonic()
        while self.progress < 1 and not self.interrupted:
            loss = self._step(self.lessons.batch(self.state.step, self.progress))
            self.state.step += 1
            self.state.average = loss if self.state.step == 1 else 0.95 * self.state.average + 0.05 * loss
            self.state.elapsed_s = time.monotonic() - began
            if self.state.step % REPORT_EVERY == 1:
                self._report()
            if time.monotonic() - kept > 60 * self.limits.save_every:
                self.keep()
                kept = time.monotonic()
        self._report()
        return self.progress >= 1

    def keep(self) -> None:
        """Write the checkpoint."""
        text = self.tokenizer.backend_tokenizer.to_str()
        write_checkpoint(self.limits.checkpoint, self.state, text, self.model, self.optimizers)

    def _step(self, batch: Batch) -> float:
        ids, labels, positions, mask = (tensor.to(self.device) for tensor in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.limits.fast):
            hidden = self.body(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)[0]
            wanted = labels != IGNORED
            loss = nn.functional.cross_entropy(self.model.lm_head(hidden[wanted]).float(), labels[wanted])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        update(self.optimizers, learning_rate(self.progress))
        return loss.item()

    def _report(self) -> None:
        state = self.state
        print(
            f"step {state.step}, {100 * self.progress:.1f} %, loss {state.average:.4f}, "
            f"{state.elapsed_s / 60:.1f} min ({state.elapsed_s / max(1, state.step):.2f} s a step)",
            flush=True,
        )


def train(limits: argparse.Namespace) -> None:
    """Begin or go on; write the model at the end, or the checkpoint when interrupted."""
    torch.manual_seed(limits.seed)
    torch.set_num_threads(limits.threads)
    begin = Training.go_on if limits.resume else Training.start if limits.start else Training.begin
    training = begin(limits)
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(training.tokenizer)} tokens", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, training.interrupt)
    if not training.run():
        training.keep()
        print(f"stopped; --resume goes on from {limits.checkpoint}", flush=True)
        return
    save(training.model, training.tokenizer, limits.out)
    limits.checkpoint.unlink(missing_ok=True)
    print(f"written to {limits.out}; --evaluate measures it", flush=True)


def evaluate(limits: argparse.Namespace) -> None:
    """Ask the model in --out, print answers and score, and write both beside it."""
    torch.set_num_threads(limits.threads)
    model = LlamaForCausalLM.from_pretrained(limits.out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(limits.out)
    answers, calls = answerer(model, tokenizer), answer_calls(model, tokenizer)
    answered = answer_cases(answers)
    for good, asked, answer in [
        *((case.rule.holds(answer), " / ".join(case.turns), answer) for case, answer in answered),
        *((case.right(answer), f"{case.messages[-1].text} -> {case.wanted}", answer) for case, answer in calls),
    ]:
        print(f"{'ok   ' if good else 'WRONG'} {asked}\n      {answer!r}", flush=True)
    for name, (right, of) in count_calls(calls).items():
        print(f"{name}: {right} of {of}", flush=True)
    good = sum(case.rule.holds(answer) for case, answer in answered)
    print(f"{good} of {len(answered)} sensible ({WANTED} wanted)", flush=True)
    (limits.out / "ANSWERS.md").write_text(page(answered, answer_groups(answers), calls), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "core" / "models" / "demo", help="folder of the model")
    parser.add_argument("--minutes", type=float, default=100.0, help="of training in all (default %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="end after so many, whatever the time")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step, at first (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--fast", action="store_true", help="bf16 products, and code compiled for it (a minute more)")
    parser.add_argument("--seed", type=int, default=7, help="seed of text and weights (default %(default)s)")
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes between checkpoints (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / KEPT, help="file to keep for --resume")
    parser.add_argument("--start", type=Path, default=None, help="folder of a trained model to start with")
    parser.add_argument(
        "--began", type=float, default=0.7, metavar="SHARE",
        help="where in the schedule --start begins, 0 to 1: later is gentler, for small changes (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --out instead of training one")
    return parser


def main() -> None:
    """Read the options and train, or evaluate."""
    parser = _parser()
    limits = parser.parse_args()
    if limits.minutes <= 0 or (limits.steps is not None and limits.steps < 1) or limits.tokens < 1:
        parser.error("--minutes must be above 0, --steps and --tokens at least 1")
    if not 0 <= limits.began < 1:
        parser.error("--began must be from 0 up to 1")
    if limits.evaluate:
        evaluate(limits)
    elif limits.resume and limits.start:
        parser.error("--start is for a new training, --resume for one that was interrupted; give one of them")
    elif limits.start and not (limits.start / "model.safetensors").is_file():
        parser.error(f"there is no model in {limits.start}")
    elif limits.resume and not limits.checkpoint.is_file():
        parser.error(f"there is no checkpoint at {limits.checkpoint}; leave out --resume to begin")
    elif not limits.resume and limits.checkpoint.exists():
        parser.error(f"{limits.checkpoint} is of an interrupted training: --resume goes on; delete it to begin anew")
    else:
        train(limits)


if __name__ == "__main__":
    main()
