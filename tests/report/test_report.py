import json
from pathlib import Path

import pytest

from tinier.errors import InputError
from tinier.report import load_results


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no results\.json"):
        load_results(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match="is not a tinier result"):
        load_results(tmp_path)


def test_results_of_another_schema(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(InputError, match="has schema 99"):
        load_results(tmp_path)
