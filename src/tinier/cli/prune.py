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
    keep_layers: Annotated[
        str | None, typer.Option("--keep-layers", help="How many stay, or a share: 23, 75%.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="Which layers: influence, angular (in a row), loss (measured, in a row), greedy "
            "(measured, one by one) or last.",
        ),
    ] = "angular",
    keep_hidden: Annotated[
        str | None,
        typer.Option("--keep-hidden", help="Hidden channels that stay, or a share: 2560, 75%."),
    ] = None,
    keep_intermediate: Annotated[
        str | None,
        typer.Option("--keep-intermediate", help="MLP neurons that stay, or a share."),
    ] = None,
    keep_heads: Annotated[
        int | None,
        typer.Option("--keep-heads", help="Query heads that stay, as many in each KV group."),
    ] = None,
    keep_kv_heads: Annotated[
        int | None,
        typer.Option("--keep-kv-heads", help="KV heads that stay, with their query heads."),
    ] = None,
    keep_experts: Annotated[
        int | None,
        typer.Option("--keep-experts", help="Experts of a mixture that stay in each layer."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="Choose the sizes: at most 2.4B or 100M parameters, 5GB or 200MB of weights, or "
            "8ms for a decode step on this device.",
        ),
    ] = None,
    shrink: Annotated[
        str, typer.Option("--shrink", help="What a target may change: depth, width or both.")
    ] = "both",
    align: Annotated[
        int, typer.Option("--align", help="Keep channels and neurons in multiples of this.")
    ] = 64,
    candidates: Annotated[
        int, typer.Option("--candidates", help="Choices of sizes that are measured for a target.")
    ] = 8,
    refit: Annotated[
        bool,
        typer.Option(
            help="Solve for the weights that stand in best for what goes (least squares)."
        ),
    ] = True,
    text: options.TextSource = "builtin",
    windows: Annotated[int, typer.Option("--windows", help="Calibration windows.")] = 64,
    length: options.Length = 512,
    heal_steps: Annotated[
        int | None,
        typer.Option(
            "--heal-steps", help="Distil from the original afterwards, for so many steps."
        ),
    ] = None,
    heal_batch: Annotated[
        int | None, typer.Option("--heal-batch", help="Windows per step; default 64.")
    ] = None,
    heal_lr: Annotated[
        float | None, typer.Option("--heal-lr", help="Highest learning rate; default 1e-3.")
    ] = None,
    heal_text: Annotated[
        str | None,
        typer.Option("--heal-text", help="Text to distil on, as --text; default builtin."),
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Drop the layers in so many rounds, each healed.")
    ] = 1,
    finalists: Annotated[
        int,
        typer.Option("--finalists", help="Sizes for a target that are healed briefly to choose."),
    ] = 1,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Remove layers, channels, neurons, heads and experts from a model.

    The result is a plain model of the same architecture, with smaller sizes. What goes is chosen by
    measurement on calibration text; layers can be named. What is left is refitted to stand in for what
    goes, which training then starts from. OUT is written in one piece at the end. Stopped before, the same
    command starts again, but takes the measurements from the cache where they were finished.

    \b
    Examples:
      tinier prune smollm2-135m --keep-layers 75% --out smollm2-23
      tinier prune meta-llama/Llama-3.2-3B --drop-layers 21-27 --out llama-21
      tinier prune meta-llama/Llama-3.2-3B --keep-intermediate 6144 --keep-hidden 2688 --out llama-narrow
      tinier prune Qwen/Qwen3-30B-A3B --keep-experts 96 --out qwen3-96-experts
      tinier prune smollm2-135m --target 110M --out smollm2-110m
      tinier prune smollm2-135m --keep-layers 75% --rounds 2 --heal-steps 100 --heal-text books/ \\
          --out smollm2-healed
    """
    from tinier.checkpoint import check_output
    from tinier.distillation import DistillPlan, HealPlan, plan_prune_and_heal, prune_and_heal
    from tinier.errors import InputError
    from tinier.families import open_model
    from tinier.pruning import PrunePlan, parse_layers, plan_prune
    from tinier.pruning import prune as run_prune
    from tinier.report.terminal import made_text, stage_text

    output.start(quiet=quiet, log_level=log_level)
    check_output(out)
    source = open_model(model, revision)
    plan = PrunePlan(
        drop_layers=parse_layers(drop_layers) if drop_layers is not None else (),
        keep_layers=keep_layers,
        method=method,  # type: ignore[arg-type]
        keep_hidden=keep_hidden,
        keep_intermediate=keep_intermediate,
        keep_heads=keep_heads,
        keep_kv_heads=keep_kv_heads,
        keep_experts=keep_experts,
        target=target,
        shrink=shrink,  # type: ignore[arg-type]
        align=align,
        candidates=candidates,
        refit=refit,
        windows=windows,
        length=length,
    )
    heal = None
    if heal_steps is not None:
        rate = 1e-3 if heal_lr is None else heal_lr
        distil = DistillPlan(
            steps=heal_steps, batch=64 if heal_batch is None else heal_batch, length=length,
            lr=rate, min_lr=rate / 10, warmup_steps=heal_steps // 10,
        )  # fmt: skip
        heal = HealPlan(distill=distil, rounds=rounds, finalists=finalists)
    elif rounds != 1 or finalists != 1:
        raise InputError("--rounds and --finalists heal in between. Give --heal-steps 100.")
    elif any(value is not None for value in (heal_batch, heal_lr, heal_text)):
        raise InputError(
            "--heal-batch, --heal-lr and --heal-text are for healing. Give --heal-steps 100, or leave them "
            "out."
        )
    healing_text = "builtin" if heal_text is None else heal_text
    if dry_run:
        if heal is None:
            stage = plan_prune(source, plan, text)
        else:
            stage = plan_prune_and_heal(source, plan, heal, text, healing_text)
        summary, data = stage_text(stage, out, device)
        output.result(summary, data, as_json=json)
        return
    if heal is None:
        made = run_prune(source, plan, out, text=text, device=device)
    else:
        made = prune_and_heal(
            source, plan, heal, out, text=text, heal_text=healing_text, device=device
        )
    summary, data = made_text(made, source)
    output.result(summary, data, as_json=json)
