"""Random tiny models under random legal options: transformers, the decoder and the whole engine agree.

A few fixed draws in the fast tests, hundreds in the slow ones. A draw that fails is one line to repeat:
`check(seed, folder, device)`.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import DEVICES, DOCUMENTS, MIXTURES, transformers_rounds_caches, write_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.device import bf16_products
from tinier.engine import Engine, EngineConfig, SamplingParams, load_decoder
from tinier.families import open_model
from tinier.quantization import QuantizePlan, quantize
from tinier.schemes import PRESETS

CPU = torch.device("cpu")
# what a seed means stays: newer families have seeds of their own
DRAWN = {
    0: ["llama", "mistral", "qwen2", "qwen3"],
    1000: ["smollm3", "granite", "gemma3"],
    2000: ["olmo2"],
    3000: ["phi3"],
    4000: ["qwen3-moe", "mixtral"],
}
"""Families of the draws from 1,000 on"""
LATER = ("int4-best", "int3-best")
"""Presets that came when the draws were there"""
NAMES = [None, *(name for name in PRESETS if name not in LATER), *LATER]


@dataclass(frozen=True)
class Draw:
    """One model and what is done to it."""

    family: str
    dtype: torch.dtype
    sizes: dict[str, Any]
    plan: QuantizePlan | None


def drawn(seed: int) -> Draw:
    """A legal combination. Sizes are small and odd: nothing is a power of two by design."""
    rng = random.Random(seed)
    family = rng.choice(DRAWN[seed // 1000 * 1000])
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.bfloat16, torch.float16])
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3])
    unit = rng.choice([16, 32, 64])
    hidden = unit * rng.choice([1, 2, 3, 5])
    if family in ("llama", "gemma3"):  # transformers wants the heads to divide it
        hidden *= heads
    sizes: dict[str, Any] = {
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256]),
        "intermediate_size": unit * rng.choice([1, 3, 4, 7]), "num_hidden_layers": 2,
        "vocab_size": rng.choice([264, 265, 288, 300, 333]),
        "tie_word_embeddings": rng.random() < 0.5, "initializer_range": 0.05,
    }  # fmt: skip
    if family == "llama":
        sizes |= {"attention_bias": rng.random() < 0.3, "mlp_bias": rng.random() < 0.3}
    if family in ("qwen3", "smollm3", "granite", "olmo2"):
        sizes["attention_bias"] = rng.random() < 0.3
    if family in ("mistral", "qwen2") and rng.random() < 0.4:
        sizes |= {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}
    if family == "gemma3":
        sizes |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    if family in MIXTURES:
        count = rng.choice([3, 4, 8])
        sizes |= {"num_experts": count, "num_local_experts": count}
        sizes |= {
            "num_experts_per_tok": rng.choice([1, 2, 3]),
            "norm_topk_prob": rng.random() < 0.5,
        }
        sizes["moe_intermediate_size"] = sizes["intermediate_size"]
    if family == "phi3":
        part = rng.choice([0.25, 0.5, 0.75, 1.0])
        sizes["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part,
        }  # fmt: skip
    if family == "smollm3":
        sizes["no_rope_layers"] = rng.choice([[1, 0], [0, 1]])
    return Draw(family, dtype, sizes, _drawn_plan(rng, sizes, unit))


def _drawn_plan(rng: random.Random, sizes: dict[str, Any], unit: int) -> QuantizePlan | None:
    name = rng.choice(NAMES)
    head, kv = rng.choice([None, None, "fp8", "int8"]), rng.choice([None, None, "fp8", "int8"])
    if not transformers_rounds_caches():
        kv = None
    if name is None:
        if head or kv:
            return QuantizePlan(preset=None, head=head, kv=kv, windows=4, length=48)
        return None
    grid = PRESETS[name].scheme.weights
    columns = [sizes["hidden_size"], sizes["intermediate_size"],
               sizes["num_attention_heads"] * sizes["head_dim"]]  # fmt: skip
    group, symmetric = None, None
    if grid.group_size is not None and grid.scale_format == "model":
        fitting = [g for g in (8, 16, 24, 32, 64) if all(c % g == 0 for c in columns)]
        if grid.granularity == "block":
            rows = sizes["num_key_value_heads"] * sizes["head_dim"]
            fitting = [g for g in fitting if rows % g == 0]
        group = rng.choice(fitting)
        if grid.kind == "int" and PRESETS[name].scheme.activations is None:
            symmetric = rng.choice([None, False])
    elif grid.group_size is not None and any(c % grid.group_size for c in columns):
        return QuantizePlan(preset="fp8", head=head, kv=kv, windows=4, length=48)
    return QuantizePlan(
        preset=name, group_size=group, symmetric=symmetric, head=head, kv=kv, windows=4, length=48,
        iterations=2,
    )  # fmt: skip


def distance(ours: Tensor, theirs: Tensor, draw: Draw) -> float:
    """Of all logits; of a mixture of experts that of the median token, as a last bit may send one to other
    experts."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    assert torch.isfinite(ours).all()
    if draw.family in MIXTURES:
        return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median().item()
    return ((ours - theirs).norm() / theirs.norm()).item()


def check(seed: int, folder: Path, device: str = "cpu") -> None:
    """Make the model of a draw and hold everything that can compute it to each other."""
    draw = drawn(seed)
    source = write_tiny(folder / "source", draw.family, dtype=draw.dtype, seed=seed, **draw.sizes)
    made = source
    if draw.plan is not None:
        made = quantize(source, draw.plan, folder / "made", text=DOCUMENTS, device="cpu")
    made = open_model(made.folder)
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(0, 256, (2, 40), generator=generator)
    decoder = load_decoder(made, device=torch.device(device))
    ours = decoder.logits(decoder.hidden_states(windows)).float()
    exact = draw.dtype == torch.float32 and not _rounds_inputs(draw)
    # a 4-bit activation that falls on the other side of a code moves by a half: the last bit shows
    _check_engine(
        draw, made, windows, ours, device, 1e-4 if exact else 0.35 if _is_coarse(draw) else 0.1
    )
    dense = _transformers(source, windows)
    # nothing is far from the model that was quantized, but at very few bits
    bits = 16 if draw.plan is None or draw.plan.preset is None else _bits(draw.plan)
    limits = {16: 0.12, 8: 0.25, 4: 0.7 if _is_coarse(draw) else 0.6, 3: 0.9, 2: 1.5}
    assert distance(ours, dense, draw) < limits[bits], draw
    if device == "cpu" and _loads(draw):
        theirs = _transformers(made, windows)
        # two ways to round to 16 bits, or a token's largest number between two codes
        near = 1e-4 if exact else 0.05
        apart = distance(theirs, dense, draw)
        assert distance(ours, theirs, draw) < max(near, 1.42 * apart), draw


def _check_engine(
    draw: Draw, made: Checkpoint, windows: Tensor, ours: Tensor, device: str, limit: float
) -> None:
    """The paged engine: a prompt, one more token after it, and both in one batch with others."""
    config = EngineConfig(
        max_batch_size=3, max_seq_len=64, block_size=4, max_step_tokens=24, device=device
    )
    engine = Engine(made, config)
    params = SamplingParams(max_tokens=2, prompt_logits=True)
    requests = [engine.add(window, params) for window in windows.tolist()]
    while engine.has_work:
        engine.step()
    for request, expected in zip(requests, ours, strict=True):
        found = torch.cat(request.prompt_logits)
        assert distance(found, expected, draw) < limit
        assert len(request.output) == 2


def _transformers(checkpoint: Checkpoint, windows: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=checkpoint.dtype).eval()
    with torch.no_grad(), bf16_products(CPU):
        logits: Tensor = model(windows).logits.float()
    return logits


def _bits(plan: QuantizePlan) -> int:
    assert plan.preset is not None
    return PRESETS[plan.preset].scheme.weights.bits


def _rounds_inputs(draw: Draw) -> bool:
    plan = draw.plan
    if plan is None:
        return False
    inputs = plan.preset is not None and PRESETS[plan.preset].scheme.activations is not None
    return inputs or plan.head is not None or plan.kv is not None


def _is_coarse(draw: Draw) -> bool:
    if draw.plan is None or draw.plan.preset is None:
        return False
    activations = PRESETS[draw.plan.preset].scheme.activations
    return activations is not None and activations.bits == 4


def _loads(draw: Draw) -> bool:
    """Whether transformers can load it (see the warnings of the plan)."""
    if draw.family in MIXTURES:
        return draw.plan is None
    if draw.plan is None or draw.plan.preset is None:
        return draw.plan is None or draw.plan.head is not None
    grid = PRESETS[draw.plan.preset].scheme.weights
    is_fp4 = grid.kind == "float" and grid.bits == 4
    return draw.plan.symmetric is None and not (is_fp4 and draw.dtype != torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "seed",
    [*range(12), *range(1000, 1004), *range(2000, 2004), *range(3000, 3004), *range(4000, 4004)],
)
def test_a_few_models(tmp_path: Path, seed: int, device: str) -> None:
    check(seed, tmp_path, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [*range(100, 340), *range(1100, 1150)])
def test_many_models(tmp_path: Path, seed: int, device: str) -> None:
    check(seed, tmp_path, device)
