"""A server of one tiny model for clients of other makers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serving.conftest import ENGINE, write_model

from tinier.serving import ServeConfig, Service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = write_model(tmp_path_factory.mktemp("interop") / "one")
    with Service([f"one={folder}"], ENGINE, ServeConfig(port=0)) as running:
        yield running
