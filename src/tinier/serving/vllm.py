"""Hand-over to vLLM: the same checkpoint on several GPUs or hosts, where tinier's engine stops.

vLLM lives in an environment of its own, because it pins torch: TINIER_VLLM_PYTHON names that environment's
python (default: this one). Start at `serve_vllm`.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinier.engine import EngineConfig
from tinier.engine.config import USUAL_SEQ_LEN
from tinier.errors import InputError, MeasuredFailure
from tinier.serving.config import ServeConfig, address
from tinier.serving.store import Source

_START_SECONDS = 1800
"""A large model over a slow disk, and compiling"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmPlan:
    source: Source
    folder: Path
    engine: EngineConfig
    serve: ServeConfig
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    ray: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}. Use 1 or more.")
        if self.serve.port == 0:
            raise InputError("port=0. vLLM needs a port: use 1 or more.")
        if len(self.serve.api_keys) > 1:
            raise InputError("vLLM takes one API key. Give --api-key once.")

    @property
    def python(self) -> str:
        return os.environ.get("TINIER_VLLM_PYTHON", sys.executable)

    def command(self) -> list[str]:
        """How vLLM is started. The key is not in it: it goes through the environment."""
        # it refuses a context that its cache has no room for, so none is the usual one
        length = self.engine.max_seq_len or USUAL_SEQ_LEN
        options: dict[str, object] = {
            "model": self.folder, "served-model-name": self.source.name,
            "host": self.serve.host, "port": self.serve.port,
            "max-model-len": length, "max-num-seqs": self.engine.max_batch_size,
            "max-num-batched-tokens": max(self.engine.max_step_tokens, length),
            "tensor-parallel-size": self.tensor_parallel,
            "pipeline-parallel-size": self.pipeline_parallel,
        }  # fmt: skip
        if self.ray:
            options["distributed-executor-backend"] = "ray"
        made = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        return made + [f"--{name}={value}" for name, value in options.items()]


def serve_vllm(plan: VllmPlan) -> None:
    """Start vLLM, say when it answers, and stay until it ends; SIGTERM and Ctrl-C are passed on.

    Raises InputError where vLLM is not installed, MeasuredFailure if it does not start.
    """
    check = [
        plan.python,
        "-c",
        # a folder of that name in the current directory is found too, without an origin
        "import importlib.util as u, sys; s = u.find_spec('vllm'); sys.exit(not (s and s.origin))",
    ]
    try:
        installed = subprocess.run(check, check=False).returncode == 0
    except OSError:
        installed = False
    if not installed:
        raise InputError(
            f"{plan.python} has no vLLM. Install it in an environment of its own, and type: "
            "TINIER_VLLM_PYTHON=/path/to/that/bin/python tinier serve … --backend vllm"
        )
    environ = dict(os.environ)
    if plan.serve.api_keys:
        environ["VLLM_API_KEY"] = plan.serve.api_keys[0]
    command = plan.command()
    print(" ".join(command), file=sys.stderr, flush=True)
    process = subprocess.Popen(command, env=environ, stdout=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda sent, _: process.send_signal(sent))
    url = address(plan.serve.host, plan.serve.port)
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            print(f"vLLM serves {plan.source.name} on {url}", flush=True)
            if (code := process.wait()) > 0:
                raise MeasuredFailure(f"vLLM ended with exit code {code}. See its output above.")
            return
        time.sleep(0.5)
    process.terminate()
    raise MeasuredFailure(f"vLLM did not start: exit code {process.wait()}. See its output above.")
