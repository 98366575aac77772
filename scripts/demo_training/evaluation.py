"""What share of the questions that training never showed a model answers sensibly, and the page that says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from demo_corpus.heldout import CASES, Case, groups

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WANTED = 32
"""Cases of `CASES` that a model to be shipped answers sensibly."""
_AT_ONCE = 32
_LONGEST = 160

Answerer = Callable[[Sequence[Sequence[dict[str, str]]]], list[str]]
"""From conversations to the answers to their last turns."""


def answerer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Answerer:
    """The model's likeliest answers, computed several at a time."""
    model.eval()

    def answers(conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        found: list[str] = []
        for begin in range(0, len(conversations), _AT_ONCE):
            batch = tokenizer.apply_chat_template(
                [list(talk) for talk in conversations[begin : begin + _AT_ONCE]],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            tokens = model.generate(
                **batch.to(model.device), max_new_tokens=_LONGEST, do_sample=False, temperature=None, top_p=None
            )
            found += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    return answers


def answer_cases(answers: Answerer) -> list[tuple[Case, str]]:
    """Each case with the answer to its last turn; the earlier turns are answered by the model as well."""
    talks: list[list[dict[str, str]]] = [[] for _ in CASES]
    last = [""] * len(CASES)
    for turn in range(max(len(case.turns) for case in CASES)):
        open_ones = [number for number, case in enumerate(CASES) if turn < len(case.turns)]
        for number in open_ones:
            talks[number].append({"role": "user", "content": CASES[number].turns[turn]})
        for number, answer in zip(open_ones, answers([talks[number] for number in open_ones]), strict=True):
            talks[number].append({"role": "assistant", "content": answer})
            last[number] = answer
    return list(zip(CASES, last, strict=True))


def answer_groups(answers: Answerer) -> dict[str, tuple[int, int]]:
    """By group: how many answers are right, and of how many."""
    counts = {}
    for name, asked in groups().items():
        found = answers([[{"role": "user", "content": question}] for question, _ in asked])
        right = [rule.holds(answer) for (_, rule), answer in zip(asked, found, strict=True)]
        counts[name] = (sum(right), len(right))
        for (question, _), answer, good in zip(asked, found, right, strict=True):
            if not good:
                print(f"  wrong: {question!r} -> {answer!r}", flush=True)
        print(f"{name}: {sum(right)} of {len(right)}", flush=True)
    return counts


def page(answered: list[tuple[Case, str]], counts: dict[str, tuple[int, int]]) -> str:
    """The cases, their rules and answers in Markdown, with the score first."""
    good = sum(case.rule.holds(answer) for case, answer in answered)
    lines = [
        "# What the demo model answers",
        "",
        f"Questions that training never showed, answered greedily: {good} of {len(answered)} sensibly. Larger groups:",
        "",
        "| group | right |",
        "|---|---|",
        *(f"| {name} | {right} of {of} |" for name, (right, of) in counts.items()),
        "",
        "An answer is sensible if it meets the rule of its question.",
        "This page is written by `python scripts/train_demo_model.py --evaluate`.",
    ]
    for kind in dict.fromkeys(case.kind for case, _ in answered):
        lines += ["", f"## {kind[0].upper()}{kind[1:]}"]
        for case, answer in answered:
            if case.kind == kind:
                mark = "yes" if case.rule.holds(answer) else "**no**"
                lines += ["", f"**{' / '.join(case.turns)}** (sensible: {mark}; rule: {case.rule})", ""]
                lines += [f"    {line}".rstrip() for line in answer.strip().splitlines()]
    return "\n".join(lines) + "\n"
