"""The decoder architectures that tinier knows, and what every reader of a checkpoint sees of one.

Start at `open_model` (opening.py): it resolves a model, verifies its folder and checks that its tensors are
those that the configuration calls for, each of the right shape and type, and no others. A new
architecture is a row in FAMILIES (table.py).
"""

from tinier.families.adapters import Update, must_be_merged, read_adapter
from tinier.families.configuration import (
    cached_from_transformers,
    check_length,
    checkpoint_layout,
    family_of,
    geometry_of,
    hf_config,
    resolved_config,
    rope_keys,
    rope_parameters,
)
from tinier.families.geometry import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Geometry,
    layer_name,
    linear_names,
    linear_shape,
    module_names,
    norm_weight,
)
from tinier.families.opening import open_model, split_adapter
from tinier.families.table import (
    FAMILIES,
    Family,
    Input,
    LayerKind,
    Mixture,
    Multipliers,
    Norms,
)
from tinier.schemes import EMBEDDING_MODULE, HEAD_LINEAR

__all__ = [
    "EMBEDDING",
    "EMBEDDING_MODULE",
    "FAMILIES",
    "FINAL_NORM",
    "HEAD",
    "HEAD_LINEAR",
    "Family",
    "Geometry",
    "Input",
    "LayerKind",
    "Mixture",
    "Multipliers",
    "Norms",
    "Update",
    "cached_from_transformers",
    "check_length",
    "checkpoint_layout",
    "family_of",
    "geometry_of",
    "hf_config",
    "layer_name",
    "linear_names",
    "linear_shape",
    "module_names",
    "must_be_merged",
    "norm_weight",
    "open_model",
    "read_adapter",
    "resolved_config",
    "rope_keys",
    "rope_parameters",
    "split_adapter",
]
