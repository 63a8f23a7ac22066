"""What the workers of benchmarks/cpu_decode.py share: the conversation with the driver.

Start at `serve`. A worker loads its model once and prints a line of JSON. It then answers each line
it reads, {"prompt": ids, "tokens": count}, with one line: the greedy output (which goes on after
an end of text) and when its first and last token were there, in seconds after the request.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

THREADS = 2


class Output(NamedTuple):
    content: list[int] | str
    """Token ids, or text where the library gives no ids."""
    made: int
    """Number of tokens."""
    times: list[float]
    """When each token was there, on time.perf_counter."""


Generate = Callable[[list[int], int], Output]


def serve(package: str, load: Callable[[str], Generate]) -> None:
    """Load the model that the command line names, then answer until the input ends."""
    # libraries print to stdout as they like: it becomes stderr, and the answers keep the real one
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    generate = load(sys.argv[1])
    seconds = time.perf_counter() - started
    print(json.dumps({"version": version(package), "load_seconds": seconds}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        asked = time.perf_counter()
        output = generate(request["prompt"], request["tokens"])
        first, last = (output.times[i] - asked for i in (0, -1))
        answer = {"content": output.content, "made": output.made, "first": first, "last": last}
        print(json.dumps(answer), file=answers)
    answers.flush()
    os._exit(0)  # vLLM's CPU build sometimes aborts while it shuts down
