"""The native decode step, against the same decoder written with reference.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
from tinier.kernels.linear import Linear, NativeLinear, StackedLinear
from tinier.kernels.reference import cached_attention, gated, rms_norm
from tinier.numerics import (
    Quantized,
    dequantize,
    quantize_tokens_e4m3,
    quantize_tokens_int8,
    round_static,
)
from tinier.quantization.scales import absmax_scales, round_nearest
from tinier.schemes import Int4Inputs, Scheme, preset_named

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, BLOCK = 128, 192, 6, 2, 48, 77, 4
SLOTS = 99 * BLOCK

pytestmark = pytest.mark.skipif(
    isinstance(native.load_library(), str), reason=str(native.load_library())
)


def quantized(weight: Tensor, kind: str) -> StoredLinear:
    """kind: int8, w8a16, int4-32, int4-64, int4-64-asym, those with " int8" for rounded inputs, w4a8-int8,
    or a preset of 8-bit floats."""
    kind = kind.removesuffix(" int8")
    name, *options = [kind] if kind.startswith(("fp8", "w4a8")) else kind.split("-")
    name = "int8" if name == "w8a16" else name
    preset = preset_named(
        name, int(options[0]) if options else None, symmetric=False if "asym" in options else None
    )
    grid = preset.scheme.weights
    scheme = Scheme(weights=grid) if kind == "w8a16" else preset.scheme
    codes = round_nearest(weight, absmax_scales(weight, grid, torch.bfloat16), grid)
    static = torch.tensor([0.01]) if preset.scheme.static_activations else None
    return StoredLinear(codes, None, scheme, static)


def stored(kind: str, rows: int, columns: int) -> StoredLinear:
    weight = torch.randn(rows, columns) * columns**-0.5
    return StoredLinear(weight.bfloat16(), None) if kind == "bf16" else quantized(weight, kind)


def make(kind: str, rows: int, columns: int, *, bias: bool = False) -> Linear:
    layer = stored(kind, rows, columns)
    if bias:
        layer = layer._replace(bias=torch.randn(rows, dtype=torch.bfloat16))
    return make_linear([layer], torch.bfloat16, int4_inputs(kind))


def int4_inputs(kind: str) -> Int4Inputs:
    return "int8" if kind.endswith(" int8") else "16bit"


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
        in_float32=mixture.in_float32, activation="silu", int4_inputs=int4_inputs(kind),
    )  # fmt: skip


def random_weights(
    kind: str = "bf16", head: str = "bf16", *, bias: bool = False, qk_norm: bool = False,
    window: int | None = None, mixture: str | None = None,
) -> DecodeWeights:  # fmt: skip
    torch.manual_seed(0)

    def norm(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(size, dtype=torch.bfloat16)

    def layer() -> Layer:
        out_kind = "bf16" if kind.startswith(("int4", "w4a8")) else kind  # 288 inputs
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
        layers=[layer(), layer()],
        final_norm=norm(HIDDEN),
        head=make(head, VOCAB, HIDDEN),
    )


class Step:
    """Inputs of one step: sequences of some lengths in a cache that earlier steps have filled."""

    def __init__(self, contexts: list[int], new: list[int] | None = None) -> None:
        """contexts: of each sequence, `new` tokens counted, those of one token first. None: one each."""
        self.new = new or [1] * len(contexts)
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
        ranges = zip(contexts, self.new, strict=True)
        at = [torch.arange(context - count, context) for context, count in ranges]
        self.positions = torch.cat(at).int()
        sequence = torch.arange(len(contexts)).repeat_interleave(torch.tensor(self.new))
        block = self.tables[sequence, self.positions // BLOCK]
        self.slots = block * BLOCK + self.positions % BLOCK
        self.entering = random(len(sequence), HIDDEN)
        self.starts = torch.tensor([0, *self.new]).cumsum(0).int()

    def native(self, weights: DecodeWeights, only: int | None = None) -> Tensor:
        """Logits of all sequences, or of a step with one of them."""
        return self.with_hidden(weights, only)[0]

    def with_hidden(
        self, weights: DecodeWeights, only: int | None = None, last: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """last: so many of its new tokens."""
        decoder = CpuDecoder(weights, self.caches(weights), self.rotations, BLOCK)
        inputs, starts, tables = (
            (self.entering, self.positions, self.slots),
            self.starts,
            self.tables,
        )
        if only is not None:
            end = int(starts[only + 1])
            begin = int(starts[only]) if last is None else end - last
            inputs = tuple(t[begin:end] for t in inputs)
            starts = torch.tensor([0, end - begin], dtype=torch.int32)
            tables = tables[only : only + 1]
        logits, hidden = decoder.step(*inputs, starts, tables, hidden=True)
        assert hidden is not None
        return logits, hidden

    def caches(self, weights: DecodeWeights) -> list[Cache]:
        parts = zip(self.keys, self.values, weights.geometry.windows, strict=True)
        return [Cache(keys, values, window=window) for keys, values, window in parts]

    def reference(self, weights: DecodeWeights) -> Tensor:
        eps = weights.geometry.norm_eps
        batch = PagedBatch(
            self.tables, self.contexts, self.starts, self.positions, self.slots,
            torch.tensor([self.new.count(1)]), self.new, BLOCK, int(self.contexts.max()),
        )  # fmt: skip
        x = self.entering
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
            return weights.head(rms_norm(x, weights.final_norm, eps)[self.starts[1:].long() - 1])


def apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("new", [[1, 1, 1], [1, 9, 6], [1, 1, 23]])
@pytest.mark.parametrize("head", ["bf16", "int8", "w8a16"])
@pytest.mark.parametrize(
    "kind",
    [
        "bf16",
        "int8",
        "w8a16",
        "w8a16 int8",
        "int4-32",
        "int4-64",
        "int4-64-asym",
        "int4-32 int8",
        "int4-64-asym int8",
        "w4a8-int8",
        "fp8",
        "fp8-static",
        "fp8-e5m2",
    ],
)
def test_logits_and_cache_are_those_of_the_reference(kind: str, head: str, new: list[int]) -> None:
    weights = random_weights(kind, head)
    ours, plain = Step([1, 9, 30], new), Step([1, 9, 30], new)
    assert apart(ours.native(weights), plain.reference(weights)) < (
        # 8-bit activations: the last bit of a sum may move a number by one step of E4M3, an eighth of it
        0.06 if kind in ("fp8", "fp8-static") else 0.03 if "8" in kind else 0.015
    )
    written = ours.slots.long()
    for made, stored in zip(ours.keys + ours.values, plain.keys + plain.values, strict=True):
        tolerance = 0.06 if kind in ("fp8", "fp8-static") else 0.015
        assert apart(made[written], stored[written]) < tolerance
        made[written] = stored[written]
        assert torch.equal(made, stored)


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"qk_norm": True}, {"window": 5}, {"bias": True, "window": 1}]
)
@pytest.mark.parametrize("kind", ["bf16", "int4-64"])
def test_every_family_has_what_it_needs(kind: str, options: dict[str, int]) -> None:
    weights = random_weights(kind, **options)  # type: ignore[arg-type]
    assert apart(Step([3, 17]).native(weights), Step([3, 17]).reference(weights)) < 0.015


@pytest.mark.parametrize("family", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4-64", "int4-64-asym", "int4-64 int8"])
def test_a_mixture_of_experts_is_that_of_the_reference(kind: str, family: str) -> None:
    weights = random_weights(kind, mixture=family)
    contexts = [1, 9, 30, 17, 4, 21, 8, 13, 2]
    ours, plain = Step(contexts).native(weights), Step(contexts).reference(weights)
    rows = torch.stack([torch.tensor(apart(a, b)) for a, b in zip(ours, plain, strict=True)])
    # a row whose expert changes with the last bit is far off
    assert rows.median() < (0.03 if "int8" in kind else 0.015), rows
    assert (rows < 0.05).sum() >= len(contexts) - 2, rows


@pytest.mark.parametrize("mixture", [None, "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize(
    "kind", ["bf16", "int8", "w8a16", "w8a16 int8", "int4-64", "int4-64 int8", "fp8", "fp8-e5m2"]
)
def test_a_row_does_not_depend_on_the_others_or_on_threads(kind: str, mixture: str | None) -> None:
    weights = random_weights(kind, mixture=mixture)
    contexts = [5, 12, 3, 40, 7, 21, 8, 33]
    for new in ([1] * 8, [1, 1, 1, 1, 1, 1, 5, 31]):  # few and many rows
        step = Step(contexts, new)
        together, hidden = step.with_hidden(weights)
        for row in range(len(contexts)):
            alone, own = Step(contexts, new).with_hidden(weights, row)
            assert torch.equal(alone[0], together[row])
            assert torch.equal(own, hidden[step.starts[row] : step.starts[row + 1]])
        # a prompt's last tokens in a step of their own, as after a prefix that was there
        again, _ = step.with_hidden(weights, 7, last=1)
        assert torch.equal(again[0], together[7])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert torch.equal(Step(contexts, new).native(weights), together)
        torch.set_num_threads(threads)


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
    x = rms_norm(step.entering, weights.final_norm, 1e-5)
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


def rounded(x: Tensor, kind: str) -> Tensor:
    """x as a layer's inputs, in float64."""
    if kind == "fp8":
        codes = quantize_tokens_e4m3(x)
    elif kind == "w4a8-int8":
        codes = quantize_tokens_int8(x)
    elif kind == "fp8-static":
        return round_static(x, "float", torch.tensor(0.01)).double()
    elif kind.endswith(" int8"):
        blocks = x.float().unflatten(1, (-1, 32))
        scale = blocks.abs().amax(dim=2, keepdim=True) / 127
        return ((blocks / scale).round() * scale).flatten(1).double()
    else:
        return x.double()
    return codes.codes.double() * codes.scale.double()


@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize(
    "kind",
    ["fp8", "fp8-static", "fp8-e5m2", "int4-32", "int4-64-asym", "int4-32 int8", "int4-128 int8",
     "int4-64-asym int8", "w4a8-int8", "w8a16", "w8a16 int8"],
)  # fmt: skip
def test_products_are_those_of_what_is_stored(kind: str, rows: int) -> None:
    """Against float64, small codes included; rounded to bf16 once, and with a bias."""
    torch.manual_seed(2)
    size = torch.logspace(-4, 0, 256) if kind.startswith("fp8") else torch.ones(256)
    stored = quantized(torch.randn(27, 256) * size, kind)
    assert isinstance(stored.weight, Quantized)
    bias = torch.randn(27).bfloat16()
    layer = make_linear([stored._replace(bias=bias)], torch.bfloat16, int4_inputs(kind))
    assert isinstance(layer, NativeLinear)
    assert layer.num_bytes < 27 * 256 * (1.1 if kind.startswith(("fp8", "w8")) else 0.65)
    x = torch.randn(rows, 256).bfloat16()
    exact = rounded(x, kind) @ dequantize(stored.weight, torch.float64).t() + bias.double()
    assert apart(layer.float32(x), exact) < 2e-6
    assert apart(layer(x), exact) < 5e-3


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
