"""A mixture's experts together against one after the other; on a GPU, or in Triton's interpreter."""

import pytest
import torch
from tests.kernels.test_triton import DEVICE, INTERPRETED, apart, random

from tinier.kernels import grouped
from tinier.kernels.reference import shares_of
from tinier.kernels.skinny import Weight, pack_int4
from tinier.numerics import Quantized, quantize_tokens_e4m3, quantize_tokens_int8

SIZES = [(1, 8, 2), (5, 8, 2), (40, 16, 4), (64, 128, 8)]
HIDDEN, INNER = 96, 48


def pairs(routing: grouped.Routing) -> set[tuple[int, int, int, float]]:
    """Of every pair: expert, token, choice and share."""
    found = set()
    total = len(routing.tokens) // routing.num_tokens
    assert sorted(routing.parts.tolist()) == list(range(total * routing.num_tokens))
    for expert, first, last in routing.blocks.tolist():
        if expert < 0:
            continue
        assert 0 < last - first <= routing.most
        for slot in range(first, last):
            choice, token = divmod(int(routing.parts[slot]), routing.num_tokens)
            assert token == routing.tokens[slot]
            found.add((expert, token, choice, round(float(routing.shares[slot]), 4)))
    assert len(found) == len(routing.tokens)
    return found


@pytest.mark.parametrize(("tokens", "experts", "chosen"), SIZES)
@pytest.mark.parametrize("sums_to_one", [False, True])
def test_every_token_goes_to_its_likeliest_experts(
    tokens: int, experts: int, chosen: int, sums_to_one: bool
) -> None:
    parts = random(3, tokens, experts)
    for logits in (parts, parts.sum(0).bfloat16()):
        summed = (logits.sum(0) if logits.dim() == 3 else logits).bfloat16()
        shares, picks = shares_of(summed, chosen, sums_to_one=sums_to_one)
        expected = {
            (int(picks[t, c]), t, c, round(float(shares[t, c]), 4))
            for t in range(tokens)
            for c in range(chosen)
        }
        made = grouped.route(logits, chosen, sums_to_one=sums_to_one, dtype=torch.bfloat16)
        # bf16 has few values, and equal ones may come in any order
        assert len(pairs(made) & expected) > 0.9 * len(expected)
        many = grouped._route_many(
            summed, chosen, made.most, len(made.blocks), sums_to_one=sums_to_one
        )
        assert pairs(many) == expected


def test_logits_that_are_no_numbers_reach_no_foreign_memory() -> None:
    logits = random(5, 8).bfloat16()
    logits[1] = float("nan")
    logits[2] = float("inf")
    logits[3, 4] = float("-inf")
    made = grouped.route(logits, 2, sums_to_one=True, dtype=torch.bfloat16)
    assert len(pairs(made)) == 10


def experts_of(
    kind: str, experts: int, rows: int, columns: int, seed: int
) -> tuple[Weight, torch.Tensor]:
    """A weight over the rows of all experts and what it stands for, [E, N, K] in float64."""
    plain = random(experts * rows, columns, seed=seed)
    sides = (experts * rows, columns)
    scale = random(experts * rows, seed=seed + 1).abs() + 0.5
    if kind == "bf16":
        weight = Weight(plain.bfloat16(), None, None, sides)
        known = plain.bfloat16().double()
    elif kind == "int4":
        codes = (plain * 3).round().clamp(-8, 7).to(torch.int8)
        steps = random(columns // 32, experts * rows, seed=seed + 1).abs().add(0.5).bfloat16()
        weight = Weight(pack_int4(codes), steps, None, sides, 32)
        known = codes.double() * steps.double().t().repeat_interleave(32, dim=1)
    else:
        if kind == "int8":
            codes = (plain * 40).round().clamp(-128, 127).to(torch.int8)
        else:
            codes = plain.to(torch.float8_e4m3fn)
        weight = Weight(codes, scale, None, sides)
        known = codes.double() * scale.double()[:, None]
    return weight, known.view(experts, rows, columns)


def coded(kind: str, x: torch.Tensor) -> tuple[torch.Tensor | Quantized, torch.Tensor]:
    if kind in ("int8", "fp8"):
        codes = quantize_tokens_int8(x) if kind == "int8" else quantize_tokens_e4m3(x)
        return codes, codes.codes.double() * codes.scale.double()
    return x, x.double()


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("bf16", 1), ("fp8", 1), ("int8", 1), ("fp8-weights", 1), ("bf16", 9), ("bf16", 70)]
    + [pytest.param(kind, tokens, marks=pytest.mark.gpu)
       for kind in ("bf16", "fp8", "int8", "fp8-weights", "int4") for tokens in (1, 40, 300)],
)  # fmt: skip
def test_experts_together_make_what_each_makes_alone(kind: str, tokens: int) -> None:
    if INTERPRETED and (kind == "int4" or tokens in (40, 300)):
        pytest.skip("inline assembly, or minutes in the interpreter")
    experts, chosen = (128, 8) if tokens == 40 else (4, 2)
    inner = 64 if kind == "int4" else INNER
    first, first_plain = experts_of(kind, experts, 2 * inner, HIDDEN, 0)
    last, last_plain = experts_of(kind, experts, 64 if kind == "int4" else HIDDEN + 8, inner, 2)
    x = random(tokens, HIDDEN, seed=4).bfloat16()
    logits = random(tokens, experts, seed=5).bfloat16()
    routing = grouped.route(logits, chosen, sums_to_one=True, dtype=torch.bfloat16)
    given, known = coded(kind, x)
    made = grouped.matmul(given, first, routing, experts, last=False)
    pairs(routing)
    slots = {
        (expert, int(routing.tokens[slot])): slot
        for expert, begun, end in routing.blocks.tolist()
        for slot in range(begun, end)
        if expert >= 0
    }
    assert len(slots) == tokens * chosen
    exact = torch.stack([known[t] @ first_plain[e].t() for e, t in slots])
    assert apart(made[list(slots.values())], exact) < 4e-3
    act = made[:, :inner].contiguous()
    given, known = coded(kind, act)
    out = grouped.matmul(given, last, routing, experts, last=True)
    assert out.shape == (chosen, tokens, last_plain.shape[1])
    assert out.dtype == (torch.float32 if tokens <= 64 else torch.bfloat16)
    expected = torch.zeros(tokens, last_plain.shape[1], dtype=torch.float64, device=DEVICE)
    for (e, t), slot in slots.items():
        expected[t] += routing.shares[slot].double() * (known[slot] @ last_plain[e].t())
    assert apart(out.sum(0), expected) < 5e-3
