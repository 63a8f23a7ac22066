"""Sampling: what is drawn is what the parameters say, alone or in any batch, without asking the device."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import DEVICES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RepetitionPenaltyLogitsProcessor

from tinier.engine.drawing import keys, most_likely, noise
from tinier.engine.request import Request, SamplingParams
from tinier.engine.sampler import Sampler
from tinier.errors import InputError

VOCAB = 1003  # odd: rows begin anywhere in a vector register
CPU = torch.device("cpu")


def request(prompt: list[int] | None = None, **params: Any) -> Request:
    return Request(1, prompt or [1, 2, 3], SamplingParams(**params), 0.0)


def random_logits(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, VOCAB, generator=generator)).to(dtype)


def sample_one(logits: Tensor, asked: Request, position: int = 0) -> int:
    sampler = Sampler(logits.shape[-1], CPU)
    return int(sampler.sample(logits.unsqueeze(0), [asked], [position]).tokens)


def every_kind() -> list[Request]:
    """Requests of every combination of parameters that a batch may mix."""
    draws: dict[str, list[Any]] = {
        "temperature": [0.0, 0.7, 1.9], "top_k": [0, 5, 5000], "top_p": [1.0, 0.8], "min_p": [0.0, 0.02],
        "repetition_penalty": [1.0, 1.3], "logit_bias": [(), {7: 4.0, 8: -3.0}],
    }  # fmt: skip
    values = itertools.product(*draws.values())
    kinds = [dict(zip(draws, row, strict=True)) for row in values]
    random.Random(0).shuffle(kinds)
    return [
        request([i, i + 1], seed=i, presence_penalty=0.5 * (i % 3), min_tokens=i % 4,
                stop_token_ids=(i,), logprobs=i % 5 or None, **kind)
        for i, kind in enumerate(kinds[:90])
    ]  # fmt: skip


# --- drawing


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(2000, -1)
    requests = [request(temperature=1.0, top_p=0.9, seed=seed) for seed in range(2000)]
    draws = Sampler(4, CPU).sample(logits, requests, [0] * 2000).tokens
    shares = torch.bincount(draws, minlength=4) / len(draws)
    # top_p 0.9 keeps the first three
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.04)
    assert shares[3] == 0


def test_a_request_s_own_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    sampler, one = Sampler(3, CPU), request(temperature=2.0)
    draws = [int(sampler.sample(logits[None], [one], [i]).tokens) for i in range(3000)]
    expected = torch.softmax(logits / 2, dim=0)
    assert torch.allclose(torch.bincount(torch.tensor(draws)) / 3000, expected, atol=0.03)


def keys_of(seeds: list[int], positions: list[int]) -> Tensor:
    return torch.from_numpy(keys(np.array(seeds, np.uint64), np.array(positions, np.uint64)))


def test_the_noise_is_gumbel_s_and_independent() -> None:
    seeds = [seed for seed in range(40) for _ in range(40)]
    found = noise(keys_of(seeds, [*range(40)] * 40), VOCAB)
    shares = torch.histc(torch.exp(-torch.exp(-found.double())), 20, 0, 1) / found.numel()
    assert torch.allclose(shares, torch.full_like(shares, 0.05), atol=0.0005)
    normal = (found - found.mean()) / found.std()
    rows = normal.unflatten(0, (40, 40))
    for one, other in [
        (rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1]), (rows[..., 1:], rows[..., :-1]),
        (rows[1:, :, 1:], rows[:-1, :, :-1]),
    ]:  # fmt: skip
        assert abs((one * other).mean()) < 0.004


def test_models_of_nearly_one_mind_draw_the_same_token() -> None:
    logits = random_logits(1)[0]
    other = logits + 0.2 * random_logits(1, seed=1)[0] / 3
    requests = [request(temperature=1.0, seed=seed) for seed in range(2000)]
    drawn = [
        Sampler(VOCAB, CPU).sample(one.expand(2000, -1), requests, [0] * 2000).tokens
        for one in (logits, other)
    ]
    agreement = 1 - (torch.softmax(logits, 0) - torch.softmax(other, 0)).abs().sum() / 2
    same = (drawn[0] == drawn[1]).float().mean()
    # no coupling reaches more than one minus total variation; this one at least a / (2 - a)
    assert agreement / (2 - agreement) - 0.03 < same < agreement + 0.03


def naive_draw(logits: Tensor, params: SamplingParams, random: Tensor) -> int:
    """By a sort, in float64."""
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    _, order = logits.sort(descending=True, stable=True)
    ranked = probabilities[order]
    ranked[ranked < params.min_p * ranked[0]] = 0
    if params.top_k:
        ranked[params.top_k :] = 0
    ranked /= ranked.sum()
    ranked[ranked.cumsum(0) - ranked >= params.top_p] = 0
    kept = torch.zeros_like(ranked).index_copy_(0, order, ranked)
    return int((kept.log() + random.double()).argmax())


@pytest.mark.parametrize("seed", range(30))
def test_draws_are_those_of_a_sort(seed: int) -> None:
    choose = random.Random(seed)
    for position in range(20):
        params = SamplingParams(
            temperature=choose.choice([0.3, 1.0, 1.5, 10.0]), top_k=choose.choice([0, 1, 7, 400, 9999]),
            top_p=choose.choice([1.0, 0.95, 0.5, 1e-6]), min_p=choose.choice([0.0, 0.001, 0.3, 1.0]),
            seed=seed,
        )  # fmt: skip
        # rounded to bfloat16 there are ties
        dtype = choose.choice([torch.float32, torch.bfloat16])
        logits = random_logits(1, seed=100 * seed + position, dtype=dtype)[0].float()
        random_numbers = noise(keys_of([seed], [position]), VOCAB)[0]
        ours = sample_one(logits, Request(1, [1], params, 0.0), position)
        assert ours == naive_draw(logits, params, random_numbers)


@pytest.mark.parametrize("seed", range(20))
def test_the_most_likely_are_those_of_a_sort(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    largest = 10 if seed % 2 else 2**31 - 1
    ranks = torch.randint(largest, (5, VOCAB), generator=generator, dtype=torch.int32)
    masses = torch.randint(0, 2**40, (5, VOCAB), generator=generator)
    total = masses.sum(dim=1, keepdim=True)
    need = (total * torch.tensor([[0.001], [0.3], [0.9], [1.0], [2.0]])).long()
    kept = most_likely(ranks, masses, need)
    order = ranks.sort(dim=1, stable=True).indices
    sorted_masses = masses.gather(1, order)
    expected = (sorted_masses.cumsum(1) - sorted_masses) < torch.minimum(need, total)
    assert torch.equal(kept.gather(1, order), expected & kept.gather(1, order))
    # beyond what is needed nothing is kept but, at most, tokens without mass
    assert not (expected & ~kept.gather(1, order) & (sorted_masses > 0)).any()


def test_of_equal_tokens_the_lowest_ids_are_kept() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])

    def drawn(**params: float) -> set[int]:
        asked = [request(temperature=1.0, seed=i, **params) for i in range(200)]
        return set(Sampler(6, CPU).sample(logits.expand(200, -1), asked, [0] * 200).tokens.tolist())

    assert drawn() == {0, 1, 2, 3, 4, 5}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_k=5) == {0, 1, 2, 3, 5}
    assert drawn(top_p=0.4) == {1, 2}  # each of the four has 0.211
    assert drawn(min_p=0.5) == {1, 2, 3, 5}
    assert drawn(min_p=0.5, top_k=5, top_p=0.75) == {1, 2, 3}
    assert drawn(min_p=0.5, top_k=5, top_p=0.76) == {1, 2, 3, 5}


@pytest.mark.parametrize("temperature", [1e-30, 0.01, 1.0, 100.0, 1e30])
@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0, "top_k": 1}])
def test_limits_to_one_token_are_greedy(temperature: float, limit: dict[str, Any]) -> None:
    logits = random_logits(20, dtype=torch.bfloat16)
    requests = [request(temperature=temperature, seed=i, **limit) for i in range(20)]
    tokens = Sampler(VOCAB, CPU).sample(logits, requests, [0] * 20).tokens
    assert torch.equal(tokens, logits.argmax(dim=-1))


def test_only_possible_tokens_are_drawn() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[17] = -1e30
    assert sample_one(logits, request(temperature=1.5, top_p=0.9)) == 17
    logits[700] = -1e30
    drawn = {sample_one(logits, request(temperature=1e9, seed=i)) for i in range(20)}
    assert drawn == {17, 700}


def test_logits_that_are_no_numbers_give_no_token() -> None:
    logits = random_logits(4)
    logits[0, 5] = torch.nan
    logits[1] = torch.nan
    logits[2, 5] = torch.inf
    limits = {"top_p": 0.9, "top_k": 10}
    for params in ({}, {"temperature": 1.0}, {"temperature": 1.0, "min_p": 0.1, **limits}):
        tokens = Sampler(VOCAB, CPU).sample(logits, [request(**params)] * 4, [0] * 4).tokens
        assert tokens[:3].tolist() == [-1] * 3
        assert 0 <= tokens[3] < VOCAB


def splitmix64(state: int) -> tuple[int, int]:
    """The published generator: next state and output."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = state
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return state, z ^ (z >> 31)


def test_keys_are_numbers_of_splitmix64() -> None:
    assert splitmix64(0)[1] == 0xE220A8397B1DCDAF  # as published
    for seed in (0, 1, 2**64 - 1):
        _, state = splitmix64(seed)
        for position in range(5):
            state, bits = splitmix64(state)
            low, high = keys_of([seed], [position])[0].tolist()
            assert (high % 2**32 << 32) + low % 2**32 == bits
    grid = np.arange(300, dtype=np.uint64)
    many = keys(grid.repeat(300), np.tile(grid, 300))
    assert len(np.unique(many, axis=0)) == len(many)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 2**200 + 5])
def test_any_integer_is_a_seed(seed: int) -> None:
    token = sample_one(random_logits(1)[0], request(temperature=1.0, seed=seed))
    assert token == sample_one(random_logits(1)[0], request(temperature=1.0, seed=seed % 2**64))


# --- batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_a_request_s_tokens_do_not_depend_on_the_batch(device: str, dtype: torch.dtype) -> None:
    requests = every_kind()
    steps = [random_logits(len(requests), seed=i, dtype=dtype).to(device) for i in range(4)]

    def tokens(batches: Callable[[int], list[list[int]]]) -> Tensor:
        """Of each step and request, if step i is sampled in these batches of requests."""
        sampler = Sampler(VOCAB, torch.device(device))
        result = torch.zeros(len(steps), len(requests), dtype=torch.int64)
        for i, logits in enumerate(steps):
            for rows in batches(i):
                got = sampler.sample(logits[rows], [requests[r] for r in rows], [i] * len(rows))
                result[i, rows] = got.tokens.cpu()
        return result

    everyone = list(range(len(requests)))
    together = tokens(lambda _: [everyone])
    alone = tokens(lambda _: [[row] for row in everyone])
    assert torch.equal(together, alone)
    shuffle = random.Random(1)

    def anyhow(_: int) -> list[list[int]]:
        order = shuffle.sample(everyone, len(everyone))
        return [order[:37], order[37:40], order[40:]]

    assert torch.equal(together, tokens(anyhow))


def test_a_large_batch_is_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    requests, logits = every_kind(), random_logits(90)
    expected = Sampler(VOCAB, CPU).sample(logits, requests, [0] * 90)
    monkeypatch.setattr("tinier.engine.sampler._DRAWN_AT_ONCE", 3 * VOCAB + 5)
    parts = Sampler(VOCAB, CPU).sample(logits, requests, [0] * 90)
    assert torch.equal(parts.tokens, expected.tokens)


def test_logits_are_left_as_they_are() -> None:
    requests, logits = every_kind(), random_logits(90)
    before = logits.clone()
    Sampler(VOCAB, CPU).sample(logits, requests, [0] * 90)
    assert torch.equal(logits, before)


class Operators(TorchDispatchMode):
    """Notes the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_greedy_batch_is_one_pass_over_the_logits() -> None:
    sampler, requests = (
        Sampler(VOCAB, CPU),
        [request(seed=i, stop_token_ids=(5,)) for i in range(64)],
    )
    for position in range(3):
        with Operators() as operators:
            sampler.sample(random_logits(64), requests, [position] * 64)
        assert operators.names.count("max") == 1
        assert not {"argmax", "amax", "sort", "topk"} & set(operators.names)


def test_the_host_never_asks_for_a_value() -> None:
    sampler, requests = Sampler(VOCAB, CPU), every_kind()
    with Operators() as operators:
        for position in range(5):
            sampler.sample(random_logits(90), requests, [position] * 90)
    assert "scatter_add_" in operators.names
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"} & set(
        operators.names
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_sampling_on_a_gpu_does_not_wait() -> None:
    device = torch.device("cuda")
    requests, logits = every_kind(), random_logits(90).to(device)
    sampler = Sampler(VOCAB, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for position in range(5):
            on_gpu = sampler.sample(logits, requests, [position] * 90)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert on_gpu.tokens.device.type == "cuda"


# --- what changes logits


def test_logit_bias_is_added() -> None:
    logits = random_logits(1)[0]
    top = int(logits.argmax())
    assert sample_one(logits, request(logit_bias={top: -100.0})) == int(logits.topk(2).indices[1])
    assert sample_one(logits, request(logit_bias={5: 100.0})) == 5
    assert sample_one(logits, request(logit_bias={5: 100.0}, temperature=1.0)) == 5


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = random_logits(1)
    first, second = (int(i) for i in logits[0].topk(2).indices)
    one = request(min_tokens=2, stop_token_ids=(first, VOCAB + 5))
    sampler = Sampler(VOCAB, CPU)
    tokens = [int(sampler.sample(logits, [one], [i]).tokens) for i in range(4)]
    assert tokens == [second, second, first, first]
    # also where the token is biased
    biased = request(min_tokens=1, stop_token_ids=(first,), logit_bias={first: 100.0})
    assert [int(sampler.sample(logits, [biased], [i]).tokens) for i in range(2)] == [second, first]


def penalized(
    logits: Tensor, prompt: list[int], output: list[int], params: SamplingParams
) -> Tensor:
    """By transformers and by OpenAI's formula."""
    ids = torch.tensor([prompt + output])
    processor = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    logits = processor(ids, logits.unsqueeze(0))[0].clone()
    for token in set(output):
        times = output.count(token)
        logits[token] -= params.frequency_penalty * times + params.presence_penalty
    return logits


PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.3, "presence_penalty": -1.0, "repetition_penalty": 1.1},
]


def test_penalties_count_tokens_as_they_are_sampled() -> None:
    sampler = Sampler(VOCAB, CPU)
    requests = [request([3, 3, i], **values) for i, values in enumerate(PENALTIES)]
    requests.append(request())  # not penalized, beside the others
    outputs: list[list[int]] = [[] for _ in requests]
    for position in range(30):
        # few tokens compete, so that they come again
        logits = random_logits(len(requests), seed=position)
        logits[:, 8:] -= 20
        tokens = sampler.sample(logits, requests, [position] * len(requests)).tokens.tolist()
        for row, one in enumerate(requests):
            expected = penalized(logits[row], one.prompt, outputs[row], one.params).argmax()
            assert tokens[row] == expected
            outputs[row].append(tokens[row])


def test_penalties_outlive_preemption_and_count_what_is_known() -> None:
    logits = random_logits(1)
    order = logits[0].topk(8).indices.tolist()
    params = {"repetition_penalty": 1.0, "presence_penalty": 2.0, "frequency_penalty": 2.0}
    flat = logits.clone()
    flat[0, order] = flat[0].amax()
    sampler, first, other = Sampler(VOCAB, CPU), request(**params), request(**params)
    seen = [int(sampler.sample(flat, [first], [i]).tokens) for i in range(3)]
    assert len(set(seen)) == 3
    both = flat.expand(2, -1)
    assert sampler.sample(both, [other, first], [0, 3]).tokens.tolist()[0] == seen[0]
    sampler.sample(flat, [other], [1])
    assert int(sampler.sample(flat, [first], [4]).tokens) not in seen  # back after a pause
    resumed = request(**params)
    resumed.output = seen
    assert int(Sampler(VOCAB, CPU).sample(flat, [resumed], [3]).tokens) not in seen
    sampler.forget(first)
    assert int(sampler.sample(flat, [request(**params)], [0]).tokens) == seen[0]  # its row is clean
    sampler.forget(first)  # twice, or never seen, is no harm
    sampler.forget(request())


def test_a_token_that_was_taken_back_does_not_count() -> None:
    logits = random_logits(1)
    one = request(presence_penalty=2.0, frequency_penalty=2.0)
    sampler = Sampler(VOCAB, CPU)
    token = int(sampler.sample(logits, [one], [0]).tokens)
    assert int(sampler.sample(logits, [one], [0]).tokens) == token


# --- log-probabilities


def test_logprobs_are_of_the_model_s_own_distribution() -> None:
    logits = random_logits(4, dtype=torch.bfloat16)
    expected = torch.log_softmax(logits.float(), dim=-1)
    requests = [
        request(logprobs=2),
        request(temperature=3.0, seed=1, top_k=50),
        request(temperature=3.0, seed=2, logprobs=4, logit_bias={9: 100.0}),
        request(logprobs=0),
    ]
    sampled = Sampler(VOCAB, CPU).sample(logits, requests, [0] * 4)
    tokens, logprobs, top_logprobs, top_tokens = sampled
    assert logprobs is not None
    assert top_logprobs is not None
    assert top_tokens is not None
    assert tokens[2] == 9
    assert logprobs.isnan().tolist() == [False, True, False, False]
    assert top_tokens[1].tolist() == [-1] * 4
    rows = torch.tensor([0, 2, 3])
    assert torch.allclose(logprobs[rows], expected[rows, tokens[rows]])
    assert torch.allclose(top_logprobs[rows], expected[rows].topk(4).values)
    assert torch.equal(top_tokens[rows], expected[rows].topk(4).indices)


def test_logprobs_without_alternatives_and_more_than_there_are_tokens() -> None:
    logits = random_logits(2)
    sampled = Sampler(VOCAB, CPU).sample(logits, [request(logprobs=0)] * 2, [0] * 2)
    assert sampled.top_tokens is not None
    assert sampled.top_tokens.shape == (2, 0)
    sampled = Sampler(5, CPU).sample(logits[:, :5], [request(logprobs=20)] * 2, [0] * 2)
    assert sampled.top_tokens is not None
    assert sampled.top_tokens.shape == (2, 5)
    assert Sampler(VOCAB, CPU).sample(logits, [request()] * 2, [0] * 2).logprobs is None


# --- parameters


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens=0. Use 1 or more"),
        ({"min_tokens": -1}, r"min_tokens=-1. Use 0 to max_tokens \(128\)"),
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens=9. Use 0 to max_tokens \(8\)"),
        ({"temperature": -1.0}, r"temperature=-1.0. Use 0 \(greedy\) or more"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": -1}, r"top_k=-1. Use 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, "top_p=0.0. Use more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 1.5}, r"min_p=1.5. Use 0 \(all tokens\) to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0. Use more than 0; 1 is none"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5. Use -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty=nan. Use -2 to 2"),
        (
            {"logit_bias": {3: 101.0}},
            r"logit_bias=\(\(3, 101.0\),\). Use token ids with biases of -100",
        ),
        ({"logit_bias": {-3: 1.0}}, "logit_bias"),
        ({"n": 0}, "n=0. Use 1 to 128"),
        ({"n": 129}, "n=129"),
        ({"logprobs": 21}, "logprobs=21. Use 0 to 20, or None"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1. Use 0 to 20, or None"),
        (
            {"stop": ("a", "")},
            r"stop=\('a', ''\). Use a tuple of at most 128 strings, none of them empty",
        ),
        ({"stop": ("a",) * 129}, "Use a tuple of at most 128 strings"),
        ({"stop": "word"}, "stop='word'. Use a tuple"),
        ({"stop_token_ids": (-1,)}, r"stop_token_ids=\(-1,\). Use a tuple of token ids"),
    ],
)
def test_impossible_parameters_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**values)


def test_parameters_are_values() -> None:
    one = SamplingParams(logit_bias={5: 1.0, 3: -2.0}, stop=("\n",))
    assert one.logit_bias == ((3, -2.0), (5, 1.0))
    assert one == SamplingParams(logit_bias=((5, 1.0), (3, -2.0)), stop=("\n",))
    assert len({one, replace(one), replace(one, n=2)}) == 2
    one.check_vocab(6)
    with pytest.raises(InputError, match=r"logit_bias has ids outside 0\.\.4: \[5\]"):
        one.check_vocab(5)
