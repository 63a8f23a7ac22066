"""How memory is shared out among the served models."""

import logging
from pathlib import Path

import pytest
import torch
from tests.conftest import write_tiny

from tinier.engine import EngineConfig
from tinier.errors import InputError
from tinier.serving.metrics import Metrics
from tinier.serving.store import Group, ModelStore, Source

GIB = 1 << 30


def store(
    free: int, config: EngineConfig, monkeypatch: pytest.MonkeyPatch, memory: int | None
) -> ModelStore:
    monkeypatch.setattr("tinier.serving.store.free_memory_bytes", lambda device: free)
    return ModelStore(
        config, replicas=1, max_queue=1, memory_bytes=memory, metrics=Metrics(),
        log_level=logging.WARNING,
    )  # fmt: skip


def test_a_cpu_server_takes_a_gibibyte_of_cache_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2 layers of 2 KV heads of 64 numbers, keys and values, in 2 bytes: 1 KiB a token
    sizes = {"head_dim": 64, "num_hidden_layers": 2, "max_position_embeddings": 1 << 21}
    model = write_tiny(tmp_path / "m", "llama", dtype=torch.bfloat16, **sizes)
    config = EngineConfig(max_batch_size=64, max_seq_len=1 << 17, device="cpu")
    need = store(64 * GIB, config, monkeypatch, None)._need(Group(model, (), []))
    assert (need.least, need.most) == (1 << 27, GIB)
    assert (
        store(64 * GIB, config, monkeypatch, 16 * GIB)._need(Group(model, (), [])).most == 64 << 27
    )
    # one request of the length that was asked for always fits
    config = EngineConfig(max_batch_size=64, max_seq_len=1 << 21, device="cpu")
    need = store(64 * GIB, config, monkeypatch, None)._need(Group(model, (), []))
    assert need.least == need.most == 2 * GIB


def test_versions_follow_the_order_that_models_are_asked_for_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = store(64 * GIB, EngineConfig(device="cpu"), monkeypatch, None)
    asked = [Source.parse(text) for text in ("x=A", "x=B", "y=A", "x=A+l", "x@7=C")]
    assert made._new_keys(asked) == [("x", 1), ("x", 2), ("y", 1), ("x", 3), ("x", 7)]
    with pytest.raises(InputError, match="x@1 is there twice"):
        made._new_keys([asked[0], Source.parse("x@1=B")])
