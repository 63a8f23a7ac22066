"""What a JSON schema costs: the same prompts with and without one, by turns, after the first token.

python -m benchmarks.structured_output smollm2-135m --out RESULT.json [--batches 1 8 64] [--repeats 7]
    [--device auto] [--weights bf16] [--profile]

--weights: instead of MODEL's, random ones of Llama-3.2-3B's shape (engine_speed's names; a GPU). --profile:
where the host's time goes in the largest batch with a schema, printed at the end.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engine_speed import random_decoder

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.device import pick_device
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.engine.decoder import Decoder
from tinier.engine.grammar import json_schema
from tinier.engine.text import encode_prompt
from tinier.families import open_model
from tinier.tokenizer import load_tokenizer

SCHEMA = {
    "type": "object", "properties": {"story": {"type": "string", "minLength": 450, "maxLength": 600}},
    "required": ["story"], "additionalProperties": False,
}  # fmt: skip
TOKENS = 90


def seconds_a_step(engine: Engine, prompt: list[int], batch: int, grammar: str | None) -> float:
    params = [
        SamplingParams(max_tokens=TOKENS, temperature=0.8, seed=i, grammar=grammar)
        for i in range(batch)
    ]
    requests = [engine.add(prompt, one) for one in params]
    while not all(request.output for request in requests):
        engine.step()
    before, started = sum(len(r.output) for r in requests), time.perf_counter()
    while engine.has_work:
        engine.step()
    made = sum(len(r.output) for r in requests) - before
    return (time.perf_counter() - started) / made * batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    model: Checkpoint | Decoder = open_model(arguments.model)
    tokenizer = load_tokenizer(model)
    if arguments.weights:
        model = random_decoder(arguments.weights)
    config = EngineConfig(
        max_batch_size=max(arguments.batches), max_seq_len=256, device=str(device)
    )
    engine = Engine(model, config, tokenizer=tokenizer)
    engine.warm_up()
    asked = "Tell a long story about a fisherman as JSON with the key story."
    prompt = encode_prompt(tokenizer, asked, chat=True)
    grammar = json_schema(SCHEMA)
    record: dict[str, Any] = {"command": " ".join(sys.argv), "environment": environment(device)}
    for batch in arguments.batches:
        rows: list[tuple[float, float]] = []
        for turn in range(arguments.repeats + 1):
            found = {
                kind: seconds_a_step(engine, prompt, batch, kind)
                for kind in ((None, grammar) if turn % 2 else (grammar, None))
            }
            rows.append((found[None], found[grammar]))
        ratios = [by / free for free, by in rows[1:]]  # the first warms up
        record[str(batch)] = {
            "time_ratio": statistics.median(ratios), "ratios": ratios,
            "ms_a_step_without": [1e3 * free for free, _ in rows[1:]],
        }  # fmt: skip
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(batch, f"{statistics.median(ratios):.3f} ({spread})", flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(seconds_a_step, engine, prompt, max(arguments.batches), grammar)
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


if __name__ == "__main__":
    main()
