"""How well `tinier fit` predicts speed: step and prompt times of random candidates, predicted and measured.

    python -m benchmarks.fit_speed --shape llama-3.2-3b --out RESULT.json [--device cuda]
        [--load 512/128@4] [--candidates 20]

A candidate has random sizes (depth and widths), a random format for each part of every layer, and for
embedding and KV cache. Its weights are noise, which changes no time. Shapes are configurations: no weights
are read. The table of parts is measured first, in the time that is given; each candidate's engine is then
served the same load, by turns with the one that the table was measured against.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.guide_shape import SHAPE

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.device import pick_device
from tinier.families import geometry_of, open_model
from tinier.fitting.budget import parse_load
from tinier.fitting.choices import default_formats, measured_widths, possible_widths
from tinier.fitting.speed import (
    Clock,
    SmallModels,
    SpeedTable,
    timed_formats,
)
from tinier.pruning import Sizes
from tinier.quantization.mixed import EMBEDDING_FORMATS, EMBEDDING_PART, KV_FORMATS, KV_PART
from tinier.quantization.plan import SIXTEEN_BIT

WIDTHS = 4


def shape(name: str, folder: Path) -> Checkpoint:
    """A checkpoint without weights."""
    if name != "llama-3.2-3b":
        return open_model(name)
    config = SHAPE.to_dict() | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder=folder, config=config, tensors={}, manifest=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.2-3b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--load", default="512/128@4")
    parser.add_argument("--candidates", type=int, default=20)
    arguments = parser.parse_args()
    device, load, chance = (
        pick_device(arguments.device),
        parse_load(arguments.load),
        random.Random(0),
    )
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "shape"
        home.mkdir()
        source = shape(arguments.shape, home)
        geometry, whole = geometry_of(source), Sizes.of(geometry_of(source))
        formats = default_formats((), geometry, device)
        timed = timed_formats(source, formats, device)
        align = 256 if device.type == "cuda" else 64
        started = time.monotonic()
        table = SpeedTable.measure(
            source,
            formats,
            measured_widths(geometry, formats, align),
            load,
            Path(folder) / "speed.json",
            device,
            "int8",
        )
        table_seconds = time.monotonic() - started
        print(f"table: {table_seconds:.0f} s", flush=True)
        measured_parts = json.loads((Path(folder) / "speed.json").read_text())
        possible = possible_widths(geometry, formats, align)[:-1]
        widths = [whole, *chance.sample(possible, WIDTHS - 1)]
        rows: list[dict[str, Any]] = []
        clock: Clock | None = None
        for number, sizes in enumerate(dict.fromkeys(widths)):
            files = SmallModels(source, sizes, timed, Path(folder) / f"w{number}", device)
            clock = clock or Clock(files.view([{}] * whole.layers, {}), load, device, "int8")
            for turn in range(arguments.candidates // len(dict.fromkeys(widths))):
                depth = chance.randint(whole.layers // 2, whole.layers)
                labels = [SIXTEEN_BIT, *timed]
                few = chance.sample(labels, min(len(labels), 1 + turn % 4))
                layers = [
                    {read.name: chance.choice(few) for read in geometry.inputs}
                    for _ in range(depth)
                ]
                ends = {
                    EMBEDDING_PART: chance.choice([SIXTEEN_BIT, *EMBEDDING_FORMATS]),
                    KV_PART: chance.choice([SIXTEEN_BIT, *KV_FORMATS]),
                }
                measured = clock.time(files.view(layers, ends))
                predicted = table.of(replace(sizes, layers=depth), layers, ends)
                row = {
                    "sizes": asdict(replace(sizes, layers=depth)), "formats": few, "ends": ends,
                    "step_ms": measured.step, "predicted_step_ms": predicted.step,
                    "load_ms": measured.over(load), "predicted_load_ms": predicted.over(load),
                    "step_error": predicted.step / measured.step - 1,
                    "load_error": predicted.over(load) / measured.over(load) - 1,
                }  # fmt: skip
                rows.append(row)
                print({k: v for k, v in row.items() if k != "sizes"}, flush=True)
    errors = {kind: sorted(abs(row[f"{kind}_error"]) for row in rows) for kind in ("step", "load")}
    record = {
        "command": " ".join(sys.argv), "environment": environment(device), "load": asdict(load),
        "table": measured_parts, "table_seconds": table_seconds, "formats": list(formats), "rows": rows,
        "errors": {
            kind: {"median": statistics.median(values), "largest": values[-1]}
            for kind, values in errors.items()
        },
    }  # fmt: skip
    print(record["errors"])
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
