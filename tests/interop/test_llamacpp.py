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
from tinier.errors import SchemeError
from tinier.exporting import export
from tinier.families import open_model
from tinier.tokenizer import load_tokenizer

pytestmark = [pytest.mark.network, pytest.mark.slow]
PACKAGES = ["xllamacpp==2026.10.11549"]

WORKER = Path(__file__).parent.parent.parent / "benchmarks" / "peers" / "llamacpp_next.py"


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that has llama.cpp (130 MB)."""
    return str(environment("llamacpp", PACKAGES) / "python")


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite", "gemma3")
PRESETS = (None, "int4", "int8", "mxfp4-w4a16", "nvfp4-w4a16")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_llama_cpp_has_the_same_next_tokens(
    tiny: Callable[..., Checkpoint], tmp_path: Path, python: str, family: str, preset: str | None
) -> None:
    """Of every family and type that is written: llama.cpp applies the scales of NVFP4 in some."""
    options: dict[str, Any] = {"num_attention_heads": 4, "head_dim": 32, "hidden_size": 128}
    if family == "gemma3":
        # without layer_types every sixth sees all
        options |= {"num_hidden_layers": 6, "query_pre_attn_scalar": 32}
    limit = 2e-3 if preset is None else 0.02  # in 8 bits llama.cpp rounds what it multiplies
    source = tiny(family, dtype=torch.bfloat16, **options)
    if preset is not None:
        source = open_model(quantize_tiny(source, preset, tmp_path / "source").folder)
    if preset == "nvfp4-w4a16" and family in ("qwen2", "granite", "gemma3"):
        with pytest.raises(SchemeError, match="leaves the second scale of NVFP4 out"):
            export(source, "gguf", tmp_path / "made")
        return
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
