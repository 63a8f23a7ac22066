"""`tinier distill`"""

from typing import Annotated

import typer

from tinier.cli import options, output


def distill(
    student: options.Model,
    out: options.Out,
    teacher: Annotated[
        str, typer.Option("--teacher", help="The original model.", show_default=False)
    ],
    text: options.TextSource = "builtin",
    heldout: Annotated[
        str | None,
        typer.Option("--heldout", help="Text on which the gain is measured; default builtin."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 100,
    batch: Annotated[int, typer.Option("--batch", help="Windows per step (global batch).")] = 64,
    micro_batch: Annotated[
        int, typer.Option("--micro-batch", help="Windows computed at once.")
    ] = 4,
    length: options.Length = 512,
    lr: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 7e-5,
    min_lr: Annotated[float, typer.Option("--min-lr", help="Learning rate at the end.")] = 1e-5,
    warmup_steps: Annotated[int, typer.Option("--warmup-steps", help="Linear warm-up.")] = 10,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Softens both distributions.")
    ] = 1.0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Train a smaller model towards the original.

    The loss is the forward KL divergence of the output distributions. Stopped at any point, the same
    command goes on from the last saved state.

    \b
    Examples:
      tinier distill smollm2-23 --teacher smollm2-135m --steps 20 --batch 8 --lr 3e-4 \\
          --warmup-steps 3 --out smollm2-23-healed
    """
    from tinier.checkpoint import check_output
    from tinier.distillation import DistillPlan, plan_distill
    from tinier.distillation import distill as run_distill
    from tinier.families import open_model
    from tinier.report.terminal import made_text, stage_text
    from tinier.text import load_part

    output.start(quiet=quiet, log_level=log_level)
    check_output(out)
    plan = DistillPlan(
        steps=steps,
        batch=batch,
        micro_batch=micro_batch,
        length=length,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=warmup_steps,
        temperature=temperature,
        seed=seed,
    )
    small, original = open_model(student), open_model(teacher)
    training = load_part(text, "training")
    held = load_part(heldout or "builtin", "heldout")
    if dry_run:
        summary, data = stage_text(plan_distill(small, original, plan, training, held), out, device)
        output.result(summary, data, as_json=json)
        return
    made = run_distill(small, original, plan, out, documents=training, heldout=held, device=device)
    summary, data = made_text(made, small)
    output.result(summary, data, as_json=json)
