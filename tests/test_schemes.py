import pytest

from tinier.errors import SchemeError
from tinier.schemes import PRESETS, Grid, Scheme, preset_named


def test_group_size_goes_with_groups_only() -> None:
    with pytest.raises(SchemeError, match="granularity 'group'"):
        Grid(kind="int", bits=4, granularity="channel", group_size=64)
    with pytest.raises(SchemeError, match="granularity 'group'"):
        Grid(kind="int", bits=4, granularity="group")
    with pytest.raises(SchemeError, match="positive"):
        Grid(kind="int", bits=4, granularity="group", group_size=0)


def test_float_grids_have_eight_bits() -> None:
    with pytest.raises(SchemeError, match="8 bits"):
        Grid(kind="float", bits=4, granularity="channel")


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(SchemeError, match=r"fp8, int8, int4. Did you mean 'int4'"):
        preset_named("int-4")


def test_group_size_replaces_that_of_a_preset() -> None:
    assert preset_named("int4", 64).scheme.weights.group_size == 64
    assert PRESETS["int4"].scheme.weights.group_size == 128
    with pytest.raises(SchemeError, match="takes no group size"):
        preset_named("fp8", 64)


def test_a_group_size_that_does_not_divide_says_which_do() -> None:
    scheme = PRESETS["int4"].scheme
    with pytest.raises(
        SchemeError, match=r"128 does not divide the 576 .*Sizes that do: 16, 32, 64"
    ):
        scheme.check_fits("model.layers.0.self_attn.q_proj", 576)
    scheme.check_fits("model.layers.0.self_attn.q_proj", 512)


def test_labels_say_bits_and_groups() -> None:
    assert PRESETS["fp8"].scheme.label == "FP8 W8A8"
    assert preset_named("int4", 64).scheme.label == "INT4 W4A16 g64"
    assert Scheme(weights=Grid(kind="int", bits=8, granularity="channel")).label == "INT8 W8A16"
