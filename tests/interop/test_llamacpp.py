"""llama.cpp computes what tinier's engine does from the GGUF files that `tinier export` writes."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import environment, quantize_tiny

from tinier.checkpoint import Checkpoint
from tinier.engine.decoder import load_decoder
from tinier.export import export
from tinier.families import open_model
from tinier.tokenizer import load_tokenizer

pytestmark = [pytest.mark.network, pytest.mark.slow]
PACKAGES = ["xllamacpp==2026.10.11549"]

WORKER = Path(__file__).parent.parent.parent / "benchmarks" / "peers" / "llamacpp_next.py"


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that has llama.cpp (130 MB)."""
    return str(environment("llamacpp", PACKAGES) / "python")


@pytest.mark.parametrize(
    ("family", "preset", "limit"),
    [
        # in 8 bits llama.cpp rounds what it multiplies
        ("llama", None, 2e-3), ("qwen2", None, 2e-3), ("qwen3", None, 2e-3), ("granite", None, 2e-3),
        ("llama", "int4", 0.02), ("llama", "int8", 0.02), ("llama", "nvfp4-w4a16", 0.02),
        ("llama", "mxfp4-w4a16", 0.02), ("qwen2", "int4", 0.02),
    ],
)  # fmt: skip
def test_llama_cpp_has_the_same_next_tokens(
    tiny: Callable[..., Checkpoint], tmp_path: Path, python: str, family: str, preset: str | None,
    limit: float,
) -> None:  # fmt: skip
    options: dict[str, Any] = {"num_attention_heads": 4, "head_dim": 32, "hidden_size": 128}
    source = tiny(family, dtype=torch.bfloat16, **options)
    if preset is not None:
        source = open_model(quantize_tiny(source, preset, tmp_path / "source").folder)
    export(source, "gguf", tmp_path / "made")
    windows = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(0))
    prompts = [
        window[:length].tolist() for window, length in zip(windows, range(3, 21, 3), strict=True)
    ]
    letter = load_tokenizer(source).inner.convert_tokens_to_ids("A")
    file = tmp_path / "made" / "model.gguf"
    command = [python, str(WORKER), str(file), str(letter), "200"]
    done = subprocess.run(
        command, input=json.dumps(prompts), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    decoder = load_decoder(source, device=torch.device("cpu"), dtype=torch.float32)
    apart = []
    for prompt, likely in zip(prompts, theirs, strict=True):
        hidden = decoder.hidden_states(torch.tensor([prompt]))[0, -1:]
        ours = decoder.logits_float32(hidden)[0].log_softmax(dim=-1)
        ids, told = (torch.tensor(column) for column in zip(*likely, strict=True))
        apart.append((ours[ids].exp() * (ours[ids] - told)).sum().item())
    assert abs(sum(apart) / len(apart)) < limit, apart
