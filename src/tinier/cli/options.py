"""The arguments that several verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Model folder, Hub id (owner/name or owner/name@revision), .gguf file or built-in "
        "name (smollm2-135m, gemma3-270m); MODEL+ADAPTER: with a LoRA adapter merged into it.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")
]
Out = Annotated[
    Path, typer.Option("--out", help="Folder to write; must not exist.", show_default=False)
]
TextSource = Annotated[
    str,
    typer.Option(
        "--text",
        help="Text: a .txt, .md, .jsonl or .parquet file, a folder of them, "
        "hub:NAME[:CONFIG[:SPLIT]], or builtin.",
    ),
]
Windows = Annotated[int, typer.Option("--windows", help="Windows of text at most.")]
Length = Annotated[int, typer.Option("--length", help="Tokens in one window.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel", help="GPUs, from --device on, that share each layer.")
]
# schemes.Int4Inputs, which imports torch: too slow for --help
Int4Inputs = Annotated[
    Literal["int8", "16bit"],
    typer.Option(
        "--int4-inputs",
        help="INT4 layers and INT8 embeddings' heads on a CPU: int8 rounds the inputs to 8 bits in "
        "blocks of 32, which is faster; 16bit leaves them.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="A smaller MODEL with the same tokens that proposes the next ones, or prompt: what followed "
        "the same words earlier. The text stays the same.",
    ),
]
Weighting = Annotated[
    str | None,
    typer.Option(
        "--weighting",
        help="What a token counts for where errors are minimized: none (all alike), or fisher: by how "
        "much the model's predictions depend on it, which takes a pass forward and back. Default: fisher "
        "for the -best presets, none for others.",
    ),
]
Drift = Annotated[
    str | None,
    typer.Option(
        "--drift",
        help="What the layers before have changed about a layer's inputs: ignored, or corrected: its "
        "weights make up for half of it, which takes more passes. Default: corrected for the -best "
        "presets, ignored for others.",
    ),
]


def _check_seed(seed: int) -> int:
    from tinier.errors import InputError

    if seed >= 2**63:
        raise InputError(f"--seed {seed} is too large. Use 0 to {2**63 - 1}.")
    return seed


Seed = Annotated[
    int,
    typer.Option("--seed", min=0, callback=_check_seed, help="Equal seeds give equal results."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one last line of JSON.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, print the resolved plan and stop."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
LogLevel = Annotated[
    str,
    typer.Option(
        "--log-level",
        envvar="TINIER_LOG_LEVEL",
        help="debug, info, warning or error.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def num_bytes(text: str) -> int:
    """`20GB`, `512MiB` or a number. Raises InputError."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from tinier.errors import InputError

    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise InputError(
            f"{text!r} is no size. Use a number with a unit: 512MB or 20GiB."
        ) from None
