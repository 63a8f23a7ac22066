import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinier.benchmark import Load, LoadResult
from tinier.checkpoint import hold
from tinier.errors import InputError, OutputError
from tinier.evaluation import Comparison, LayerDifference, Quality
from tinier.recipe import EndpointResult, RunResults, add_endpoint, load_results
from tinier.report import write_report
from tinier.report.page import footnotes

DEMO = Path(__file__).parents[2] / "benchmarks/results/demo_amd-epyc-2-cores_2026-11-26.json"


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no results\.json"):
        load_results(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match="is not a tinier result"):
        load_results(tmp_path)


def kept(new: Any, old: Any) -> Any:
    """`new` without what was added since `old` was written."""
    if isinstance(old, dict):
        return {key: kept(new[key], value) for key, value in old.items()}
    if isinstance(old, list):
        return [kept(a, b) for a, b in zip(new, old, strict=True)]
    return new


def test_results_are_the_same_values_and_back() -> None:
    values = json.loads(DEMO.read_text("utf-8"))
    results = RunResults.from_json(values)
    written = results.to_json()
    assert RunResults.from_json(written) == results
    assert kept(written, values) == values
    assert results.base.from_ is None
    assert results.variant("int4-distilled") == results.variants[-1]
    assert results.variant("none") is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    values = json.loads(DEMO.read_text("utf-8"))
    del values["variants"][2]["quality"]["kl"]
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"not a tinier result: variants\.2\.quality\.kl"):
        load_results(tmp_path)


def test_results_of_another_schema(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(InputError, match="has schema 99"):
        load_results(tmp_path)


def measured(url: str, p95: float) -> EndpointResult:
    spread = {"mean": 1.0, "p50": 2.0, "p90": 3.0, "p95": p95, "p99": 70.25}
    result = LoadResult(
        load=Load(request_rate=2.5), requests=8, errors=1, requests_per_s=2.4567,
        output_tokens_per_s=300.0, ttft_ms=spread, itl_ms=spread, latency_ms=spread,
        targets_met={"real-time": p95 < 100, "conversation": True, "batch": True},
    )  # fmt: skip
    return EndpointResult(url=url, model="small", endpoint="openai", load=(result,))


def test_a_warning_of_several_variants_is_said_once() -> None:
    results = RunResults.from_json(json.loads(DEMO.read_text("utf-8")))
    warned = tuple(replace(row, warnings=("too little text",)) for row in results.variants[2:4])
    assert footnotes(replace(results, variants=(results.base, *warned))) == [
        f"{results.variants[2].name}, {results.variants[3].name}: too little text"
    ]


def test_a_notebook_shows_the_table_and_the_curves() -> None:
    results = RunResults.from_json(json.loads(DEMO.read_text("utf-8")))
    base, first, *others = results.variants
    named = replace(first, name="<b>")
    shown = replace(results, variants=(base, named, *others))._repr_html_()
    assert shown.count("<svg") == 2
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    assert shown.count("<tr>") == 1 + len(results.variants)


def test_a_notebook_shows_a_quality_and_a_comparison() -> None:
    quality = Quality(
        perplexity=16.0, nll_stderr=0.01, kl=0.085, kl_stderr=None, top1_agreement=0.85, tokens=1022
    )
    shown = quality._repr_html_()
    assert "<td>16.0000</td><td>0.1600</td>" in shown
    assert "<td>0.0850</td><td></td>" in shown
    layer = LayerDifference(
        name="model.layers.0", layer_snr_db=None, added_error=0.0, stream_snr_db=12.5
    )
    shown = Comparison(layers=(layer,), first=quality, second=quality)._repr_html_()
    assert "model.layers.0" in shown
    assert "<td>0.0850</td>" in shown


def test_load_on_a_server_is_kept_with_a_run_and_reported(tmp_path: Path) -> None:
    shutil.copy(DEMO, tmp_path / "results.json")
    assert (
        "Load on a server"
        not in write_report(load_results(tmp_path), tmp_path).with_suffix(".md").read_text()
    )
    for url, p95 in (("http://a:1", 50.5), ("http://b:1", 5.0), ("http://a:1", 150.5)):
        results = add_endpoint(tmp_path, measured(url, p95))
    assert load_results(tmp_path) == results
    assert [entry.url for entry in results.endpoints] == ["http://b:1", "http://a:1"]
    page = write_report(results, tmp_path).with_suffix(".md").read_text()
    assert (
        "| small at http://a:1 | 2.5 requests/s | 2.457 | 300 | TTFT ms | 1 | 2 | 3 | 150.5 | 70.25 |"
        in page
    )
    assert (
        "small at http://a:1, 2.5 requests/s: 95 % within the target of real-time missed, "
        "conversation met, batch met; 1 requests failed" in page
    )
    assert "50.5 |" not in page.replace("150.5 |", "")


def test_a_run_in_use_keeps_its_results(tmp_path: Path) -> None:
    shutil.copy(DEMO, tmp_path / "results.json")
    before = load_results(tmp_path)
    with hold(tmp_path, tmp_path / ".lock"), pytest.raises(OutputError, match="another tinier"):
        add_endpoint(tmp_path, measured("http://a:1", 1.0))
    assert load_results(tmp_path) == before
