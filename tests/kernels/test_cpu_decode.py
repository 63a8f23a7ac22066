"""The native decode step, against the same decoder written with reference.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.device import bf16_products
from tinier.families import FAMILIES, Geometry, LayerKind
from tinier.kernels import (
    Cache,
    Experts,
    HeadInputs,
    Layer,
    PagedBatch,
    StoredLinear,
    make_experts,
    make_linear,
    native,
)
from tinier.kernels.cpu_decode import CpuDecoder, DecodeWeights, unsupported
from tinier.kernels.linear import Fp8NativeLinear, Int4NativeLinear, Linear, StackedLinear
from tinier.kernels.reference import cached_attention, gated, rms_norm
from tinier.numerics import Quantized, dequantize, quantize_tokens_e4m3, round_static
from tinier.quantization.scales import absmax_scales, round_nearest
from tinier.schemes import preset_named

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, BLOCK = 128, 192, 6, 2, 48, 77, 4
SLOTS = 99 * BLOCK

pytestmark = pytest.mark.skipif(
    isinstance(native.load_library(), str), reason=str(native.load_library())
)


def quantized(weight: Tensor, kind: str) -> StoredLinear:
    """kind: int8, int4-32, int4-64, int4-64-asym, or a preset of 8-bit floats."""
    name, *options = [kind] if kind.startswith("fp8") else kind.split("-")
    preset = preset_named(
        name, int(options[0]) if options else None, symmetric=False if "asym" in options else None
    )
    grid = preset.scheme.weights
    codes = round_nearest(weight, absmax_scales(weight, grid, torch.bfloat16), grid)
    static = torch.tensor([0.01]) if preset.scheme.static_activations else None
    return StoredLinear(codes, None, preset.scheme, static)


def stored(kind: str, rows: int, columns: int) -> StoredLinear:
    weight = torch.randn(rows, columns) * columns**-0.5
    return StoredLinear(weight.bfloat16(), None) if kind == "bf16" else quantized(weight, kind)


def make(kind: str, rows: int, columns: int, *, bias: bool = False) -> Linear:
    layer = stored(kind, rows, columns)
    if bias:
        layer = layer._replace(bias=torch.randn(rows, dtype=torch.bfloat16))
    return make_linear([layer], torch.bfloat16)


def make_mixture(kind: str, family: str) -> Experts:
    """Six experts, two of which a token goes through."""
    mixture = FAMILIES[family].mixture
    assert mixture is not None
    router = torch.randn(6, HIDDEN, dtype=torch.bfloat16) * 0.3
    mlps = [
        ([stored(kind, INNER, HIDDEN), stored(kind, INNER, HIDDEN)], stored(kind, HIDDEN, INNER))
        for _ in range(6)
    ]
    return make_experts(
        router, mlps, torch.bfloat16, top_k=2, sums_to_one=family.startswith("Mixtral"),
        in_float32=mixture.in_float32, activation="silu",
    )  # fmt: skip


def random_weights(
    kind: str = "bf16", head: str = "bf16", *, bias: bool = False, qk_norm: bool = False,
    window: int | None = None, mixture: str | None = None,
) -> DecodeWeights:  # fmt: skip
    torch.manual_seed(0)

    def norm(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(size, dtype=torch.bfloat16)

    def layer() -> Layer:
        out_kind = "bf16" if kind.startswith("int4") else kind  # 288 inputs
        return Layer(
            input_norm=norm(HIDDEN),
            qkv=make(kind, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, bias=bias),
            q_norm=norm(HEAD_DIM) if qk_norm else None,
            k_norm=norm(HEAD_DIM) if qk_norm else None,
            out=make(out_kind, HIDDEN, HEADS * HEAD_DIM, bias=bias),
            post_norm=norm(HIDDEN),
            gate_up=None if mixture else make(kind, 2 * INNER, HIDDEN, bias=bias),
            down=None if mixture else make(kind, HIDDEN, INNER, bias=bias),
            experts=make_mixture(kind, mixture) if mixture else None,
        )

    geometry = Geometry(
        layers=2, hidden=HIDDEN, intermediate=INNER, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        turning=HEAD_DIM, vocab=VOCAB, max_positions=64, norm_eps=1e-5, tied_head=False, qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias, head_norms="each" if qk_norm else "none", hidden_in_heads=False,
        kinds=(LayerKind(window), LayerKind(window, rope=None)),
        **({} if mixture is None else {
            "mixture": FAMILIES[mixture].mixture, "experts": 6, "top_k": 2,
            "shares_sum_to_one": mixture.startswith("Mixtral"),
        }),
    )  # fmt: skip
    return DecodeWeights(
        geometry=geometry,
        embedding=torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16),
        layers=[layer(), layer()],
        final_norm=norm(HIDDEN),
        head=make(head, VOCAB, HIDDEN),
    )


class Step:
    """Inputs of one step: sequences of some lengths in a cache that earlier steps have filled."""

    def __init__(self, contexts: list[int]) -> None:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).bfloat16()

        self.keys, self.values = (
            [random(SLOTS, KV_HEADS, HEAD_DIM) for _ in range(2)] for _ in range(2)
        )
        angles = torch.rand(64, HEAD_DIM // 2, generator=generator).repeat(1, 2) * 6
        turned = (angles.cos().bfloat16(), angles.sin().bfloat16())
        # the second layer does not turn
        self.rotations = [turned, (torch.ones_like(turned[0]), torch.zeros_like(turned[1]))]
        blocks = torch.randperm(99, generator=generator).int()
        width = max(contexts) // BLOCK + 1
        self.tables = blocks[: width * len(contexts)].view(len(contexts), width)
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        self.positions = self.contexts - 1
        rows = torch.arange(len(contexts))
        block = self.tables[rows, self.positions // BLOCK]
        self.slots = block * BLOCK + self.positions % BLOCK
        self.tokens = torch.randint(VOCAB, (len(contexts),), generator=generator).int()

    def native(self, weights: DecodeWeights, rows: slice = slice(None)) -> Tensor:
        decoder = CpuDecoder(weights, self.caches(weights), self.rotations, BLOCK)
        inputs = (self.tokens, self.positions, self.slots, self.contexts, self.tables)
        return decoder.step(*(t[rows] for t in inputs))

    def caches(self, weights: DecodeWeights) -> list[Cache]:
        parts = zip(self.keys, self.values, weights.geometry.windows, strict=True)
        return [Cache(keys, values, window=window) for keys, values, window in parts]

    def reference(self, weights: DecodeWeights) -> Tensor:
        count, eps = len(self.tokens), weights.geometry.norm_eps
        batch = PagedBatch(
            self.tables, self.contexts, torch.arange(count + 1), self.positions, self.slots,
            torch.tensor([count]), [1] * count, BLOCK, int(self.contexts.max()),
        )  # fmt: skip
        x = F.embedding(self.tokens.long(), weights.embedding)
        with bf16_products(torch.device("cpu")):
            parts = zip(weights.layers, self.caches(weights), self.rotations, strict=True)
            for layer, cache, rotation in parts:
                inputs = HeadInputs(rotation, HEADS, torch.bfloat16, layer.head_norms, eps)
                qkv = layer.qkv(rms_norm(x, layer.input_norm, eps))
                x = x + layer.out(cached_attention(qkv, inputs, cache, batch))
                y = rms_norm(x, layer.post_norm, eps)
                if layer.experts is not None:
                    x = x + layer.experts(y)
                    continue
                assert layer.gate_up is not None
                assert layer.down is not None
                x = x + layer.down(gated(layer.gate_up(y)))
            return weights.head(rms_norm(x, weights.final_norm, eps))


def apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("head", ["bf16", "int8"])
@pytest.mark.parametrize(
    "kind",
    ["bf16", "int8", "int4-32", "int4-64", "int4-64-asym", "fp8", "fp8-static", "fp8-e5m2"],
)
def test_logits_and_cache_are_those_of_the_reference(kind: str, head: str) -> None:
    weights = random_weights(kind, head)
    ours, plain = Step([1, 9, 30]), Step([1, 9, 30])
    assert apart(ours.native(weights), plain.reference(weights)) < (
        # 8-bit activations: the last bit of a sum may move a number by one step of E4M3, an eighth of it
        0.06 if kind in ("fp8", "fp8-static") else 0.03 if "8" in kind else 0.015
    )
    for made, stored in zip(ours.keys + ours.values, plain.keys + plain.values, strict=True):
        assert apart(made, stored) < (4e-3 if kind in ("fp8", "fp8-static") else 2e-3)


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"qk_norm": True}, {"window": 5}, {"bias": True, "window": 1}]
)
@pytest.mark.parametrize("kind", ["bf16", "int4-64"])
def test_every_family_has_what_it_needs(kind: str, options: dict[str, int]) -> None:
    weights = random_weights(kind, **options)  # type: ignore[arg-type]
    assert apart(Step([3, 17]).native(weights), Step([3, 17]).reference(weights)) < 0.015


@pytest.mark.parametrize("family", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4-64", "int4-64-asym"])
def test_a_mixture_of_experts_is_that_of_the_reference(kind: str, family: str) -> None:
    weights = random_weights(kind, mixture=family)
    contexts = [1, 9, 30, 17, 4, 21, 8, 13, 2]
    ours, plain = Step(contexts).native(weights), Step(contexts).reference(weights)
    rows = torch.stack([torch.tensor(apart(a, b)) for a, b in zip(ours, plain, strict=True)])
    # a row whose expert changes with the last bit is far off
    assert rows.median() < (0.03 if "int8" in kind else 0.015), rows
    assert (rows < 0.05).sum() >= len(contexts) - 2, rows


@pytest.mark.parametrize("mixture", [None, "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4-64", "fp8"])
def test_a_row_does_not_depend_on_the_others_or_on_threads(kind: str, mixture: str | None) -> None:
    weights = random_weights(kind, mixture=mixture)
    contexts = [5, 12, 3, 40, 7, 21, 8]
    together = Step(contexts).native(weights)
    for row in range(len(contexts)):
        alone = Step(contexts).native(weights, slice(row, row + 1))
        assert torch.equal(alone[0], together[row])
    torch.set_num_threads(1)
    assert torch.equal(Step(contexts).native(weights), together)


def test_parts_in_different_formats_make_one_layer() -> None:
    weights = random_weights()
    torch.manual_seed(3)
    sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    kinds = ("int4-64", "bf16", "int8")
    parts = [make(kind, rows, HIDDEN) for kind, rows in zip(kinds, sizes, strict=True)]
    for layer in weights.layers:
        layer.qkv = StackedLinear(parts)
    assert apart(Step([4, 8]).native(weights), Step([4, 8]).reference(weights)) < 0.02


@pytest.mark.parametrize("kind", ["fp8", "fp8-static", "fp8-e5m2"])
def test_8_bit_floats_are_multiplied_as_they_are_stored(kind: str) -> None:
    """Through the head alone: nothing before it adds anything. Against float64, small codes included."""
    weights = random_weights()
    for layer in weights.layers:
        assert layer.down is not None
        for linear in (layer.out, layer.down):
            linear.weight.zero_()  # type: ignore[attr-defined]
    size = torch.logspace(-6, 0, HIDDEN)  # down to codes below the smallest normal one
    plain = torch.randn(VOCAB, HIDDEN) * size
    head = quantized(plain, kind)
    object.__setattr__(weights, "head", make_linear([head], torch.bfloat16))
    step = Step([3, 17])
    made = step.native(weights)
    x = rms_norm(F.embedding(step.tokens.long(), weights.embedding), weights.final_norm, 1e-5)
    assert isinstance(head.weight, Quantized)
    if kind == "fp8":
        codes = quantize_tokens_e4m3(x)
        inputs = codes.codes.double() * codes.scale.double()
    elif kind == "fp8-static":
        inputs = round_static(x, "float", torch.tensor(0.01)).double()
    else:
        inputs = x.double()
    exact = inputs @ (head.weight.codes.double() * head.weight.scale.double()).t()
    assert apart(made, exact) < 3e-3


@pytest.mark.parametrize("kind", ["fp8", "fp8-e5m2"])
def test_expanded_8_bit_floats_are_codes_times_scale(kind: str) -> None:
    stored = quantized(torch.randn(24, 128) * torch.logspace(-6, 0, 128), kind)
    assert isinstance(stored.weight, Quantized)
    layer = make_linear([stored], torch.bfloat16)
    assert isinstance(layer, Fp8NativeLinear)
    made = native.expand_fp8(layer.codes, layer.scale)
    assert torch.equal(made, dequantize(stored.weight, torch.bfloat16))
    assert layer.num_bytes < 24 * 128 * 1.1


@pytest.mark.parametrize("kind", ["int4-32", "int4-64-asym"])
def test_expanded_codes_codes_are_codes_times_scale(kind: str) -> None:
    stored = quantized(torch.randn(24, 128), kind)
    assert isinstance(stored.weight, Quantized)
    made = native.expand_int4(native.pack_int4(stored.weight))
    assert torch.equal(made, dequantize(stored.weight, torch.bfloat16))
    layer = make_linear([stored], torch.bfloat16)
    assert isinstance(layer, Int4NativeLinear)
    assert layer.num_bytes < 24 * 128


def test_what_it_cannot_run_is_said() -> None:
    weights = random_weights()
    assert unsupported(weights, torch.bfloat16) is None
    assert "cached in bf16" in str(unsupported(weights, torch.int8))
    object.__setattr__(weights, "head", make("mxfp4", VOCAB, HIDDEN))
    assert "expanded to bfloat16 is not among its formats" in str(
        unsupported(weights, torch.bfloat16)
    )


def test_the_compiled_step_is_kept_and_a_missing_compiler_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = native.build("c++", tmp_path)
    made = path.stat().st_mtime_ns
    assert native.build("c++", tmp_path) == path
    assert path.stat().st_mtime_ns == made
    assert list(tmp_path.iterdir()) == [path]
    code = "from tinier.kernels.native import load_library; print(load_library())"
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no C++ compiler 'no-such-compiler'. Install g++, or name one in CXX" in done.stdout
