"""Every family on a GPU against the CPU: whole windows, and token by token through graphs and cache."""

from pathlib import Path

import pytest
import torch
from tests.conftest import FAMILIES, MIXTURES, quantize_tiny

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.engine.decoder import load_decoder

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]  # fmt: skip
WIDE = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 64}


def logits(checkpoint: Checkpoint, device: str, windows: torch.Tensor) -> torch.Tensor:
    decoder = load_decoder(checkpoint, device=torch.device(device))
    hidden = decoder.hidden_states(windows).flatten(0, 1)
    return decoder.logits_float32(hidden).cpu()


@pytest.mark.parametrize(
    ("family", "preset"),
    [(family, None) for family in FAMILIES]
    + [(family, preset) for family in MIXTURES for preset in ("fp8", "fp8-static", "int8", "int4")],
)
def test_a_family_on_a_gpu_computes_what_it_does_on_a_cpu(
    tiny, tmp_path: Path, family: str, preset: str | None  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    source = tiny(family, dtype=torch.bfloat16, **WIDE)
    made = source if preset is None else quantize_tiny(source, preset, tmp_path / "q")
    windows = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(1))
    ours, theirs = logits(made, "cuda", windows), logits(made, "cpu", windows)
    apart = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    # a token whose expert changes with the last bit is far off; most are not
    assert apart.median() < 0.03, apart.median()

    config = EngineConfig(max_batch_size=8, max_seq_len=128, device="cuda:0")
    engine = Engine(made, config)
    assert engine.runner._captures
    params = SamplingParams(max_tokens=24, logprobs=1)
    prompts = [windows[0, :n].tolist() for n in (3, 17, 33)]
    requests = [engine.add(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    for prompt, request in zip(prompts, requests, strict=True):
        whole = torch.tensor([[*prompt, *request.output]])
        rows = logits(made, "cuda", whole)[len(prompt) - 1 : -1].log_softmax(dim=-1)
        known = rows.gather(1, torch.tensor(request.output).unsqueeze(1)).squeeze(1)
        told = torch.tensor([value.logprob for value in request.logprobs])
        assert (known - told).abs().median() < 0.05
