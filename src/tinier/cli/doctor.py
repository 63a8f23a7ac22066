"""`tinier doctor`"""

from dataclasses import asdict
from typing import Annotated

import typer

from tinier.cli import options, output


def doctor(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[CHECKPOINT|RUN]",
            help="A model (as elsewhere) or the folder of a finished run; nothing: this machine.",
            show_default=False,
        ),
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Look for what is wrong with this machine, a checkpoint or a run, and say what to do.

    Of the machine: GPU and driver, what each format runs as, compiler, memory and the limits of a
    container, disk. Of a checkpoint: what serving takes and what to lower, formats without a fast path,
    tokenizer and template, the layers that lost most. Of a run: what failed, which step of a chain lost
    the quality, formats that did not pay.

    \b
    Examples:
      tinier doctor
      tinier doctor ./smollm2-int4
      tinier doctor runs/demo
    """
    from pathlib import Path

    from tinier.advice import examine_checkpoint, examine_machine, examine_run
    from tinier.errors import MeasuredFailure
    from tinier.families import open_model
    from tinier.recipe import load_results
    from tinier.report.terminal import findings_text

    output.start(quiet=quiet, log_level=log_level)
    if what is None:
        found = examine_machine(device)
    elif (Path(what) / "results.json").is_file():
        found = examine_run(load_results(Path(what)))
    else:
        found = examine_checkpoint(open_model(what), device)
    data = {"findings": [asdict(finding) for finding in found]}
    output.result(findings_text(found), data, as_json=json)
    bad = sum(finding.level == "bad" for finding in found)
    if bad:
        raise MeasuredFailure(f"{bad} of {len(found)} findings need something to be done.")
