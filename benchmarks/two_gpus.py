"""One GPU beside two, in the same run: Llama-3.2-3B's shape with random weights.

decode    tensor parallelism in the engine: tokens/s of 1 and 64 requests in step after a prompt of 384, and
          requests/s with 64 in flight, 512 tokens in and 128 out; bf16, and FP8 with an FP8 head
replicas  requests/s over HTTP with 64 in flight for each engine, the same requests, FP8
quantize  int4-gptq of 128 windows of 2,048 tokens: seconds of the command's stage
profile   (not unless asked) where a decode step's time goes, by kernel
distill   28 layers teach 21, windows of 2,048, global batch 64: training tokens/s
          (--compile: of compiled layers)

Llama-3.2-3B's weights are gated; its shape is not. Quality of random weights means nothing and is left out.

    python -m benchmarks.two_gpus --work DIR --out RESULT.json [--rounds 3] [--steps 4] [--shape 8b]
        [--parts decode replicas quantize distill profile] [--formats bf16 fp8] [--compile]

8b: decode alone, of Llama-3.1-8B's shape.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks import guide_shape
from benchmarks.engine_speed import decode, kernel_times, prompts, requests
from benchmarks.serving_speed import completion, over_http
from transformers import LlamaConfig

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.device import release_memory
from tinier.distillation import DistillPlan, distill
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import open_model
from tinier.pruning import PrunePlan, prune
from tinier.quantization import QuantizePlan, quantize
from tinier.serving import ServeConfig, Service
from tinier.text import load_documents

SHAPE_8B = LlamaConfig(
    **guide_shape.SHAPE.to_dict()
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
       "num_attention_heads": 32, "tie_word_embeddings": False}
)  # fmt: skip


def by_turns(work: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Each function's figures in every round, and the second's over the first's; one round warms up."""
    values: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, measure in work.items():
            value = measure()
            if round_:
                values[name].append(value)
    one, two = values.values()
    ratios = [b / a for a, b in zip(one, two, strict=True)]
    result = {name: {"median": statistics.median(v), "all": v} for name, v in values.items()}
    return {
        **result,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def engine_on(model: Checkpoint, gpus: int) -> Engine:
    config = EngineConfig(
        max_batch_size=64, max_seq_len=1024, max_step_tokens=4096, reuse_prefixes=False,
        tensor_parallel=gpus, device="cuda:0", kv_cache_bytes=(10 << 30) // gpus,
    )  # fmt: skip
    return Engine(model, config)


def decoding(model: Checkpoint, rounds: int) -> dict[str, Any]:
    engines = {}
    for gpus in (1, 2):
        begun = time.monotonic()
        engines[gpus] = engine_on(model, gpus)
        engines[gpus].generate(prompts(2, 20), SamplingParams(max_tokens=4))
        print(f"{gpus}: first tokens after {time.monotonic() - begun:.1f} s", flush=True)
    assert engines[2].decoder.share.peers is not None, "the GPUs cannot read each other's memory"

    def tokens(gpus: int, batch: int) -> float:
        return batch / statistics.median(decode(engines[gpus], batch, 384, 200))

    result: dict[str, Any] = {}
    for batch in (1, 64):
        work = {f"{n}": lambda n=n, batch=batch: tokens(n, batch) for n in (1, 2)}
        result[f"tokens/s, batch {batch}"] = by_turns(work, rounds)
    work = {f"{n}": lambda n=n: requests(engines[n], 64, 192) for n in (1, 2)}
    result["requests/s, 64 in flight"] = by_turns(work, rounds)
    for name, row in result.items():
        print(name, {k: v["median"] for k, v in row.items() if k in "12"}, row["ratio"], flush=True)
    return result


def profiled(model: Checkpoint) -> dict[str, Any]:
    """Where a decode step's time goes: microseconds a step of each kernel of the leading process, on one
    GPU and on two. Kernels overlap a little at their ends."""
    result: dict[str, Any] = {}
    for gpus in (1, 2):
        engine = engine_on(model, gpus)
        for batch in (1, 64):
            decode(engine, batch, 384, 20)
            result[f"{gpus}, batch {batch}"] = kernel_times(engine, batch, 50)
            print(gpus, batch, json.dumps(result[f"{gpus}, batch {batch}"], indent=1), flush=True)
        del engine
    return result


def replicas(model: Checkpoint, rounds: int) -> dict[str, Any]:
    """Two engines with 128 requests in flight beside one with 64: both have as much to do."""
    engine = EngineConfig(max_batch_size=64, max_seq_len=1024, device="cuda:0")
    services = {n: Service([f"m={model.folder}"], engine, serve_config(n)) for n in (1, 2)}

    def rate(service: Service, n: int) -> float:
        bodies = [completion("m", prompt, 128) for prompt in prompts(192 * n, 512)]
        return over_http(service.url, bodies, 64 * n)["requests_per_second"]

    with services[1] as one, services[2] as two:
        work = {"1": lambda: rate(one, 1), "2": lambda: rate(two, 2)}
        result = by_turns(work, rounds)
    print("replicas", {k: v["median"] for k, v in result.items() if k in "12"}, result["ratio"])
    return result


def serve_config(n: int) -> ServeConfig:
    return ServeConfig(port=0, replicas=n, memory_bytes=24 << 30)


def child(gpus: int, *arguments: object) -> dict[str, Any]:
    """This program again, on one GPU or under torchrun; what its first process printed last."""
    words = [sys.executable]
    if gpus > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    words += ["-m", "benchmarks.two_gpus", *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    line = next(x for x in reversed(done.stdout.splitlines()) if x.startswith("{"))
    result: dict[str, Any] = json.loads(line)
    return result


def quantizing(model: Checkpoint, work: Path) -> dict[str, Any]:
    out = work / "gptq"
    shutil.rmtree(out, ignore_errors=True)
    plan = QuantizePlan(preset="int4-gptq", windows=128, length=2048)
    begun = time.monotonic()
    made = quantize(model, plan, out, text=load_documents("builtin"), device="cuda")
    return {"seconds": time.monotonic() - begun, "hash": made.hash}


def distilling(
    student: Checkpoint, teacher: Checkpoint, work: Path, steps: int, compiles: bool
) -> dict[str, Any]:
    plan = DistillPlan(
        steps=steps, batch=64, micro_batch=4, length=2048, warmup_steps=1, lr=1e-6, min_lr=1e-6,
        eval_every=10**9, save_seconds=1e9, compile=compiles,
    )  # fmt: skip
    out = work / "distilled"
    for folder in (out, out.with_name("distilled-last")):
        shutil.rmtree(folder, ignore_errors=True)
    text = load_documents("builtin")
    made = distill(student, teacher, plan, out, text=text, heldout=text, device="cuda")
    assert made.manifest is not None
    rates = made.manifest.measures["all_tokens_per_s"][1:]  # the first step compiles
    return {
        "tokens_per_s": statistics.median(rates), "all": rates, "loss": made.manifest.measures["loss"],
        "peak_gpu_bytes": made.manifest.peak_memory_bytes,
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--quantize"]:
        result = quantizing(open_model(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--distill"]:
        student, teacher = (open_model(folder) for folder in sys.argv[2:4])
        result = distilling(
            student, teacher, Path(sys.argv[4]), int(sys.argv[5]), sys.argv[6:] == ["--compile"]
        )
    else:
        measure_all()
        return
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result), flush=True)


def measure_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--shape", choices=["3b", "8b"], default="3b")
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8"], help="of the decode part")
    parser.add_argument("--parts", nargs="+", default=["decode", "replicas", "quantize", "distill"])
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    if a.shape == "8b":
        guide_shape.SHAPE, a.parts, a.formats = SHAPE_8B, ["decode"], ["bf16"]
    base = guide_shape.random_llama(a.work / a.shape, guide_shape.SHAPE.num_hidden_layers)
    record: dict[str, Any] = {
        "model": f"Llama's {a.shape} shape, random weights", "command": " ".join(sys.argv),
        "environment": environment(torch.device("cuda", 0)), "gpus": torch.cuda.device_count(),
    }  # fmt: skip

    def keep(name: str, values: dict[str, Any]) -> None:
        record[name] = values
        a.out.write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(values)[:600], flush=True)

    if "distill" in a.parts:
        folder = a.work / "student"
        if not folder.exists():
            dropped = PrunePlan(drop_layers=tuple(range(20, 27)), refit=False)
            prune(base, dropped, folder, device="cuda")
        release_memory()
        for gpus in (1, 2):
            words = [folder, base.folder, a.work, a.steps, *(["--compile"] if a.compile else [])]
            keep(f"distill, {gpus}", child(gpus, "--distill", *words))
    if "quantize" in a.parts:
        for gpus in (1, 2):
            keep(f"quantize, {gpus}", child(gpus, "--quantize", base.folder, a.work))
    if "profile" in a.parts:
        keep("profile, bf16", profiled(base))
    decodes = a.formats if "decode" in a.parts else []
    if "bf16" in decodes:
        keep("decode, bf16", decoding(base, a.rounds))
    if "fp8" in decodes or "replicas" in a.parts:
        fp8 = a.work / "fp8"
        if not fp8.exists():
            quantize(base, QuantizePlan(preset="fp8", head="fp8"), fp8, device="cuda")
        release_memory()
        if "fp8" in decodes:
            keep("decode, fp8", decoding(open_model(fp8), a.rounds))
        if "replicas" in a.parts:
            keep("replicas, fp8", replicas(open_model(fp8), a.rounds))


if __name__ == "__main__":
    main()
