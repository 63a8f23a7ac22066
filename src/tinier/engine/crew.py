"""The other processes of engines that share their models among several GPUs.

Start at `crew_for`. This process leads: the others (follower.py) make the same engines on their shares of
the models, and do with them what is done with this one's, call by call. A step depends on nothing but the
calls before it, so all compute the same step and meet in its sums (parallel.py); no tensor goes through the
pipes. A crew lasts as long as this process, whatever engines come and go: starting one takes seconds.

If one of the others ends, this process ends too: it may be waiting for it inside a GPU, where nothing else
can reach it.
"""

import atexit
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from tinier.engine.config import EngineConfig
from tinier.engine.parallel import Share, share_of
from tinier.errors import InputError

_FAREWELL_SECONDS = 10.0


class Place(NamedTuple):
    """Where a follower belongs."""

    rank: int
    size: int
    port: int
    """Of the leader's store, on this host"""
    device: str
    threads: int
    """Of torch, on a CPU"""


class Build(NamedTuple):
    """Load an engine's model and answer None, or what is wrong; then make the engine at `Go`."""

    number: int
    folder: Path
    config: EngineConfig
    dtype: torch.dtype | None
    tokenizer: Any


class Go(NamedTuple):
    number: int


class Drop(NamedTuple):
    number: int


class Call(NamedTuple):
    """Do what the leader does with its engine."""

    number: int
    method: str
    arguments: tuple[Any, ...]


class Crew:
    """The processes beside this one. Make one with `crew_for`."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._built = 0
        self._dropped: deque[int] = deque()
        self._closing = False
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        devices = crew_devices(size, device)
        store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        atexit.register(self.close)
        for rank in range(1, size):
            ours, theirs = Pipe()
            command = [sys.executable, "-m", "tinier.engine.follower", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            theirs.close()
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()
            ours.send(Place(rank, size, store.port, devices[rank], torch.get_num_threads()))
            self._processes.append(process)
            self._pipes.append(ours)
        self._answers()  # they are there, with all that they import
        self.share: Share = share_of(0, size, store, device)

    def build(
        self, folder: Path, config: EngineConfig, dtype: torch.dtype | None, tokenizer: Any
    ) -> int:
        """Let the others load a model, as this process does too; returns the engine's number. `go` or
        `give_up` must follow."""
        self._built += 1
        self._tell(Build(self._built, folder, config, dtype, tokenizer))
        return self._built

    def go(self, number: int) -> None:
        """Make the engine, whose model is loaded here. Raises InputError where another could not."""
        wrong = [answer for answer in self._answers() if answer is not None]
        if wrong:
            self._tell(Drop(number))
            raise InputError(wrong[0])
        self._tell(Go(number))

    def give_up(self, number: int) -> None:
        """Make no engine: its model could not be loaded here."""
        self._answers()
        self._tell(Drop(number))

    def call(self, number: int, method: str, *arguments: Any) -> None:
        """Let the others call a method of the engine of this number."""
        self._tell(Call(number, method, arguments))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all processes compute: where another has ended, an error in here only says so."""
        try:
            yield
        except RuntimeError:
            time.sleep(0.5)  # a connection breaks a little before a process has ended
            if any(process.poll() is not None for process in self._processes):
                self._wait_for_the_end()
            raise

    def drop(self, number: int) -> None:
        """The engine is gone here. The garbage collector may call it at any moment, so that nothing is
        sent before the next message."""
        self._dropped.append(number)

    def close(self) -> None:
        """End the others."""
        if self._closing:
            return
        self._closing = True
        for pipe in self._pipes:
            pipe.close()
        until = time.monotonic() + _FAREWELL_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        with suppress(AttributeError, RuntimeError, ValueError):  # it never came about, or is gone
            dist.destroy_process_group(self.share.group)

    def _tell(self, message: Build | Go | Drop | Call) -> None:
        while self._dropped:
            self._send(Drop(self._dropped.popleft()))
        self._send(message)

    def _send(self, message: Build | Go | Drop | Call) -> None:
        try:
            for pipe in self._pipes:
                pipe.send(message)
        except OSError:
            self._wait_for_the_end()

    def _answers(self) -> list[str | None]:
        """What each of the others says of the last that it was told: None, or what is wrong."""
        try:
            return [pipe.recv() for pipe in self._pipes]
        except (EOFError, OSError):
            self._wait_for_the_end()
            raise

    def _wait_for_the_end(self) -> None:
        """Another process has ended, and `_watch` is about to end this one."""
        time.sleep(_FAREWELL_SECONDS)

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        if self._closing:
            return
        print(
            f"error: process {rank} of the {self.size} that share the model ended (exit code {code}); "
            "nothing can be computed without it.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        for other in self._processes:
            other.kill()
        os._exit(1)


def crew_devices(size: int, first: torch.device, what: str = "") -> list[str]:
    """`size` devices from the first one on. Raises InputError where there are too few for `what`."""
    if first.type == "cpu":
        return ["cpu"] * size
    assert first.index is not None
    count = torch.cuda.device_count()
    if first.index + size > count:
        raise InputError(
            f"{what or f'tensor_parallel={size}'}: {size} GPUs are needed from {first} on, and torch sees "
            f"{count}. Use fewer."
        )
    return [f"cuda:{first.index + rank}" for rank in range(size)]


_crew: Crew | None = None


def crew_for(size: int, device: torch.device) -> Crew:
    """The crew of `size` processes, this one on `device` among them; started unless it is there.

    Raises InputError where there are too few GPUs, or another crew is at work.
    """
    global _crew
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"tensor_parallel={size} under torchrun: tinier starts the processes itself, so leave "
            "torchrun out."
        )
    if _crew is None:
        _crew = Crew(size, device)
    if (_crew.size, _crew.device) != (size, device):
        raise InputError(
            f"tensor_parallel={size} on {device}, after {_crew.size} on {_crew.device} in the same "
            "process: use one of them, or a process for each."
        )
    return _crew
