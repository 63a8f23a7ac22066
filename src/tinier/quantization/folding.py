"""Fold factors of a layer's inputs into what stands before them, so that nothing is added at run time.

Start at `fold`. Dividing an input by factors and multiplying the columns of the layers that read it by
the same factors changes nothing; the division is done by the norm's weight, or by the rows of the
linear layer, that the input comes from: values before o_proj (shared over the query heads that read
one KV head), the up projection before down_proj.
"""

import torch
from torch import Tensor, nn

from tinier.families import Geometry, Input


def shared(channels: Tensor, read: Input, geometry: Geometry) -> Tensor:
    """A statistic of an input's channels [in], averaged where channels can only be scaled together.

    The input of o_proj has a channel for each query head; the rows of v_proj that it comes from
    serve all query heads of one KV head.
    """
    if not read.per_kv_head:
        return channels
    heads = channels.view(geometry.kv_heads, -1, geometry.head_dim)
    return heads.mean(dim=1, keepdim=True).expand_as(heads).flatten()


def fold(
    layer: nn.Module, weights: dict[str, Tensor], read: Input, factors: Tensor, geometry: Geometry
) -> Tensor:
    """Divide an input by `factors`, and multiply its readers.

    weights: float32 weights of the layer's linear layers by name, changed in place; norms and biases
    are changed in `layer`. factors: [in]. Returns the factors as they were applied: those of a norm
    are such that the norm's new weight is exact in its 16-bit type.
    """
    source = read.source
    assert source is not None
    if source in weights:
        rows = factors
        if read.per_kv_head:
            rows = factors.view(geometry.kv_heads, -1, geometry.head_dim)[:, 0].flatten()
        made = slice(read.first_row, read.first_row + len(rows))
        divided = weights[source].clone()
        divided[made] /= rows.unsqueeze(1)
        weights[source] = divided
        if f"{source}.bias" in layer.state_dict():
            bias = layer.get_parameter(f"{source}.bias")
            bias.data[made] = (bias[made].float() / rows).to(bias.dtype)
    else:
        norm = layer.get_parameter(f"{source}.weight")
        offset = geometry.norm_offset
        whole = norm.float() + offset
        divided = (whole / factors - offset).to(norm.dtype)
        # a channel that the norm closes stays closed, whatever the factor
        left = divided.float() + offset
        factors = torch.where(left != 0, whole / left, factors)
        norm.data = divided
    for name in read.readers:
        weights[name] = weights[name] * factors
    return factors
