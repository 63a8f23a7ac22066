"""Prefix reuse, overlapped steps, cancelling, several outputs, log-probabilities, stop strings; a soak."""

import gc
import random
from collections.abc import Callable

import pytest
import torch
from tests.conftest import byte_tokenizer
from tests.engine.test_engine import prompts

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, Request, SamplingParams
from tinier.errors import InputError
from tinier.tokenizer import Tokenizer

Tiny = Callable[..., Checkpoint]
BLOCK_BYTES = 2 * 4 * 2 * 16 * 4 * 4  # k and v, layers, kv heads, head dim, float32, block of 4


def engine(checkpoint: Checkpoint, **limits: object) -> Engine:
    config: dict[str, object] = {"max_batch_size": 4, "max_seq_len": 128, "block_size": 4}
    config |= limits
    return Engine(
        checkpoint, EngineConfig(device="cpu", **config), tokenizer=Tokenizer(byte_tokenizer())  # type: ignore[arg-type]
    )  # fmt: skip


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_a_known_prefix_is_not_computed_again_and_changes_nothing(tiny: Tiny) -> None:
    checkpoint = tiny("qwen3")
    shared = prompts(1, longest=31)[0] * 2
    asked = [shared + tail for tail in ([1, 2], [1, 2, 3, 4, 5], [9])]
    params = SamplingParams(max_tokens=8)
    plain = engine(checkpoint, reuse_prefixes=False).generate(asked, params)
    ours = engine(checkpoint)
    for prompt, expected in zip(asked, plain, strict=True):
        request = ours.add(prompt, params)
        run(ours)
        assert request.output == expected
    assert request.num_reused == len(shared) // 4 * 4
    again = ours.add(asked[1], params)
    run(ours)
    # at least one token is computed
    assert again.num_reused == (len(asked[1]) - 1) // 4 * 4
    assert again.output == plain[1]
    assert ours.num_free_blocks == ours.num_blocks


def test_prompts_of_one_step_share_their_beginning(tiny: Tiny) -> None:
    shared = prompts(1, longest=31)[0]
    asked = [[*shared, i] for i in range(4)]
    params = SamplingParams(max_tokens=6)
    checkpoint = tiny()
    ours = engine(checkpoint)
    requests = [ours.add(prompt, params) for prompt in asked]
    run(ours)
    assert [r.num_reused > 0 for r in requests] == [False, True, True, True]
    plain = engine(checkpoint, reuse_prefixes=False).generate(asked, params)
    assert [r.output for r in requests] == plain


def test_blocks_of_old_prefixes_are_taken_when_memory_is_short(tiny: Tiny) -> None:
    checkpoint = tiny()
    small = engine(checkpoint, kv_cache_bytes=16 * BLOCK_BYTES)
    roomy = engine(checkpoint, reuse_prefixes=False)
    params = SamplingParams(max_tokens=20)
    for prompt in prompts(12, seed=5):
        assert small.generate([prompt], params) == roomy.generate([prompt], params)
    assert small.num_free_blocks == small.num_blocks == 16


def test_steps_that_overlap_give_the_same_text(tiny: Tiny) -> None:
    checkpoint = tiny("mistral", sliding_window=12)
    asked = prompts(9, seed=4, longest=50)
    for params in (
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, repetition_penalty=1.2, seed=3),
    ):
        stop = engine(checkpoint).generate(asked[:1], params)[0][7]
        params = SamplingParams(
            max_tokens=20, temperature=params.temperature, top_p=params.top_p, seed=3,
            repetition_penalty=params.repetition_penalty, stop_token_ids=(stop,),
        )  # fmt: skip
        plain = engine(checkpoint).generate(asked, params)
        for limits in ({}, {"kv_cache_bytes": 24 * BLOCK_BYTES}, {"max_step_tokens": 7}):
            ours = engine(checkpoint, overlap=True, **limits)
            assert ours.generate(asked, params) == plain
            assert ours.num_free_blocks == ours.num_blocks


def test_cancelling_frees_at_once_wherever_the_request_is(tiny: Tiny) -> None:
    for overlap in (False, True):
        ours = engine(tiny(), max_batch_size=2, overlap=overlap)
        params = SamplingParams(max_tokens=30)
        requests = [ours.add(prompt, params) for prompt in prompts(4, longest=20)]
        for _ in range(4):
            ours.step()
        held = ours.num_free_blocks
        ours.cancel(requests[0])
        assert ours.num_free_blocks > held
        ours.cancel(requests[3])  # it waits
        ours.cancel(requests[3])
        run(ours)
        assert [r.finished for r in requests] == ["cancelled", "length", "length", "cancelled"]
        assert len(requests[0].output) < 30
        assert not requests[3].output
        ours.cancel(requests[1])
        assert requests[1].finished == "length"
        assert ours.num_free_blocks == ours.num_blocks


def test_several_outputs_have_seeds_of_their_own(tiny: Tiny) -> None:
    ours = engine(tiny())
    prompt = prompts(1, longest=31)[0]
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=5, n=3)
    requests = ours.add_all(prompt, params)
    run(ours)
    singles = [
        engine(tiny(name=f"m{i}")).generate(
            [prompt], SamplingParams(max_tokens=10, temperature=1.0, seed=5 + i)
        )[0]
        for i in range(3)
    ]
    assert [r.output for r in requests] == singles
    with pytest.raises(InputError, match="Use add_all"):
        ours.add(prompt, params)


def test_logprobs_are_those_of_the_whole_text_at_once(tiny: Tiny) -> None:
    checkpoint = tiny()
    for limits in ({}, {"max_step_tokens": 5}, {"overlap": True}):
        ours = engine(checkpoint, **limits)
        prompt = prompts(1, longest=31)[0]
        params = SamplingParams(max_tokens=6, logprobs=3, prompt_logprobs=2, prompt_logits=True)
        plain = ours.add(prompt, SamplingParams(max_tokens=6))
        request = ours.add(prompt, params)
        run(ours)
        assert request.output == plain.output
        text = torch.tensor([prompt + request.output])
        logits = ours.decoder.logits(ours.decoder.hidden_states(text))[0].float()
        assert torch.allclose(torch.cat(request.prompt_logits), logits[: len(prompt)], atol=1e-4)
        expected = torch.log_softmax(logits, dim=-1)
        known = request.prompt_logprobs + request.logprobs
        assert [entry.token for entry in known] == text[0, 1:].tolist()
        assert len(request.prompt_logprobs) == len(prompt) - 1
        for row, entry in enumerate(known):
            assert entry.logprob == pytest.approx(expected[row, entry.token].item(), abs=1e-4)
            count = 2 if row < len(prompt) - 1 else 3
            best = expected[row].topk(count)
            assert list(entry.top) == best.indices.tolist()
            assert list(entry.top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_prompt_logprobs_survive_preemption(tiny: Tiny) -> None:
    checkpoint = tiny()
    params = SamplingParams(max_tokens=30, prompt_logprobs=0)
    asked = prompts(6, seed=2, longest=40)
    roomy = engine(checkpoint)
    expected = [roomy.add(prompt, params) for prompt in asked]
    run(roomy)
    tight = engine(checkpoint, kv_cache_bytes=20 * BLOCK_BYTES, max_step_tokens=6)
    requests = [tight.add(prompt, params) for prompt in asked]
    run(tight)
    assert tight.num_preemptions > 0
    for ours, theirs in zip(requests, expected, strict=True):
        assert [e.token for e in ours.prompt_logprobs] == [e.token for e in theirs.prompt_logprobs]
        assert [e.logprob for e in ours.prompt_logprobs] == pytest.approx(
            [e.logprob for e in theirs.prompt_logprobs], abs=1e-4
        )


def test_stop_strings_end_the_text(tiny: Tiny) -> None:
    checkpoint = tiny()
    prompt = [ord(letter) for letter in "green bottles"]
    whole = engine(checkpoint).generate([prompt], SamplingParams(max_tokens=30))[0]
    text = byte_tokenizer().decode(whole)
    at = next(i for i in range(4, len(text) - 2) if text.find(text[i : i + 2]) == i)
    stop = text[at : at + 2]
    for overlap in (False, True):
        ours = engine(checkpoint, overlap=overlap)
        request = ours.add(prompt, SamplingParams(max_tokens=30, stop=(stop, "never there")))
        run(ours)
        assert request.finished == "stop"
        assert request.stream is not None
        assert request.stream.text == text[:at]
        assert ours.num_free_blocks == ours.num_blocks
    bare = Engine(checkpoint, EngineConfig(device="cpu"))
    with pytest.raises(InputError, match="stop strings need the tokenizer"):
        bare.add(prompt, SamplingParams(stop=("x",)))


def test_limits_on_prompts_are_told(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="this engine takes 10"):
        engine(tiny(), max_input_len=10).add([1] * 11, SamplingParams(max_tokens=1))
    with pytest.raises(InputError, match="less than max_seq_len"):
        EngineConfig(max_input_len=64, max_seq_len=64)
    with pytest.raises(InputError, match=r"logit_bias has ids outside 0\.\.263"):
        engine(tiny(name="b")).add([1], SamplingParams(max_tokens=2, logit_bias={999: 1.0}))


def soak(checkpoint: Checkpoint, count: int, seed: int, **limits: object) -> None:
    """Random arrivals, lengths, prefixes, cancels and too little memory; every answer is checked."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(256) for _ in range(rng.randrange(4, 30))] for _ in range(5)]
    ours = engine(checkpoint, kv_cache_bytes=40 * BLOCK_BYTES, **limits)
    waiting = count
    live: list[tuple[Request, int | None]] = []
    done: list[tuple[Request, int | None]] = []
    while waiting or ours.has_work:
        for _ in range(rng.randrange(3)):
            if not waiting:
                break
            tail = [rng.randrange(256) for _ in range(rng.randrange(1, 40))]
            params = SamplingParams(
                max_tokens=rng.randrange(1, 30), temperature=rng.choice([0.0, 0.0, 0.8]),
                seed=rng.randrange(5), stop_token_ids=(rng.randrange(256),),
            )  # fmt: skip
            request = ours.add(rng.choice(beginnings) + tail, params)
            live.append((request, rng.choice([None, None, None, rng.randrange(20)])))
            waiting -= 1
        ours.step()
        for entry in list(live):
            request, patience = entry
            if patience is not None and len(request.output) >= patience:
                ours.cancel(request)
            if request.finished:
                live.remove(entry)
                done.append(entry)
    assert not live
    assert len(done) == count
    assert ours.num_free_blocks == ours.num_blocks
    assert ours.num_preemptions > 0
    alone = engine(checkpoint, reuse_prefixes=False, max_batch_size=1)
    for request, _ in done:
        (expected,) = alone.generate([request.prompt], request.params)
        if request.finished == "cancelled":
            expected = expected[: len(request.output)]
        assert request.output == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_every_answer_is_right_under_any_schedule(tiny: Tiny, overlap: bool) -> None:
    soak(tiny("qwen2"), 60, seed=1, overlap=overlap)


@pytest.mark.slow
def test_a_long_soak(tiny: Tiny) -> None:
    for seed in range(4):
        soak(tiny(name=f"m{seed}"), 250, seed=seed, overlap=True, max_step_tokens=16)


def _live() -> int:
    # type, not isinstance: asking some of torch's objects for their class is deprecated
    return sum(issubclass(type(o), (torch.Tensor, Request)) for o in gc.get_objects())


@pytest.mark.slow
def test_nothing_is_left_after_ten_thousand_requests(tiny: Tiny) -> None:
    checkpoint = tiny(num_hidden_layers=1)
    ours = engine(checkpoint, max_batch_size=32, overlap=True)
    rng = random.Random(0)

    def serve(count: int) -> None:
        for _ in range(count // 100):
            for i in range(100):
                params = SamplingParams(
                    max_tokens=2, temperature=float(i % 2), frequency_penalty=float(i % 3 == 0)
                )
                ours.add([rng.randrange(256) for _ in range(rng.randrange(1, 9))], params)
            run(ours)

    serve(1000)
    gc.collect()
    before = _live()
    serve(9000)
    gc.collect()
    after = _live()
    assert after <= before + 5
    assert ours.num_free_blocks == ours.num_blocks
