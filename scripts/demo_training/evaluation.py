"""What share of the questions that training never showed a model answers sensibly, and the page that says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from demo_corpus.heldout import CASES, Case, groups
from demo_corpus.heldout_calls import CALL_CASES, CallCase

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WANTED = 32
"""Cases of `CASES` that a model to be shipped answers sensibly."""
_AT_ONCE = 32
_LONGEST = 160

Writer = Callable[[Sequence[str]], list[str]]
"""From prompts, as the chat template renders them, to what the model writes."""
Answerer = Callable[[Sequence[Sequence[dict[str, str]]]], list[str]]
"""From conversations to the answers to their last turns."""


def writer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Writer:
    """The model's likeliest continuations, computed several at a time."""
    model.eval()

    def continuations(prompts: Sequence[str]) -> list[str]:
        found: list[str] = []
        for begin in range(0, len(prompts), _AT_ONCE):
            texts = list(prompts[begin : begin + _AT_ONCE])
            batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
            tokens = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=_LONGEST,
                do_sample=False,
                temperature=None,
                top_p=None,
            )
            found += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    return continuations


def _prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def answerer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Answerer:
    """The model's likeliest answers."""
    write = writer(model, tokenizer)
    return lambda conversations: write([_prompt(tokenizer, talk) for talk in conversations])


def answer_calls(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[tuple[CallCase, str]]:
    """What the model writes where it is offered functions or asked for JSON."""
    prompts = [
        _prompt(
            tokenizer,
            [message.openai() for message in case.messages],
            tools=[tool.schema() for tool in case.tools] or None,
        )
        for case in CALL_CASES
    ]
    return list(zip(CALL_CASES, writer(model, tokenizer)(prompts), strict=True))


def count_calls(answered: Sequence[tuple[CallCase, str]]) -> dict[str, tuple[int, int]]:
    """By group of `CALL_CASES`: how many answers are right, and of how many."""
    counts: dict[str, tuple[int, int]] = {}
    for case, answer in answered:
        right, of = counts.get(case.kind, (0, 0))
        counts[case.kind] = (right + case.right(answer), of + 1)
    return counts


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


def page(
    answered: Sequence[tuple[Case, str]],
    counts: dict[str, tuple[int, int]],
    calls: Sequence[tuple[CallCase, str]] = (),
) -> str:
    """The cases, their rules and answers in Markdown, with the score first."""
    good = sum(case.rule.holds(answer) for case, answer in answered)
    lines = [
        "# What the demo model answers",
        "",
        f"Questions that training never showed, answered greedily: {good} of {len(answered)} sensibly. Larger groups:",
        "",
        "| group | right |",
        "|---|---|",
        *(f"| {name} | {right} of {of} |" for name, (right, of) in (counts | count_calls(calls)).items()),
        "",
        "An answer is sensible if it meets the rule of its question. A call is right if function and arguments are and",
        "nothing stands beside it; an object, if it parses and is the one that was asked for.",
        "This page is written by `python scripts/train_demo_model.py --evaluate`.",
    ]
    for kind in dict.fromkeys(case.kind for case, _ in answered):
        lines += ["", f"## {_heading(kind)}"]
        for case, answer in answered:
            if case.kind == kind:
                mark = "yes" if case.rule.holds(answer) else "**no**"
                lines += ["", f"**{' / '.join(case.turns)}** (sensible: {mark}; rule: {case.rule})", ""]
                lines += _quoted(answer)
    for kind in dict.fromkeys(case.kind for case, _ in calls):
        lines += ["", f"## {_heading(kind)}"]
        for case, answer in calls:
            if case.kind == kind:
                offered = ", ".join(f"`{tool.name}`" for tool in case.tools)
                said = " / ".join(message.text for message in case.messages if message.text)
                lines += ["", f"**{said}**{f' with {offered}' if offered else ''}", ""]
                lines += [f"Right: {'yes' if case.right(answer) else '**no**'}; wanted: `{case.wanted}`", ""]
                lines += _quoted(answer)
    return "\n".join(lines) + "\n"


def _heading(kind: str) -> str:
    return f"{kind[0].upper()}{kind[1:]}"


def _quoted(answer: str) -> list[str]:
    return [f"    {line}".rstrip() for line in answer.strip().splitlines()]
