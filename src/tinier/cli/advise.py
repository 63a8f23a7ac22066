"""`tinier advise`"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tinier.cli import options, output


def advise(
    model: options.Model,
    use: Annotated[
        str,
        typer.Option("--use", help="cloud, edge, real-time, batch or mobile.", show_default=False),
    ],
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware",
            help="auto (this machine), T4, A10, A100, L4, L40S, H100, H200, B200, RTX-4090, CPU or "
            "Jetson-Orin.",
        ),
    ] = "auto",
    load: Annotated[
        str, typer.Option("--load", help="TOKENS_IN/TOKENS_OUT@AT_ONCE that it is meant for.")
    ] = "512/128@4",
    min_quality: Annotated[
        str | None,
        typer.Option("--min-quality", help="Likelihood that must be left, exp(-KL): 95%."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="A finished run: its measurements, instead of estimates."),
    ] = None,
    revision: options.Revision = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Say which compression suits a use, a device and a load, with the commands.

    Without a run, bytes come from the model's shape and times from the device's bandwidth and arithmetic:
    estimates, for a first choice. With --run, they are that run's measurements. tinier fit searches.

    \b
    Examples:
      tinier advise meta-llama/Llama-3.2-3B --use real-time --hardware L4
      tinier advise smollm2-135m --use edge --hardware CPU --min-quality 90%
      tinier advise smollm2-135m --use cloud --run runs/demo
    """
    from tinier.advice import advise as advised
    from tinier.advice import advise_from_run, device_named
    from tinier.families import open_model
    from tinier.fitting.budget import parse_load, parse_quality
    from tinier.recipe import load_results
    from tinier.report.terminal import advice_text

    output.start(quiet=quiet, log_level=log_level)
    floor = parse_quality(min_quality) if min_quality else None
    workload = parse_load(load)
    if run is not None:
        found = advise_from_run(load_results(run), run, use, floor)  # type: ignore[arg-type]
        origin = f"Measured in {run}."
        lacks: list[str] = []
    else:
        device = device_named(hardware)
        found = advised(open_model(model, revision), model, use, device, workload, floor)  # type: ignore[arg-type]
        origin = (
            f"Estimates for {device.name}: {device.memory_gb:.0f} GB, {device.bandwidth_gb_s:.0f} GB/s; "
            "quality is SmolLM2-135M's, measured (of NVFP4, pruned FP8 and pruned INT8 guessed)."
        )
        lacks = device.lacks
    data = {"use": use, "origin": origin, "lacks": lacks, "advice": [asdict(a) for a in found]}
    output.result(advice_text(found, origin, lacks), data, as_json=json)
