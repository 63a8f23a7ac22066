"""The Triton kernels against the plain torch operators, on a GPU or, where there is none, in Triton's
interpreter (tests/conftest.py switches it on)."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.kernels.test_reference import paged_batch

from tinier.engine import drawing
from tinier.kernels import reference
from tinier.kernels.machine import machine_of
from tinier.kernels.reference import Cache, HeadInputs
from tinier.kernels.table import Table
from tinier.numerics import Quantized, dequantize, quantize_tokens_e4m3, quantize_tokens_int8
from tinier.quantization.scales import round_nearest, searched_scales
from tinier.schemes import PRESETS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU and no triton package", allow_module_level=True)
pytest.importorskip("triton")
from tinier.kernels import attention, draws, fused, int8, skinny  # noqa: E402

if INTERPRETED:
    from tests.kernels.interpreter import round_as_a_gpu_does

    round_as_a_gpu_does()
# the interpreter takes seconds for what a GPU does at once
SLOW = [pytest.mark.slow] if INTERPRETED else []
POSITIONS = 2 if INTERPRETED else 8
TYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return ((ours - theirs).norm() / theirs.norm()).item()


def limit(dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 1e-5
    return 6e-3


def check_codes(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Nearly all the same; where float32 differs in its last bit, a neighbour."""
    assert ours.dtype == theirs.dtype
    same = (ours.float() == theirs.float()).float().mean()
    assert same > 0.95
    assert apart(ours, theirs) < 0.02


def check_row(made: torch.Tensor | Quantized, plain: torch.Tensor, takes: str | None) -> None:
    if takes is None:
        assert isinstance(made, torch.Tensor)
        assert apart(made, plain) < limit(plain.dtype)
        return
    assert isinstance(made, Quantized)
    expected = quantize_tokens_int8(plain) if takes == "int8" else quantize_tokens_e4m3(plain)
    assert apart(made.scale, expected.scale) < 1e-2
    check_codes(made.codes, expected.codes)


@pytest.mark.parametrize("takes", ["e4m3", "int8"])
@pytest.mark.parametrize("dtype", TYPES)
def test_encode_rows(dtype: torch.dtype, takes: str) -> None:
    x = random(5, 100, dtype=dtype)
    check_row(fused.encode_rows(x, takes), x, takes)


@pytest.mark.parametrize("rows", [64, 200, 320, 960])
def test_int4_words_fill_the_tiles_that_are_read(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """960 rows, SmolLM2's q, k and v, ended in half a tile: the kernel read past the tensor."""
    monkeypatch.setattr(skinny, "_processors", lambda device: 132)
    weight = skinny.Weight(
        skinny.pack_int4(torch.zeros(rows, 128)), None, None, (rows, 128), group_size=64
    )
    for tokens in (1, 16, 17, 64, 300):
        assert len(weight.codes) * 64 % skinny.tiling_for(weight, tokens).rows == 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("by_descriptor", [False, True])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(70, 40, 80), (9, 300, 256)])
def test_int8_product(
    tokens: int, rows: int, columns: int, by_descriptor: bool, biased: bool, dtype: torch.dtype
) -> None:
    if by_descriptor and not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor memory accelerator")
    generator = torch.Generator().manual_seed(0)
    x, codes = (
        torch.randint(-128, 128, (n, columns), generator=generator).to(torch.int8).to(DEVICE)
        for n in (tokens, rows)
    )
    x_scale, scale = random(tokens, 1, seed=2).abs(), random(rows).abs() * 1e-3
    bias = random(rows, dtype=dtype, seed=1) if biased else None
    tiling = int8.Tiling(64, 64, 4, 2, by_descriptor)
    made = int8.matmul(x, x_scale, codes, scale, bias, dtype, tiling)
    expected = (x.double() @ codes.double().t()) * x_scale.double() * scale.double()
    assert apart(made, expected if bias is None else expected + bias) < limit(dtype)
    assert made.dtype == dtype


@pytest.mark.parametrize("takes", [None, "e4m3", "int8"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("normed", [True, False])
def test_add_rms_norm(
    dtype: torch.dtype, takes: str | None, with_delta: bool, normed: bool
) -> None:
    x, weight = random(5, 100, dtype=dtype), random(100, dtype=dtype, seed=1)
    delta = random(5, 100, dtype=dtype, seed=2) if with_delta else None
    before = x.clone()
    summed, y = fused.add_rms_norm(x, delta, weight if normed else None, 1e-5, takes)
    expected = x if delta is None else x + delta
    assert torch.equal(x, before)
    assert apart(summed, expected) <= (limit(dtype) if INTERPRETED else 0)
    check_row(y, reference.rms_norm(expected, weight, 1e-5) if normed else expected, takes)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 3])
def test_norm_all_heads(kept: torch.dtype, parts: int) -> None:
    qkv = random(5, (6 + 2 * 2) * 24, dtype=torch.bfloat16)
    norms = (random(6 * 24, dtype=kept, seed=2), random(2 * 24, dtype=kept, seed=3))
    expected = reference.norm_all_heads(qkv, norms, 1e-5)
    given = (
        qkv
        if parts == 1
        else torch.stack([qkv.float() - 3, *[torch.full_like(qkv.float(), 1.5)] * 2])
    )
    made = fused.norm_all_heads(given, norms, 1e-5, torch.bfloat16)
    assert apart(made, expected) < limit(torch.bfloat16)


@pytest.mark.parametrize("takes", [None, "e4m3", "int8"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation: str, dtype: torch.dtype, takes: str | None) -> None:
    gate_up = random(5, 2 * 100, dtype=dtype)
    made = fused.gated(gate_up, dtype, takes, activation)
    check_row(made, reference.gated(gate_up, activation), takes)


@pytest.mark.parametrize("cache", [None, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("normed", [False, True, "in float32"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [16, 24, 80])
def test_rotate_and_store(
    dtype: torch.dtype, normed: bool | str, cache: torch.dtype | None, size: int
) -> None:
    heads, kv_heads, tokens = 6, 2, 5
    qkv = random(tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    turning = 48 if size == 80 else size  # the first channels of a head
    angles = random(40, turning // 2, seed=1).repeat(1, 2)
    turned_in = torch.float32 if size == 24 else dtype
    rotation = (angles.cos().to(turned_in), angles.sin().to(turned_in))
    positions = torch.tensor([3, 39, 0, 7, 7], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([9, 1, 4, 0, 30], dtype=torch.int32, device=DEVICE)
    kept = torch.float32 if normed == "in float32" else dtype
    norms = (random(size, dtype=kept, seed=2), random(size, dtype=kept, seed=3)) if normed else None
    steps = (torch.tensor([0.02], device=DEVICE), torch.tensor([0.03], device=DEVICE))
    scales = steps if cache else None
    keys, values = (
        torch.zeros(32, kv_heads, size, dtype=cache or dtype, device=DEVICE) for _ in range(2)
    )
    q = fused.rotate_and_store(
        qkv, rotation, positions, slots, norms, 1e-5, heads, dtype, keys, values, scales
    )  # fmt: skip
    turns = tuple(t[positions.long()].unsqueeze(1) for t in rotation)
    plain_q, plain_k, plain_v = reference.split_heads(qkv, turns, norms, 1e-5, heads, kv_heads)  # type: ignore[arg-type]
    assert apart(q, plain_q) < limit(dtype)
    for made, plain, step in zip((keys, values), (plain_k, plain_v), steps, strict=True):
        stored = (
            made.view(torch.uint8)[slots.long()].view(made.dtype) if cache else made[slots.long()]
        )
        if cache is None:
            assert apart(stored, plain) < limit(dtype)
        else:
            check_codes(stored, reference.encode(plain, step, cache))
        untouched = torch.ones(32, dtype=torch.bool)
        untouched[slots.long().cpu()] = False
        assert made.float().cpu()[untouched].abs().max() == 0


@pytest.mark.parametrize("cache", [None, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("takes", [None, pytest.param("e4m3", marks=SLOW)])
@pytest.mark.parametrize("normed", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize(
    ("contexts", "counts"),
    [
        pytest.param([5, 9, 1], [1, 1, 1], marks=SLOW),
        pytest.param([30], [1], marks=SLOW),
        pytest.param([6], [6], marks=SLOW),
        ([8, 4, 7], [1, 4, 3]),
        pytest.param([9, 9, 40], [1, 1, 40], marks=SLOW),
    ],
    ids=["decode", "split", "prefill", "mixed", "long"],
)
@pytest.mark.parametrize("size", [16, pytest.param(24, marks=SLOW), pytest.param(80, marks=SLOW)])
def test_cached_attention(
    contexts: list[int], counts: list[int], dtype: torch.dtype, window: int | None,
    cache: torch.dtype | None, takes: str | None, normed: bool, size: int,
) -> None:  # fmt: skip
    if size != 16 and (window or takes):
        pytest.skip("those do not look at the size")
    generator = torch.Generator().manual_seed(0)
    batch, _ = paged_batch(contexts, counts, generator)
    batch = batch._replace(**{
        n: getattr(batch, n).to(DEVICE)
        for n in ("tables", "contexts", "starts", "positions", "slots", "decodes")
    })  # fmt: skip
    keys, values = random(66, 2, size, dtype=dtype), random(66, 2, size, dtype=dtype, seed=1)
    scales = None
    if cache:
        scales = (torch.tensor([0.02], device=DEVICE), torch.tensor([0.03], device=DEVICE))
        keys, values = (
            reference.encode(t, s, cache) for t, s in zip((keys, values), scales, strict=True)
        )
    turning = 48 if size == 80 else size
    angles = random(64, turning // 2, seed=1).repeat(1, 2)
    kept = torch.float32 if size == 24 else dtype
    norms = (random(size, dtype=kept, seed=2), random(size, dtype=kept, seed=3)) if normed else None
    inputs = HeadInputs((angles.cos().to(kept), angles.sin().to(kept)), 6, dtype, norms, 1e-5)
    qkv = random(sum(counts), 10 * size, dtype=dtype, seed=2)
    ours, plain = (Cache(keys.clone(), values.clone(), scales, window) for _ in range(2))
    expected = reference.cached_attention(qkv, inputs, plain, batch)
    made = attention.cached_attention(qkv, inputs, ours, batch, None)
    assert isinstance(made, torch.Tensor)
    # the plain operators round more often on the way
    assert apart(made, expected) < 2 * limit(dtype)
    check_row(attention.cached_attention(qkv, inputs, ours, batch, takes), made, takes)
    for made, stored in zip(ours[:2], plain[:2], strict=True):
        if cache is None:
            assert apart(made, stored) < limit(dtype)
        else:
            check_codes(made, stored)
    if dtype == torch.bfloat16:
        parts = torch.stack((qkv.float() - 1, torch.ones_like(qkv, dtype=torch.float32)))
        whole = attention.cached_attention(qkv, inputs, ours, batch, None)
        again = attention.cached_attention(parts, inputs, ours, batch, None)
        assert isinstance(whole, torch.Tensor)
        assert isinstance(again, torch.Tensor)
        assert apart(again, whole) < limit(dtype)


def test_embed_reads_tokens_that_are_on_the_device_alone() -> None:
    table = random(10, 24, dtype=torch.bfloat16)
    sampled = torch.tensor([7, 3, 9], device=DEVICE)
    tokens = torch.tensor([4, -1, 0, -3], dtype=torch.int32, device=DEVICE)
    for times in (1.0, 3.3):
        expected = table[[4, 7, 0, 9]] * times
        made = fused.embed(tokens, sampled, Table(table, None, 24, torch.bfloat16), times)
        assert torch.equal(made, expected)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embed_reads_codes_as_they_are_stored(kind: str, dtype: torch.dtype) -> None:
    if kind == "fp8" and DEVICE == "cuda" and not machine_of(torch.device(DEVICE)).has_fp8:
        pytest.skip("this GPU reads no FP8")
    grid = PRESETS[kind].scheme.weights
    grid = replace(grid, group_size=32) if kind == "int4" else grid
    weight = random(70, 160, dtype=dtype)
    quantized = round_nearest(weight, searched_scales(weight, grid, dtype), grid)
    codes, scale = quantized.codes, quantized.scale.float().reshape(-1)
    if kind == "int4":
        codes, scale = skinny.pack_int4(codes), quantized.scale.t().contiguous()
    table = Table(codes, scale, 160, dtype)
    tokens = torch.tensor([64, -1, 0, 69], dtype=torch.int32, device=DEVICE)
    sampled = torch.tensor([31], device=DEVICE)
    for times in (1.0, 12.25):
        expected = dequantize(quantized, dtype)[[64, 31, 0, 69]] * times
        assert torch.equal(fused.embed(tokens, sampled, table, times), expected)


@pytest.mark.parametrize("takes", [None, "e4m3", "int8"])
def test_what_is_added_may_go_through_a_norm(takes: str | None) -> None:
    """Gemma's norms: behind attention and the MLP, and of weights that are kept in float32."""
    x, parts = random(5, 100, dtype=torch.bfloat16), random(2, 5, 100, seed=2)
    weight, between = random(100, seed=1), random(100, seed=3)
    summed, y = fused.add_rms_norm(x, parts, weight, 1e-5, takes, 1.0, between)
    delta = reference.rms_norm(parts.sum(dim=0).bfloat16(), between, 1e-5)
    assert delta.dtype == torch.bfloat16
    assert apart(summed, x + delta) < 2e-3
    check_row(y, reference.rms_norm(x + delta, weight, 1e-5), takes)


def test_what_is_added_may_be_multiplied() -> None:
    x, weight = random(5, 100, dtype=torch.bfloat16), random(100, dtype=torch.bfloat16, seed=1)
    delta = random(5, 100, dtype=torch.bfloat16, seed=2)
    summed, y = fused.add_rms_norm(x, delta, weight, 1e-5, None, 0.22)
    assert torch.equal(summed, x + delta * 0.22)
    check_row(y, reference.rms_norm(summed, weight, 1e-5), None)


@pytest.mark.parametrize("takes", [None, "e4m3", "int8"])
def test_parts_are_summed(takes: str | None) -> None:
    x, weight = random(5, 100, dtype=torch.bfloat16), random(100, dtype=torch.bfloat16, seed=1)
    parts = random(3, 5, 100, seed=2)
    summed, y = fused.add_rms_norm(x, parts, weight, 1e-5, takes)
    expected = x + parts.sum(dim=0).bfloat16()
    assert apart(summed, expected) < 1e-3
    check_row(y, reference.rms_norm(expected, weight, 1e-5), takes)
    gate_up = random(3, 5, 200, seed=3)
    plain = reference.gated(gate_up.sum(dim=0).bfloat16())
    check_row(fused.gated(gate_up, torch.bfloat16, takes), plain, takes)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("vocab", [1003, 70_001])
def test_greedy_is_the_first_of_the_largest_or_no_token(vocab: int, dtype: torch.dtype) -> None:
    logits = random(7, vocab, dtype=dtype)
    logits[0, 900], logits[1, 1002] = torch.nan, torch.inf
    logits[2], logits[3] = torch.nan, -torch.inf
    logits[4, [17, 970]] = 100.0  # of equal ones the first
    logits[5, -1] = 100.0
    seats = torch.tensor([3, 1, 0, 2, 5, 6, 4], dtype=torch.int32, device=DEVICE)
    sampled = torch.full((8,), 77, dtype=torch.int64, device=DEVICE)
    tokens = draws.greedy(logits, seats, sampled)
    expected = reference.greedy(logits.cpu())
    assert expected[:6].tolist() == [-1, -1, -1, -1, 17, vocab - 1]
    assert torch.equal(tokens.cpu(), expected)
    assert torch.equal(sampled.cpu()[seats.cpu().long()], expected.clamp(min=0))
    assert sampled[7] == 77


def in_torch(logits: torch.Tensor, t: torch.Tensor, row_keys: torch.Tensor) -> torch.Tensor:
    logits = logits.float().cpu()
    limits = drawing.Limits(t.cpu(), None, None, None)
    return drawing.draw(logits, limits, row_keys.cpu()).to(DEVICE)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(3, 301), pytest.param(20, 5000, marks=SLOW)])
def test_tokens_are_drawn_as_torch_draws_them(dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits = random(rows, vocab, dtype=dtype) * 3
    t = torch.linspace(0.2, 1.5, rows, device=DEVICE).unsqueeze(1)
    t[0] = 1e-9
    seeds = np.arange(rows).astype(np.uint64)
    found, expected, words = [], [], -(-vocab // 32)
    for position in range(POSITIONS):
        at = np.full(rows, position, dtype=np.uint64)
        row_keys = torch.from_numpy(drawing.keys(seeds, at)).to(DEVICE)
        allowed = random(rows, 32 * words, seed=position) > 0.5
        bits = np.packbits(allowed.cpu().numpy(), axis=1, bitorder="little").view(np.int32)
        masked = logits.masked_fill(~allowed[:, :vocab], torch.finfo(dtype).min)
        found += [
            draws.draw(logits, t, row_keys),
            draws.draw(logits, t, row_keys, torch.from_numpy(bits).to(DEVICE)),
        ]
        expected += [in_torch(logits, t, row_keys), in_torch(masked, t, row_keys)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert len(set(found[-1].tolist())) > 1
    assert len({tuple(one.tolist()) for one in found[::2]}) == POSITIONS
    theirs = drawing.noise(row_keys.cpu(), vocab)
    torch.testing.assert_close(draws.noise(row_keys, vocab).cpu(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_no_numbers_draws_nothing(bad: float) -> None:
    logits = random(2, 40)
    logits[1, 3] = bad
    row_keys = torch.ones(2, 2, dtype=torch.int32, device=DEVICE)
    t = torch.ones(2, 1, device=DEVICE)
    bits = torch.tensor([[3, 0]] * 2, dtype=torch.int32, device=DEVICE)  # not the bad one
    for allowed in (None, bits):
        tokens = draws.draw(logits, t, row_keys, allowed).tolist()
        assert tokens[0] >= 0
        assert tokens[1] == -1
