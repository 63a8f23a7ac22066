"""Several LoRA adapters in one batch against one that is merged: milliseconds of a decode step, by turns.

    python -m benchmarks.adapters smollm2-135m --out RESULT.json [--adapters 4] [--rank 16]
        [--batches 1 8] [--repeats 5] [--device auto]

Random adapters on all linear layers of the blocks. The merged engine's requests are all of one model, the
other's take the adapters by turns.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tinier.benchmark import environment
from tinier.device import pick_device
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import Geometry, geometry_of, layer_name, open_model

PROMPT, TOKENS = 64, 48


def write_adapter(folder: Path, geometry: Geometry, rank: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(geometry.layers):
        for name, (rows, columns) in geometry.linears.items():
            module = f"base_model.model.{layer_name(i)}.{name}"
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                drawn = torch.randn(shape, generator=generator) * 0.02
                tensors[f"{module}.lora_{part}.weight"] = drawn
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def step_ms(engine: Engine, batch: int, adapters: int) -> float:
    requests = []
    for i in range(batch):
        adapter = i % adapters + 1 if adapters else 0
        params = SamplingParams(max_tokens=TOKENS, min_tokens=TOKENS, adapter=adapter)
        requests.append(engine.add([*range(50 + i, 50 + i + PROMPT)], params))
    while not all(request.output for request in requests):
        engine.step()
    steps, started = 0, time.perf_counter()
    while engine.has_work:
        engine.step()
        steps += 1
    return (time.perf_counter() - started) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    base = open_model(arguments.model)
    record: dict[str, Any] = {"command": " ".join(sys.argv), "environment": environment(device)}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [
            write_adapter(Path(scratch) / str(i), geometry_of(base), arguments.rank, i)
            for i in range(arguments.adapters)
        ]
        limits: dict[str, Any] = {
            "device": str(device), "max_batch_size": max(arguments.batches), "max_seq_len": 256,
        }  # fmt: skip
        merged = Engine(open_model(f"{arguments.model}+{folders[0]}"), EngineConfig(**limits))
        beside = Engine(base, EngineConfig(**limits, adapters=tuple(folders)))
    for engine in (merged, beside):
        engine.warm_up()
    for batch in arguments.batches:
        rows = [
            (step_ms(merged, batch, 0), step_ms(beside, batch, arguments.adapters))
            for _ in range(arguments.repeats + 1)
        ][1:]  # the first warms up
        ratios = [b / a for a, b in rows]
        record[str(batch)] = {
            "merged_ms": [a for a, _ in rows], "beside_ms": [b for _, b in rows],
            "time_ratio": statistics.median(ratios), "ratios": ratios,
        }  # fmt: skip
        a, b = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"batch {batch}: merged {a:.1f} ms, beside {b:.1f} ms, {min(ratios):.2f} to {max(ratios):.2f}"
        )
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
