"""`tinier bench`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinier.cli import options, output

if TYPE_CHECKING:
    from tinier.benchmark import Endpoint, Load


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|URL",
            help="A model, or the http:// address of a server.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None, typer.Option("--against", help="Base model, measured by turns in the same run.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option("--concurrency", help="Requests in flight; several: 1,4,8.")
    ] = "1,4",
    request_rate: Annotated[
        str | None,
        typer.Option("--request-rate", help="URL: arrivals a second instead; several: 1,2.5."),
    ] = None,
    input_length: Annotated[int, typer.Option("--input-length", help="Prompt tokens.")] = 128,
    output_length: Annotated[int, typer.Option("--output-length", help="Output tokens.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="MODEL: measured rounds.")] = 3,
    requests: Annotated[int, typer.Option("--requests", help="URL: requests of each load.")] = 64,
    name: Annotated[
        str | None, typer.Option("--name", help="URL: model to ask for.", show_default="the first")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="URL: MODEL whose tokenizer makes the prompts."),
    ] = None,
    endpoint: Annotated[str, typer.Option("--endpoint", help="URL: openai or triton.")] = "openai",
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="TINIER_API_KEY", help="URL: of the server.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="URL: run folder whose report gets the figures too."),
    ] = None,
    draft: options.Draft = None,
    tensor_parallel: options.TensorParallel = 1,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    device: options.Device = "auto",
    int4_inputs: options.Int4Inputs = "int8",
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Measure speed and memory of a model, or the speed of a server.

    MODEL, in process: latency, time to first token (TTFT), inter-token latency (ITL), output tokens/s and
    requests/s of requests that arrive together; memory in a fresh process. URL: the same with AIPerf as the
    client (pip install aiperf), with percentiles.

    \b
    Examples:
      tinier bench smollm2-135m
      tinier bench smollm2-int8 --against smollm2-135m --concurrency 1,8 --output-length 128
      tinier bench smollm2-135m --draft smollm2-int4
      tinier bench http://127.0.0.1:8000 --tokenizer smollm2-135m --concurrency 4 --input-length 512
      tinier bench http://127.0.0.1:8001 --tokenizer smollm2-135m --request-rate 1,2,4 --run runs/demo
    """
    from tinier.errors import InputError

    output.start(quiet=quiet, log_level=log_level)
    if model.startswith(("http://", "https://")):
        from tinier.benchmark import base_url

        for option, name_of in {"--against": against, "--draft": draft}.items():
            if name_of is not None:
                raise InputError(
                    f"{option} is for a model, and not for a server's URL. Leave it out."
                )
        shape = {"input_length": input_length, "output_length": output_length}
        loads = _loads(concurrency, request_rate, shape | {"requests": requests, "seed": seed})
        asked = _endpoint(base_url(model), name, tokenizer, endpoint, api_key)
        _bench_server(asked, loads, run, as_json=json)
        return
    given = {
        "--request-rate": request_rate, "--name": name, "--tokenizer": tokenizer, "--run": run,
    }  # fmt: skip
    for option, value in given.items():
        if value is not None:
            raise InputError(
                f"{option} is for a server's URL, and {model!r} is none. Give http://HOST:PORT, or leave "
                f"{option} out."
            )
    _bench_model(
        model, against, _numbers(concurrency, "concurrency"), input_length, output_length, repeats,
        seed, revision, device, tensor_parallel, int4_inputs, draft, as_json=json,
    )  # fmt: skip


def _numbers(text: str, name: str) -> list[int]:
    from tinier.errors import InputError

    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise InputError(f"{name} {text!r} is no list of numbers. Use 4 or 1,4,8.")
    return [int(part) for part in text.split(",")]


def _endpoint(
    url: str, name: str | None, tokenizer: str | None, kind: str, api_key: str | None
) -> "Endpoint":
    from tinier.benchmark import Endpoint, served_models
    from tinier.errors import InputError
    from tinier.families import open_model

    if tokenizer is None:
        raise InputError("a server's prompts need a tokenizer. Type: --tokenizer MODEL")
    if kind not in ("openai", "triton"):
        raise InputError(f"endpoint {kind!r} is not known. Use openai or triton.")
    if name is None and kind == "triton":
        raise InputError("Triton needs the model's name. Type: --name NAME")
    return Endpoint(
        url=url, model=name or served_models(url, api_key)[0], kind=kind,  # type: ignore[arg-type]
        tokenizer=open_model(tokenizer).folder, api_key=api_key,
    )  # fmt: skip


def _loads(concurrency: str, request_rate: str | None, shape: dict[str, int]) -> "list[Load]":
    from tinier.benchmark import Load
    from tinier.errors import InputError

    if not request_rate:
        return [Load(concurrency=n, **shape) for n in _numbers(concurrency, "concurrency")]
    rates = [part.strip() for part in request_rate.split(",")]
    if not all(part.replace(".", "", 1).isdecimal() for part in rates):
        raise InputError(f"request rate {request_rate!r} is no list of numbers. Use 2 or 1,2.5.")
    return [Load(request_rate=float(rate), **shape) for rate in rates]


def _bench_server(
    endpoint: "Endpoint", loads: "list[Load]", run: Path | None, *, as_json: bool
) -> None:
    from dataclasses import asdict

    from tinier.benchmark import load
    from tinier.progress import say
    from tinier.recipe import EndpointResult, add_endpoint, load_results
    from tinier.report import write_report
    from tinier.report.terminal import load_text

    if run is not None:
        load_results(run)  # before the work: is it a run?
    measured = EndpointResult(
        url=endpoint.url, model=endpoint.model, endpoint=endpoint.kind,
        load=tuple(load(endpoint, loads)),
    )  # fmt: skip
    output.result(load_text(measured), asdict(measured), as_json=as_json)
    if run is not None:  # after it is printed: the run may be in use now
        say(f"report: {write_report(add_endpoint(run, measured), run)}")


def _bench_model(
    model: str, against: str | None, concurrency: list[int], input_length: int, output_length: int,
    repeats: int, seed: int, revision: str | None, device: str, tensor_parallel: int,
    int4_inputs: options.Int4Inputs, draft: str | None, *, as_json: bool,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from tinier.benchmark import Workload, environment, measure_memory
    from tinier.benchmark import bench as run_bench
    from tinier.device import pick_device
    from tinier.families import open_model
    from tinier.report.terminal import bench_text

    workloads = [
        Workload(concurrency=n, input_length=input_length, output_length=output_length)
        for n in concurrency
    ]
    checkpoints = {model: open_model(model, revision)}
    if against:
        checkpoints[against] = open_model(against)
    speed = []
    for workload in workloads:
        measured = run_bench(
            checkpoints,
            workload,
            base=against or model,
            repeats=repeats,
            seed=seed,
            device=device,
            tensor_parallel=tensor_parallel,
            int4_inputs=int4_inputs,
            draft=draft,
        )
        speed.append({name: asdict(result) for name, result in measured.items()})
    largest = max(workloads, key=lambda w: w.concurrency)
    memory = {
        name: asdict(measure_memory(checkpoint, largest, device, tensor_parallel, int4_inputs))
        for name, checkpoint in checkpoints.items()
    }
    data = {
        "model": model, "against": against, "draft": draft, "tensor_parallel": tensor_parallel,
        "environment": environment(pick_device(device)), "speed": speed, "memory": memory,
    }  # fmt: skip
    output.result(bench_text(data), data, as_json=as_json)
