from pathlib import Path

import pytest

from tinier.errors import RecipeError
from tinier.recipe import load_recipe

GOOD = """
base: model
variants:
  small: {quantize: {preset: fp8}}
  pruned: {prune: {keep_layers: 75%}}
  healed: {from: pruned, distill: {steps: 4, warmup_steps: 1}}
"""


def load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_a_good_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.order() == ["small", "pruned", "healed"]  # type: ignore[attr-defined]


def test_order_follows_needs_not_the_file(tmp_path: Path) -> None:
    text = """
base: model
variants:
  c: {from: b, quantize: {preset: fp8}}
  b: {from: a, distill: {teacher: d}}
  a: {prune: {keep_layers: 2}}
  d: {prune: {keep_layers: 3}}
"""
    assert load(tmp_path, text).order() == ["a", "d", "b", "c"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base: model", "base: model\nseeed: 1", "seeed: unknown key. Did you mean 'seed'"),
        ("preset: fp8", "prset: fp8", r"variants\.small\.quantize\.prset: unknown key. Did you mean 'preset'"),
        ("{keep_layers: 75%}", "{layers: 25%}", r"variants\.pruned\.prune\.layers: unknown key. Did you mean 'keep_layers'"),
        ("from: pruned", "frm: pruned", r"variants\.healed\.frm: unknown key. Did you mean 'from'"),
        ("from: pruned", "from: prund", "needs 'prund', which does not exist. .* did you mean 'pruned'"),
        ("from: pruned", "from: healed", "'healed' starts from itself|in a circle"),
        ("prune: {", "from: healed, prune: {", "pruned, healed need each other in a circle"),
        ("{prune: {keep_layers: 75%}}", "{}", "has exactly one stage"),
        ("{steps: 4,", "{steps: x,", r"variants\.healed\.distill\.steps: 'x' is not allowed. Use a whole number\."),
        ("base: model", "bse: model", "bse: unknown key. Did you mean 'base'"),
        ("  small:", "  base:", "are not 'base', which is the base model"),
        ("  small:", "  a/b:", "names have letters"),
        ("base: model", "base: model\nmeasure: {quality: {windws: 3}}", r"measure\.quality\.windws: unknown key. Did you mean 'windows'"),
        ("base: model", "base: model\nmeasure: {speed: {repeats: 0}}", "repeats: 0 is not allowed. Use 1 or more"),
        ("base: model", "base: model\nmeasure: {speed: {concurrency: []}}", r"concurrency: \[\] is not allowed. Use at least one entry"),
        ("base: model", "base: model\nseed: -1", "seed: -1 is not allowed. Use 0 or more"),
        ("base: model", "base: model\nseed: 99999999999999999999", "Use a number below 9223372036854775808"),
        ("base: model", "base: model\ndate: 2026-13-45", "not valid YAML: month must be in 1..12"),
        ("base: model", "base: model\nmeasure: 3", "measure: 3 is not allowed. Use keys with values"),
        ("base: model", "", "base: missing, and must be given"),
        ("base: model", "base: model\nmeasure: null", "measure: null is not allowed. Use keys with values"),
        ("base: model", "base: model\n1: x", "1: 1 is not allowed. Use text in quotes"),
        ("base: model", "base: model\nmeasure: {mmlu: {folder: 3}}", r"mmlu\.folder: 3 is not allowed. Use text in quotes"),
        ("base: model", "base: 3", "base: 3 is not allowed. Use text"),
        ("preset: fp8", "preset: fp8, symmetric: maybe", "'maybe' is not allowed. Use true or false"),
        ("preset: fp8", "preset: fp8, drift: much", "'much' is not allowed. Use 'ignored' or 'corrected'"),
        ("{keep_layers: 75%}", "{keep_layers: [1]}", r"prune\.keep_layers: \[1\] is not allowed. Use a whole number or text"),
        ("base: model", "base: model\ntext: {heldot: x}", "heldot: unknown key. Did you mean 'heldout'"),
    ],
)  # fmt: skip
def test_bad_recipes_say_where_and_what(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, GOOD.replace(old, new))


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist. Write one, or try"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load(tmp_path, "a: [")
    with pytest.raises(RecipeError, match="not a mapping"):
        load(tmp_path, "- a")
    path = tmp_path / "number.yaml"
    path.write_text(f"{GOOD}\nmeasure: 3")
    with pytest.raises(RecipeError, match="measure: 3 is not allowed. Use keys with values"):
        load_recipe(path, tensor_parallel=2)


@pytest.mark.parametrize("name", ["demo", "guide"])
def test_recipes_of_the_repository_are_good(name: str) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")
    assert len(recipe.variants) >= 6
