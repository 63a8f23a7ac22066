"""Bad model folders: a clear error before any work."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import quantize_tiny

from tinier.checkpoint import Checkpoint, content_hash, open_checkpoint
from tinier.errors import CheckpointError
from tinier.families import open_model

Tiny = Callable[..., Checkpoint]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist. Give a folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is no folder"):
        open_model(tmp_path / "nothing")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        open_model(tmp_path)


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_model(tmp_path)


def test_config_that_is_not_json(tiny: Tiny) -> None:
    folder = tiny().folder
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_model(folder)


def test_unknown_family(tiny: Tiny) -> None:
    folder = tiny().folder
    edit_config(folder, architectures=["BloomForCausalLM"])
    with pytest.raises(CheckpointError, match="BloomForCausalLM. tinier knows .*LlamaForCausalLM"):
        open_model(folder)


def test_unknown_rope(tiny: Tiny) -> None:
    folder = tiny().folder
    edit_config(folder, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4})
    with pytest.raises(CheckpointError, match="RoPE of type 'proportional'"):
        open_model(folder)


def test_remote_code_is_refused(tiny: Tiny) -> None:
    folder = tiny().folder
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    with pytest.raises(CheckpointError, match="never runs code from a model folder"):
        open_model(folder)


def test_pickle_weights_are_never_read(tiny: Tiny) -> None:
    folder = tiny().folder
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(CheckpointError, match="pickle weights only"):
        open_model(folder)


def test_no_weights_at_all(tiny: Tiny) -> None:
    folder = tiny().folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_safetensors(tiny: Tiny, keep: int) -> None:
    path = tiny().folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        open_model(path.parent)


def test_corrupt_header(tiny: Tiny) -> None:
    path = tiny().folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:20] = b"\xff" * 12
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is corrupt"):
        open_model(path.parent)


def test_absurd_header_length(tiny: Tiny) -> None:
    path = tiny().folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        open_model(path.parent)


def shard(folder: Path) -> None:
    """Split model.safetensors in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    weight_map = {}
    for i, part in enumerate((names[:half], names[half:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards_are_read_like_one_file(tiny: Tiny) -> None:
    single = tiny()
    shapes = {name: info.shape for name, info in single.tensors.items()}
    shard(single.folder)
    sharded = open_model(single.folder)
    assert {name: info.shape for name, info in sharded.tensors.items()} == shapes


def test_an_index_that_is_a_list(tiny: Tiny) -> None:
    folder = tiny().folder
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        open_model(folder)


def test_a_type_that_does_not_fit_its_bytes(tiny: Tiny) -> None:
    path = tiny().folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F16"', 1))
    with pytest.raises(CheckpointError, match=r"is corrupt: .* bytes, which is not .* of F16"):
        open_model(path.parent)


def test_an_embedding_that_is_quantized_apart_from_its_head_is_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    made = quantize_tiny(tiny(), "fp8", tmp_path / "q", head="fp8")
    edit_config(made.folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="16 bit of the embedding and FP8 of the head"):
        open_model(made.folder)
    path = tiny().folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight_scale"] = torch.ones(264, 1)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight_scale.*must describe"):
        open_model(path.parent)


def test_size_counts_what_makes_the_model(tiny: Tiny) -> None:
    checkpoint = tiny()
    before = checkpoint.disk_bytes
    (checkpoint.folder / ".git").mkdir()
    (checkpoint.folder / ".git" / "pack").write_bytes(b"x" * 1000)
    (checkpoint.folder / "consolidated.safetensors").write_bytes(b"x" * 1000)
    assert open_model(checkpoint.folder).disk_bytes == before


def test_missing_shard(tiny: Tiny) -> None:
    folder = tiny().folder
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 shards: model-00002"):
        open_model(folder)


def test_index_that_names_a_tensor_the_shard_lacks(tiny: Tiny) -> None:
    folder = tiny().folder
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight .* does not hold it"):
        open_model(folder)


def test_index_cannot_point_outside_the_folder(tiny: Tiny) -> None:
    folder = tiny().folder
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_model(folder)


def test_wrong_shapes(tiny: Tiny) -> None:
    folder = tiny().folder
    edit_config(folder, intermediate_size=256)
    with pytest.raises(CheckpointError, match=r"has shape .* config\.json implies \[256, 64\]"):
        open_model(folder)


def test_missing_tensors(tiny: Tiny) -> None:
    folder = tiny().folder
    edit_config(folder, num_hidden_layers=5)
    with pytest.raises(CheckpointError, match=r"lacks 9 tensors .* model\.layers\.4"):
        open_model(folder)


def test_other_quantization_methods_are_refused(tiny: Tiny) -> None:
    folder = tiny().folder
    edit_config(folder, quantization_config={"quant_method": "hqq", "bits": 4})
    with pytest.raises(CheckpointError, match="'hqq'; tinier reads compressed-tensors"):
        open_model(folder)


@pytest.mark.parametrize(
    "block",
    [
        {"quant_method": ["fp8"]},
        {"quant_method": "awq", "bits": 4, "group_size": "x"},
        {"quant_method": "compressed-tensors", "config_groups": 3},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": 3}}},
    ],
)
def test_damaged_quantization_is_refused(tiny: Tiny, block: dict[str, object]) -> None:
    folder = tiny().folder
    edit_config(folder, quantization_config=block)
    with pytest.raises(CheckpointError, match="is damaged .* Download it again|tinier reads compr"):
        open_model(folder)


@pytest.mark.parametrize("theta", ["x", -1.0, 0])
def test_a_theta_that_is_none_is_refused(tiny: Tiny, theta: object) -> None:
    folder = tiny().folder
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": theta})
    with pytest.raises(CheckpointError, match="has rope_theta=.* such as 10000"):
        open_model(folder)


def test_hash_depends_on_weights_and_configuration_only(tiny: Tiny) -> None:
    folder = tiny().folder
    before = content_hash(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "tinier.json").write_text("{}")
    assert content_hash(folder) == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert content_hash(folder) != before


def test_dtype_of_a_checkpoint(tiny: Tiny) -> None:
    assert tiny(dtype=torch.bfloat16).dtype == torch.bfloat16
    checkpoint = tiny(name="other")
    edit_config(checkpoint.folder, dtype="float8_e4m3fn")
    with pytest.raises(CheckpointError, match="not a type tinier computes in"):
        _ = open_model(checkpoint.folder).dtype


def test_a_folder_around_a_gguf_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=f"Give its GGUF file: {tmp_path / 'model.gguf'}"):
        open_checkpoint(tmp_path)
