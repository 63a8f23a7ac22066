"""How long a decode step of other sizes takes on this device, from a few measured ones.

Start at `StepTime`. The engine decodes with random weights of two depths at the full and at half the
width; between them the time of a layer and of what is around the layers is taken as linear in bytes.
"""

import statistics
import tempfile
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch

from tinier.checkpoint import Checkpoint, TensorWriter, copy_side_files, write_config
from tinier.device import release_memory
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import Geometry, geometry_of, open_model
from tinier.pruning.cut import Sizes
from tinier.pruning.importance import cut_to
from tinier.pruning.plan import resized

_CONTEXT, _STEPS, _WARM_UP = 64, 24, 8


class StepTime:
    """Milliseconds of one decode step at batch 1, by sizes."""

    def __init__(self, source: Checkpoint, device: torch.device) -> None:
        self._source, self._device = source, device
        self._geometry = geometry_of(source)

    def __call__(self, sizes: Sizes) -> float:
        after = resized(self._geometry, sizes)
        (layer_fixed, layer_rate), (edge_fixed, edge_rate) = self._fitted
        layer = layer_fixed + layer_rate * after.active_layer_parameters
        return after.layers * layer + edge_fixed + edge_rate * after.vocab * after.hidden

    @cached_property
    def _fitted(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Fixed time and time per parameter, of a layer and of embedding, norm and head."""
        whole = Sizes.of(self._geometry)
        half = replace(whole, hidden=whole.hidden // 2, intermediate=whole.intermediate // 2)
        points = []
        for sizes in (whole, half):
            shallow, deep = (self.measure(replace(sizes, layers=n)) for n in (2, 4))
            layer = max(0.0, (deep - shallow) / 2)
            points.append((resized(self._geometry, sizes), layer, max(0.0, shallow - 2 * layer)))
        (large, *slow), (small, *fast) = points
        sizes_of_layers = large.active_layer_parameters, small.active_layer_parameters
        sizes_of_edges = large.vocab * large.hidden, small.vocab * small.hidden
        return _line(sizes_of_layers, (slow[0], fast[0])), _line(sizes_of_edges, (slow[1], fast[1]))

    def measure(self, sizes: Sizes) -> float:
        """Median milliseconds of a step, with random weights of these sizes."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            _write_random(self._source, sizes, self._geometry, path)
            engine = Engine(
                open_model(path),
                EngineConfig(max_batch_size=1, max_seq_len=_CONTEXT + _STEPS, device=self._device.type),
            )  # fmt: skip
            params = SamplingParams(max_tokens=_STEPS, stop_token_ids=())
            request = engine.add(list(range(1, _CONTEXT + 1)), params)
            while engine.has_work:
                engine.step()
            del engine
        release_memory()
        times = request.token_times[_WARM_UP:]
        steps = [after - before for before, after in pairwise(times)]
        return 1e3 * statistics.median(steps)


def _line(xs: tuple[int, int], ys: tuple[float, float]) -> tuple[float, float]:
    """(value at 0, slope) through two points; neither is negative."""
    slope = max(0.0, (ys[0] - ys[1]) / (xs[0] - xs[1]))
    return max(0.0, ys[0] - slope * xs[0]), slope


def _write_random(source: Checkpoint, sizes: Sizes, geometry: Geometry, folder: Path) -> None:
    """A checkpoint of these sizes whose weights are noise of the usual size."""
    cut = cut_to(geometry, sizes, tuple(range(sizes.layers)), None)
    folder.mkdir()
    writer = TensorWriter(folder)
    generator = torch.Generator().manual_seed(0)
    for name, info in source.tensors.items():
        renamed = cut.renamed(name, geometry)
        if renamed is not None:
            noise = torch.randn(info.shape, generator=generator).mul_(0.02).to(source.dtype)
            writer.add(renamed, cut.tensor(name, noise, geometry))
    writer.close()
    write_config(folder, cut.config(source.config, geometry))
    copy_side_files(source, folder)
