"""What two GPUs of one host compute is what one computes. Where there are not two of them, the same over
gloo is tested beside each part (tests/engine/test_parallel.py, …)."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import DOCUMENTS, TinyMaker
from tests.distillation.test_trainer import pair

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import open_model
from tinier.quantization import QuantizePlan, quantize
from tinier.serving import ServeConfig, Service

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = {
    "dtype": torch.bfloat16, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 1024,
}  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"preset": "fp8", "head": "fp8", "kv": "fp8"},
    "fp8-static": {"preset": "fp8-static"},
    "int8": {"preset": "int8", "head": "int8", "kv": "int8"},
    "int4": {"preset": "int4", "group_size": 64, "kv": "fp8"},
    "int4-32": {"preset": "int4", "group_size": 32, "symmetric": False},
    "nvfp4": {"preset": "nvfp4"},
}


def run(*command: object, gpus: int = 2) -> None:
    """A Python program, under torchrun where several processes run it."""
    words = [sys.executable]
    if gpus > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*words, *map(str, command)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def prompts(count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 2048, (n,), generator=generator).tolist() for n in lengths]


def made(source: Checkpoint, name: str, folder: Path) -> Checkpoint:
    if not FORMATS[name]:
        return source
    plan = QuantizePlan(**{"windows": 8, "length": 64} | FORMATS[name])
    return quantize(source, plan, folder / name, text=DOCUMENTS, device="cuda")


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    ("family", "name"), [("qwen3", "bf16"), *(("llama", name) for name in FORMATS)]
)
def test_a_shared_engine_has_the_logits_of_one(
    tiny: TinyMaker, tmp_path: Path, family: str, name: str
) -> None:
    """In float32 the same; in 16 bit, where sums of other parts are rounded, as near to float32's."""
    model = made(tiny(family, **SIZES), name, tmp_path)
    asked = prompts(6, 400)

    def logits(gpus: int, dtype: torch.dtype) -> torch.Tensor:
        config = EngineConfig(
            max_batch_size=8, max_seq_len=512, max_step_tokens=600, tensor_parallel=gpus,
            device="cuda:0",
        )  # fmt: skip
        engine = Engine(model, config, dtype=dtype)
        scored = [engine.add(p, SamplingParams(max_tokens=1, prompt_logits=True)) for p in asked]
        while engine.has_work:
            engine.step()
        return torch.cat([torch.cat(request.prompt_logits) for request in scored])

    exact = logits(1, torch.float32)
    alone, shared = (apart(logits(gpus, torch.bfloat16), exact) for gpus in (1, 2))
    in_float32 = apart(logits(2, torch.float32), exact)
    print(f"{family} {name}: {alone:.4f}, shared {shared:.4f}; in float32 {in_float32:.6f}")
    assert shared < 1.2 * alone + 0.005
    if name in ("bf16", "int4-32"):  # nothing but weights is rounded
        assert in_float32 < 1e-4


def test_graphs_prefixes_and_preemption_of_a_shared_engine(tiny: TinyMaker) -> None:
    """In float32 two GPUs have one GPU's text, whatever steps it comes from."""
    model = tiny("qwen3", **SIZES | {"dtype": torch.float32})
    shared = prompts(1, 300)[0]
    asked = [[*shared, *prompt] for prompt in prompts(12, 100)]
    texts = []
    for gpus in (1, 2):
        config = EngineConfig(
            max_batch_size=8, max_seq_len=512, max_step_tokens=128, tensor_parallel=gpus,
            device="cuda:0", kv_cache_bytes=(3 << 20) // gpus,
        )  # fmt: skip
        engine = Engine(model, config)
        engine.warm_up()
        requests = []
        for i, prompt in enumerate(asked):
            params = SamplingParams(max_tokens=40, temperature=0.8 * (i % 2), seed=i)
            requests.append(engine.add(prompt, params))
            engine.step()
        engine.cancel(requests[3])
        while engine.has_work:
            engine.step()
        assert engine.num_preemptions > 0
        assert any(request.num_reused for request in requests)
        texts.append([request.output for i, request in enumerate(requests) if i != 3])
        del engine
    assert texts[0] == texts[1]


def test_calibration_on_two_gpus_gives_the_bytes_of_one(tiny: TinyMaker, tmp_path: Path) -> None:
    source = tiny(**SIZES | {"vocab_size": 264})
    text = tmp_path / "text.txt"
    text.write_text(" ".join(DOCUMENTS * 8))
    int4 = ["--preset", "int4-gptq", "--preset", "int4-awq", "--group-size", "64"]
    for gpus in (1, 2):
        for words, out in ((int4, "int4"), (["--preset", "int8-sq"], "int8-sq")):
            run(
                "-m", "tinier", "quantize", source.folder, *words, "--text", text, "--windows",
                128, "--length", 64, "--quiet", "--out", tmp_path / f"{gpus}-{out}", gpus=gpus,
            )  # fmt: skip
    for preset in ("int4/int4-gptq", "int4/int4-awq", "int8-sq"):
        one, two = (
            {n: t for path in sorted((tmp_path / f"{gpus}-{preset}").glob("*.safetensors"))
             for n, t in load_file(path).items()}
            for gpus in (1, 2)
        )  # fmt: skip
        assert one.keys() == two.keys()
        different = [name for name in one if not torch.equal(one[name], two[name])]
        assert not different, (preset, different)


TRAIN = """
import dataclasses, os, signal, sys
from pathlib import Path
from tests.distillation.test_trainer import HELD, PLAN, TEXT
from tinier.distillation import distill, trainer
from tinier.families import open_model
from tinier.quantization import QuantizePlan

student, teacher, out = map(Path, sys.argv[1:4])
grid, stop_at = sys.argv[4], int(sys.argv[5])
quantize = None
if grid != "none":  # two batches, one for each process
    quantize = QuantizePlan(preset=grid, group_size=32, windows=160, length=32)
plan = dataclasses.replace(PLAN, steps=20, eval_every=10, save_seconds=0.0, quantize=quantize)
step = trainer.Trainer._step

def stopped(self, number):
    if number == stop_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)

trainer.Trainer._step = stopped
distill(open_model(student), open_model(teacher), plan, out, text=TEXT, heldout=HELD, device="cuda")
"""


@pytest.mark.parametrize("grid", ["none", "int4-gptq"])
def test_training_on_two_gpus_is_that_of_one(tiny: TinyMaker, tmp_path: Path, grid: str) -> None:
    """The same losses; killed and gone on with, on as many GPUs or on another number of them."""
    student, teacher = pair(tiny, tmp_path, **SIZES | {"vocab_size": 264})
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    losses, folders = {}, {}
    plans = {"one": [(1, -1)], "two": [(2, -1)], "two then one": [(2, 8), (1, -1)]}
    if grid == "none":
        plans |= {"two then two": [(2, 8), (2, -1)], "one then two": [(1, 8), (2, -1)]}

    def train(name: str) -> None:
        out = tmp_path / name.replace(" ", "-")
        for gpus, stop_at in plans[name]:
            words = (script, student.folder, teacher.folder, out, grid, stop_at)
            if stop_at < 0:
                run(*words, gpus=gpus)
                continue
            with pytest.raises(AssertionError):
                run(*words, gpus=gpus)
            assert not out.exists()
        folders[name] = open_model(out)

    with ThreadPoolExecutor() as pool:  # most of it is the start of Python
        list(pool.map(train, plans))
    for name in plans:
        manifest = folders[name].manifest
        assert manifest is not None
        losses[name] = manifest.measures["loss"]
        assert len(losses[name]) == 20
    for name, found in losses.items():
        assert found == pytest.approx(losses["one"], rel=0.02), name
        tensors = {n: i.dtype for n, i in folders[name].tensors.items()}
        assert tensors == {n: i.dtype for n, i in folders["one"].tensors.items()}
        assert folders[name].config == folders["one"].config
    if grid == "none":
        assert losses["two then two"] == pytest.approx(losses["two"], rel=2e-3)


@pytest.mark.parametrize("way", ["tensor_parallel", "replicas"])
def test_two_gpus_serve_as_one(tiny: TinyMaker, way: str) -> None:
    model = tiny(**SIZES | {"vocab_size": 264, "dtype": torch.float32})
    answers = []
    for gpus in (1, 2):
        engine = EngineConfig(
            max_batch_size=8, max_seq_len=512, device="cuda:0",
            tensor_parallel=gpus if way == "tensor_parallel" else 1,
        )  # fmt: skip
        config = ServeConfig(
            port=0, memory_bytes=8 << 30, replicas=gpus if way == "replicas" else 1
        )
        with Service([f"m={model.folder}"], engine, config) as service:
            url = f"{service.url}/v1/completions"
            body = {"model": "m", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
            asked = [body | {"prompt": f"{i} bottles"} for i in range(6)]
            texts = [httpx.post(url, json=one, timeout=60).json() for one in asked]
            answers.append([text["choices"][0]["text"] for text in texts])
            with httpx.stream("POST", url, json=asked[0] | {"stream": True}, timeout=60) as stream:
                next(stream.iter_lines())  # and leave
            again = httpx.post(url, json=asked[0], timeout=60).json()
            assert again["choices"][0]["text"] == answers[-1][0]
    assert answers[0] == answers[1]
