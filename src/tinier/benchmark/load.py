"""Load on a running server, by AIPerf: the speed that clients see.

Start at `load`. AIPerf (https://github.com/ai-dynamo/aiperf, GenAI-Perf's successor) is a program of its
own; its definitions are those of speed.py. Requests are streamed completions of synthetic text of exactly
`input_length` tokens, greedy, with the end token ignored. Works offline: the tokenizer is a model's folder.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from tinier import progress
from tinier.errors import InputError, MeasuredFailure

Kind = Literal["openai", "triton"]
TARGETS = {"real-time": 100.0, "conversation": 1000.0, "batch": 10_000.0}
"""Milliseconds in which 95 % of the requests should be answered, by use"""
_PERCENTILES = {"mean": "avg", "p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}
_INSTALL = "pip install aiperf, or AIPerf in an environment of its own that is on PATH"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    url: str
    """http://HOST:PORT"""
    model: str
    """As the server names it"""
    tokenizer: Path
    """Model folder whose tokenizer makes the prompts"""
    kind: Kind = "openai"
    """`openai`: /v1/completions; `triton`: the generate extension of NAME_stream"""
    api_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Either so many requests in flight, or so many arriving a second."""

    concurrency: int | None = None
    request_rate: float | None = None
    """Requests/s, at random moments (Poisson)"""
    input_length: int = 512
    output_length: int = 128
    requests: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.request_rate is None):
            raise InputError("give either a concurrency or a request rate.")
        for name in ("concurrency", "request_rate", "input_length", "requests"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value}. Use a number above 0.")
        if self.output_length < 2:
            raise InputError(f"output_length={self.output_length}. Use 2 or more.")

    @property
    def name(self) -> str:
        """For people."""
        if self.concurrency is not None:
            return f"{self.concurrency} in flight"
        return f"{self.request_rate:g} requests/s"


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    load: Load
    requests: int
    """Answered"""
    errors: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: dict[str, float]
    """Each: mean, p50, p90, p95, p99"""
    itl_ms: dict[str, float]
    latency_ms: dict[str, float]
    targets_met: dict[str, bool]
    """TARGETS: whether 95 % of the requests, failed ones included, were answered within"""


def find_aiperf() -> str:
    """The program's path. Raises InputError if it is not installed."""
    beside = Path(sys.executable).with_name("aiperf")
    found = str(beside) if beside.exists() else shutil.which("aiperf")
    if found is None:
        raise InputError(
            f"load on a server is made by AIPerf, which is not installed. Type: {_INSTALL}"
        )
    return found


def base_url(url: str) -> str:
    """The address of a server as http://HOST:PORT, however it was typed: clients also know it with /v1."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def served_models(url: str, api_key: str | None) -> list[str]:
    """Names that an OpenAI endpoint serves. url: as `base_url` gives it. Raises InputError if it does not
    answer."""
    try:
        request = urllib.request.Request(f"{url}/v1/models")
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            names = [entry["id"] for entry in json.load(answer)["data"]]
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{url} does not answer like an OpenAI endpoint: {error}. Start the server, or give its "
            "address as http://HOST:PORT."
        ) from None
    if not names:
        raise InputError(f"{url} serves no model. Load one there first.")
    return names


def load(endpoint: Endpoint, loads: list[Load]) -> list[LoadResult]:
    """Measure one load after the other. Raises InputError without AIPerf, MeasuredFailure if it fails."""
    program = find_aiperf()
    results = []
    for one in loads:
        progress.say(f"load: {one.name}")
        with tempfile.TemporaryDirectory() as folder:
            _run(program, endpoint, one, Path(folder))
            exported = json.loads((Path(folder) / "profile_export_aiperf.json").read_text("utf-8"))
        results.append(_result(one, exported))
    return results


def _run(program: str, endpoint: Endpoint, one: Load, folder: Path) -> None:
    options: dict[str, object] = {
        "model": endpoint.model, "url": endpoint.url, "tokenizer": endpoint.tokenizer,
        "synthetic-input-tokens-mean": one.input_length, "synthetic-input-tokens-stddev": 0,
        "output-tokens-mean": one.output_length, "output-tokens-stddev": 0,
        "request-count": one.requests, "random-seed": one.seed, "ui": "none", "artifact-dir": folder,
        # the first requests of a server may compile; they are not counted
        "warmup-request-count": max(2, one.concurrency or 2),
    }  # fmt: skip
    if one.concurrency is not None:
        options["concurrency"] = one.concurrency
    else:
        options["request-rate"] = one.request_rate
    extra: list[str] = []
    if endpoint.kind == "openai":
        options["endpoint-type"] = "completions"
        extra = ["ignore_eos:true", f"min_tokens:{one.output_length}", "temperature:0"]
    else:
        options["endpoint-type"] = "template"
        options["custom-endpoint"] = f"/v2/models/{endpoint.model}_stream/generate_stream"
        template = (
            '{"text_input": {{ text|tojson }}, "ignore_eos": true, '
            f'"max_tokens": {one.output_length}, "min_length": {one.output_length}}}'
        )
        path = folder / "template.json"
        path.write_text(template, encoding="utf-8")
        extra = [f"payload_template:{path}", "response_field:text_output"]
    command = [program, "profile", "--streaming"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    for value in extra:
        command += ["--extra-inputs", value]
    if endpoint.kind == "openai":
        command.append("--use-server-token-count")
    # these make it refuse a tokenizer in a folder
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    if endpoint.api_key:
        command = _with_hidden_key(command, endpoint.api_key, environ)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / "profile_export_aiperf.json").exists():
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise MeasuredFailure(f"aiperf failed ({done.returncode}):\n{tail}")


def _with_hidden_key(command: list[str], api_key: str, environ: dict[str, str]) -> list[str]:
    """AIPerf's command with a key that is not in the command line, which everyone on the machine can read:
    its own Python adds it from the environment."""
    with Path(command[0]).open(encoding="utf-8", errors="replace") as script:
        first = script.readline()
    if not first.startswith("#!"):
        raise InputError(
            f"{command[0]} is no Python script, so it cannot be given a key in secret. Install AIPerf with "
            "pip, or leave --api-key out."
        )
    environ["TINIER_LOAD_KEY"] = api_key
    starter = (
        "import os, sys, runpy; key = os.environ.pop('TINIER_LOAD_KEY'); "
        "sys.argv = [*sys.argv[1:], '--api-key', key]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [*first[2:].split(), "-c", starter, *command]


def _result(one: Load, exported: dict[str, Any]) -> LoadResult:
    def value(metric: str) -> float:
        return float((exported.get(metric) or {}).get("avg") or 0)

    def percentiles(metric: str) -> dict[str, float]:
        found = exported.get(metric)
        if not found:
            raise MeasuredFailure(f"aiperf measured no {metric}.")
        return {ours: round(float(found[theirs]), 3) for ours, theirs in _PERCENTILES.items()}

    if not value("request_count"):
        raise MeasuredFailure(f"no request was answered: {exported.get('error_summary')}")
    latency = percentiles("request_latency")
    answered, failed = value("request_count"), value("error_request_count")
    enough = answered >= 0.95 * (answered + failed)
    return LoadResult(
        load=one,
        requests=int(answered),
        errors=int(failed),
        requests_per_s=value("request_throughput"),
        output_tokens_per_s=value("output_token_throughput"),
        ttft_ms=percentiles("time_to_first_token"),
        itl_ms=percentiles("inter_token_latency"),
        latency_ms=latency,
        targets_met={name: enough and latency["p95"] < limit for name, limit in TARGETS.items()},
    )
