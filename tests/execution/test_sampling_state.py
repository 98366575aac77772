"""Seeds, and the counts that penalties keep per sequence."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import torch

from core.execution.sampler import Sampler, SamplingRow, derive_seed, fresh_seed
from core.execution.sampling.logit_edits import TokenCounts
from core.execution.sampling.random import uniforms
from core.request import MAX_SEED, SamplingParams

CPU = torch.device("cpu")
GOLDEN_UNIFORM = 0.6524484863740322
GOLDEN_CHILD = 7776600003938832346
PENALTIES = SamplingParams(temperature=1.0, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.4)


def generate(sampler, logits_at, row_params, seed, prompt, steps, forget_at=()):
    output = []
    for step in range(steps):
        if step in forget_at:
            sampler.forget([1])
        row = SamplingRow(1, row_params, seed, len(prompt) + len(output), prompt, output)
        output.append(sampler.sample(logits_at(step), [row])[0].token_id)
    return output


def logits_at(step):
    return torch.randn(1, 60, generator=torch.Generator().manual_seed(step))


def test_same_seed_same_tokens_also_after_state_was_dropped():
    prompt = [3, 4, 5, 3]
    first = generate(Sampler(60, CPU), logits_at, PENALTIES, 17, prompt, 60)
    assert generate(Sampler(60, CPU), logits_at, PENALTIES, 17, prompt, 60) == first
    assert generate(Sampler(60, CPU), logits_at, PENALTIES, 17, prompt, 60, forget_at=(5, 30, 31)) == first
    assert generate(Sampler(60, CPU), logits_at, PENALTIES, 18, prompt, 60) != first


def test_counts_follow_the_output_incrementally():
    rng = random.Random(5)
    prompt = [rng.randrange(300) for _ in range(50)]
    counts, output = TokenCounts(prompt, 300), []
    for _ in range(40):
        output += [rng.randrange(300) for _ in range(rng.randrange(1, 9))]
        counts.extend(output)
        expected = {**dict.fromkeys(prompt, 0), **Counter(output)}
        assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == expected


def test_counts_ignore_ids_beyond_the_vocabulary():
    counts = TokenCounts([1, 99], 50)
    counts.extend([2, 77])
    assert counts.ids.tolist() == [1, 2]


def test_counts_restart_when_the_output_shrank():
    sampler, params = Sampler(60, CPU), SamplingParams(temperature=0, frequency_penalty=2.0)
    logits = torch.zeros(1, 60)
    logits[0, 7] = 3.0
    assert sampler.sample(logits, [SamplingRow(1, params, 0, 4, [1], [7, 7])])[0].token_id != 7
    assert sampler.sample(logits, [SamplingRow(1, params, 0, 2, [1], [])])[0].token_id == 7


def test_state_is_held_only_for_those_who_need_it_and_until_forgotten():
    sampler = Sampler(60, CPU)
    cases = [SamplingParams(top_p=0.5), PENALTIES, SamplingParams(logit_bias={1: 1.0}), SamplingParams(temperature=0)]
    sampler.sample(torch.zeros(4, 60), [SamplingRow(i, params, 0, 0) for i, params in enumerate(cases)])
    editor = sampler._editor
    assert (list(editor._counts), list(editor._biases)) == ([1], [2])
    sampler.forget([0, 1, 2, 3, 99])
    assert not editor._counts and not editor._biases


def test_reused_sequence_id_with_another_bias_reads_the_new_one():
    sampler = Sampler(60, CPU)
    for token in (5, 6):
        params = SamplingParams(temperature=0, logit_bias={token: 10.0})
        assert sampler.sample(torch.zeros(1, 60), [SamplingRow(1, params, 0, 0)])[0].token_id == token


def test_uniforms_are_uniform_and_uncorrelated():
    count = 100_000
    for values in (uniforms([42] * count, range(count)), uniforms(range(count), [7] * count)):
        assert values.min() >= 0
        assert values.max() < 1
        histogram = np.histogram(values, bins=100, range=(0, 1))[0]
        assert ((histogram - count / 100) ** 2 / (count / 100)).sum() < 99 + 5 * np.sqrt(198)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    neighbours = uniforms([1] * count, range(count)), uniforms([2] * count, range(count))
    assert abs(np.corrcoef(*neighbours)[0, 1]) < 0.02


def test_uniforms_are_stable_across_versions_and_batches():
    alone = [uniforms([seed], [position])[0] for seed, position in ((0, 0), (-1, 5), (MAX_SEED, 10**6))]
    assert uniforms([0, -1, MAX_SEED], [0, 5, 10**6]).tolist() == alone
    assert alone[0] == GOLDEN_UNIFORM
    assert derive_seed(1, 0) == GOLDEN_CHILD


def test_children_have_seeds_of_their_own():
    seeds = {derive_seed(seed, index) for seed in (*range(-50, 50), MAX_SEED, -MAX_SEED - 1) for index in range(128)}
    assert len(seeds) == 102 * 128
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert len({fresh_seed() for _ in range(100)}) == 100
