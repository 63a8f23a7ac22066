"""llama.cpp's likeliest next tokens after prompts, with their log-probabilities. In its own environment:

    ENV/bin/python benchmarks/peers/llamacpp_next.py FILE.gguf LETTER COUNT < PROMPTS.json

PROMPTS: lists of token ids. LETTER: the id of a token that is a letter; it is drawn whatever is likely, for
half a character has no log-probabilities here. Prints a line of JSON: for each prompt the COUNT likeliest,
[id, log-probability].
"""

import json
import sys

import xllamacpp


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel = 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    server = xllamacpp.Server(params)
    letter, count = int(sys.argv[2]), int(sys.argv[3])
    found = []
    for prompt in json.load(sys.stdin):
        said: list[dict] = []
        asked = {
            "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "logprobs": count, "n_probs": count,
            "logit_bias": [[letter, 1000.0]], "cache_prompt": False, "stream": False,
        }  # fmt: skip
        answer = server.handle_completions(asked, said.append)
        content = (said[0] if said else answer)["choices"][0]["logprobs"]["content"]
        found.append([[token["id"], token["logprob"]] for token in content[0]["top_logprobs"]])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
