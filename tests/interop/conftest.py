"""A server of one tiny model for clients of other makers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.serving.conftest import ENGINE, write_model

from tinier.serving import ServeConfig, Service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = write_model(
        tmp_path_factory.mktemp("interop") / "one", max_position_embeddings=2048
    )
    with Service(
        [f"one={folder}"], replace(ENGINE, max_seq_len=2048), ServeConfig(port=0)
    ) as running:
        yield running
