"""`tinier prune`"""

from typing import Annotated

import typer

from tinier.cli import options, output


def prune(
    model: options.Model,
    out: options.Out,
    drop_layers: Annotated[
        str | None,
        typer.Option("--drop-layers", help="Layers to remove, from 0: 21-27, or 3,5,7."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", help="How many to remove, or a share: 7, 25%. Chosen by block influence."
        ),
    ] = None,
    text: options.TextSource = "builtin",
    sequences: Annotated[int, typer.Option("--sequences", help="Calibration windows.")] = 16,
    length: options.Length = 512,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Remove decoder layers from a model.

    The result is a plain model of the same architecture, with fewer layers.

    \b
    Examples:
      tinier prune smollm2-135m --layers 25% --out smollm2-23
      tinier prune meta-llama/Llama-3.2-3B --drop-layers 21-27 --out llama-21
    """
    from tinier.checkpoint import check_output
    from tinier.families import open_model
    from tinier.pruning import PrunePlan, parse_layers, plan_prune
    from tinier.pruning import prune as run_prune
    from tinier.report.terminal import made_text, stage_text
    from tinier.text import load_part

    output.start(quiet=quiet, log_level=log_level)
    check_output(out)
    source = open_model(model, revision)
    plan = PrunePlan(
        drop_layers=parse_layers(drop_layers) if drop_layers is not None else (),
        layers=layers,
        sequences=sequences,
        length=length,
    )
    documents = load_part(text, "calibration") if layers is not None else []
    if dry_run:
        summary, data = stage_text(plan_prune(source, plan, documents), out, device)
        output.result(summary, data, as_json=json)
        return
    made = run_prune(source, plan, out, documents=documents, device=device)
    summary, data = made_text(made, source)
    output.result(summary, data, as_json=json)
