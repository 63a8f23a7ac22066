"""`tinier distill`"""

from pathlib import Path
from typing import Annotated

import typer

from tinier.cli import options, output


def distill(
    student: options.Model,
    out: options.Out,
    teacher: Annotated[
        str, typer.Option("--teacher", help="The original model.", show_default=False)
    ],
    text: Annotated[
        str,
        typer.Option(
            "--text",
            help="Text: a .txt, .md, .jsonl or .parquet file, a folder of them, "
            "hub:NAME[:CONFIG[:SPLIT]], builtin, or self: the teacher writes it.",
        ),
    ] = "builtin",
    heldout: Annotated[
        str | None,
        typer.Option("--heldout", help="Text that decides which step was best; default builtin."),
    ] = None,
    generated: Annotated[
        int,
        typer.Option(
            "--generated", help="Windows that the teacher writes, going on from pieces of the text."
        ),
    ] = 0,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 100,
    batch: Annotated[int, typer.Option("--batch", help="Windows per step (global batch).")] = 64,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            "--micro-batch", help="Windows computed at once; default by device and length."
        ),
    ] = None,
    length: options.Length = 512,
    lr: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 7e-5,
    min_lr: Annotated[
        float | None,
        typer.Option("--min-lr", help="Learning rate at the end; default 1e-5, or lr / 7 if less."),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option("--warmup-steps", help="Linear warm-up; default 10, or steps / 5 if less."),
    ] = None,
    loss: Annotated[
        str, typer.Option("--loss", help="forward-kl, reverse-kl or js (Jensen-Shannon).")
    ] = "forward-kl",
    temperature: Annotated[
        float, typer.Option("--temperature", help="Softens both distributions.")
    ] = 1.0,
    ce_weight: Annotated[
        float,
        typer.Option("--ce-weight", help="Share of cross-entropy with the text; 1: nothing else."),
    ] = 0.0,
    hidden_weight: Annotated[
        float, typer.Option("--hidden-weight", help="Weight of the hidden states' loss, added.")
    ] = 0.0,
    hidden_loss: Annotated[str, typer.Option("--hidden-loss", help="mse or cosine.")] = "mse",
    hidden_layers: Annotated[
        str | None,
        typer.Option(
            "--hidden-layers", help="Pairs student:teacher, such as 5:7,11:15; default: all."
        ),
    ] = None,
    train: Annotated[
        str, typer.Option("--train", help="all parameters, norms (and scales), or lora.")
    ] = "all",
    lora_rank: Annotated[int, typer.Option("--lora-rank", help="Rank of the updates.")] = 16,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", help="Quantize to this preset first, then train on its grid."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Input columns per scale, with --quantize.")
    ] = None,
    weighting: options.Weighting = None,
    drift: options.Drift = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="Store the teacher's k likeliest tokens, train from those."),
    ] = None,
    teacher_store: Annotated[
        Path | None,
        typer.Option("--teacher-store", help="Keep them in this folder, for other runs too."),
    ] = None,
    checkpointing: Annotated[
        str | None,
        typer.Option(
            "--checkpointing",
            help="Compute again in the backward pass: none, selective or full; default by device.",
        ),
    ] = None,
    compile_layers: Annotated[
        bool, typer.Option("--compile", help="Compile the decoder layers: faster steps on a GPU.")
    ] = False,
    precision: Annotated[
        str, typer.Option("--precision", help="auto (bf16 products where there are), or float32.")
    ] = "auto",
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", help="Steps between held-out measurements.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", help="Folder for TensorBoard's scalars.")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Train a smaller or quantized model towards the original.

    The result has the weights of the lowest held-out divergence; those of the last step are kept in
    OUT-last where they are others. Stopped at any point, the same command goes on from the last saved
    state. Under torchrun the model is sharded over the processes.

    \b
    Examples:
      tinier distill smollm2-23 --teacher smollm2-135m --text books/ --steps 100 --batch 16 \\
          --lr 1e-3 --min-lr 1e-4 --out smollm2-23-healed
      tinier distill smollm2-135m --teacher smollm2-135m --quantize int4-gptq --group-size 64 \\
          --text books/ --lr 1e-4 --out smollm2-int4-trained
      torchrun --nproc-per-node 8 -m tinier distill llama-21 --teacher llama \\
          --text hub:Salesforce/wikitext:wikitext-103-raw-v1 --length 2048 --out llama-21-healed
    """
    from tinier.checkpoint import check_output
    from tinier.distillation import DistillPlan, check_folders, parse_pairs, plan_distill
    from tinier.distillation import distill as run_distill
    from tinier.errors import InputError
    from tinier.families import open_model
    from tinier.progress import say
    from tinier.quantization import QuantizePlan
    from tinier.report.terminal import made_text, stage_text

    output.start(quiet=quiet, log_level=log_level)
    check_output(out)
    if text == "self" and not generated:
        generated = steps * batch
    grid = None
    if quantize is not None:
        grid = QuantizePlan(
            preset=quantize, group_size=group_size, seed=seed, length=min(length, 512),
            weighting=weighting, drift=drift,  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        given = {
            "--group-size": group_size is not None,
            "--weighting": weighting is not None,
            "--drift": drift is not None,
        }
        for option, is_given in given.items():
            if is_given:
                raise InputError(f"{option} goes with --quantize. Add that, or leave {option} out.")
    plan = DistillPlan(
        steps=steps,
        batch=batch,
        micro_batch=micro_batch,
        length=length,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=warmup_steps,
        loss=loss,  # type: ignore[arg-type]
        temperature=temperature,
        ce_weight=ce_weight,
        hidden_weight=hidden_weight,
        hidden_loss=hidden_loss,  # type: ignore[arg-type]
        hidden_layers=parse_pairs(hidden_layers) if hidden_layers else (),
        train=train,  # type: ignore[arg-type]
        lora_rank=lora_rank,
        top_k=top_k,
        generated=generated,
        quantize=grid,
        checkpointing=checkpointing,  # type: ignore[arg-type]
        compile=compile_layers,
        precision=precision,  # type: ignore[arg-type]
        eval_every=eval_every,
        seed=seed,
    )
    if teacher_store is not None and top_k is None:
        raise InputError(
            "--teacher-store keeps what --top-k stores. Add --top-k 64, or leave it out."
        )
    small, original = open_model(student), open_model(teacher)
    training, held = () if text == "self" else text, heldout or "builtin"
    check_folders(teacher_store, tensorboard)
    if dry_run:
        summary, data = stage_text(plan_distill(small, original, plan, training, held), out, device)
        output.result(summary, data, as_json=json)
        return
    if tensorboard is not None:
        say(f"follow it with: tensorboard --logdir {tensorboard}")
    made = run_distill(
        small, original, plan, out, text=training, heldout=held, device=device,
        teacher_store=teacher_store, tensorboard=tensorboard,
    )  # fmt: skip
    summary, data = made_text(made, small)
    output.result(summary, data, as_json=json)
