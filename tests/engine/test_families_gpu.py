"""Every family on a GPU against the CPU: whole windows, and token by token through graphs and cache."""

from collections.abc import Callable
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


def logits(
    checkpoint: Checkpoint, device: str, windows: torch.Tensor, noise: float = 0.0
) -> torch.Tensor:
    """noise: the embeddings are off by up to this share, drawn at random."""
    decoder = load_decoder(checkpoint, device=torch.device(device))
    if noise:
        size = decoder.geometry.vocab, decoder.geometry.hidden
        draw = torch.rand(size, generator=torch.Generator().manual_seed(3)).to(device)
        plain, factor = decoder.embed, 1 + noise * (2 * draw - 1)
        decoder.embed = lambda at: (plain(at).float() * factor[at]).to(decoder.dtype)  # type: ignore
    hidden = decoder.hidden_states(windows).flatten(0, 1)
    return decoder.logits_float32(hidden).cpu()


@pytest.mark.parametrize(
    ("family", "preset"),
    [(family, None) for family in FAMILIES]
    + [(family, preset) for family in MIXTURES for preset in ("fp8", "fp8-static", "int8", "int4")]
    + [
        (family, f"int4, {kind} embedding")
        for family in ("llama", "gemma3", "mistral")
        for kind in ("fp8", "int8", "int4")
    ],
)
def test_a_family_on_a_gpu_computes_what_it_does_on_a_cpu(
    tiny: Callable[..., Checkpoint], tmp_path: Path, family: str, preset: str | None
) -> None:
    source = tiny(family, dtype=torch.bfloat16, **WIDE)
    made = source
    if preset is not None:
        preset, _, ends = preset.partition(", ")
        plan = {"embedding": ends.split()[0]} if ends else {}
        made = quantize_tiny(source, preset, tmp_path / "q", **plan)
    windows = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(1))
    ours, theirs = logits(made, "cuda", windows), logits(made, "cpu", windows)
    apart = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    # An input that crosses to the next code, and a token whose expert changes with the last bit, move the
    # logits much: the two devices may differ by what one unit in the last place of the embeddings does.
    moved = (logits(made, "cpu", windows, noise=2**-8) - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert apart.median() < max(0.03, 1.25 * moved.median()), (apart.median(), moved.median())

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

        def known(noise: float, whole=whole, prompt=prompt, request=request):  # type: ignore[no-untyped-def]
            rows = logits(made, "cuda", whole, noise)[len(prompt) - 1 : -1].log_softmax(dim=-1)
            return rows.gather(1, torch.tensor(request.output).unsqueeze(1)).squeeze(1)

        told = torch.tensor([value.logprob for value in request.logprobs])
        moved = (known(2**-8) - known(0.0)).abs().median()
        assert (known(0.0) - told).abs().median() < max(0.05, 1.5 * moved)
