"""Block influence: how much each decoder layer changes the hidden states that pass through it.

ShortGPT, arXiv 2403.03853, equation 1: BI = 1 - mean over tokens of cos(input, output). A layer that
hardly turns its input is a candidate for removal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.calibration import walk
from tinier.checkpoint import Checkpoint


def block_influence(
    checkpoint: Checkpoint, windows: Tensor, *, device: torch.device
) -> list[float]:
    """BI of each layer, in order, from one forward pass. windows: [n, length] token ids."""
    scores = []
    for step in walk(checkpoint, windows, device=device, label="block influence"):
        cosines = [
            F.cosine_similarity(before.float(), after.float(), dim=-1)
            for before, after in zip(step.inputs, step.outputs, strict=True)
        ]
        scores.append(1.0 - torch.stack(cosines).mean().item())
    return scores
