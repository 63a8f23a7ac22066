"""Advice and diagnoses: what a device lacks is said, commands are ones that work, and faults are found."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import quantize_tiny

from tinier.advice import (
    DEVICES,
    USES,
    advise,
    advise_from_run,
    device_named,
    examine_checkpoint,
    examine_machine,
    examine_run,
)
from tinier.benchmark import Workload
from tinier.checkpoint import Checkpoint
from tinier.cli.main import VERBS, main
from tinier.errors import InputError
from tinier.recipe import Failure, RunResults
from tinier.report.terminal import advice_text, findings_text

Tiny = Callable[..., Checkpoint]
LOAD = Workload(concurrency=4, input_length=32, output_length=16)
DEMO = Path(__file__).parents[2] / "benchmarks/results/demo_amd-epyc-2-cores_2026-11-26.json"


@pytest.fixture
def source(tiny: Tiny) -> Checkpoint:
    return tiny(dtype=torch.bfloat16)


@pytest.fixture
def results() -> RunResults:
    return RunResults.from_json(json.loads(DEMO.read_text("utf-8")))


def test_devices_by_name() -> None:
    assert device_named("rtx-4090").name == "RTX 4090"
    assert device_named("jetson_orin").capability == (8, 7)
    assert device_named("auto").memory_gb > 0
    with pytest.raises(InputError, match="Did you mean 'H100'"):
        device_named("H1000")


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("use", USES)
def test_what_a_device_lacks_is_not_advised(source: Checkpoint, name: str, use: Any) -> None:
    device = DEVICES[name]
    found = advise(source, "m", use, device, LOAD, None)
    best = found[0]
    assert best.against == ()
    if not device.has_fp8 and not device.is_cpu:
        fp8 = [one for one in found if "FP8" in one.chain]
        assert all("no FP8 arithmetic" in " ".join(one.against) for one in fp8)
    if not device.has_fp4:
        assert all(one.against for one in found if one.chain == "NVFP4")
    for one in found:
        for command in one.commands:
            program, verb, *_ = shlex.split(command)
            assert (program, verb in VERBS) == ("tinier", True)
    assert advice_text(found, "origin", device.lacks)


def test_floors_memory_and_loads_speak_against_chains(source: Checkpoint) -> None:
    small = replace(DEVICES["l4"], memory_gb=source.weight_bytes * 0.7e-9)
    found = advise(source, "m", "cloud", small, LOAD, 0.95)
    plain = next(one for one in found if one.chain.startswith("16 bit"))
    assert "takes" in plain.against[0]
    pruned = next(one for one in found if "pruned" in one.chain)
    assert "below the floor of 95 %" in pruned.against[0]
    with pytest.raises(InputError, match="real-time"):
        advise(source, "m", "gaming", small, LOAD, None)  # type: ignore[arg-type]


def test_advice_from_a_run_is_what_it_measured(results: RunResults) -> None:
    rows = {row.name: row for row in results.variants}
    cloud = advise_from_run(results, Path("runs/demo"), "cloud", 0.95)
    assert cloud[0].chain.startswith("int8")
    assert cloud[0].speedup == rows["int8"].speedup
    assert cloud[0].commands == ("tinier serve runs/demo/variants/int8",)
    assert "below the floor" in cloud[-1].against[0]
    assert advise_from_run(results, Path("runs/demo"), "edge", 0.9)[0].chain.startswith("int4 ")


def test_advice_on_the_command_line(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "advise",
        str(source.folder),
        "--use",
        "mobile",
        "--hardware",
        "T4",
        "--load",
        "32/16@1",
    ]
    monkeypatch.setattr("sys.argv", ["tinier", *arguments, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    data = json.loads(capsys.readouterr().out)
    assert any("FP8" in lack for lack in data["lacks"])
    assert data["advice"][0]["commands"]


def subjects(found: list[Any], level: str) -> list[str]:
    return [finding.subject for finding in found if finding.level == level]


def test_a_machine_is_looked_over() -> None:
    found = examine_machine("cpu")
    assert {"CPU", "native step", "formats", "memory", "disk"} <= {f.subject for f in found}
    said = findings_text(found)
    assert "int4" in said


def test_a_checkpoint_that_does_not_fit(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "memory" in subjects(examine_checkpoint(source, "cpu"), "ok")
    for free, remedy in ((source.weight_bytes * 1.5, "--max-seq-len"), (10_000, "tinier fit")):
        monkeypatch.setattr("tinier.advice.doctor.free_memory_bytes", lambda _, free=free: free)
        bad = [f for f in examine_checkpoint(source, "cpu") if f.level == "bad"]
        assert bad[0].subject == "memory"
        assert remedy in bad[0].remedy


def test_layers_that_lost_most_and_formats_without_a_path(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_tiny(tiny(dtype=torch.bfloat16), "nvfp4-w4a16", tmp_path / "q")
    found = examine_checkpoint(made, "cpu")
    assert "speed" in subjects(found, "bad")
    assert made.manifest is not None
    name = next(iter(made.manifest.layers))
    layers = made.manifest.layers | {name: {"snr_db": 1.0, "output_snr_db": 1.0}}
    worse = replace(made, manifest=replace(made.manifest, layers=layers))
    (named,) = [f for f in examine_checkpoint(worse, "cpu") if f.subject == "layers"]
    assert name in named.what
    assert "--ignore" in named.remedy


def test_a_tokenizer_that_is_not_the_models(source: Checkpoint) -> None:
    config = json.loads((source.folder / "config.json").read_text())
    (source.folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 7}))
    other = replace(source, config=config | {"bos_token_id": 7})
    assert "tokenizer" in subjects(examine_checkpoint(other, "cpu"), "bad")


def test_which_step_of_a_chain_lost_the_quality(results: RunResults) -> None:
    found = {finding.subject: finding for finding in examine_run(results)}
    assert "prune in pruned lost" in found["int4-distilled"].what
    assert "Remove less" in found["int4-distilled"].remedy
    assert "quantize in int4 lost" in found["int4"].what
    assert "int8" not in found
    failed = Failure(variant="w", what="stage", error="no room")
    assert examine_run(replace(results, failed=(failed,)))[0].level == "bad"


def test_the_doctor_ends_with_1_where_something_must_be_done(
    results: RunResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    failed = replace(results, failed=(Failure(variant="w", what="stage", error="no room"),))
    (tmp_path / "results.json").write_text(json.dumps(failed.to_json()))
    monkeypatch.setattr("sys.argv", ["tinier", "doctor", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "no room" in capsys.readouterr().out
