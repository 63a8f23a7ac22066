import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import FAMILIES
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.errors import InputError, SchemeError, TextError
from tinier.families import geometry_of, open_model
from tinier.pruning import METHODS, PrunePlan, parse_layers, prune
from tinier.pruning.importance import least_influential
from tinier.pruning.plan import Method
from tinier.quantization import QuantizePlan, quantize

Tiny = Callable[..., Checkpoint]
TEXT = ["The quick brown fox jumps over the lazy dog. " * 40]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_original_with_layers_skipped(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    source = tiny(family, num_hidden_layers=5)
    made = prune(source, PrunePlan(drop_layers=(1, 3), refit=False), tmp_path / "out")
    windows = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    skipped = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    del skipped.model.layers[3], skipped.model.layers[1]
    for i, layer in enumerate(skipped.model.layers):
        layer.self_attn.layer_idx = i
    skipped.config.num_hidden_layers = 3
    if skipped.config.__dict__.get("layer_types"):
        skipped.config.layer_types = skipped.config.layer_types[:3]
    pruned = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    with torch.no_grad():
        assert torch.equal(pruned(windows).logits, skipped(windows).logits)


def test_it_is_a_plain_llama_that_needs_nothing_of_ours(tiny: Tiny, tmp_path: Path) -> None:
    made = prune(tiny(), PrunePlan(drop_layers=(2,), refit=False), tmp_path / "out")
    code = (
        "import sys; sys.modules['tinier'] = None; sys.modules['compressed_tensors'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m, info = AutoModelForCausalLM.from_pretrained({str(made.folder)!r}, output_loading_info=True)\n"
        f"AutoTokenizer.from_pretrained({str(made.folder)!r})\n"
        "assert type(m).__name__ == 'LlamaForCausalLM' and len(m.model.layers) == 3\n"
        "assert not info['missing_keys'] and not info['unexpected_keys']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_per_layer_settings_follow_their_layers(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(
        "qwen2",
        num_hidden_layers=6,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=3,
    )
    made = prune(source, PrunePlan(drop_layers=(1, 4), refit=False), tmp_path / "out")
    assert geometry_of(made).windows == (None, None, 16, 16)
    assert geometry_of(open_model(made.folder)).windows == (None, None, 16, 16)


@pytest.mark.parametrize("method", METHODS[:-1])
def test_a_layer_that_does_nothing_is_dropped_first(
    tiny: Tiny, tmp_path: Path, method: Method
) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny(num_hidden_layers=6)
    path = source.folder / "model.safetensors"
    tensors = load_file(path)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.3.{name}.weight"].zero_()
    save_file(tensors, path, {"format": "pt"})
    plan = PrunePlan(keep_layers=5, method=method, windows=2, length=64)
    made = prune(open_model(source.folder), plan, tmp_path / "out", text=TEXT)
    assert made.manifest is not None
    assert made.manifest.measures["dropped_layers"] == [3]
    assert made.manifest.layers["3"]["block_influence"] == pytest.approx(0.0, abs=1e-6)


def test_first_two_and_last_layers_go_last() -> None:
    scores = [0.0, 0.1, 0.9, 0.8, 0.7, 0.2]
    assert least_influential(scores, 2) == (3, 4)
    assert least_influential(scores, 4) == (0, 2, 3, 4)


def test_shares_are_rounded_up(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(num_hidden_layers=7)
    plan = PrunePlan(keep_layers="60%", windows=1, length=64)
    made = prune(source, plan, tmp_path / "out", text=TEXT)
    assert geometry_of(made).layers == 5  # 4.2 layers


@pytest.mark.parametrize(
    ("text", "layers"), [("21-27", range(21, 28)), ("3,5, 7", (3, 5, 7)), ("1-2,2", (1, 2))]
)
def test_layer_lists(text: str, layers: range | tuple[int, ...]) -> None:
    assert parse_layers(text) == tuple(layers)


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "5-3", "1;2"])
def test_bad_layer_lists(text: str) -> None:
    with pytest.raises(InputError, match="layers"):
        parse_layers(text)


def test_heads_that_do_not_divide_the_hidden_size(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(hidden_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
    with pytest.raises(InputError, match="3 heads do not divide the hidden size 128"):
        prune(source, PrunePlan(keep_kv_heads=3, length=64), tmp_path / "out", text=TEXT)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PrunePlan(), "nothing to remove"),
        (PrunePlan(drop_layers=(1,), keep_layers=3), "give either"),
        (PrunePlan(drop_layers=(2, 4, 9)), r"\[4, 9\] do not exist: tiny has layers 0 to 3"),
        (PrunePlan(drop_layers=(0, 1, 2, 3)), "dropping all of 4 layers leaves none"),
        (PrunePlan(keep_layers="0%"), "keeps 0 of 4. Keep 1 to 3"),
        (PrunePlan(keep_layers="90%"), "keeps 4 of 4. Keep 1 to 3"),
        (PrunePlan(keep_layers="half"), "no count and no share"),
        (PrunePlan(keep_layers="1.5"), "no count and no share"),
        (PrunePlan(keep_intermediate=100), "no multiple of 64. Use 64 or 128"),
        (PrunePlan(keep_intermediate=500), "keeps 500 of 128. Keep 64 to 128"),
        (PrunePlan(keep_intermediate=60), "no multiple of 64. Use 64, or another --align"),
        (PrunePlan(keep_hidden=128), "keeps 128 of 64"),
        (PrunePlan(keep_hidden="x"), "no size and no share"),
        (PrunePlan(keep_kv_heads=3), "keep_kv_heads=3. Use one of 1, 2"),
        (PrunePlan(keep_heads=3), "keep_heads=3. Use one of 2, 4"),
        (PrunePlan(target="5"), "target '5' is not understood"),
        (PrunePlan(target="5B"), "is not below the model's"),
        (PrunePlan(target="1M", keep_layers=3), "a target chooses all sizes"),
    ],
)
def test_bad_plans(tiny: Tiny, tmp_path: Path, plan: PrunePlan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny(), plan, tmp_path / "out", text=TEXT)
    assert not (tmp_path / "out").exists()


def test_short_calibration_text(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="less than one window of 128"):
        prune(tiny(), PrunePlan(keep_layers=3, length=128), tmp_path / "out", text=["short"])


def test_windows_that_do_not_fit_the_model(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="512 tokens are more than the 256 positions of tiny"):
        prune(tiny(), PrunePlan(keep_layers=3), tmp_path / "out", text=TEXT)
    source = tiny("mistral", name="sliding", sliding_window=32)
    with pytest.raises(TextError, match="128 tokens exceed sliding attention of 32"):
        prune(source, PrunePlan(keep_layers=3, length=128), tmp_path / "out", text=TEXT)


def test_a_quantized_source_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize(tiny(), QuantizePlan(preset="fp8"), tmp_path / "q")
    with pytest.raises(SchemeError, match="Prune first, then quantize"):
        prune(made, PrunePlan(drop_layers=(1,)), tmp_path / "out")


def test_dangerous_plans_are_warned_about(tiny: Tiny, tmp_path: Path) -> None:
    plan = PrunePlan(drop_layers=(0, 3), windows=2, length=64)
    made = prune(tiny(), plan, tmp_path / "out", text=TEXT)
    assert made.manifest is not None
    first, second, measured = made.manifest.warnings
    assert "dropped layers [0, 3]" in first
    assert "half or more" in second
    numbers = re.search(
        r"dropping \[0, 3\] costs .* of (\S+) nats .* dropping \[\d, \d\] (\S+)", measured
    )
    assert numbers is not None
