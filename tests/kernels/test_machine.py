"""What each format gets on each GPU, without any of them: the choice looks at a faked capability."""

from pathlib import Path

import pytest
import torch

from tinier.kernels.linear import linear_path
from tinier.kernels.machine import Machine
from tinier.schemes import PRESETS, preset_named

GPUS = {"Turing": (7, 5), "Ampere": (8, 0), "Ampere 8.6": (8, 6), "Ada": (8, 9), "Hopper": (9, 0),
        "Blackwell": (10, 0)}  # fmt: skip
TRITON = ("Ampere", "Ampere 8.6", "Ada", "Hopper", "Blackwell")
FP8 = ("Ada", "Hopper", "Blackwell")


def path(name: str, gpu: str, sides: tuple[int, int] = (1000, 512), **more: object) -> str:
    scheme = preset_named(name, **more).scheme  # type: ignore[arg-type]
    return linear_path(scheme, sides, torch.bfloat16, Machine("cuda", GPUS[gpu], has_triton=True))


@pytest.mark.parametrize("gpu", GPUS)
def test_every_preset_has_a_way_on_every_gpu(gpu: str) -> None:
    expected = dict.fromkeys(PRESETS, "expanded")
    expected |= {"int8": "int8", "int8-sq": "int8"}
    if gpu in FP8:
        expected |= dict.fromkeys(("fp8", "fp8-gptq", "fp8-static"), "fp8")
        expected["fp8-e5m2"] = "weight-only 8-bit"
    if gpu in TRITON:
        expected |= dict.fromkeys(
            ("int4", "int4-awq", "int4-gptq", "int4-best"), "weight-only int4"
        )
        expected["int8-w8a16"] = "weight-only 8-bit"
    assert {name: path(name, gpu) for name in PRESETS} == expected


@pytest.mark.parametrize("gpu", GPUS)
def test_the_attention_kernels_run_where_their_conversions_are(gpu: str) -> None:
    machine = Machine("cuda", GPUS[gpu], has_triton=True)
    assert machine.caches(torch.bfloat16) == (gpu in TRITON)
    assert machine.caches(torch.int8) == (gpu in TRITON)
    assert machine.caches(torch.float8_e4m3fn) == (gpu in FP8)
    assert not Machine("cuda", GPUS[gpu], has_triton=False).caches(torch.bfloat16)
    assert not Machine("cpu").caches(torch.bfloat16)


def test_sizes_that_the_products_do_not_take_are_expanded() -> None:
    assert path("fp8", "Hopper", (32_001, 512)) == "fp8"  # rows are padded
    assert path("fp8", "Hopper", (512, 520)) == "expanded"
    assert path("int8", "Hopper", (512, 520)) == "expanded"
    assert path("int4", "Hopper", symmetric=False) == "expanded"
    assert path("int4", "Hopper", group_size=16) == "expanded"


def test_the_page_about_devices_is_what_the_dispatch_does() -> None:
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    for name in PRESETS:
        cells = [path(name, gpu) for gpu in ("Turing", "Ampere", "Ada", "Hopper")]
        assert f"| `{name}` | {' | '.join(cells)} |" in page
