"""`tinier bench`"""

from typing import Annotated

import typer

from tinier.cli import options, output


def bench(
    model: options.Model,
    against: Annotated[
        str | None, typer.Option("--against", help="Base model, measured by turns in the same run.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option("--concurrency", help="Requests in flight; several: 1,4,8.")
    ] = "1,4",
    input_length: Annotated[int, typer.Option("--input-length", help="Prompt tokens.")] = 128,
    output_length: Annotated[int, typer.Option("--output-length", help="Output tokens.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured rounds.")] = 3,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Measure the engine's speed and memory.

    In process: latency, time to first token (TTFT), inter-token latency (ITL), output tokens/s and
    requests/s of requests that arrive together; memory in a fresh process.

    \b
    Examples:
      tinier bench smollm2-135m
      tinier bench smollm2-int8 --against smollm2-135m --concurrency 1,8 --output-length 128
    """
    from dataclasses import asdict

    from tinier.benchmark import Workload, environment, measure_memory
    from tinier.benchmark import bench as run_bench
    from tinier.device import pick_device
    from tinier.errors import InputError
    from tinier.families import open_model
    from tinier.report.terminal import bench_text

    output.start(quiet=quiet, log_level=log_level)
    if not all(part.strip().isdigit() for part in concurrency.split(",")):
        raise InputError(f"concurrency {concurrency!r} is no list of numbers. Use 4 or 1,4,8.")
    workloads = [
        Workload(concurrency=int(part), input_length=input_length, output_length=output_length)
        for part in concurrency.split(",")
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
        )
        speed.append({name: asdict(result) for name, result in measured.items()})
    largest = max(workloads, key=lambda w: w.concurrency)
    memory = {n: asdict(measure_memory(c, largest, device)) for n, c in checkpoints.items()}
    data = {"model": model, "against": against, "environment": environment(pick_device(device)),
            "speed": speed, "memory": memory}  # fmt: skip
    output.result(bench_text(data), data, as_json=json)
