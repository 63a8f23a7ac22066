"""Several LoRA adapters beside one model: a batch computes each request as its own merged model would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import quantize_tiny
from tests.test_adapters import pair, write_adapter

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.errors import CheckpointError, InputError
from tinier.families import open_model

Tiny = Callable[..., Checkpoint]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
        ],
    ),
]
PROMPT = [*range(1, 40)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINIER_CACHE", str(tmp_path / "cache"))


def adapters(tmp_path: Path) -> tuple[Path, Path]:
    """Of the tiny Llama: one changes q, v and down of all layers, the other k, out, gate and up of two."""

    def of(layers: range, modules: dict[str, tuple[int, int]], rank: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i in layers:
            for name, sides in modules.items():
                made = pair(f"model.layers.{i}.{name}", *sides, rank=rank)
                found |= {key: tensor * (1 + 0.1 * i) for key, tensor in made.items()}
        return found

    attention, mlp = "self_attn", "mlp"
    first = {
        f"{attention}.q_proj": (64, 64),
        f"{attention}.v_proj": (32, 64),
        f"{mlp}.down_proj": (64, 128),
    }
    second = {
        f"{attention}.k_proj": (32, 64), f"{attention}.o_proj": (64, 64), f"{mlp}.gate_proj": (128, 64),
        f"{mlp}.up_proj": (128, 64),
    }  # fmt: skip
    return (
        write_adapter(tmp_path / "a", of(range(4), first, 4), lora_alpha=32),
        write_adapter(tmp_path / "b", of(range(1, 3), second, 8), r=8, lora_alpha=48),
    )


def outputs(engine: Engine, asked: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    requests = [engine.add(prompt, params) for prompt, params in asked]
    while engine.has_work:
        engine.step()
    return [request.output for request in requests]


@pytest.mark.parametrize("device", DEVICES)
def test_each_request_gets_what_its_merged_model_says(
    tiny: Tiny, tmp_path: Path, device: str
) -> None:
    base = tiny("llama", dtype=torch.float32)
    folders = adapters(tmp_path)
    config = EngineConfig(device=device, max_seq_len=128, adapters=folders, max_step_tokens=48)
    engine = Engine(base, config, dtype=torch.float32)
    asked = [
        (PROMPT[: 20 + i], SamplingParams(max_tokens=12, adapter=i % 3, min_tokens=12))
        for i in range(7)
    ]
    found = outputs(engine, asked)
    for number, model in enumerate((base, *(open_model(f"{base.folder}+{f}") for f in folders))):
        merged = Engine(model, EngineConfig(device=device, max_seq_len=128), dtype=torch.float32)
        for (prompt, params), output in zip(asked, found, strict=True):
            if params.adapter == number:
                assert outputs(
                    merged, [(prompt, SamplingParams(max_tokens=12, min_tokens=12))]
                ) == [output]
    assert len({tuple(output) for output in found}) > 3  # they do change what is said


def test_prefixes_are_shared_with_the_same_adapter_alone(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("llama", dtype=torch.float32)
    engine = Engine(base, EngineConfig(device="cpu", max_seq_len=128, adapters=adapters(tmp_path)))
    reused = []
    for adapter in (0, 1, 2, 1, 0):
        request = engine.add(PROMPT, SamplingParams(max_tokens=4, adapter=adapter))
        while engine.has_work:
            engine.step()
        reused.append(request.num_reused)
    assert reused == [0, 0, 0, 32, 32]


def test_a_quantized_model_takes_adapters_too(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("llama", dtype=torch.bfloat16)
    small = quantize_tiny(base, "int4", tmp_path / "small")
    folders = adapters(tmp_path)
    engine = Engine(small, EngineConfig(device="cpu", max_seq_len=128, adapters=folders))
    params = [SamplingParams(max_tokens=8, adapter=i, logprobs=0) for i in (0, 1, 2)]
    plain = Engine(small, EngineConfig(device="cpu", max_seq_len=128, int4_inputs="int8"))
    one = plain.add(PROMPT, params[0])
    three = [engine.add(PROMPT, p) for p in params]
    for e in (plain, engine):
        while e.has_work:
            e.step()
    assert three[0].logprobs[0].logprob == pytest.approx(one.logprobs[0].logprob, abs=0.1)
    assert len({request.logprobs[0].logprob for request in three}) == 3


def test_bad_adapters_are_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("llama")
    q = "model.layers.0.self_attn.q_proj"

    def load(folder: Path) -> None:
        Engine(base, EngineConfig(device="cpu", max_seq_len=64, adapters=(folder,)))

    wide = write_adapter(tmp_path / "wide", pair(q, 128, 64))
    with pytest.raises(CheckpointError, match=r"changes .*q_proj.*has \(64, 64\) there"):
        load(wide)
    head = write_adapter(tmp_path / "head", pair("lm_head", 264, 64))
    with pytest.raises(CheckpointError, match="no linear layer of that name in its blocks"):
        load(head)
    norm = write_adapter(tmp_path / "n", pair(q, 64, 64) | {"model.norm.weight": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"replaces model.norm.weight.*Merge it"):
        load(norm)
    dora = pair(q, 64, 64) | {f"{q}.lora_magnitude_vector": torch.ones(64)}
    with pytest.raises(CheckpointError, match="DoRA"):
        load(write_adapter(tmp_path / "dora", dora, use_dora=True))
    broken = pair(q, 64, 64)
    broken[f"{q}.lora_B.weight"][3, 1] = float("nan")
    with pytest.raises(CheckpointError, match="has NaN or Inf in the update of"):
        load(write_adapter(tmp_path / "broken", broken))
    with pytest.raises(InputError, match="tensor_parallel=2 with 1 adapters"):
        EngineConfig(adapters=(wide,), tensor_parallel=2)
    engine = Engine(base, EngineConfig(device="cpu", max_seq_len=64))
    with pytest.raises(InputError, match="adapter=1: this engine has 0"):
        engine.add([1], SamplingParams(adapter=1))
    with pytest.raises(InputError, match="adapter=-1"):
        SamplingParams(adapter=-1)
