"""`tinier quantize`"""

from typing import Annotated

import typer

from tinier.cli import options, output


def quantize(
    model: options.Model,
    preset: Annotated[str, typer.Option("--preset", help="fp8, int8 or int4.", show_default=False)],
    out: options.Out,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="Input columns per scale; int4 has 128 unless told."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="Leave layers of this name pattern in 16 bit; repeatable."),
    ] = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Quantize a model's linear layers.

    Writes a compressed-tensors checkpoint, which transformers, vLLM and SGLang load as it is.

    \b
    Presets:
      fp8   E4M3 weights per channel, activations per token (dynamic)
      int8  INT8 weights per channel, activations per token (dynamic)
      int4  INT4 weights in groups, 16-bit activations

    \b
    Examples:
      tinier quantize smollm2-135m --preset fp8 --out smollm2-fp8
      tinier quantize smollm2-135m --preset int4 --group-size 64 --out smollm2-int4
      tinier quantize smollm2-135m --preset int8 --ignore '*.down_proj' --out smollm2-int8
    """
    from pathlib import Path

    from tinier.checkpoint import check_output
    from tinier.families import open_model
    from tinier.quantization import plan_quantize
    from tinier.quantization import quantize as run_quantize
    from tinier.report.terminal import made_text, stage_text

    output.start(quiet=quiet, log_level=log_level)
    check_output(Path(out))
    source = open_model(model, revision)
    patterns = tuple(ignore or ())
    if dry_run:
        plan = plan_quantize(source, preset, group_size=group_size, ignore=patterns)
        text, data = stage_text(plan, out, device)
        output.result(text, data, as_json=json)
        return
    made = run_quantize(source, preset, out, group_size=group_size, ignore=patterns, device=device)
    text, data = made_text(made, source)
    output.result(text, data, as_json=json)
