"""The real Triton Inference Server in front of the served models: KServe v2 over HTTP and gRPC.

The binary is the one that the package nvidia-pytriton carries, on a model repository of its Python backend.
Its models hand requests to this process over a Unix socket (triton_model.py), so that the requests of all
clients and protocols join one continuous batch. Each model is there twice: `NAME` answers once, over both
protocols; `NAME_stream` is decoupled and streams over gRPC. Start at `Triton`.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tinier.checkpoint import cache_folder
from tinier.errors import InputError
from tinier.serving.config import address
from tinier.serving.store import ModelStore, Source

log = logging.getLogger(__name__)

_INPUTS = {
    "text_input": "TYPE_STRING", "max_tokens": "TYPE_INT32", "min_length": "TYPE_INT32",
    "temperature": "TYPE_FP32", "top_k": "TYPE_INT32", "top_p": "TYPE_FP32",
    "repetition_penalty": "TYPE_FP32", "presence_penalty": "TYPE_FP32",
    "frequency_penalty": "TYPE_FP32", "random_seed": "TYPE_UINT64", "stop_words": "TYPE_STRING",
    "return_log_probs": "TYPE_BOOL", "ignore_eos": "TYPE_BOOL",
}  # fmt: skip
_OUTPUTS = {
    "text_output": ("TYPE_STRING", 1), "finish_reason": ("TYPE_STRING", 1),
    "cum_log_probs": ("TYPE_FP32", 1), "output_log_probs": ("TYPE_FP32", -1),
}  # fmt: skip


def packages_folder() -> Path:
    """Where Triton's packages are: TINIER_TRITON, or a folder of tinier's cache."""
    return Path(os.environ.get("TINIER_TRITON") or cache_folder() / "triton")


def check_installed() -> Path:
    """The folder of tritonserver. Raises InputError where it cannot run here."""
    packages = packages_folder()
    folder = packages / "pytriton" / "tritonserver"
    if not (folder / "bin" / "tritonserver").exists() or not (packages / "numpy").exists():
        # in a folder of its own: Triton's Python backend needs a numpy from before 2.0
        raise InputError(
            "--triton needs Triton's binary. Type: pip install --no-deps --target "
            f"{packages} nvidia-pytriton==0.7.0 'numpy<2'"
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = folder / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        found = sorted(path.name for path in stub.parent.parent.glob("*") if path.is_dir())
        raise InputError(
            f"Triton's Python backend has no build for Python {version}. Use Python {' or '.join(found)}."
        )
    linked = subprocess.run(["ldd", str(stub)], capture_output=True, text=True, check=False).stdout
    missing = [line.split()[0] for line in linked.splitlines() if "not found" in line]
    if missing:
        raise InputError(
            f"Triton's Python backend lacks {', '.join(missing)}. Type: sudo apt-get install "
            f"libpython{version}"
        )
    return folder


_EXIT_SECONDS = 5
"""For connections that are open when all requests are answered"""
_CLOSED = "inference,shared-memory,model-config,model-repository,statistics,trace,logging"
"""Triton's interfaces that need the key"""


@dataclass
class Attached:
    """Which models Triton has loaded; what it unloads twice over is unloaded here."""

    store: ModelStore
    sources: dict[str, Source]
    """By NAME@VERSION, of all that Triton may load"""
    _counts: Counter[str] = field(default_factory=Counter)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def routes(self) -> list[Route]:
        return [
            Route("/internal/attach", self._attach, methods=["POST"]),
            Route("/internal/detach", self._detach, methods=["POST"]),
        ]

    async def _attach(self, request: Request) -> Response:
        label = (await request.json())["model"]
        async with self._lock:
            if self.store.find(label) is None:
                await self.store.load(self.sources[label])
            self._counts[label] += 1
        return JSONResponse({})

    async def _detach(self, request: Request) -> Response:
        label = (await request.json())["model"]
        async with self._lock:
            self._counts[label] -= 1
            if self._counts[label] == 0:
                await self.store.unload(label)
        return JSONResponse({})


class Triton:
    """A running tritonserver.

    labels: NAME@VERSION of the models. port: HTTP; gRPC and metrics have the next two. api_key: what
    clients must send for everything but health and metadata; None: nothing.
    """

    def __init__(
        self,
        labels: list[str],
        *,
        host: str,
        port: int,
        max_batch_size: int,
        verbose: bool,
        api_key: str | None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tinier-triton-"))
        self.socket_path = str(self.folder / "tinier.sock")
        self.key = secrets.token_hex(16)
        self._server = check_installed()
        self._host, self._port, self._verbose = host, port, verbose
        self._api_key = api_key
        self._process: subprocess.Popen[bytes] | None = None
        self._names = _write_repository(self.folder / "models", labels, max_batch_size)

    def start(self, timeout: float = 120) -> None:
        """Start the server and wait until its models are ready. Raises InputError if they are not."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        backends = self.folder / "backends"
        shutil.copytree(self._server / "backends", backends)
        stub = self._server / "python_backend_stubs" / version / "triton_python_backend_stub"
        # the stub finds its libraries beside where it was installed
        (backends / "python" / stub.name).symlink_to(stub)
        # the stub takes its packages from the Python on PATH: where this virtual environment is activated
        # that would be its numpy, which is too new
        ours = Path(sys.prefix) / "bin"
        paths = [p for p in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(p) != ours]
        environ = os.environ | {
            "PATH": os.pathsep.join(paths),
            "TINIER_SOCKET": self.socket_path, "TINIER_SOCKET_KEY": self.key,
            "TINIER_PACKAGES": str(packages_folder()),
        }  # fmt: skip
        options = {
            "model-repository": self.folder / "models", "backend-directory": backends,
            "model-control-mode": "explicit", "allow-metrics": "true",
            "http-address": self._host, "grpc-address": self._host, "metrics-address": self._host,
            "http-port": self._port, "grpc-port": self._port + 1, "metrics-port": self._port + 2,
            "log-info": str(self._verbose).lower(), "exit-timeout-secs": _EXIT_SECONDS,
        }  # fmt: skip
        if self._api_key:
            closed = f"{_CLOSED}:authorization=Bearer {self._api_key}"
            options |= {"http-restricted-api": closed, "grpc-restricted-protocol": closed}
        command = [str(self._server / "bin" / "tritonserver")]
        command += [f"--{name}={value}" for name, value in options.items()]
        command += [f"--load-model={name}" for name in self._names]
        self._log = (self.folder / "log").open("wb")
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdout=None if self._verbose else self._log,
            stderr=subprocess.STDOUT,
        )
        self._wait(timeout)
        if self._api_key:
            _hide(self._process.pid, self._api_key)

    def stop(self) -> None:
        """Let it finish what it has, then end it."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2 * _EXIT_SECONDS)
            self._process.kill()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self, timeout: float) -> None:
        url = f"{address(self._host, self._port)}/v2/health/ready"
        end = time.monotonic() + timeout
        assert self._process is not None
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(url, timeout=1).close()
                return
            time.sleep(0.1)
        tail = (self.folder / "log").read_text("utf-8", "replace").splitlines()[-15:]
        self.stop()
        raise InputError("Triton did not start:\n" + "\n".join(tail))


def _hide(pid: int, secret: str) -> None:
    """Overwrite a secret in the command line of a process of ours, which has read it by now: everyone on
    the machine may list command lines, and Triton takes the key in no other way."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, proc(5)
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            arguments = memory.read(end - start)
            memory.seek(start)
            memory.write(arguments.replace(secret.encode(), b"*" * len(secret)))
    except (OSError, ValueError, IndexError) as error:
        log.warning(
            "the API key stands in Triton's command line, which others here can read: %s", error
        )


def _write_repository(folder: Path, labels: list[str], max_batch_size: int) -> list[str]:
    """Both kinds of each model, all versions. Returns the names that Triton knows."""
    versions: dict[str, list[str]] = {}
    for label in labels:
        name, _, version = label.rpartition("@")
        versions.setdefault(name, []).append(version)
    made = []
    for name, numbers in versions.items():
        safe = name.replace("/", "--")
        for kind, decoupled in ((safe, False), (f"{safe}_stream", True)):
            for number in numbers:
                (folder / kind / number).mkdir(parents=True)
                source = Path(__file__).with_name("triton_model.py")
                shutil.copy(source, folder / kind / number / "model.py")
            config = python_config(
                kind, {"tinier_model": name}, decoupled=decoupled, max_batch_size=max_batch_size
            )
            (folder / kind / "config.pbtxt").write_text(config, encoding="utf-8")
            made.append(kind)
    return made


def python_config(
    name: str,
    parameters: dict[str, str],
    *,
    decoupled: bool,
    max_batch_size: int,
    stream: bool = False,
) -> str:
    """config.pbtxt of a model of the Python backend that runs triton_model.py. stream: whether requests say
    if they want their answer in pieces."""
    types = _INPUTS | ({"stream": "TYPE_BOOL"} if stream else {})
    inputs = ",\n".join(
        f'  {{ name: "{n}" data_type: {t} dims: [ {-1 if n == "stop_words" else 1} ]'
        + ("" if n == "text_input" else " optional: true")
        + " }"
        for n, t in types.items()
    )
    outputs = ",\n".join(
        f'  {{ name: "{n}" data_type: {t} dims: [ {d} ] }}' for n, (t, d) in _OUTPUTS.items()
    )
    told = "\n".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}'
        for key, text in parameters.items()
    )
    return f"""name: "{name}"
backend: "python"
max_batch_size: {max_batch_size}
dynamic_batching {{ }}
version_policy {{ all {{ }} }}
model_transaction_policy {{ decoupled: {str(decoupled).lower()} }}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
{told}
input [
{inputs}
]
output [
{outputs}
]
"""
