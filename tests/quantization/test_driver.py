import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import DOCUMENTS, FAMILIES, MIXTURES, quantize_tiny
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint, open_checkpoint
from tinier.engine import load_decoder
from tinier.errors import InputError, OutputError, SchemeError
from tinier.families import checkpoint_layout, open_model
from tinier.pruning import PrunePlan, prune
from tinier.quantization import QuantizePlan, driver, layer, plan_quantize, quantize, quantize_all
from tinier.schemes import PRESETS

Tiny = Callable[..., Checkpoint]
SLOW_PRESETS = ("int8-sq", "int4-awq", "int4-gptq", "int4-best")


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    files = {info.file for info in checkpoint.tensors.values()}
    return {n: t for f in files for n, t in load_file(checkpoint.folder / f).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "preset",
    ["fp8", "int8-sq", "int4-awq", "int4-gptq", "w4a8",
     pytest.param("int4-best", marks=pytest.mark.slow)],
)  # fmt: skip
def test_transformers_loads_it_with_nothing_missing(
    tiny: Tiny, tmp_path: Path, family: str, preset: str
) -> None:
    made = quantize_tiny(tiny(family, dtype=torch.bfloat16), preset, tmp_path / "out")
    if family in MIXTURES:
        assert made.manifest is not None
        assert any("cannot load quantized experts" in text for text in made.manifest.warnings)
        return
    _, info = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    open_model(made.folder)


def test_manifest_says_how_it_was_made(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    made = quantize_tiny(source, "int4-gptq", tmp_path / "out", ignore=("*.up_proj",))
    manifest = open_checkpoint(made.folder).manifest
    assert manifest is not None
    assert manifest.stage == "quantize"
    assert manifest.parents == {"source": source.hash}
    assert manifest.parameters["group_size"] == 32
    assert manifest.parameters["windows_sha256"]
    linears = {n: m for n, m in manifest.layers.items() if n.endswith("_proj")}
    assert len(linears) == 4 * 6
    assert all(10 < m["snr_db"] < 30 for m in linears.values())  # type: ignore[operator]
    assert all(m["output_snr_db"] > m["snr_db"] for m in linears.values())  # type: ignore[operator]
    assert {f"model.layers.{i}" for i in range(4)} == set(manifest.layers) - set(linears)
    named = ", ".join(f"model.layers.{i}.mlp.up_proj" for i in range(3))
    assert f"left in 16 bit: {named} and 1 more" in manifest.warnings
    assert manifest.seconds > 0
    assert manifest.peak_memory_bytes > 0


@pytest.mark.slow
def test_the_estimated_size_is_the_size(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(
        dtype=torch.bfloat16, hidden_size=256, intermediate_size=1024, head_dim=64,
        num_attention_heads=4, num_hidden_layers=2,
    )  # fmt: skip
    for preset in PRESETS:
        plan = QuantizePlan(preset=preset, windows=2, length=64, iterations=1)
        stage = plan_quantize(source, plan, DOCUMENTS)
        made = quantize(source, plan, tmp_path / preset, text=DOCUMENTS, device="cpu")
        assert stage.output_bytes == pytest.approx(made.disk_bytes, rel=0.03), preset
        assert stage.output_config == made.config
        assert made.manifest is not None
        assert made.manifest.key == stage.key


@pytest.mark.parametrize("preset", SLOW_PRESETS)
def test_equal_inputs_give_equal_files(tiny: Tiny, tmp_path: Path, preset: str) -> None:
    source = tiny()
    first, second = (quantize_tiny(source, preset, tmp_path / name) for name in ("a", "b"))
    assert first.hash == second.hash


@pytest.mark.parametrize("preset", SLOW_PRESETS)
@pytest.mark.parametrize("options", [{}, {"kv": "fp8", "head": "int8"}])
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    options: dict[str, str],
) -> None:
    source = tiny()
    whole = quantize_tiny(source, preset, tmp_path / "whole", **options)
    quantize_layer, layers = driver.quantize_layer, []

    def stops_at_the_third(*arguments: Any) -> Any:
        if len(layers) == 2:
            raise KeyboardInterrupt
        layers.append(None)
        return quantize_layer(*arguments)

    monkeypatch.setattr(driver, "quantize_layer", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize_tiny(source, preset, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

    def counts(*arguments: Any) -> Any:
        layers.append(None)
        return quantize_layer(*arguments)

    monkeypatch.setattr(driver, "quantize_layer", counts)
    resumed = quantize_tiny(source, preset, tmp_path / "out", **options)
    assert len(layers) == 4  # two before the stop, two after: none twice
    assert resumed.hash == whole.hash
    assert not list(tmp_path.glob(".out*"))
    one, other = open_checkpoint(whole.folder).manifest, open_checkpoint(resumed.folder).manifest
    assert one is not None
    assert other is not None
    assert one.layers == other.layers


@pytest.mark.slow
def test_kill_minus_nine_costs_one_layer(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(num_hidden_layers=12, hidden_size=128, intermediate_size=512)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(DOCUMENTS))
    command = [
        sys.executable, "-m", "tinier", "quantize", str(source.folder), "--preset", "int4-best",
        "--group-size", "32", "--text", str(text), "--windows", "4", "--length", "64",
        "--iterations", "20", "--device", "cpu", "--quiet",
    ]  # fmt: skip
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")])
    unfinished = tmp_path / ".out.unfinished"
    while process.poll() is None and not (unfinished / "model-00003-of-00013.safetensors").exists():
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("model-*")}
    assert 3 <= len(done) < 13
    subprocess.run([*command, "--out", str(tmp_path / "out")], check=True)
    for name, written in done.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == written
    assert open_checkpoint(tmp_path / "out").hash == open_checkpoint(tmp_path / "whole").hash


def test_another_plan_does_not_go_on_from_what_was_left(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / ".key").write_text("another")
    (left / "model-00001-of-00005.safetensors").write_bytes(b"not a layer")
    made = quantize_tiny(source, "int4-gptq", tmp_path / "out")
    assert made.hash == quantize_tiny(source, "int4-gptq", tmp_path / "other").hash


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "weighting", "drift"),
    [
        (("int4-awq", "int4-gptq", "int4-best"), "none", "ignored"),
        (("int4-gptq", "int4-best"), "fisher", "corrected"),
    ],
)
def test_two_processes_give_the_same_bytes(
    tiny: Tiny, tmp_path: Path, names: tuple[str, ...], weighting: str, drift: str
) -> None:
    source = tiny()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(DOCUMENTS * 4))
    command = [
        "-m", "tinier", "quantize", str(source.folder), "--group-size", "32",
        "--text", str(text), "--windows", "128", "--length", "64", "--iterations", "3",
        "--device", "cpu", "--quiet", "--weighting", weighting, "--drift", drift,
    ]  # fmt: skip
    presets = [word for preset in names for word in ("--preset", preset)]
    for count, out in ((1, "one"), (2, "two")):
        launcher = [sys.executable, *command]
        if count > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            launcher = [sys.executable, *torchrun, *command]
        done = subprocess.run(
            [*launcher, *presets, "--out", str(tmp_path / out)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    for preset in names:
        one, two = (tensors_of(open_checkpoint(tmp_path / n / preset)) for n in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_groups_are_shared_out_evenly_and_the_writer_has_the_lightest() -> None:
    work = {"qkv": 77, "o": 58, "gate and up": 184, "down": 756}
    assert layer._owners(work, 1) == dict.fromkeys(work, 0)
    assert layer._owners(work, 2) == {"down": 1, "gate and up": 0, "qkv": 0, "o": 0}
    assert sorted(layer._owners(work, 4).values()) == [0, 1, 2, 3]
    assert layer._owners(work, 4)["o"] == 0
    assert set(layer._owners(work, 7).values()) <= set(range(7))


@pytest.mark.slow
def test_several_presets_in_one_walk_are_what_each_is_alone(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    plans = {
        tmp_path / preset: QuantizePlan(
            preset=preset, group_size=32 if "int4" in preset else None, windows=8, length=64,
            iterations=5,
        )
        for preset in ("fp8", *SLOW_PRESETS)
    }  # fmt: skip
    together = quantize_all(source, plans, text=DOCUMENTS, device="cpu")
    for checkpoint, preset in zip(together, ("fp8", *SLOW_PRESETS), strict=True):
        alone = quantize_tiny(source, preset, tmp_path / "alone" / preset)
        assert checkpoint.hash == alone.hash


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_head_and_norms_are_untouched(tiny: Tiny, tmp_path: Path, tied: bool) -> None:
    source = tiny(tie_word_embeddings=tied)
    before, after = tensors_of(source), tensors_of(quantize_tiny(source, "int8", tmp_path / "out"))
    for name in before:
        if "_proj" not in name:
            assert torch.equal(before[name], after[name]), name


def test_a_quantized_head_is_written_beside_a_tied_embedding(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_tiny(tiny(), "int8", tmp_path / "out", head="fp8", kv="fp8")
    assert made.config["tie_word_embeddings"] is False
    layout = checkpoint_layout(made)
    assert layout is not None
    assert layout.label == "INT8 W8A8, FP8 head, FP8 KV"
    assert made.tensors["lm_head.weight"].dtype == "F8_E4M3"
    assert made.tensors["model.embed_tokens.weight"].dtype == "F32"


def test_null_copies_every_weight(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    made = quantize_tiny(source, None, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(made)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "quantization_config" not in made.config


def test_layers_have_formats_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    formats = {"model.layers.1.mlp.down_proj": "int3:32", "model.layers.0.self_attn.o_proj": "fp8"}
    made = quantize_tiny(tiny(), "int4", tmp_path / "out", layer_formats=formats)
    layout = checkpoint_layout(made)
    assert layout is not None
    labels = {name: layout.schemes[name].label for name in formats}
    assert list(labels.values()) == ["INT3 W3A16 g32", "FP8 W8A8"]
    assert layout.schemes["model.layers.0.mlp.down_proj"].label == "INT4 W4A16 g32"


def test_layers_that_are_rounded_as_one_matrix_have_one_format(tiny: Tiny, tmp_path: Path) -> None:
    source, key = tiny(), "model.layers.0.self_attn.k_proj"
    with pytest.raises(SchemeError, match="share an input and are rounded as one matrix"):
        quantize_tiny(source, "int4", tmp_path / "out", layer_formats={key: "int3:32"})
    formats = {key.replace("k_proj", f"{p}_proj"): "int8-w8a16" for p in "qkv"}
    made = quantize_tiny(source, "int4", tmp_path / "out", layer_formats=formats)
    assert made.manifest is not None
    assert (made.manifest.layers[key]["snr_db"] or 0) > 35


def test_only_layers_with_learned_rounding_are_learned(tiny: Tiny, tmp_path: Path) -> None:
    source, name = tiny(), "model.layers.1.mlp.down_proj"
    pairs = [
        ("int4-best", {name: "fp8"}),
        ("fp8", {name: "int4-best:32"}),
        ("int4-gptq", {name: "int4-best:32"}),
    ]
    for preset, formats in pairs:
        out = tmp_path / f"{preset}-{len(formats[name])}"
        made = quantize_tiny(source, preset, out, layer_formats=formats)
        assert made.manifest is not None
    left = quantize_tiny(source, "int4-best", tmp_path / "left", ignore=("model.layers.0.*",))
    assert left.manifest is not None


def test_the_model_writes_its_own_calibration_text(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    first, second = (
        quantize(
            source,
            QuantizePlan(preset="int4-gptq", group_size=32, windows=3, length=32, self_text=True),
            tmp_path / name,
            device="cpu",
        )
        for name in ("a", "b")
    )
    assert first.hash == second.hash


def test_a_layer_that_learning_does_not_help_keeps_gptq_and_says_so(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "learn_rounding", lambda *_, **__: (1.0, 1.0))
    made = quantize_tiny(tiny(), "int4-best", tmp_path / "out")
    assert made.manifest is not None
    told = "learned rounding did not lower the error; GPTQ's codes are kept"
    assert f"model.layers.0 and 3 more layers: {told}" in made.manifest.warnings
    gptq = quantize_tiny(
        tiny(), "int4-gptq", tmp_path / "gptq", weighting="fisher", drift="corrected"
    )
    one, other = tensors_of(made), tensors_of(gptq)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_more_damping_is_in_the_manifest(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinier.quantization.gptq._DAMPS", (0.3,))
    made = quantize_tiny(tiny(), "int4-gptq", tmp_path / "out")
    assert made.manifest is not None
    expected = "mlp.down_proj: the Hessian needed damping of 0.3 (usual: 0.01)"
    assert f"model.layers.0 and 3 more layers: {expected}" in made.manifest.warnings


def test_what_loaders_refuse_is_said_beforehand(tiny: Tiny) -> None:
    def told(**plan: Any) -> str:
        return "\n".join(plan_quantize(tiny(), QuantizePlan(**plan), DOCUMENTS).warnings)

    said = told(preset="int8", ignore=("*.3.self_attn.q_proj",))
    assert "model.layers.3.self_attn.q_proj, model.layers.3.self_attn.k_proj" in said
    assert "vLLM multiplies them as one matrix" in said
    assert "one matrix" in told(preset="fp8", ignore=("*.up_proj",))
    for whole in ((), ("*.self_attn.[qkv]_proj",), ("*.o_proj", "*.down_proj")):
        assert told(preset="int8", ignore=whole) == ""
    assert "reads all 8-bit floats as E4M3" in told(preset="fp8-e5m2")


def test_weights_of_few_bits_are_one_warning(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_tiny(tiny(), "int2", tmp_path / "out")
    assert made.manifest is not None
    (warning,) = [w for w in made.manifest.warnings if "rounding noise" in w]
    assert warning.startswith("weights of 28 of 28 linear layers keep less than 12 dB of signal")


def test_groups_that_do_not_divide_are_replaced_and_said(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(hidden_size=64, intermediate_size=192)
    made = quantize_tiny(source, "int4", tmp_path / "out", group_size=None)
    layout = checkpoint_layout(made)
    assert layout is not None
    assert {scheme.weights.group_size for scheme in layout.schemes.values()} == {64}
    assert made.manifest is not None
    assert any("groups of 64: the preset's own size" in w for w in made.manifest.warnings)
    wide = tiny(
        name="wide", hidden_size=128, intermediate_size=256, num_attention_heads=8, head_dim=16
    )
    told = plan_quantize(wide, QuantizePlan(preset="int4")).warnings
    assert not any("groups of" in warning for warning in told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "int5"}, "preset 'int5' is not known"),
        (
            {"preset": "int4", "group_size": 128},
            "128 does not divide the 64 input columns .* Sizes that do: 16, 32, 64",
        ),
        ({"preset": "int4", "group_size": 48}, "48 does not divide"),
        ({"preset": "fp8", "symmetric": False}, "has no zero points"),
        (
            {"preset": "fp8", "ignore": ("*.q",)},
            r"matches no layer\. Names look like model\.layers",
        ),
        ({"preset": "fp8", "ignore": ("*",)}, "leaves no layer to quantize"),
        ({"preset": "fp8", "head": "int4"}, "Use fp8 or int8"),
        ({"preset": "mixed"}, "bits and preset 'mixed' go together"),
        ({"preset": "fp8", "bits": 5.0}, "bits and preset 'mixed' go together"),
        ({"preset": "fp8", "formats": ("int4:32",)}, "what the preset 'mixed' chooses from"),
        ({"preset": "mixed", "bits": 5.0, "formats": ("int4:x",)}, "'int4:x' is no format"),
        ({"preset": "mixed", "bits": 5.0, "symmetric": False}, "without zero points"),
        (
            {"preset": "mixed", "bits": 5.0, "formats": ("int4:32",), "group_size": 32},
            "name their group sizes",
        ),
        (
            {"preset": "mixed", "bits": 5.0, "layer_formats": {"x": "int4"}},
            "mixed chooses them itself",
        ),
        ({"preset": "fp8", "layer_formats": {"x": "int4"}}, "names 'x', which is not quantized"),
        ({"preset": "int4-gptq", "group_size": 32}, "needs calibration text"),
        ({"preset": "int4-gptq", "group_size": 32, "length": 512}, "more than the 256 positions"),
        ({"preset": "fp8", "self_text": True}, "needs no calibration text"),
        ({"preset": "fp8", "windows": 0}, "Use 1 or more"),
        ({"preset": None, "group_size": 32}, "preset null quantizes no layer. Leave --group-size"),
    ],
)
def test_bad_input_is_found_before_any_work(
    tiny: Tiny, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    source = tiny()
    with pytest.raises((SchemeError, InputError), match=message):
        quantize(source, QuantizePlan(**({"length": 64} | arguments)), tmp_path / "out", text=())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_too_few_bits_for_mixed_say_which_can_be_had(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"bits=2.0 is below 2\.50.*between it and 8\.\d\d"):
        quantize_tiny(tiny(), "mixed", tmp_path / "out", bits=2.0, group_size=None)


def test_too_little_memory_is_refused_before_any_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny()
    needs = [plan_quantize(source, QuantizePlan(preset=p)).memory_bytes for p in ("fp8", "int8")]
    free = max(needs)
    monkeypatch.setattr("tinier.device.free_memory_bytes", lambda device: free)
    quantize_tiny(source, "fp8", tmp_path / "one")
    both = {tmp_path / name: QuantizePlan(preset=name) for name in ("fp8", "int8")}
    with pytest.raises(InputError, match=r"takes about .* GB on cpu and 0.0 GB are free"):
        quantize_all(source, both, device="cpu")  # each would fit, not both
    monkeypatch.setattr("tinier.device.free_memory_bytes", lambda device: 1000)
    for work in (
        lambda: quantize_tiny(source, "int4-gptq", tmp_path / "out"),
        lambda: prune(
            source, PrunePlan(drop_layers=(1,), refit=False), tmp_path / "out", device="cpu"
        ),
        lambda: load_decoder(source, device=torch.device("cpu")),
    ):
        with pytest.raises(InputError, match=r"takes about .* GB on cpu and 0.0 GB are free"):
            work()
    assert not list(tmp_path.glob(".out*"))


def test_a_quantized_source_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_tiny(tiny(), "fp8", tmp_path / "one")
    with pytest.raises(SchemeError, match="is quantized already"):
        quantize_tiny(made, "int8", tmp_path / "two")


def test_an_existing_output_is_refused(tiny: Tiny) -> None:
    source = tiny()
    with pytest.raises(OutputError, match="exists"):
        quantize_tiny(source, "fp8", source.folder)


def test_the_command_line_makes_several_and_says_what(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    command = [
        sys.executable, "-m", "tinier", "quantize", str(source.folder), "--preset", "fp8",
        "--preset", "int8", "--out", str(tmp_path / "out"), "--json", "--quiet",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout.splitlines()[-1])["checkpoints"]
    assert [Path(m["out"]).name for m in made] == ["fp8", "int8"]
    assert all(Path(m["out"], "config.json").exists() for m in made)


@pytest.mark.parametrize(
    ("preset", "part"),
    [("nvfp4", "weight_global_scale"), ("nvfp4-w4a16", "weight_global_scale"),
     ("fp8-static", "weight_scale")],
)  # fmt: skip
def test_layers_that_servers_fuse_share_the_scale_of_the_whole(
    tiny: Tiny, tmp_path: Path, preset: str, part: str
) -> None:
    """vLLM and TensorRT-LLM keep one such scale for q, k, v and for gate, up: the largest."""
    source = tiny(dtype=torch.bfloat16)
    made = quantize_tiny(source, preset, tmp_path / "out")
    with made.reader() as read:
        for index in range(4):
            for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                          ("mlp.gate_proj", "mlp.up_proj")):  # fmt: skip
                scales = [read(f"model.layers.{index}.{name}.{part}") for name in group]
                assert len({scale.item() for scale in scales}) == 1
    with source.reader() as read:  # and that is not because all weights are alike
        assert (
            len({read(f"model.layers.0.self_attn.{n}_proj.weight").abs().max() for n in "qkv"}) == 3
        )


def test_an_int4_embedding_takes_groups_that_divide_it(tiny: Tiny) -> None:
    """Also beside a preset that has none."""
    for preset in ("int4", "fp8"):
        plan = QuantizePlan(preset=preset, embedding="int4")
        stage = plan_quantize(tiny(name=preset, hidden_size=64), plan)
        assert stage.output_bytes
