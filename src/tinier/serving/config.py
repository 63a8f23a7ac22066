"""Limits and addresses of a server."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tinier.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def address(host: str, port: int) -> str:
    """http://HOST:PORT, with the brackets that IPv6 needs."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


Adapters = Literal["auto", "shared", "merged"]
MAX_BATCH_SIZE = 64
"""Requests of a model that `tinier serve` computes at once, unless told otherwise"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    uds: Path | None = None
    """Listen on this Unix socket, and not on host and port."""
    api_keys: tuple[str, ...] = ()
    """Requests must carry one of them; none: open to all who can connect."""
    max_queue: int = 256
    """Requests of a model that may wait; more get 429."""
    timeout: float = 600.0
    """Seconds until a request is given up."""
    drain_seconds: float = 60.0
    """How long requests in flight may go on after SIGTERM."""
    max_body_bytes: int = 4 << 20
    memory_bytes: int | None = None
    """For weights and caches of all models; None: most of what is free."""
    keep_alive: float = 75.0
    """Seconds that an idle connection stays open: longer than clients keep theirs, or they find it closed
    when they send."""
    cors_origins: tuple[str, ...] = ()
    """Web pages (https://HOST) that may ask from a browser; `*`: all."""
    replicas: int = 1
    """Engines of each model, on GPUs of their own, behind one queue."""
    adapters: Adapters = "auto"
    """Several LoRA adapters of one model: `shared`: one engine and one batch, which is slow on a CPU;
    `merged`: a model of its own for each; `auto`: shared on a GPU."""
    load_folder: Path | None = None
    """Models in it may be loaded over HTTP; None: none may."""
    triton: bool = False
    """Triton takes `port` (HTTP) and the next two (gRPC, metrics), and the OpenAI API the one after."""
    log_level: int = logging.WARNING

    def __post_init__(self) -> None:
        for name, least in (
            ("port", 0), ("max_queue", 0), ("timeout", 0.001), ("drain_seconds", 0),
            ("max_body_bytes", 1000), ("keep_alive", 0), ("replicas", 1),
        ):  # fmt: skip
            if not getattr(self, name) >= least:  # nor is NaN
                raise InputError(f"{name}={getattr(self, name)}. Use {least} or more.")
        if self.adapters not in get_args(Adapters):
            raise InputError(f"adapters={self.adapters!r}. Use {', '.join(get_args(Adapters))}.")
        last = 65_532 if self.triton else 65_535
        if self.port > last or (self.triton and self.port == 0):
            raise InputError(f"port={self.port}. Use {int(self.triton)} to {last}.")
        if self.uds is not None and self.triton:
            raise InputError("Triton listens on ports. Leave --uds out.")
        if self.triton and not self.api_keys and self.host not in LOOPBACK:
            raise InputError(
                f"Triton on {self.host} without a key lets everyone who can connect run programs here: "
                "models are loaded through it. Use --api-key KEY, or --host 127.0.0.1."
            )
        if any(not key.isascii() or not key or " " in key for key in self.api_keys):
            raise InputError("an API key is empty or has a space in it. Use ASCII without spaces.")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise InputError(f"cors={origin!r} is no page's origin. Use https://HOST, or *.")
        if self.load_folder is not None and not self.load_folder.is_dir():
            raise InputError(
                f"--allow-load {self.load_folder} is no folder. Give the folder that holds the models."
            )
