"""`tinier fit`"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tinier.cli import options, output


def fit(
    model: options.Model,
    out: Annotated[
        Path,
        typer.Option("--out", help="Run folder. An old one is continued.", show_default=False),
    ],
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", help="On disk: 1.2GB, 800MiB, or 40% of the base's."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", help="While serving the load: 2.4GB, or 50% of the base's."),
    ] = None,
    min_throughput: Annotated[
        str | None,
        typer.Option(
            "--min-throughput", help="Under the load: 2x the base's, or output tokens a second."
        ),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option("--max-latency", help="Between two tokens of a request (ITL): 20ms."),
    ] = None,
    min_quality: Annotated[
        str | None,
        typer.Option(
            "--min-quality",
            help="Likelihood per token of the base's own text that is left, exp(-KL): 95%.",
        ),
    ] = None,
    load: Annotated[
        str,
        typer.Option("--load", help="TOKENS_IN/TOKENS_OUT@AT_ONCE that it is meant for."),
    ] = "128/64@1",
    time: Annotated[str, typer.Option("--time", help="What the search may take: 30m, 2h.")] = "1h",
    text: Annotated[
        str,
        typer.Option(
            "--text",
            help="Text to calibrate, heal and measure with, split by document: a .txt, .md, .jsonl or "
            ".parquet file, a folder of them, hub:NAME[:CONFIG[:SPLIT]], or builtin.",
        ),
    ] = "builtin",
    formats: Annotated[
        str | None,
        typer.Option(
            "--formats",
            help="What a layer may become, as PRESET or PRESET:GROUP_SIZE with commas; 16 bit always may.",
            show_default="2 to 4 bits in two group sizes each, and 8 bits",
        ),
    ] = None,
    pruning: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Whether layers and widths may go.")
    ] = True,
    training: Annotated[
        bool,
        typer.Option(
            "--train/--no-train", help="Whether candidates are healed and trained on their grids."
        ),
    ] = True,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless",
            help="Also measure the candidates as drafts of MODEL, and propose the one that makes MODEL "
            "itself fastest: its text stays the same.",
        ),
    ] = False,
    windows: Annotated[int, typer.Option("--windows", help="Calibration windows.")] = 64,
    length: options.Length = 512,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Find the best model within a budget, and make it.

    Chooses the format of each group of layers, of the embedding and of the KV cache, which layers and
    widths go, and what is healed or trained on its grid. What each part costs in quality and time is
    measured on this device, the choice is solved, and the candidates are made and measured as variants of a
    run.

    Leaves a run folder: checkpoints in variants/, results.json, report.html, and fit.json and front.csv
    with the winner, the front and the alternatives. A search that was stopped goes on; another budget with
    the same --out only solves again and makes the new candidates.

    \b
    Examples:
      tinier fit smollm2-135m --max-size 40% --time 30m --out runs/fit
      tinier fit MODEL --max-memory 2.4GB --min-throughput 2x --min-quality 95% --out runs/fit
      tinier fit MODEL --max-latency 20ms --load 512/128@4 --time 2h --out runs/fit
      tinier fit MODEL --max-size 1.2GB --formats int4-gptq:128,fp8 --no-prune --out runs/fit
      tinier fit MODEL --max-size 40% --lossless --out runs/fit
    """
    from tinier.errors import MeasuredFailure
    from tinier.fitting import Budget, FitPlan, describe
    from tinier.fitting import fit as search
    from tinier.fitting.budget import (
        parse_bytes,
        parse_latency,
        parse_load,
        parse_quality,
        parse_seconds,
        parse_throughput,
    )
    from tinier.recipe import load_results
    from tinier.report import write_report
    from tinier.report.fitted import fit_text
    from tinier.report.terminal import results_text

    output.start(quiet=quiet, log_level=log_level)
    budget = Budget(
        max_size=parse_bytes(max_size, "--max-size") if max_size else None,
        max_memory=parse_bytes(max_memory, "--max-memory") if max_memory else None,
        min_throughput=parse_throughput(min_throughput) if min_throughput else None,
        max_latency=parse_latency(max_latency) if max_latency else None,
        min_quality=parse_quality(min_quality) if min_quality else None,
        load=parse_load(load),
        seconds=parse_seconds(time),
    )
    plan = FitPlan(
        model=model,
        budget=budget,
        revision=revision,
        text=text,
        device=device,
        seed=seed,
        windows=windows,
        length=length,
        formats=tuple(formats.split(",")) if formats else (),
        prune=pruning,
        train=training,
        lossless=lossless,
    )
    if dry_run:
        expected = describe(plan, out)
        output.result("\n".join(expected["lines"]), expected, as_json=json)
        return
    found = search(plan, out, command=shlex.join(["tinier", *sys.argv[1:]]))
    results = load_results(out)
    page = write_report(results, out)
    output.result(
        f"{results_text(results)}\n\n{fit_text(found)}\n{page}", found.to_json(), as_json=json
    )
    if found.winner is None:
        raise MeasuredFailure("no model that was made keeps the budget. The nearest are above.")
