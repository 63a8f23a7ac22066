"""Load on a server: AIPerf itself where it is installed, and what is refused before anything runs."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import write_tiny
from typer.testing import CliRunner

from tinier.benchmark import Endpoint, Load, load, served_models
from tinier.benchmark.load import _with_hidden_key, find_aiperf
from tinier.benchmark.speed import Workload, bench
from tinier.cli.main import app
from tinier.engine import EngineConfig
from tinier.errors import InputError
from tinier.families import open_model
from tinier.serving import ServeConfig, Service
from tinier.serving.triton import _hide


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.usefixtures("aiperf")
def test_a_server_s_figures_have_the_definitions_of_those_in_process(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny(folder, "llama", dtype=torch.float32)
    config = EngineConfig(max_batch_size=4, max_seq_len=128, device="cpu")
    serve = ServeConfig(port=0, api_keys=("secret-of-the-test",))
    with Service([f"one={folder}"], config, serve) as service:
        assert served_models(service.url, "secret-of-the-test") == ["one"]
        endpoint = Endpoint(
            url=service.url, model="one", tokenizer=folder, api_key="secret-of-the-test"
        )
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


def test_a_key_is_not_in_the_command_line(tmp_path: Path) -> None:
    """Everyone on the machine can list command lines."""
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "print(sys.argv[1:], 'a-secret' in open('/proc/self/cmdline').read())\n"
    )
    environ: dict[str, str] = {}
    command = _with_hidden_key([str(program), "profile", "--x"], "a-secret", environ)
    assert "a-secret" not in " ".join(command)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "['profile', '--x', '--api-key', 'a-secret'] False\n"


def test_a_running_process_s_command_line_loses_its_secret() -> None:
    code = "import sys; print('up', flush=True); input(); print(sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", code, "a=SECRET;b"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        _hide(process.pid, "SECRET")
        line = Path(f"/proc/{process.pid}/cmdline").read_text()
        assert "SECRET" not in line
        assert "a=******;b" in line
        assert process.communicate("\n")[0] == "a=SECRET;b\n"  # it goes on with what it read


def test_without_aiperf_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="pip install aiperf"):
        find_aiperf()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either a concurrency or a request rate"),
        ({"concurrency": 1, "request_rate": 2.0}, "either a concurrency or a request rate"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"request_rate": math.nan}, "request_rate=nan. Use a number above 0"),
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
        (["--tokenizer", "x", "--concurrency", "²"], "no list of numbers"),
        (["--tokenizer", "x", "--request-rate", "²"], "no list of numbers"),
        (["--tokenizer", "x", "--against", "y"], "--against is for a model"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "http://127.0.0.1:1", "--quiet", *options])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_an_address_where_nothing_listens() -> None:
    with pytest.raises(InputError, match="does not answer like an OpenAI endpoint"):
        served_models("http://127.0.0.1:1", None)
    with pytest.raises(InputError, match="or give its address as http://HOST:PORT"):
        served_models("http://[bad", None)
