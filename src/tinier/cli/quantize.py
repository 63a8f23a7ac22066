"""`tinier quantize`"""

from typing import Annotated

import typer

from tinier.cli import options, output


def quantize(
    model: options.Model,
    preset: Annotated[
        list[str],
        typer.Option(
            "--preset",
            help="A name from the list below, mixed, or null for none; several are made in one pass, "
            "each in a folder of its name under --out.",
            show_default=False,
        ),
    ],
    out: options.Out,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="Input columns per scale; 128 unless told, or the largest that divides.",
        ),
    ] = None,
    asymmetric: Annotated[
        bool,
        typer.Option("--asymmetric", help="Zero points beside the scales (int2, int3, int4…)."),
    ] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="Leave layers of this name pattern in 16 bit; repeatable."),
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="Quantize the output head too: fp8 or int8.")
    ] = None,
    embedding: Annotated[
        str,
        typer.Option(
            "--embedding",
            help="Store the embedding as fp8, int8, int4 or 16bit; a tied head is the same matrix.",
        ),
    ] = "16bit",
    kv: Annotated[
        str | None, typer.Option("--kv", help="Quantize the KV cache: fp8 or int8.")
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="What will read it (a target of tinier export): the group size of its blocks is taken, "
            "and what it cannot read is refused now.",
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option("--bits", help="With mixed: average bits of a weight, scales included."),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--formats",
            help="With mixed: what a layer may become, as PRESET or PRESET:GROUP_SIZE with commas.",
            show_default="2 to 4 bits in two group sizes each, and 8 bits",
        ),
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            help="Text for presets that look at activations: a .txt, .md, .jsonl or .parquet file, a "
            "folder of them, hub:NAME[:CONFIG[:SPLIT]], builtin, or self (the model writes it).",
        ),
    ] = "builtin",
    windows: Annotated[int, typer.Option("--windows", help="Calibration windows.")] = 128,
    length: options.Length = 512,
    weighting: options.Weighting = None,
    drift: options.Drift = None,
    iterations: Annotated[
        int,
        typer.Option(
            "--iterations", help="Steps of learned rounding for each layer (the -best presets)."
        ),
    ] = 100,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Quantize a model's linear layers, and its embedding, head and KV cache if asked to.

    Writes a compressed-tensors checkpoint, which transformers, vLLM and SGLang read; docs/loading.md has
    what was seen to load for each preset, and what is known to fail is said before the work, and by
    --dry-run. A run that was stopped goes on where it was when the same is typed again.

    \b
    Presets:
      fp8          E4M3 weights per channel, activations per token; needs no text
      fp8-gptq     the same grid, codes chosen by GPTQ
      fp8-static   E4M3 weights and activations with one calibrated scale per tensor, GPTQ
      fp8-block    E4M3 weights in blocks of 128 x 128, activations in groups of 128; needs no text
      fp8-e5m2     E5M2 weights per channel, 16-bit activations; needs no text
      int8         INT8 weights per channel, activations per token, to nearest; needs no text
      int8-sq      the same grid, SmoothQuant folded into the weights, GPTQ
      int8-w8a16   INT8 weights per channel, 16-bit activations, GPTQ
      int4         INT4 weights in groups, to nearest; needs no text
      int4-awq     INT4 weights in groups, AWQ
      int4-gptq    INT4 weights in groups, GPTQ
      int4-best    INT4 weights in groups, rounding and scales learned; slowest, most accurate
      w4a8         INT4 weights in groups, FP8 activations per token; w4a8-int8: INT8 activations
      nvfp4        FP4 weights and activations in blocks of 16, SmoothQuant, GPTQ; nvfp4-w4a16: weights
                   only, GPTQ
      mxfp4        the same in blocks of 32; mxfp4-w4a16: weights only, GPTQ
      int3, int2   INT3, INT2 weights in groups, AWQ and GPTQ; int3-best: rounding and scales learned
      mixed        the format of each layer that loses least within --bits, of --formats; mixed-best:
                   then learns the rounding of 2 to 4 bits, slower
      null         no quantization: every weight as it is

    \b
    Examples:
      tinier quantize smollm2-135m --preset fp8 --out smollm2-fp8
      tinier quantize smollm2-135m --preset int4-gptq --group-size 64 --out smollm2-int4
      tinier quantize smollm2-135m --preset int8-sq --preset fp8-gptq --out smollm2-8bit
      tinier quantize smollm2-135m --preset mixed --bits 3.5 --out smollm2-mixed
      tinier quantize smollm2-135m --preset mixed --bits 5 --formats int4-gptq:64,fp8-gptq --out mixed5
      tinier quantize smollm2-135m --preset int4-gptq --group-size 64 --embedding int8 --out smollm2-small
      tinier quantize smollm2-135m --preset int4-gptq --for gguf --out smollm2-for-llama.cpp
      tinier quantize smollm2-135m --preset fp8 --head fp8 --kv fp8 --out smollm2-fp8-all
      torchrun --nproc-per-node 2 -m tinier quantize MODEL --preset int4-gptq --out DIR
    """
    from pathlib import Path

    from tinier.checkpoint import check_output
    from tinier.errors import InputError
    from tinier.families import open_model
    from tinier.quantization import (
        MIXED,
        MIXED_BEST,
        NULL,
        QuantizePlan,
        plan_quantize,
        quantize_all,
    )
    from tinier.report.terminal import made_text, stage_text

    output.start(quiet=quiet, log_level=log_level)
    if len(set(preset)) < len(preset):
        raise InputError(f"--preset {' '.join(preset)} names one twice. Give each once.")
    mixed = [name for name in preset if name in (MIXED, MIXED_BEST)]
    if formats is not None and not mixed:
        raise InputError("--formats is what --preset mixed chooses from. Leave it out.")
    if bits is not None and not mixed:
        raise InputError(f"--bits {bits:g} is for --preset mixed. Use that, or leave --bits out.")
    folders = {name: Path(out) / name if len(preset) > 1 else Path(out) for name in preset}
    for folder in folders.values():
        check_output(folder)
    plans = {
        folders[name]: QuantizePlan(
            preset=None if name == NULL else name,
            group_size=group_size,
            symmetric=False if asymmetric else None,
            ignore=tuple(ignore or ()),
            head=head,  # type: ignore[arg-type]
            embedding=embedding,  # type: ignore[arg-type]
            kv=kv,  # type: ignore[arg-type]
            bits=bits if name in mixed else None,
            formats=() if formats is None or name not in mixed else tuple(formats.split(",")),
            self_text=text == "self",
            windows=windows,
            length=length,
            weighting=weighting,  # type: ignore[arg-type]
            drift=drift,  # type: ignore[arg-type]
            iterations=iterations,
            seed=seed,
        )
        for name in preset
    }
    source = open_model(model, revision)
    if for_ is not None:
        from tinier.exporting import suited

        plans = {folder: suited(source, plan, for_) for folder, plan in plans.items()}
    if dry_run:
        texts = [
            stage_text(plan_quantize(source, plan, text), folder, device)
            for folder, plan in plans.items()
        ]
    else:
        made = quantize_all(source, plans, text=text, device=device)
        texts = [made_text(checkpoint, source) for checkpoint in made]
    data = texts[0][1] if len(texts) == 1 else {"checkpoints": [data for _, data in texts]}
    output.result("\n".join(text for text, _ in texts), data, as_json=json)
