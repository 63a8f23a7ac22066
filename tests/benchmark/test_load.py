"""Load on a server: AIPerf itself where it is installed, and what is refused before anything runs."""

from pathlib import Path

import pytest
import torch
from tests.conftest import write_tiny
from typer.testing import CliRunner

from tinier.benchmark import Endpoint, Load, load, served_models
from tinier.benchmark.load import find_aiperf
from tinier.benchmark.speed import Workload, bench
from tinier.cli.main import app
from tinier.engine import EngineConfig
from tinier.errors import InputError
from tinier.families import open_model
from tinier.serving import ServeConfig, Service


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.usefixtures("aiperf")
def test_a_server_s_figures_have_the_definitions_of_those_in_process(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny(folder, "llama", dtype=torch.float32)
    config = EngineConfig(max_batch_size=4, max_seq_len=128, device="cpu")
    with Service([f"one={folder}"], config, ServeConfig(port=0)) as service:
        assert served_models(service.url, None) == ["one"]
        endpoint = Endpoint(url=service.url, model="one", tokenizer=folder)
        asked = Load(concurrency=2, input_length=20, output_length=8, requests=8)
        (served,) = load(endpoint, [asked])
    assert (served.requests, served.errors) == (8, 0)
    workload = Workload(concurrency=2, input_length=20, output_length=8)
    checkpoint = open_model(str(folder))
    own = bench({"one": checkpoint}, workload, base="one", repeats=1, seed=0, device="cpu")["one"]
    for latency, ttft, itl, tokens, requests in (
        (served.latency_ms["mean"], served.ttft_ms["mean"], served.itl_ms["mean"],
         served.output_tokens_per_s, served.requests_per_s),
        (own.latency_ms.median, own.ttft_ms.median, own.itl_ms.median,
         own.output_tokens_per_s.median, own.requests_per_s.median),
    ):  # fmt: skip
        assert latency == pytest.approx(ttft + 7 * itl, rel=1e-3)
        assert tokens == pytest.approx(8 * requests, rel=1e-3)
    for use, limit in (("real-time", 100), ("conversation", 1000), ("batch", 10_000)):
        assert served.targets_met[use] == (served.latency_ms["p95"] < limit)


def test_without_aiperf_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"pip install 'tinier\[bench\]'"):
        find_aiperf()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either a concurrency or a request rate"),
        ({"concurrency": 1, "request_rate": 2.0}, "either a concurrency or a request rate"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"request_rate": 1.0, "output_length": 1}, "output_length=1"),
    ],
)
def test_impossible_loads_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Load(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--tokenizer MODEL"),
        (["--tokenizer", "x", "--endpoint", "grpc"], "Use openai or triton"),
        (["--tokenizer", "x", "--endpoint", "triton"], "--name NAME"),
        (["--tokenizer", "x", "--request-rate", "a"], "no list of numbers"),
        (["--tokenizer", "x", "--concurrency", "a"], "no list of numbers"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "http://127.0.0.1:1", "--quiet", *options])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_an_address_where_nothing_listens() -> None:
    with pytest.raises(InputError, match="does not answer like an OpenAI endpoint"):
        served_models("http://127.0.0.1:1", None)
