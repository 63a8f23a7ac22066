"""What the workers of benchmarks/cpu_decode.py share: the conversation with the driver.

Start at `serve`. A worker loads its model once and prints a line of JSON. It then answers each line
it reads, {"prompts": [ids], "tokens": count}, with one line: the first one's greedy output (which goes on
after an end of text), and when every request's first token and the last of all were there, in seconds after
the request.
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


Generate = Callable[[list[list[int]], int], list[Output]]


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
        outputs = generate(request["prompts"], request["tokens"])
        first, last = (max(output.times[i] for output in outputs) - asked for i in (0, -1))
        made = [output.made for output in outputs]
        answer = {"content": outputs[0].content, "made": made, "first": first, "last": last}
        print(json.dumps(answer), file=answers)
    answers.flush()
    os._exit(0)  # vLLM's CPU build sometimes aborts while it shuts down
