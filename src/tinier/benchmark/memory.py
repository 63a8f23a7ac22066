"""Memory while serving, measured in a process of its own: weights, KV cache, peak.

Start at `measure_memory`. A fresh process, because the peak of the one that quantized, trained or
loaded other models before says nothing about serving this one.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from tinier.benchmark.speed import Workload, engine_for, random_prompts
from tinier.checkpoint import Checkpoint
from tinier.device import peak_memory_bytes, pick_device
from tinier.engine import Engine, SamplingParams
from tinier.families import open_model
from tinier.schemes import Int4Inputs


@dataclass(frozen=True, kw_only=True)
class ServingMemory:
    weights_bytes: int
    """The weights as loaded."""
    kv_bytes: int
    """The KV cache for this workload."""
    peak_bytes: int
    """Most in use while loading and serving: the process's on CPU, torch's on a GPU."""
    start_bytes: int
    """Of that, in use before the model was loaded: interpreter and libraries."""


def measure_memory(
    checkpoint: Checkpoint,
    workload: Workload,
    device: str,
    tensor_parallel: int = 1,
    int4_inputs: Int4Inputs = "int8",
) -> ServingMemory:
    """Serve one workload in a fresh process and report its memory; where several processes share the
    model, that of one."""
    request = {
        "folder": str(checkpoint.folder), "workload": asdict(workload), "device": device,
        "tensor_parallel": tensor_parallel, "int4_inputs": int4_inputs,
    }  # fmt: skip
    command = [sys.executable, "-m", "tinier.benchmark.memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"measuring memory of {checkpoint.folder} ended with {done.returncode}"
            f" (negative: a signal):\n{done.stderr}"
        )
    return ServingMemory(**json.loads(done.stdout.splitlines()[-1]))


def gpu_memory(load: Callable[[], Engine], workload: Workload) -> ServingMemory:
    """Serve one workload with an engine that `load` loads, on a GPU, where torch counts what it takes
    beside what is there already."""
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = load()
    params = SamplingParams(max_tokens=workload.output_length)
    engine.generate(random_prompts(engine, workload, seed=0), params)
    return ServingMemory(
        weights_bytes=engine.decoder.weight_bytes,
        kv_bytes=engine.runner.kv_bytes,
        peak_bytes=torch.cuda.max_memory_allocated() - start,
        start_bytes=0,
    )


def _serve_once(
    folder: Path, workload: Workload, device: str, tensor_parallel: int, int4_inputs: Int4Inputs
) -> ServingMemory:
    place = pick_device(device)
    on_gpu = place.type == "cuda"
    start = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    engine = Engine(open_model(folder), engine_for(workload, device, tensor_parallel, int4_inputs))
    params = SamplingParams(max_tokens=workload.output_length)
    engine.generate(random_prompts(engine, workload, seed=0), params)
    return ServingMemory(
        weights_bytes=engine.decoder.weight_bytes,
        kv_bytes=engine.runner.kv_bytes,
        peak_bytes=peak_memory_bytes(place),
        start_bytes=start,
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    memory = _serve_once(
        Path(asked["folder"]), Workload(**asked["workload"]), asked["device"],
        asked["tensor_parallel"], asked["int4_inputs"],
    )  # fmt: skip
    print(json.dumps(asdict(memory)))
