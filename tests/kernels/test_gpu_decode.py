"""A decoding step in one kernel against the same step operator by operator, on a GPU."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.decode_kernel import fill_caches, inputs_of
from tests.conftest import quantize_tiny

from tinier.checkpoint import Checkpoint
from tinier.engine.decoder import load_decoder
from tinier.engine.runner import Runner
from tinier.kernels import gpu_decode
from tinier.kernels.machine import Machine

WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
BLOCKS, BLOCK_SIZE = 80, 16
on_a_gpu = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]  # fmt: skip


def runner_of(made: Checkpoint, *, in_one_kernel: bool) -> Runner:
    decoder = load_decoder(made, device=torch.device("cuda:0"))
    runner = Runner(decoder, BLOCKS, BLOCK_SIZE, 4, 1024, 64, in_one_kernel=in_one_kernel)
    torch.manual_seed(1)  # both have the same
    fill_caches(runner, 20)
    return runner


def step(runner: Runner, contexts: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits after a new token of sequences that have so many, and what it wrote to the caches."""
    count = len(contexts)
    torch.manual_seed(2)
    inputs = inputs_of(runner, contexts)
    slots = runner._split(inputs, count, count)[2].long()
    whole = runner._whole
    found = []
    for _ in range(3):
        found.append(runner._compute(inputs, [1] * count, max(contexts)).logits.clone())
        assert torch.equal(found[0], found[-1])
    if whole is not None:
        layers = runner.decoder.geometry.layers
        assert whole._counters.tolist() == [1 + 3 * 4 * layers, 0]
    written = [t[slots].float() for c in runner._caches for t in (c.keys, c.values)]
    return found[0].float(), written


@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_a_gpu)])
@pytest.mark.parametrize(
    "contexts", [[1], [33], [500], [17, 130], [2, 400, 129], [700, 300, 64, 1]]
)
@pytest.mark.parametrize(
    ("family", "preset", "plan"),
    [
        ("llama", None, {}),
        ("llama", "fp8", {}),
        ("llama", "int8", {}),
        ("llama", "int4", {"group_size": 32}),
        ("llama", "int4", {"group_size": 64}),
        ("llama", "int4", {"group_size": 128}),
        ("llama", "fp8", {"kv": "fp8"}),
        ("llama", "int4", {"kv": "int8"}),
        ("qwen2", None, {}),  # biases
        ("qwen3", None, {}),  # norms of heads
    ],
)
def test_one_kernel_computes_what_the_operators_do(
    tiny: Callable[..., Checkpoint], tmp_path: Path, marked: None, family: str, preset: str | None,
    plan: dict[str, object], contexts: list[int],
) -> None:  # fmt: skip
    made = tiny(family, dtype=torch.bfloat16, **WIDE)
    if preset is not None:
        made = quantize_tiny(made, preset, tmp_path / "q", **plan)
    one, many = (runner_of(made, in_one_kernel=is_one) for is_one in (True, False))
    assert one._whole is not None
    assert many._whole is None
    ours, theirs = step(one, contexts), step(many, contexts)
    # an input that crosses to the next code moves what follows by a share of it
    most = 0.25 if preset in ("fp8", "int8") or plan.get("kv") else 0.03
    for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        assert (a - b).norm() < most * b.norm()


def test_a_cpu_has_no_such_step(tiny: Callable[..., Checkpoint]) -> None:
    decoder = load_decoder(tiny("llama", dtype=torch.bfloat16), device=torch.device("cpu"))
    runner = Runner(decoder, 8, BLOCK_SIZE, 4, 64, 64, in_one_kernel=True)
    assert runner._whole is None
    weights, rotation = runner._decode_weights(), runner._head_inputs[0].rotation
    reason = gpu_decode.unsupported(weights, runner._caches, rotation)
    assert reason == "it needs a GPU of compute capability 9.0 or later"


def test_float32_is_none_of_its_formats(
    tiny: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(tiny("llama"), device=torch.device("cpu"))
    weights = Runner(decoder, 8, BLOCK_SIZE, 4, 64, 64)._decode_weights()
    monkeypatch.setattr(gpu_decode, "machine_of", lambda device: Machine("cuda", (9, 0)))
    monkeypatch.setattr(gpu_decode, "_multiprocessors", lambda device: 132)
    assert gpu_decode.faster_up_to(weights) == 0


def decode_weights(kinds: list[int], layer_bytes: int, rows: int) -> Any:
    """Two layers of four linears and a head, of these kinds."""
    few = SimpleNamespace(shape=(rows, 64))
    linears = [SimpleNamespace(kind=k, few=few, num_bytes=layer_bytes // 4) for k in kinds * 4]
    layer = SimpleNamespace(linears=linears[:4], gate_up=None)
    return SimpleNamespace(
        final_norm=torch.zeros(1), layers=[layer, layer],
        linears=[*linears[:4] * 2, SimpleNamespace(kind=99)],
    )  # fmt: skip


def test_the_kernel_is_used_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine("cuda", (9, 0))
    monkeypatch.setattr(gpu_decode, "machine_of", lambda device: machine)
    monkeypatch.setattr(gpu_decode, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(gpu_decode, "_kind", lambda linear: linear.kind)

    def faster(*kinds: int, layer_bytes: int = 10**8, rows: int = 3072) -> int:
        return gpu_decode.faster_up_to(decode_weights([*kinds], layer_bytes, rows))

    int4 = gpu_decode._INT4
    assert [faster(k) for k in (gpu_decode.BF16, gpu_decode.E4M3, gpu_decode.INT8)] == [1, 1, 1]
    assert [faster(int4[group]) for group in (128, 64, 32)] == [2, 1, 1]
    assert faster(int4[128], gpu_decode.INT8) == 0
    assert faster(int4[128], layer_bytes=3 * 10**8) == faster(int4[128], rows=1024) == 0
    assert faster(gpu_decode.BF16, rows=1024) == 1
    machine = Machine("cuda", (12, 0))
    assert faster(int4[128]) == 0
