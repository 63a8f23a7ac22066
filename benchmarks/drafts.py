"""Tokens a second with drafts against none: the same requests through the same weights, by turns.

    python -m benchmarks.drafts MODEL --drafts prompt runs/demo/variants/int4 --out RESULT.json
        [--tasks text chat rewrite] [--batches 1 4 16] [--output-length 128] [--repeats 5]
        [--temperature 0] [--device auto]

text: the built-in held-out text goes on; chat: questions by the chat template; rewrite: a paragraph of the
text to be said again, which a draft may copy from the prompt. Texts are compared: on a CPU they are equal.
A row's ratio is the median over repeats of (seconds without / seconds with), both timed in turn.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinier.benchmark import environment
from tinier.device import pick_device
from tinier.engine import Engine, EngineConfig, SamplingParams, load_decoder
from tinier.engine.drafts import DraftModel
from tinier.engine.text import encode_prompt
from tinier.families import open_model
from tinier.text import load_documents
from tinier.tokenizer import check_same_tokens, load_tokenizer

QUESTIONS = (
    "Explain in a few sentences how a steam engine works.",
    "Write a short letter that thanks a neighbour for her help.",
    "What are the main differences between a frog and a toad?",
    "Give me five tips for learning a new language.",
    "Tell a short story about a fisherman and a storm.",
    "Why is the sky blue, and why is it red in the evening?",
    "Write a Python function that counts the words of a text.",
    "Describe the city of Rome to someone who has never been there.",
)
PARAGRAPH_WORDS = 90
LONGEST = 640


def prompts(task: str, tokenizer: Any, documents: list[Any], count: int) -> list[list[int]]:
    text = "\n".join(str(document) for document in documents)
    words = text.split()
    found = []
    for i in range(count):
        part = words[i * 400 : i * 400 + PARAGRAPH_WORDS]
        if task == "text":
            found.append(encode_prompt(tokenizer, " ".join(part), chat=False))
        elif task == "chat":
            found.append(encode_prompt(tokenizer, QUESTIONS[i % len(QUESTIONS)], chat=True))
        else:
            asked = "Write this text again, word for word:\n\n" + " ".join(part)
            found.append(encode_prompt(tokenizer, asked, chat=True))
    return found


def ready(engine: Engine) -> None:
    engine.warm_up()
    runners = [engine.runner]
    if isinstance(engine.drafter, DraftModel):
        runners.append(engine.drafter.runner)
    for runner in runners:  # memory that is touched for the first time is slow
        for cache in runner._caches:
            cache.keys.zero_()
            cache.values.zero_()


def timed(
    engine: Engine, asked: list[list[int]], params: SamplingParams
) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    outputs = engine.generate(asked, params)
    return time.perf_counter() - started, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--drafts", nargs="+", required=True)
    parser.add_argument("--tasks", nargs="+", default=["text", "chat", "rewrite"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    base = open_model(arguments.model)
    tokenizer, documents = load_tokenizer(base), load_documents("builtin")
    decoder = load_decoder(base, device=device)
    config = EngineConfig(
        max_batch_size=max(arguments.batches), max_seq_len=LONGEST, device=str(device)
    )  # fmt: skip
    record: dict[str, Any] = {
        "command": " ".join(sys.argv), "environment": environment(device), "rows": {},
    }  # fmt: skip
    plain = Engine(decoder, config, tokenizer=tokenizer)
    ready(plain)
    for name in arguments.drafts:
        if name != "prompt":
            check_same_tokens(base, open_model(name))
        drafting = Engine(decoder, replace(config, draft=name), tokenizer=tokenizer)
        ready(drafting)
        for task in arguments.tasks:
            for batch in arguments.batches:
                every = prompts(task, tokenizer, documents, batch * (arguments.repeats + 1))
                ratios, rates, same = [], [], 0
                before = drafting.num_drafted, drafting.num_accepted
                for turn in range(arguments.repeats + 1):
                    asked = every[turn * batch : (turn + 1) * batch]
                    params = SamplingParams(
                        max_tokens=arguments.output_length,
                        temperature=arguments.temperature,
                        seed=turn,
                    )
                    found = {}
                    for engine in (plain, drafting) if turn % 2 else (drafting, plain):
                        found[engine] = timed(engine, asked, params)
                    if turn:  # the first warms up
                        ratios.append(found[plain][0] / found[drafting][0])
                        rates.append(batch * arguments.output_length / found[plain][0])
                    same += sum(
                        a == b for a, b in zip(found[plain][1], found[drafting][1], strict=True)
                    )
                drafted = drafting.num_drafted - before[0]
                row = {
                    "ratio": statistics.median(ratios), "ratios": ratios,
                    "tokens_per_s_without": statistics.median(rates),
                    "drafted": drafted, "accepted": drafting.num_accepted - before[1],
                    "texts": len(every), "equal_texts": same,
                }  # fmt: skip
                record["rows"][f"{name}, {task}, {batch}"] = row
                share = row["accepted"] / max(1, drafted)
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                print(
                    f"{name} {task} batch {batch}: {row['ratio']:.2f}x ({spread}) "
                    f"of {row['tokens_per_s_without']:.0f} tok/s, {share:.2f} of {drafted} right, "
                    f"{same}/{len(every)} texts equal", flush=True,
                )  # fmt: skip
                arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
