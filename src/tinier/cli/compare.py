"""`tinier compare`"""

from typing import Annotated

import typer

from tinier.cli import options, output


def compare(
    model: options.Model,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="The model to judge.", show_default=False)
    ],
    text: options.TextSource = "builtin",
    windows: options.Windows = 8,
    length: options.Length = 512,
    draft: Annotated[
        bool,
        typer.Option("--draft", help="Only what OTHER is worth as MODEL's draft: serve --draft."),
    ] = False,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Show where OTHER differs from MODEL: layer by layer, and at the end.

    Each layer is judged on MODEL's inputs (what it alone does wrong) and on OTHER's own (what has
    piled up). The layers that add most error are named.

    \b
    Examples:
      tinier compare smollm2-135m smollm2-int4
      tinier compare smollm2-int4 smollm2-int4-best --text wiki.txt
      tinier compare smollm2-135m smollm2-int4 --draft
    """
    from dataclasses import asdict

    from tinier.evaluation import compare as run_compare
    from tinier.evaluation import compare_draft
    from tinier.families import open_model
    from tinier.report.terminal import comparison_text, draft_text

    output.start(quiet=quiet, log_level=log_level)
    if draft:
        forecast = compare_draft(
            open_model(model), open_model(other), text=text, windows=windows, length=length,
            device=device,
        )  # fmt: skip
        found = {"model": model, "other": other, "text": text, **asdict(forecast)}
        output.result(draft_text(forecast, other), found, as_json=json)
        return
    comparison = run_compare(
        open_model(model), open_model(other), text=text, windows=windows, length=length,
        device=device,
    )  # fmt: skip
    data = {"model": model, "other": other, "text": text, **asdict(comparison)}
    output.result(comparison_text(comparison, model, other), data, as_json=json)
