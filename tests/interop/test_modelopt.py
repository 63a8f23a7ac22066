"""The `tensorrt-llm` export beside what ModelOpt itself exports of the same model, tensor by tensor."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import environment, quantize_tiny, write_tiny
from torch import Tensor

from tinier.checkpoint import Checkpoint, read_json, unpack_linear
from tinier.errors import CheckpointError
from tinier.exporting import export
from tinier.families import checkpoint_layout, open_model
from tinier.numerics import dequantize

pytestmark = [pytest.mark.network, pytest.mark.slow]
PACKAGES = ["torch==2.13.0", "nvidia-modelopt==0.47.0", "transformers", "accelerate", "requests"]
WORKER = Path(__file__).parent.parent.parent / "benchmarks" / "peers" / "modelopt_export.py"
# ModelOpt's configuration, the preset, and how far its numbers may be from the model's
PAIRS: dict[str, tuple[str, dict[str, Any], float]] = {
    "FP8_DEFAULT_CFG": ("fp8-static", {}, 0.03),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": ("fp8", {}, 0.03),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": ("fp8-block", {"group_size": 128}, 0.03),
    "NVFP4_DEFAULT_CFG": ("nvfp4", {}, 0.12),
    "INT4_AWQ_CFG": ("int4-awq", {"group_size": 128}, 0.0),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("modelopt")
    return write_tiny(
        folder / "model", "llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512,
        head_dim=64, num_hidden_layers=2, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def theirs(model: Checkpoint) -> Path:
    """A folder for each configuration."""
    out = model.folder.parent
    python = environment("modelopt", PACKAGES) / "python"
    command = [str(python), str(WORKER), str(model.folder), str(out), *PAIRS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def stored(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("configuration", PAIRS)
def test_names_types_shapes_and_keys_are_model_opt_s(
    model: Checkpoint, theirs: Path, tmp_path: Path, configuration: str
) -> None:
    preset, options, _ = PAIRS[configuration]
    export(
        quantize_tiny(model, preset, tmp_path / "q", **options), "tensorrt-llm", tmp_path / "made"
    )
    ours, wanted = stored(tmp_path / "made"), stored(theirs / configuration)
    # ours are folded into the layers before
    wanted = {name: kind for name, kind in wanted.items() if not name.endswith("pre_quant_scale")}
    assert ours == wanted
    told, known = (
        read_json(folder / "hf_quant_config.json")["quantization"]
        for folder in (tmp_path / "made", theirs / configuration)
    )
    assert told.keys() == known.keys()
    for key in ("quant_algo", "kv_cache_quant_algo", "group_size", "has_zero_point"):
        assert told.get(key) == known.get(key), key


@pytest.mark.parametrize("configuration", PAIRS)
def test_model_opt_s_own_checkpoint_is_read(
    model: Checkpoint, theirs: Path, configuration: str
) -> None:
    limit = PAIRS[configuration][2]
    if not limit:
        with pytest.raises(CheckpointError, match="multiplied with factors first"):
            open_model(theirs / configuration)
        return
    found = open_model(theirs / configuration)
    layout = checkpoint_layout(found)
    assert layout is not None
    with found.reader() as read, model.reader() as original:
        for name, scheme in layout.schemes.items():
            codes, _ = unpack_linear(found.optional(read), name, scheme, layout.storage)
            weight = original(f"{name}.weight").float()
            apart = (dequantize(codes, torch.float32) - weight).norm() / weight.norm()
            assert apart < limit, name
