"""Where two checkpoints differ: layer by layer, and at the end.

Start at `compare_windows`. Both models run over the same windows in step. Each layer of the second is
judged twice: on the inputs that the first model gives (what this layer alone does wrong), and on those
that the second model has by then (what has piled up).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.engine import Decoder, load_decoder
from tinier.engine.decoder import causal_windows
from tinier.evaluation.quality import Quality, evaluate_windows, reference_states
from tinier.evaluation.shown import layers_html, quality_html
from tinier.families import layer_name
from tinier.numerics import power_db
from tinier.progress import bar

_BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    name: str
    layer_snr_db: float | None
    """Signal over error of what the layer adds, on the first model's inputs; None: no error"""
    added_error: float
    """Power of that error as a share of the power of the hidden states after the layer"""
    stream_snr_db: float | None
    """Signal over error of the hidden states after the layer, each model on its own"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    layers: tuple[LayerDifference, ...]
    """Empty where the models have different numbers of layers, or different widths."""
    first: Quality
    second: Quality
    """Its divergence is against the first."""

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return layers_html(self.layers) + quality_html(self.second)

    @property
    def worst(self) -> list[LayerDifference]:
        """Layers by the error that they add, largest first."""
        return sorted(self.layers, key=lambda layer: layer.added_error, reverse=True)


def compare_windows(
    first: Checkpoint, second: Checkpoint, windows: Tensor, *, device: torch.device
) -> Comparison:
    """Compare two checkpoints on windows [n, length]; both are in memory at once.

    They must have the same vocabulary.
    """
    one, other = (load_decoder(checkpoint, device=device) for checkpoint in (first, second))
    reference = reference_states(one, windows)
    alike = (one.geometry.layers, one.geometry.hidden) == (
        other.geometry.layers,
        other.geometry.hidden,
    )
    return Comparison(
        layers=_layers(one, other, windows) if alike else (),
        first=evaluate_windows(one, windows),
        second=evaluate_windows(other, windows, reference),
    )


@torch.inference_mode()
def _layers(one: Decoder, other: Decoder, windows: Tensor) -> tuple[LayerDifference, ...]:
    count = one.geometry.layers
    # for each layer: what it adds, its error, the stream, the stream's error
    powers = torch.zeros(count, 4, dtype=torch.float64)
    length = windows.shape[1]
    with bar("compare", len(windows)) as advance:
        for batch in windows.split(max(1, _BATCH_TOKENS // length)):
            tokens = batch.to(one.device).flatten()
            x, y = (model.embed(tokens) for model in (one, other))
            attends = [causal_windows(model, len(batch), length) for model in (one, other)]
            for i in range(count):
                exact = one.summed(i, *one.layer(i, x, None, attends[0]))
                alone = other.summed(i, *other.layer(i, x, None, attends[1]))
                y = other.summed(i, *other.layer(i, y, None, attends[1]))
                terms = (exact - x, alone - exact, exact, y - exact)
                powers[i] += torch.stack([t.double().square().sum() for t in terms]).cpu()
                x = exact
            advance(len(batch))
    return tuple(
        LayerDifference(
            name=layer_name(i),
            layer_snr_db=power_db(added, error),
            added_error=error / stream if stream else 0.0,
            stream_snr_db=power_db(stream, stream_error),
        )
        for i, (added, error, stream, stream_error) in enumerate(powers.tolist())
    )
