"""recipes/gemma3.yaml on the real model: all of it is planned, a part of it is run on less text."""

from pathlib import Path

import pytest
import yaml

from tinier.errors import NetworkError
from tinier.families import open_model
from tinier.recipe import load_recipe, run_recipe
from tinier.recipe.plan import plan_recipe

# two minutes alone on two slow cores
pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(900)]
RECIPE = Path(__file__).parent.parent.parent / "recipes" / "gemma3.yaml"


def test_the_recipe_of_gemma_runs_and_its_variants_stand_in_order(tmp_path: Path) -> None:
    try:
        open_model("gemma3-270m")
    except NetworkError as error:
        pytest.skip(str(error))
    plan_recipe(load_recipe(RECIPE))
    values = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    variants = values["variants"]
    for name in ("fp8", "int8", "int8-all", "int4", "distilled"):
        del variants[name]
    for name, stage in (("int4-gptq", "quantize"), ("pruned", "prune")):
        variants[name][stage] |= {"windows": 2, "length": 128}
    values["measure"] = {
        "quality": {"windows": 2, "length": 128},
        "speed": {"concurrency": [1], "input_length": 16, "output_length": 4, "repeats": 1},
    }
    path = tmp_path / "gemma3.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    results = run_recipe(load_recipe(path), tmp_path / "run", command="a test")
    assert not results.failed
    rows = {row.name: row for row in results.variants}
    kl = {name: row.quality.kl for name, row in rows.items()}
    assert 0 < kl["int4-gptq"] < kl["pruned"]
    assert rows["int4-gptq"].disk_bytes < rows["base"].disk_bytes
