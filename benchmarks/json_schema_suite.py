"""Schemas of JSON Schema's own test suite, followed by a model or refused by name.

    pip download --no-deps --no-binary jsonschema jsonschema==4.25.1; tar xzf jsonschema-4.25.1.tar.gz
    python -m benchmarks.json_schema_suite smollm2-135m --suite jsonschema-4.25.1/json/tests
        --out RESULT.json [--count 1000] [--max-tokens 160] [--device auto]

So many different schemas are drawn from drafts 7, 2019-09 and 2020-12. A text is judged by the jsonschema
package, by the schema's own draft. `valid`: the text is; `refused`: the schema is answered with a reason
before anything is computed; `cut off`: the text ends at its token limit; `wrong`: it is not the schema's.
"""

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from jsonschema.validators import (  # type: ignore[import-untyped]
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
)

from tinier.benchmark import environment
from tinier.device import pick_device
from tinier.engine import Engine, EngineConfig, Request, SamplingParams
from tinier.engine.grammar import json_schema
from tinier.engine.text import encode_prompt
from tinier.errors import InputError
from tinier.families import open_model
from tinier.tokenizer import load_tokenizer

DRAFTS: dict[str, Any] = {
    "draft7": Draft7Validator, "draft2019-09": Draft201909Validator, "draft2020-12": Draft202012Validator,
}  # fmt: skip
PROMPT = "Write an example as JSON."


def schemas(suite: Path, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Drafts and schemas, each schema once."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for draft in DRAFTS:
        for path in sorted((suite / draft).rglob("*.json")):
            for group in json.loads(path.read_text()):
                if isinstance(group["schema"], dict):  # true and false are no schema of an answer
                    key = json.dumps(group["schema"], sort_keys=True)
                    found.setdefault(key, (draft, group["schema"]))
    every = list(found.values())
    random.Random(0).shuffle(every)
    return every[:count]


def judge(draft: str, schema: dict[str, Any], text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return "no JSON"
    try:
        validator = DRAFTS[draft](schema)
        return "valid" if validator.is_valid(value) else "wrong"
    except Exception as error:  # references to documents elsewhere
        return f"not judged: {type(error).__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    model = open_model(arguments.model)
    tokenizer = load_tokenizer(model)
    config = EngineConfig(max_batch_size=16, max_seq_len=512, device=arguments.device)
    engine = Engine(model, config, tokenizer=tokenizer)
    prompt = encode_prompt(tokenizer, PROMPT, chat=True)
    asked = schemas(arguments.suite, arguments.count)
    refused: Counter[str] = Counter()
    requests: list[tuple[str, dict[str, Any], Request]] = []
    for seed, (draft, schema) in enumerate(asked):
        try:
            params = SamplingParams(
                max_tokens=arguments.max_tokens, temperature=1.0, top_p=0.95, seed=seed,
                grammar=json_schema(schema), stop_token_ids=(tokenizer.eos_token_id or 0,),
            )  # fmt: skip
            requests.append((draft, schema, engine.add(prompt, params)))
        except InputError as error:
            refused[str(error)[:100]] += 1
    while engine.has_work:
        engine.step()
    results: Counter[str] = Counter({"refused": sum(refused.values())})
    wrong = []
    for draft, schema, request in requests:
        text = tokenizer.decode(request.output, skip_special_tokens=True)
        result = "cut off" if request.finished == "length" else judge(draft, schema, text)
        results[result] += 1
        if result in ("wrong", "no JSON"):
            wrong.append({"draft": draft, "schema": schema, "text": text})
    record = {
        "command": " ".join(sys.argv), "environment": environment(pick_device(arguments.device)),
        "schemas": len(asked), "results": dict(results), "refused": dict(refused.most_common()),
        "wrong": wrong,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(dict(results), f"{len(refused)} reasons of refusal")


if __name__ == "__main__":
    main()
