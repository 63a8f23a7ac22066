"""A checkpoint is a Hugging Face model folder plus our `tinier.json`; every stage reads one and
writes one.

Start at `open_checkpoint` (folder.py). `resolve` (sources.py) turns what the user typed into a
folder, `atomic_folder` and `TensorWriter` (writer.py) write one, `Manifest` (manifest.py) says how
it was made, `compressed.py` is the compressed-tensors layout of quantized weights.
"""

from tinier.checkpoint.compressed import pack_linear, quantization_config, scheme_of
from tinier.checkpoint.folder import Checkpoint, TensorInfo, content_hash, open_checkpoint
from tinier.checkpoint.manifest import MANIFEST_NAME, Manifest, code_digest
from tinier.checkpoint.sources import BUILTIN_MODELS, cache_folder, resolve
from tinier.checkpoint.stage import StagePlan
from tinier.checkpoint.writer import (
    SHARD_BYTES,
    TensorWriter,
    atomic_folder,
    check_disk,
    check_output,
    copy_side_files,
    write_atomically,
    write_config,
)

__all__ = [
    "BUILTIN_MODELS",
    "MANIFEST_NAME",
    "SHARD_BYTES",
    "Checkpoint",
    "Manifest",
    "StagePlan",
    "TensorInfo",
    "TensorWriter",
    "atomic_folder",
    "cache_folder",
    "check_disk",
    "check_output",
    "code_digest",
    "content_hash",
    "copy_side_files",
    "open_checkpoint",
    "pack_linear",
    "quantization_config",
    "resolve",
    "scheme_of",
    "write_atomically",
    "write_config",
]
