"""RoPE is transformers', for every scaling that checkpoints may ask for, at 16,384 tokens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import TinyMaker
from tests.engine.test_decoder import distance, logits_of_both
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.engine.rope import Rope

LENGTH = 16_384


SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 8.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 2048},
    "llama3": {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run of these tests kept would be compared with itself."""
    monkeypatch.setenv("TINIER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("length", [1000, LENGTH])
@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_those_of_transformers(kind: str, dtype: torch.dtype, length: int) -> None:
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=8, max_position_embeddings=2048,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5, **SCALINGS[kind]},
    )  # fmt: skip
    check(config, LlamaRotaryEmbedding(config), dtype, length)


@pytest.mark.parametrize("length", [1000, LENGTH])
@pytest.mark.parametrize("partial", [1.0, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_longrope_turns_short_and_long_sequences_in_two_ways(
    dtype: torch.dtype, partial: float, length: int
) -> None:
    config = Phi3Config(
        hidden_size=256, num_attention_heads=8, max_position_embeddings=LENGTH,
        original_max_position_embeddings=2048, rope_parameters=longrope(16, partial, 2048),
    )  # fmt: skip
    check(config, Phi3RotaryEmbedding(config), dtype, length)


def longrope(pairs: int, partial: float, original: int) -> dict[str, Any]:
    """For heads of `pairs` pairs of channels."""
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.rand(2, int(pairs * partial), generator=generator) * 3 + 1).tolist()
    return {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": original, "partial_rotary_factor": partial,
    }  # fmt: skip


def check(
    config: PreTrainedConfig, module: torch.nn.Module, dtype: torch.dtype, length: int
) -> None:
    positions = torch.arange(length)
    theirs = module(torch.zeros(1, dtype=dtype), positions.unsqueeze(0))
    values = SimpleNamespace(**json.loads(config.to_json_string(use_diff=False)))
    for _ in range(2):  # from transformers, and as it was kept
        rope = Rope(values, torch.device("cpu"))
        for one, other in zip(rope(positions, length, dtype), theirs, strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other.squeeze(0))


@pytest.mark.slow
def test_a_second_start_does_not_import_transformers(tiny: TinyMaker, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, **SCALINGS["llama3"]}
    model = tiny("llama", rope_parameters=rope)
    code = (
        "import sys\n"
        "from tinier.engine import Engine, EngineConfig, SamplingParams\n"
        "from tinier.families import open_model\n"
        "config = EngineConfig(max_seq_len=int(sys.argv[2]), device='cpu')\n"
        "engine = Engine(open_model(sys.argv[1]), config)\n"
        "engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))\n"
        "print('transformers' in sys.modules, 'torch._dynamo' in sys.modules)"
    )

    def start(longest: int) -> str:
        process = [sys.executable, "-c", code, str(model.folder), str(longest)]
        return subprocess.run(process, check=True, capture_output=True, text=True).stdout

    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert start(64).startswith("True")
    assert start(32) == "False False\n"  # memory may have room for fewer
    for kept in (tmp_path / "cache").rglob("*.json"):
        kept.write_text("", encoding="utf-8")
    assert start(64).startswith("True")
    assert start(64) == "False False\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SCALINGS, "longrope"])
def test_a_long_window_has_the_logits_of_transformers(tiny: TinyMaker, kind: str) -> None:
    """16,384 tokens of a model made for 2,048."""
    rope = {"rope_type": kind, "rope_theta": 1e4, **SCALINGS.get(kind, {})}
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    if kind in ("linear", "dynamic"):
        sizes["max_position_embeddings"] = 2048
    if kind == "longrope":
        rope = longrope(8, 0.75, 2048)
        sizes["original_max_position_embeddings"] = 2048
    model = tiny("phi3" if kind == "longrope" else "llama", rope_parameters=rope, **sizes)
    assert distance(*logits_of_both(model, length=LENGTH)) < 1e-4


def test_an_engine_for_long_sequences_turns_all_in_the_long_way(tiny: TinyMaker) -> None:
    """transformers looks at each call's length; a cache cannot, so `max_seq_len` decides."""
    sizes = {"rope_parameters": longrope(8, 1.0, 32), "original_max_position_embeddings": 32}
    model = tiny("phi3", **sizes)
    prompt = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    found = []
    for length in (60, 20):
        ours, theirs = logits_of_both(model, length=length)
        assert distance(ours, theirs) < 1e-5
    for longest in (32, 128):
        engine = Engine(model, EngineConfig(max_seq_len=longest, device="cpu"))
        params = SamplingParams(max_tokens=1, prompt_logits=True)
        request = engine.add(prompt[0, :20].tolist(), params)
        while engine.has_work:
            engine.step()
        found.append(torch.cat(request.prompt_logits))
    short = engine.decoder.logits(engine.decoder.hidden_states(prompt[:, :20]))[0]
    assert distance(found[0], short) < 1e-5
    assert distance(found[1], short) > 1e-3
    long = engine.decoder.logits(engine.decoder.hidden_states(prompt))[0, :20]
    assert distance(found[1], long) < 1e-5
