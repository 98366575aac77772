"""The sampler against slow references: a float64 one written per row, and Hugging Face's own processors."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.errors import StepFailedError
from core.execution.sampler import NonFiniteLogitsError, Sampler, SamplingRow, prompt_logprobs
from core.execution.sampling import draws
from core.execution.sampling.draws import Filters, draw_filtered, to_host
from core.execution.sampling.random import uniforms
from core.request import SamplingParams

CPU = torch.device("cpu")


def make_row(params, seq_id=0, seed=1, position=10, prompt=(), output=(), suppress=()):
    return SamplingRow(seq_id, params, seed, position, prompt, output, suppress)


def random_logits(rows, vocab_size, seed=0, scale=3.0):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def row_over(logits, params, seed=1):
    """A row whose context holds some of the likeliest tokens, so that penalties matter."""
    best = logits.argsort(descending=True).tolist()
    prompt = [best[1], best[2], best[2], best[20], best[39]]
    return make_row(params, seed=seed, prompt=prompt, output=[best[3]] * 3 + [best[2], best[4]], suppress=(best[0], 11))


def reference_probs(logits, row):
    """Distribution of one row in float64, one rule after another, tokens in order of id."""
    params = row.params
    x = logits.double().clone()
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in row.suppress_token_ids:
        x[token] = -math.inf
    for token in set(row.prompt_token_ids) | set(row.output_token_ids):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(row.output_token_ids):
        x[token] -= params.frequency_penalty * list(row.output_token_ids).count(token) + params.presence_penalty
    if params.temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(), len(x)).double()
    probs = torch.softmax(x / params.temperature, 0)
    probs[probs < params.min_p * probs.max()] = 0
    if 0 < params.top_k < len(x):
        probs[probs < probs.sort(descending=True).values[params.top_k - 1]] = 0
    probs /= probs.sum()
    if params.top_p < 1:
        order = probs.sort(descending=True, stable=True).indices
        kept, mass = [], 0.0
        for token in order.tolist():
            if mass >= params.top_p:
                break
            kept.append(token)
            mass += probs[token].item()
        mask = torch.zeros_like(probs)
        mask[kept] = 1
        probs = probs * mask
    return probs / probs.sum()


def counts_of(logits, row, draws=20_000, batch=500):
    """How often each token is drawn for consecutive positions."""
    vocab_size = logits.shape[0]
    sampler = Sampler(vocab_size, CPU)
    counts = np.zeros(vocab_size)
    for start in range(0, draws, batch):
        rows = [
            SamplingRow(
                0, row.params, row.seed, start + i, row.prompt_token_ids, row.output_token_ids, row.suppress_token_ids
            )
            for i in range(batch)
        ]
        for item in sampler.sample(logits.expand(batch, -1), rows):
            counts[item.token_id] += 1
    return counts


def assert_follows(counts, probs):
    """Pearson's chi-square within 5 standard deviations; nothing impossible is drawn."""
    probs = probs.numpy()
    assert counts[probs == 0].sum() == 0
    total = counts.sum()
    common = probs * total >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(probs[common], probs[~common].sum()) * total
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = max(1, len(expected) - 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


CASES = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=2.0),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.3),
    "all_filters": SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
    "bias": SamplingParams(logit_bias={3: 5.0, 4: -100.0, 39: 2.0}),
    "repetition": SamplingParams(repetition_penalty=1.7),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=0.8),
    "negative": SamplingParams(presence_penalty=-1.5, frequency_penalty=-0.5, repetition_penalty=0.8),
    "everything": SamplingParams(
        temperature=0.8, top_k=25, top_p=0.95, min_p=0.01, repetition_penalty=1.3, presence_penalty=0.5,
        frequency_penalty=0.3, logit_bias={0: 1.0, 7: -2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_reference_distribution(name):
    logits = random_logits(1, 40, seed=3, scale=2.0)[0]
    row = row_over(logits, CASES[name], seed=99)
    assert_follows(counts_of(logits, row), reference_probs(logits, row))


@pytest.mark.parametrize("vocab_size", [700, 1024, 5000])
def test_draws_follow_the_distribution_across_blocks(vocab_size):
    logits = random_logits(1, vocab_size, seed=4, scale=1.0)[0]
    row = make_row(SamplingParams(), seed=5)
    assert_follows(counts_of(logits, row, draws=40_000), reference_probs(logits, row))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("plain", "temperature", "hot")])
def test_each_parameter_changes_the_distribution(name):
    """Guards the test above: a parameter that were ignored would have to fail it."""
    logits = random_logits(1, 40, seed=3, scale=2.0)[0]
    without = reference_probs(logits, row_over(logits, SamplingParams()))
    assert (reference_probs(logits, row_over(logits, CASES[name])) - without).abs().max() > 0.01


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        (SamplingParams(top_p=0.8), [TopPLogitsWarper(0.8)]),
        (SamplingParams(top_k=30), [TopKLogitsWarper(30)]),
        (SamplingParams(min_p=0.05), [MinPLogitsWarper(0.05)]),
        (SamplingParams(temperature=0.7, top_k=100, top_p=0.9), "temperature"),
        (SamplingParams(min_p=0.02, top_k=50, top_p=0.95), "min_p"),
    ],
)
def test_support_equals_hugging_face_warpers(params, warpers):
    """Sweeping u over [0, 1) visits exactly the tokens which the warpers leave, in their proportions."""
    if warpers == "temperature":
        warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(100), TopPLogitsWarper(0.9)]
    elif warpers == "min_p":
        warpers = [MinPLogitsWarper(0.02), TopKLogitsWarper(50), TopPLogitsWarper(0.95)]
    vocab_size, num_uniform = 3000, 4000
    for seed in range(5):
        logits = random_logits(1, vocab_size, seed)
        expected = logits
        for warper in warpers:
            expected = warper(None, expected)
        expected = torch.softmax(expected, 1)[0].double()
        scaled = (logits / params.temperature).expand(num_uniform, -1)
        probs = torch.softmax(scaled, 1)
        tokens = draw_filtered(
            scaled, probs, draws.block_sums(probs).sum(1), torch.arange(num_uniform).double() / num_uniform,
            Filters.of([params] * num_uniform, vocab_size),
        )  # fmt: skip
        share = torch.bincount(tokens, minlength=vocab_size).double() / num_uniform
        assert (share - expected).abs().max() <= 1.01 / num_uniform
        assert share[expected == 0].sum() == 0


def test_repetition_penalty_equals_hugging_face():
    logits = random_logits(4, 500)
    prompts = [[random.Random(i).randrange(500) for _ in range(60)] for i in range(4)]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(prompts), logits).argmax(1)
    params = SamplingParams(temperature=0, repetition_penalty=1.3)
    rows = [make_row(params, i, prompt=prompts[i][:40], output=prompts[i][40:]) for i in range(4)]
    edited = Sampler(500, CPU)._edited(logits, rows)
    torch.testing.assert_close(edited, RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(prompts), logits))
    assert [item.token_id for item in Sampler(500, CPU).sample(logits, rows)] == expected.tolist()


def mixed_rows(count, vocab_size):
    rng = random.Random(7)
    cases = [*CASES.values(), SamplingParams(temperature=0), SamplingParams(temperature=0, repetition_penalty=1.5)]
    rows = []
    for i in range(count):
        params = cases[i % len(cases)]
        if rng.random() < 0.5:
            params = dataclasses.replace(params, logprobs=rng.randrange(8))
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 80))]
        output = [rng.randrange(vocab_size) for _ in range(rng.randrange(0, 80))]
        rows.append(make_row(params, i, rng.getrandbits(62), len(prompt) + len(output), prompt, output, (0, 5)))
    return rows


@pytest.mark.parametrize("vocab_size", [40, 3001, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(vocab_size, dtype):
    rows = mixed_rows(48, vocab_size)
    logits = random_logits(48, vocab_size).to(dtype)
    together = Sampler(vocab_size, CPU).sample(logits, rows)
    order = list(range(48))
    random.Random(1).shuffle(order)
    shuffled = Sampler(vocab_size, CPU).sample(logits[order], [rows[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(48)] == together
    sampler = Sampler(vocab_size, CPU)
    assert [sampler.sample(logits[i : i + 1], [rows[i]])[0] for i in range(48)] == together


def test_candidates_give_the_token_of_a_full_sort():
    vocab_size = 12_000
    rng = random.Random(3)
    params = [
        SamplingParams(
            temperature=1.0, top_k=rng.choice([0, 1, 10, 64, 65, 500, 11_999]),
            top_p=rng.choice([1.0, 0.999, 0.9, 0.5, 0.01]), min_p=rng.choice([0.0, 0.0, 0.001, 0.2]),
        )
        for _ in range(300)
    ]  # fmt: skip
    scales = torch.tensor([rng.choice([0.0, 0.1, 1.0, 4.0, 20.0]) for _ in params])
    for dtype in (torch.float32, torch.bfloat16):  # bfloat16 has many equal logits
        logits = (random_logits(len(params), vocab_size, scale=1.0) * scales[:, None]).to(dtype).float()
        probs = torch.softmax(logits, 1)
        uniform = torch.from_numpy(uniforms(range(len(params)), [1] * len(params)))
        totals = draws.block_sums(probs).cumsum(1)[:, -1]
        results = [
            draw_filtered(logits, probs, totals, uniform, Filters.of(params, vocab_size), tiers).tolist()
            for tiers in ((), (64,), (64, 1024), draws.CANDIDATE_TIERS, (4, 300, 5000))
        ]
        assert all(result == results[0] for result in results)


@pytest.mark.parametrize("count", [1, 20, 64, 257, 8192, 20_000])
@pytest.mark.parametrize("distinct", [3, 100, 10**9])
def test_largest_is_ordered_by_value_then_column(count, distinct):
    values = (torch.rand(3, 20_000, generator=torch.Generator().manual_seed(0)) * distinct).floor() / distinct
    values[1] = -values[1]
    values[2, ::7] = -math.inf
    top, columns = draws.largest(values, count)
    expected = values.sort(dim=1, descending=True, stable=True)
    assert torch.equal(top, expected.values[:, :count])
    assert torch.equal(values.gather(1, columns), top)
    strictly_inside = top > top[:, -1:]
    assert torch.equal(columns[strictly_inside], expected.indices[:, :count][strictly_inside])
    if count == 20_000:
        assert torch.equal(columns, expected.indices)


def test_equal_logits_top_p_keeps_the_smallest_set_of_lowest_ids():
    row = make_row(SamplingParams(top_p=0.5))
    assert counts_of(torch.zeros(10), row, draws=2000)[5:].sum() == 0
    assert (counts_of(torch.zeros(10), row, draws=2000)[:5] > 0).all()


def test_top_p_zero_leaves_the_likeliest_token():
    logits = random_logits(1, 30_000)
    row = make_row(SamplingParams(top_p=0.0, temperature=2.0))
    assert counts_of(logits[0], row, draws=50).argmax() == logits[0].argmax()
    assert (counts_of(logits[0], row, draws=50) > 0).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_maximum(dtype):
    logits = torch.zeros(3, 4000, dtype=dtype)
    logits[0, [100, 3000]] = 1
    logits[1, 3999] = 2
    rows = [make_row(SamplingParams(temperature=0), i) for i in range(3)]
    assert [item.token_id for item in Sampler(4000, CPU).sample(logits, rows)] == [100, 3999, 0]


def test_tiny_temperature_is_greedy_and_small_ones_do_not_overflow():
    logits = random_logits(2, 1000, scale=50)
    rows = [make_row(SamplingParams(temperature=value), i) for i, value in enumerate((1e-40, 1e-4))]
    assert [item.token_id for item in Sampler(1000, CPU).sample(logits, rows)] == logits.argmax(1).tolist()


def test_never_draws_an_impossible_token():
    logits = torch.full((64, 2000), -math.inf)
    logits[:, 1234] = 0.0
    logits[:, 700] = -120.0  # underflows to probability zero
    for params in (SamplingParams(), SamplingParams(top_p=0.99), SamplingParams(top_k=2), SamplingParams(min_p=1e-9)):
        rows = [make_row(params, i, seed=i) for i in range(64)]
        assert {item.token_id for item in Sampler(2000, CPU).sample(logits, rows)} == {1234}


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("vocab_size", [3, 512, 513, 1500])
def test_extreme_uniforms_stay_on_possible_tokens(uniform, vocab_size):
    weights = torch.zeros(1, vocab_size)
    weights[0, 1 : vocab_size - 1] = 0.1
    drawn = draws.draw_by_weight(weights, draws.block_sums(weights), torch.tensor([uniform], dtype=torch.float64))
    assert 1 <= drawn.item() < vocab_size - 1
    if uniform in (0.0, 1 - 2.0**-53):
        assert drawn.item() == (1 if uniform == 0.0 else vocab_size - 2)


def test_padding_of_the_vocabulary_is_never_chosen():
    logits = random_logits(8, 100)
    padded = torch.cat((logits, torch.full((8, 28), 50.0)), dim=1)
    for params in (SamplingParams(temperature=0, logprobs=3), SamplingParams(logprobs=3), SamplingParams(top_p=0.9)):
        rows = [make_row(params, i, seed=i) for i in range(8)]
        sampler = Sampler(100, CPU)
        assert sampler.sample(padded, rows) == sampler.sample(logits, rows)


def test_caller_keeps_its_logits():
    logits = random_logits(16, 3000)
    before = logits.clone()
    Sampler(3000, CPU).sample(logits, mixed_rows(16, 3000))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.9, logprobs=2)]
)
def test_bad_logits_fail_by_name_and_leave_the_others_samplable(bad, params):
    logits = random_logits(4, 2000)
    logits[2, 1999] = bad
    rows = [make_row(params, seq_id=10 + i, seed=i) for i in range(4)]
    sampler = Sampler(2000, CPU)
    with pytest.raises(NonFiniteLogitsError, match="sequence 12") as error:
        sampler.sample(logits, rows)
    assert isinstance(error.value, StepFailedError)
    assert error.value.seq_ids == (12,)
    good = [0, 1, 3]
    alone = [Sampler(2000, CPU).sample(logits[i : i + 1], [rows[i]])[0] for i in good]
    assert sampler.sample(logits[good], [rows[i] for i in good]) == alone


def test_suppressing_every_token_fails():
    row = make_row(SamplingParams(), suppress=tuple(range(5)))
    with pytest.raises(NonFiniteLogitsError):
        Sampler(5, CPU).sample(torch.zeros(1, 5), [row])


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Sampler(5, CPU).sample(torch.zeros(2, 5), [make_row(SamplingParams())])
    assert Sampler(5, CPU).sample(torch.zeros(0, 5), []) == []


@pytest.mark.parametrize("changes", [{"temperature": 0}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_logprobs_are_of_the_raw_distribution(changes):
    params = SamplingParams(**changes, logprobs=4, logit_bias={7: 100.0})
    logits = random_logits(5, 900)
    raw = torch.log_softmax(logits.double(), 1)
    for item, expected in zip(
        Sampler(900, CPU).sample(logits, [make_row(params, i) for i in range(5)]), raw, strict=True
    ):
        assert item.token_id == item.logprob.token_id == 7
        assert item.logprob.logprob == pytest.approx(expected[7].item(), abs=1e-5)
        best = expected.topk(4)
        assert [token for token, _ in item.logprob.top] == best.indices.tolist()
        assert [value for _, value in item.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_zero_reports_the_token_alone_and_none_reports_nothing():
    rows = [make_row(SamplingParams(logprobs=value), i) for i, value in enumerate((0, None, 20))]
    first, second, third = Sampler(50, CPU).sample(random_logits(3, 50), rows)
    assert first.logprob.top == ()
    assert second.logprob is None
    assert len(third.logprob.top) == 20


def test_logprobs_of_a_tiny_vocabulary_and_impossible_tokens_are_finite():
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    item = Sampler(3, CPU).sample(logits, [make_row(SamplingParams(temperature=0, logprobs=20))])[0]
    assert [token for token, _ in item.logprob.top] == [2, 0, 1]
    assert item.logprob.top[-1][1] == -9999.0


def test_prompt_logprobs_in_chunks(monkeypatch):
    logits = random_logits(37, 600)
    tokens = torch.randint(0, 600, (37,), generator=torch.Generator().manual_seed(1))
    whole = prompt_logprobs(logits, tokens, 3)
    monkeypatch.setattr("core.execution.sampling.logprobs.CHUNK_ELEMENTS", 600 * 5)
    assert prompt_logprobs(torch.cat((logits, torch.ones(37, 40)), 1), tokens, 3, vocab_size=600) == whole
    expected = torch.log_softmax(logits.double(), 1)
    for record, row, token in zip(whole, expected, tokens.tolist(), strict=True):
        assert record.token_id == token
        assert record.logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert [item for item, _ in record.top] == row.topk(3).indices.tolist()
    assert prompt_logprobs(logits[:0], tokens[:0], 3) == []
    logits[20, 5] = math.nan
    with pytest.raises(StepFailedError):
        prompt_logprobs(logits, tokens, 0)


def test_chunks_do_not_change_anything(monkeypatch):
    rows, logits = mixed_rows(40, 2000), random_logits(40, 2000)
    whole = Sampler(2000, CPU).sample(logits, rows)
    monkeypatch.setattr("core.execution.sampling.logprobs.CHUNK_ELEMENTS", 6000)
    assert Sampler(2000, CPU).sample(logits, rows) == whole


@pytest.mark.parametrize("asks", [0, 3])
def test_a_batch_comes_to_the_host_at_once(monkeypatch: pytest.MonkeyPatch, asks: int) -> None:
    """However many chunks it is computed in, and whatever is asked of it."""
    fetched = []

    def counted(*tensors: torch.Tensor) -> list[torch.Tensor]:
        fetched.append(len(tensors))
        return to_host(*tensors)

    monkeypatch.setattr("core.execution.sampling.logprobs.CHUNK_ELEMENTS", 600 * 2)
    monkeypatch.setattr("core.execution.sampler.to_host", counted)
    rows = [
        SamplingRow(i, SamplingParams(temperature=0.7, top_p=0.9, logprobs=2 if i < asks else None), i, 5)
        for i in range(7)
    ]
    logits = torch.randn(7, 600, generator=torch.Generator().manual_seed(0))
    tokens = Sampler(600, torch.device("cpu")).sample(logits, rows)
    assert len(fetched) == 1
    assert [token.logprob is not None for token in tokens] == [i < asks for i in range(7)]


def test_tensors_of_all_kinds_travel_in_one_copy() -> None:
    class Elsewhere(torch.Tensor):
        """A tensor that says it is on a GPU."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    tensors = [torch.arange(5), torch.rand(2, 3), torch.zeros(0, dtype=torch.int32)]
    first = tensors[0].as_subclass(Elsewhere)
    for part, tensor in zip(to_host(first, *tensors[1:]), tensors, strict=True):
        assert part.dtype == tensor.dtype
        assert torch.equal(part.as_subclass(torch.Tensor), tensor)
