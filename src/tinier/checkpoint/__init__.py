"""A checkpoint is a Hugging Face model folder plus our `tinier.json`; every stage reads one and
writes one.

Start at `open_checkpoint` (folder.py). `resolve` (sources.py) turns what the user typed into a
folder, `atomic_folder` and `TensorWriter` (writer.py) write one, `Manifest` (manifest.py) says how
it was made, `formats.py` knows the layouts of quantized weights, `compressed.py` the one that stages write.
"""

from tinier.checkpoint.folder import (
    Checkpoint,
    TensorInfo,
    TensorReader,
    content_hash,
    finished_checkpoint,
    open_checkpoint,
    read_json,
)
from tinier.checkpoint.formats import (
    layout_of,
    pack_linear,
    quantization_config,
    stored_shapes,
    unpack_linear,
)
from tinier.checkpoint.manifest import MANIFEST_NAME, Manifest, code_digest
from tinier.checkpoint.sources import BUILTIN_MODELS, cache_folder, resolve
from tinier.checkpoint.stage import StagePlan
from tinier.checkpoint.writer import (
    SHARD_BYTES,
    PartFiles,
    TensorWriter,
    atomic_folder,
    check_disk,
    check_output,
    check_writable,
    copy_side_files,
    hold,
    new_file,
    resumable_folder,
    sync_folder,
    unfinished_folder,
    write_atomically,
    write_config,
)

__all__ = [
    "BUILTIN_MODELS",
    "MANIFEST_NAME",
    "SHARD_BYTES",
    "Checkpoint",
    "Manifest",
    "PartFiles",
    "StagePlan",
    "TensorInfo",
    "TensorReader",
    "TensorWriter",
    "atomic_folder",
    "cache_folder",
    "check_disk",
    "check_output",
    "check_writable",
    "code_digest",
    "content_hash",
    "copy_side_files",
    "finished_checkpoint",
    "hold",
    "layout_of",
    "new_file",
    "open_checkpoint",
    "pack_linear",
    "quantization_config",
    "read_json",
    "resolve",
    "resumable_folder",
    "stored_shapes",
    "sync_folder",
    "unfinished_folder",
    "unpack_linear",
    "write_atomically",
    "write_config",
]
