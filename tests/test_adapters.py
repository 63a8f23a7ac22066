"""LoRA adapters, merged into their base as PEFT's files say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.errors import CheckpointError
from tinier.families import open_model, split_adapter
from tinier.quantization import QuantizePlan, quantize

Tiny = Callable[..., Checkpoint]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "fan_in_fan_out": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(said))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def pair(module: str, rows: int, columns: int, rank: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=generator) * 0.1,
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=generator) * 0.1,
    }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["plain", "root", "patterns", "magnitude"])
def test_weights_are_base_and_update(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    base = tiny(dtype=torch.float32)
    tensors = pair(Q, 64, 64) | pair(DOWN, 64, 128, rank=2 if kind == "patterns" else 4)
    config: dict[str, Any] = {}
    scales = {Q: 2.0, DOWN: 2.0}
    if kind == "root":
        config, scales = {"use_rslora": True}, {Q: 4.0, DOWN: 4.0}
    if kind == "patterns":
        config = {
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 2},
        }
        scales = {Q: 0.5, DOWN: 4.0}
    if kind == "magnitude":
        config = {"use_dora": True}
        tensors |= {f"{name}.lora_magnitude_vector": torch.rand(64) + 0.5 for name in (Q, DOWN)}
    folder = write_adapter(tmp_path / "adapter", tensors, **config)
    made = open_model(f"{base.folder}+{folder}")
    before, after = (load_file(c.folder / "model.safetensors") for c in (base, made))
    for module, scale in scales.items():
        up, down = tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"]
        expected = before[f"{module}.weight"] + scale * (up @ down)
        if kind == "magnitude":
            length = tensors[f"{module}.lora_magnitude_vector"] / expected.norm(dim=1)
            expected = expected * length.unsqueeze(1)
        assert torch.allclose(after[f"{module}.weight"], expected, atol=1e-6)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{Q}.weight", f"{DOWN}.weight"}
    assert made.manifest is not None
    assert made.manifest.stage == "merge"


def test_it_is_merged_once_and_is_a_model_like_any_other(
    tiny: Tiny, tmp_path: Path, cache: Path
) -> None:
    base = tiny(dtype=torch.float32)
    norm = "model.norm.weight"
    folder = write_adapter(tmp_path / "a", pair(Q, 64, 64) | {norm: torch.full((64,), 1.5)})
    first, again = (open_model(f"{base.folder}+{folder}") for _ in range(2))
    assert first.folder == again.folder
    assert len(list(cache.glob("merged-*"))) == 1
    assert (load_file(first.folder / "model.safetensors")[norm] == 1.5).all()
    other = write_adapter(tmp_path / "b", pair(Q, 64, 64), lora_alpha=4)
    assert open_model(f"{base.folder}+{other}").folder != first.folder
    small = quantize(first, QuantizePlan(preset="int4", group_size=32), tmp_path / "small")
    with pytest.raises(CheckpointError, match="is quantized. Merge the adapter into the 16-bit"):
        open_model(f"{small.folder}+{folder}")


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (pair("model.layers.9.self_attn.q_proj", 64, 64), {}, "does not have"),
        (pair(Q, 32, 64), {}, "is for a model.layers.0.self_attn.q_proj.weight of"),
        (pair(Q, 64, 64), {"r": 8}, "says that the rank"),
        (pair(Q, 64, 64), {"peft_type": "LOHA"}, "peft_type='LOHA'"),
        (pair(Q, 64, 64), {"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        (
            pair(Q, 64, 64),
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4'",
        ),
        (pair(Q, 64, 64), {"use_dora": True}, "but half of the update"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 64)}, {}, "but half of the update"),
        ({"model.embed_tokens.lora_embedding_A": torch.zeros(4, 264)}, {}, "does not have"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_said(
    tiny: Tiny, tmp_path: Path, cache: Path, tensors: dict[str, Tensor], config: dict[str, Any],
    said: str,
) -> None:  # fmt: skip
    base = tiny(dtype=torch.float32)
    folder = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(CheckpointError, match=said):
        open_model(f"{base.folder}+{folder}")
    assert not list(cache.glob("merged-*"))


def test_a_folder_without_an_adapter_is_said(tiny: Tiny) -> None:
    base = tiny()
    with pytest.raises(CheckpointError, match="is no LoRA adapter"):
        open_model(f"{base.folder}+{base.folder}")
    for missing in (f"{base.folder}+nothing here", "./c++/nope"):
        with pytest.raises(CheckpointError, match="is no folder") as caught:
            open_model(missing)
        assert missing in str(caught.value)


def test_folders_with_a_plus_in_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = tmp_path / "c++" / "base", tmp_path / "c++" / "x+y"
    for folder in (base, adapter):
        folder.mkdir(parents=True)
    assert split_adapter(f"{base}+{adapter}") == (str(base), str(adapter))
    assert split_adapter(adapter) == (str(adapter), None)
    assert split_adapter("owner/m+owner/lora") == ("owner/m", "owner/lora")
    assert split_adapter("m+lora") == ("m+lora", None)
    monkeypatch.chdir(tmp_path / "c++")
    assert split_adapter("base+x+y") == ("base", "x+y")
