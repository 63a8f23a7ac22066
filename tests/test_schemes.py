import pytest

from tinier.errors import SchemeError
from tinier.schemes import PRESETS, Grid, Layout, Scheme, preset_named


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"granularity": "channel", "group_size": 64}, "granularity 'group'"),
        ({"granularity": "group"}, "granularity 'group'"),
        ({"granularity": "group", "group_size": 0}, "positive"),
        (
            {"granularity": "channel", "kind": "float", "bits": 3},
            "bits=3 with kind .float.. Use 4 or 8",
        ),
        ({"granularity": "channel", "kind": "int", "bits": 5}, "Use 2 or 3 or 4 or 8"),
        ({"granularity": "channel", "kind": "e5m2", "bits": 4}, "kind .e5m2.. Use 8"),
        ({"granularity": "channel", "kind": "float", "bits": 8, "symmetric": False}, "symmetric"),
        ({"granularity": "channel", "scale_format": "e8m0"}, "4-bit floats only"),
    ],
)
def test_grids_that_do_not_exist_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Grid(**({"kind": "int", "bits": 4} | wrong))  # type: ignore[arg-type]


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(SchemeError, match=r"fp8, .*int4.*Did you mean 'int4-gptq'"):
        preset_named("int4gptq")


def test_group_size_replaces_that_of_a_preset() -> None:
    assert preset_named("int4", 64).scheme.weights.group_size == 64
    assert PRESETS["int4"].scheme.weights.group_size == 128
    block = preset_named("fp8-block", 64).scheme
    assert block.weights.group_size == 64
    assert block.activations is not None
    assert block.activations.group_size == 64
    for fixed in ("fp8", "nvfp4", "mxfp4"):
        with pytest.raises(SchemeError, match="takes no group size"):
            preset_named(fixed, 64)


def test_zero_points_go_with_integer_groups() -> None:
    assert not preset_named("int4-awq", 64, symmetric=False).scheme.weights.symmetric
    assert preset_named("int4", symmetric=False).scheme.label == "INT4 W4A16 g128 asym"
    for fixed in ("fp8", "int8", "nvfp4", "w4a8"):
        with pytest.raises(SchemeError, match="has no zero points"):
            preset_named(fixed, symmetric=False)


def test_a_group_size_that_does_not_divide_says_which_do() -> None:
    scheme = PRESETS["int4"].scheme
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(
        SchemeError, match=r"128 does not divide the 576 .*Sizes that do: 16, 32, 64"
    ):
        scheme.check_fits(name, (576, 576))
    scheme.check_fits(name, (576, 512))
    with pytest.raises(SchemeError, match=r"256 input columns and 192 rows .*16, 32, 64\."):
        PRESETS["fp8-block"].scheme.check_fits(name, (192, 256))


def test_only_presets_that_look_at_activations_need_text() -> None:
    free = {name for name, preset in PRESETS.items() if not preset.needs_data}
    assert free == {"fp8", "fp8-e5m2", "fp8-block", "int8", "int4"}


def test_labels_say_bits_and_groups() -> None:
    labels = {
        "fp8": "FP8 W8A8", "fp8-block": "FP8 W8A8 b128", "int8-sq": "INT8 W8A8",
        "int4": "INT4 W4A16 g128", "w4a8": "INT4 W4A8-FP8 g128", "nvfp4": "NVFP4 W4A4",
        "mxfp4-w4a16": "MXFP4 W4A16", "int2": "INT2 W2A16 g128",
    }  # fmt: skip
    assert {name: PRESETS[name].scheme.label for name in labels} == labels
    assert Scheme(weights=Grid(kind="int", bits=8, granularity="channel")).label == "INT8 W8A16"


def test_layout_names_its_most_frequent_scheme_first() -> None:
    fp8, int4 = PRESETS["fp8"].scheme, PRESETS["int4"].scheme
    layout = Layout(
        schemes={"a": fp8, "b": int4, "c": int4, "lm_head": fp8},
        kv_cache=Grid(kind="float", bits=8, granularity="tensor"),
    )
    assert layout.label == "INT4 W4A16 g128 + FP8 W8A8, FP8 head, FP8 KV"


def test_a_quantized_cache_alone_has_a_name_too() -> None:
    cache = Grid(kind="int", bits=8, granularity="tensor")
    assert Layout(schemes={}, kv_cache=cache).label == "16 bit, INT8 KV"
