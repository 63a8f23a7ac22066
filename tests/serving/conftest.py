"""A running server over tiny models, shared by the tests of a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import write_tiny

from tinier.engine import EngineConfig
from tinier.serving import ServeConfig, Service

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if thinks %}<think>{% endif %}"
)
ENGINE = EngineConfig(max_batch_size=8, max_seq_len=256, block_size=4, device="cpu")


def write_model(folder: Path, seed: int = 0, template: str = TEMPLATE, **config: Any) -> Path:
    """A tiny model with a chat template. config: of transformers', beside the tiny sizes."""
    write_tiny(folder, "llama", dtype=torch.float32, seed=seed, **config)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("served")
    return {name: write_model(root / name, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="session")
def service(model_folders: dict[str, Path]) -> Iterator[Service]:
    sources = [f"{name}={path}" for name, path in model_folders.items()]
    with Service(sources, ENGINE, ServeConfig(port=0, max_queue=8)) as running:
        yield running
