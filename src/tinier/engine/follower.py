"""A process that holds a share of the models of another's engines (crew.py).

python -m tinier.engine.follower FD        FD: the pipe that the leader passed on
"""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from torch.distributed import TCPStore

from tinier.device import pick_device
from tinier.engine.crew import Build, Call, Drop, Go, Place
from tinier.engine.decoder import load_decoder
from tinier.engine.drafts import PROMPT
from tinier.engine.engine import Engine
from tinier.engine.parallel import Share, share_of
from tinier.engine.request import Request
from tinier.errors import TinierError
from tinier.families import open_model


def follow(pipe: Connection) -> None:
    """Do what comes through the pipe until its other end is closed."""
    place: Place = pipe.recv()
    device = pick_device(place.device)
    torch.set_num_threads(place.threads)
    pipe.send(None)
    store = TCPStore("127.0.0.1", place.port, place.size, is_master=False)
    share = share_of(place.rank, place.size, store, device)
    engines: dict[int, _Engine] = {}
    while True:
        message: Build | Drop | Call = pipe.recv()
        if isinstance(message, Build):
            engine = _build(message, pipe, share, device)
            if engine is not None:
                engines[message.number] = engine
        elif isinstance(message, Drop):
            engines.pop(message.number, None)
        else:
            engines[message.number].do(message)


def _build(
    message: Build, pipe: Connection, share: Share, device: torch.device
) -> "_Engine | None":
    """The engine, if all processes can have theirs."""
    try:
        checkpoint = open_model(str(message.folder))
        decoder = load_decoder(checkpoint, device=device, dtype=message.dtype, share=share)
    except TinierError as error:
        pipe.send(str(error))
        pipe.recv()
        return None
    pipe.send(None)
    if not isinstance(pipe.recv(), Go):
        return None
    try:
        # the leader's drafts come with each step, which has the same graphs here
        config = replace(message.config, draft=message.config.draft and PROMPT)
        return _Engine(Engine(decoder, config, tokenizer=message.tokenizer))
    except TinierError:  # the leader has it too, and says it
        return None


class _Engine:
    """An engine with the requests that it has not done."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._requests: dict[int, Request] = {}

    def do(self, call: Call) -> None:
        if call.method == "add":
            request = self._engine.add(*call.arguments)
            self._requests[request.number] = request
        elif call.method == "cancel":
            self._engine.cancel(self._requests.pop(*call.arguments))
        elif call.method == "compute":
            for request in self._engine.compute(*call.arguments):
                if request.finished:
                    del self._requests[request.number]
        else:
            if call.method == "reset":
                self._requests.clear()
            getattr(self._engine, call.method)(*call.arguments)


def _end_with(parent: int) -> None:
    """End this process when the leader has ended, even while it waits for it inside a GPU."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def main() -> None:
    # the leader decides when this ends: Ctrl-C and a service manager's SIGTERM may reach all of them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    leader = os.getppid()
    threading.Thread(target=_end_with, args=(leader,), daemon=True).start()
    try:
        follow(Connection(int(sys.argv[1])))
    except (EOFError, OSError):  # the leader closed the pipe
        os._exit(0)
    except Exception:
        time.sleep(0.2)
        if os.getppid() != leader:  # it ended within a sum
            os._exit(0)
        raise


if __name__ == "__main__":
    main()
