"""What learned rounding minimizes: the error as the norm behind the layer hands it on."""

from collections.abc import Callable

import torch

from tinier.calibration import DecoderWalk
from tinier.checkpoint import Checkpoint
from tinier.quantization.learned import Importance, _error

Tiny = Callable[..., Checkpoint]
CPU = torch.device("cpu")


def error(
    source: Checkpoint, outputs: torch.Tensor, inputs: torch.Tensor, gain: torch.Tensor
) -> float:
    walk = DecoderWalk(source, inputs.shape[1], CPU)
    layer = walk.load(0)
    importance = Importance(gain.square(), None)
    return _error(walk, layer, {}, inputs, outputs, importance, torch.arange(len(inputs))).item()


def test_a_channel_that_the_norm_leaves_out_is_not_learned_from(tiny: Tiny) -> None:
    source = tiny(dtype=torch.float32)
    inputs = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    walk = DecoderWalk(source, 8, CPU)
    outputs = walk.run(walk.load(0), inputs, torch.empty_like(inputs)) + 0.01
    gain = torch.ones(64)
    plain = error(source, outputs, inputs, gain)
    gain[3] = 0
    moved = outputs.clone()
    moved[..., 3] += 0.5
    share = (outputs.square().sum(-1) / moved.square().sum(-1)).mean().item()
    assert error(source, moved, inputs, gain) < plain
    assert error(source, moved, inputs, torch.ones(64)) > 10 * plain * share


def test_a_large_token_counts_as_much_as_a_small_one(tiny: Tiny) -> None:
    source = tiny(dtype=torch.float32)
    inputs = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] *= 1000
    walk = DecoderWalk(source, 8, CPU)
    outputs = walk.run(walk.load(0), inputs, torch.empty_like(inputs))
    errors = []
    for token in (0, 5):
        wrong = outputs.clone()
        wrong[:, token] *= 1.1
        errors.append(error(source, wrong, inputs, torch.ones(64)))
    assert errors[0] / errors[1] < 1.001
    assert errors[1] / errors[0] < 1.001


def test_tokens_count_what_the_fisher_information_says(tiny: Tiny) -> None:
    source = tiny(dtype=torch.float32)
    inputs = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    walk = DecoderWalk(source, 8, CPU)
    layer = walk.load(0)
    outputs = walk.run(layer, inputs, torch.empty_like(inputs)) + 0.1
    channels, tokens = torch.rand(64), torch.rand(2, 8)
    chosen = torch.tensor([1])
    found = _error(walk, layer, {}, inputs, outputs, Importance(channels, tokens), chosen).item()
    expected = 0.1**2 * float(channels.sum()) * float(tokens[1].mean())
    assert abs(found / expected - 1) < 1e-3
