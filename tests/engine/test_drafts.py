"""Drafts: the text is the one without them, and comes in fewer steps."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import FAMILIES, quantize_tiny
from tests.engine.test_engine import prompts

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, Request, SamplingParams
from tinier.engine.drafts import PromptLookup
from tinier.engine.pace import MEASURED, Pace
from tinier.engine.runner import Shape
from tinier.engine.scheduler import Chunk

Tiny = Callable[..., Checkpoint]

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 3},
    "limited": {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 4, "logprobs": 2},
    "penalized": {
        "repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_tokens": 5, "stop_token_ids": (7,),
    },
    "drawn and penalized": {"temperature": 0.8, "presence_penalty": 1.0, "logit_bias": {5: 3.0}},
}  # fmt: skip


def run(
    model: Checkpoint,
    asked: list[tuple[list[int], SamplingParams]],
    *,
    always: int = 0,
    **options: Any,
) -> tuple[list[Request], int, Engine]:
    """The requests when they are done, and the steps that it took. always: drafts of this length in every
    step, whether they pay or not."""
    if isinstance(options.get("draft"), Checkpoint):
        options["draft"] = str(options["draft"].folder)
    config = {"max_batch_size": 4, "max_seq_len": 128, "block_size": 4, "device": "cpu"} | options
    engine = Engine(model, EngineConfig(**config))
    if always:
        engine._pace.lengths = lambda unread, rows: {  # type: ignore[method-assign]
            r: min(always, r.params.max_tokens - r.num_sampled - 1)
            for r in unread
            if r.params.max_tokens - r.num_sampled > 1
        }
    requests = [engine.add(prompt, params) for prompt, params in asked]
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    return requests, steps, engine


def check_same(got: list[Request], plain: list[Request], *where: Any) -> None:
    for ours, theirs in zip(got, plain, strict=True):
        assert (ours.output, ours.finished) == (theirs.output, theirs.finished), where
        values = [[entry.logprob for entry in one.logprobs] for one in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], abs=1e-3), where


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_text_is_that_without_drafts(
    tiny: Tiny, tmp_path: Path, sampling: str, overlap: bool
) -> None:
    model = tiny(initializer_range=0.2)
    params = SamplingParams(max_tokens=24, **SAMPLINGS[sampling])
    asked = [
        (prompt, replace(params, seed=params.seed + i, max_tokens=24 - i))
        for i, prompt in enumerate(prompts(7))
    ]
    plain, plain_steps, _ = run(model, asked)
    drafts: dict[str, Any] = {
        "itself": model, "other": tiny(name="other", initializer_range=0.2, num_hidden_layers=1),
        "prompt": "prompt", "int4": quantize_tiny(model, "int4", tmp_path / "int4"),
    }  # fmt: skip
    for name, draft in drafts.items():
        for length in (1, 3, 8):
            got, steps, engine = run(
                model,
                asked,
                draft=draft,
                always=length,
                overlap=overlap,
            )
            check_same(got, plain, name, length)
            assert engine.num_drafted == sum(r.num_drafted for r in got)
            assert engine.num_accepted == sum(r.num_accepted for r in got) <= engine.num_drafted
            if name == "itself" and "penal" not in sampling:
                assert engine.num_accepted > 0.9 * engine.num_drafted
                assert steps < plain_steps
            assert engine._pool.num_free == engine.num_blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_on_a_gpu_too(tiny: Tiny, sampling: str) -> None:
    """In float32, where no two tokens are so near that another shape of a product decides between them."""
    model = tiny(initializer_range=0.2, head_dim=64, hidden_size=128)
    params = SamplingParams(max_tokens=24, **SAMPLINGS[sampling])
    asked = [(prompt, replace(params, seed=params.seed + i)) for i, prompt in enumerate(prompts(7))]
    plain, plain_steps, _ = run(model, asked, device="cuda", block_size=16)
    for draft in (model, "prompt"):
        for length in (1, 3, 8):
            got, steps, engine = run(
                model, asked, draft=draft, always=length, device="cuda", block_size=16
            )
            check_same(got, plain, length)
            if draft is model and "penal" not in sampling:
                assert engine.num_accepted > 0.9 * engine.num_drafted
                assert steps < plain_steps
                assert any(shape.every for shape in engine.runner._captured)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_checks_drafts(tiny: Tiny, family: str) -> None:
    model = tiny(family, dtype=torch.bfloat16, head_dim=64, hidden_size=128)
    asked = [(prompt, SamplingParams(max_tokens=20)) for prompt in prompts(3)]
    plain, _, _ = run(model, asked)
    got, _, engine = run(model, asked, draft=model, always=4)
    check_same(got, plain)
    assert engine.num_accepted > 0.8 * engine.num_drafted


def test_with_too_little_room_requests_give_way_and_drafts_first(tiny: Tiny) -> None:
    model = tiny(initializer_range=0.2)
    asked = [(prompt, SamplingParams(max_tokens=40)) for prompt in prompts(6)]
    plain, _, _ = run(model, asked)
    one = run(model, asked[:1])[2]._block_bytes
    for draft, room in ((model, 2), ("prompt", 1)):
        got, _, engine = run(
            model,
            asked,
            draft=draft,
            always=4,
            kv_cache_bytes=24 * one * room,
            max_step_tokens=9,
        )
        assert engine.num_preemptions
        check_same(got, plain)


def test_prompts_that_start_alike_share_blocks_of_both_models(tiny: Tiny) -> None:
    model = tiny(initializer_range=0.2)
    start = prompts(1, longest=31)[0] * 3
    asked = [([*start, i], SamplingParams(max_tokens=12)) for i in range(5)]
    plain, _, _ = run(model, asked)
    got, _, _ = run(model, asked, draft=model, always=3, max_batch_size=2)
    check_same(got, plain)
    assert got[-1].num_reused


def test_two_processes_check_drafts_as_one(tiny: Tiny) -> None:
    model = tiny(initializer_range=0.2)
    asked = [
        (prompt, SamplingParams(max_tokens=16, temperature=i % 2))
        for i, prompt in enumerate(prompts(5))
    ]
    plain, _, _ = run(model, asked, tensor_parallel=2)
    for draft in ("prompt", model):
        got, _, engine = run(model, asked, tensor_parallel=2, draft=draft, always=3)
        check_same(got, plain)
    assert engine.num_accepted


def test_a_draft_computed_as_one_chunk_gives_the_same_logits(tiny: Tiny) -> None:
    """As a GPU's graphs do, of more rows and sequences than there are."""
    model = tiny(initializer_range=0.2)
    config = EngineConfig(
        max_batch_size=4, max_seq_len=64, block_size=4, device="cpu", draft="prompt"
    )
    engine = Engine(model, config)
    requests = [engine.add(prompt, SamplingParams(max_tokens=20)) for prompt in prompts(2)]
    while not all(request.output for request in requests):
        engine.step()
    for request, draft in zip(requests, ([1, 2, 3], [4]), strict=True):
        request.draft = draft
    chunks = engine._scheduler.schedule()
    assert [chunk.drafts for chunk in chunks] == [3, 1]
    expected = engine.runner.run(chunks)
    whole = [Chunk(chunk.request, chunk.start, chunk.count) for chunk in chunks]
    inputs = engine.runner._inputs(whole, 8, 4)
    counts = [chunk.count for chunk in chunks]
    longest = max(chunk.start + chunk.count for chunk in chunks)
    assert engine.runner._draft_shape(sum(counts), len(chunks), longest) == Shape(8, 4, False, True)
    tokens, positions, slots, adapters, contexts, seats, starts, decodes, tables = (
        engine.runner._split(inputs, 8, 4)
    )
    rows, few = (
        [t[:6] for t in (tokens, positions, slots, adapters)],
        [contexts[:2], seats[:2], starts[:3]],
    )
    cut = torch.cat([*rows, *few, decodes, tables[:2].flatten()])
    made = engine.runner._compute(cut, counts, longest, every=True)
    assert torch.allclose(made.logits, expected.logits, atol=1e-4)
    assert torch.equal(made.tokens, expected.tokens)


def test_cancelled_and_reset_requests_leave_nothing(tiny: Tiny) -> None:
    model = tiny()
    engine = Engine(model, EngineConfig(device="cpu", max_seq_len=64, draft=str(model.folder)))
    requests = [engine.add(prompt, SamplingParams(max_tokens=30)) for prompt in prompts(3)]
    for _ in range(4):
        engine.step()
    engine.cancel(requests[0])
    while engine.has_work:
        engine.step()
    engine.reset()
    (again,) = engine.generate([prompts(3)[1]], SamplingParams(max_tokens=30))
    assert again == requests[1].output
    assert len(engine._pace._agreement) == 0


def test_a_draft_with_fewer_tokens_stops_where_it_knows_no_more(tiny: Tiny) -> None:
    model = tiny(initializer_range=0.2)
    small = tiny(name="small", vocab_size=200, initializer_range=0.2)
    asked = [(prompt, SamplingParams(max_tokens=16)) for prompt in prompts(4)]
    plain, _, _ = run(model, asked)
    got, _, _ = run(model, asked, draft=small, always=4)
    check_same(got, plain)


def request(prompt: list[int], output: list[int], **params: Any) -> Request:
    made = Request(1, prompt, SamplingParams(**params), 0.0)
    made.output, made.seat = output, 0
    return made


def test_prompt_look_up_copies_what_followed() -> None:
    lookup = PromptLookup()
    one = request([1, 2, 3, 4, 5, 6, 7, 8], [9, 2, 3])
    assert lookup.propose({one: 3}) == {one: [4, 5, 6]}
    one.output += [4, 5]
    assert lookup.propose({one: 2}) == {one: [6, 7]}
    one.output += [0, 0]
    assert lookup.propose({one: 2}) == {}
    one.output += [0, 0]  # goes on as it began
    assert lookup.propose({one: 3}) == {one: [0, 0, 0]}


def test_prompt_look_up_finds_whole_tokens_and_the_latest() -> None:
    drawn = random.Random(0)
    for _ in range(2000):
        # few different tokens, some with the bytes of two others between them
        tokens = drawn.choices([0, 1, 256, 257, 65536, 2**24], k=drawn.randint(1, 30))
        expected: list[int] = []
        for count in (4, 3, 2):
            ends = range(len(tokens) - 1, count - 1, -1)
            same = [end for end in ends if tokens[end - count : end] == tokens[-count:]]
            if same:
                goes_on = itertools.cycle(tokens[same[0] :])
                expected = list(itertools.islice(goes_on, 5))
                break
        found = PromptLookup().propose({request(tokens, []): 5})
        assert list(found.values()) == ([expected] if expected else [])


def test_a_trial_costs_what_a_step_that_cannot_overlap_costs() -> None:
    trials = {}
    for checking in (1.1, 3.0):
        pace = Pace(8, model=False, overlaps=True)
        for _ in range(MEASURED):
            pace.step_took(1.0, 16)
            pace.step_took(checking, 18, drafts=True)
        requests = [request([1], [], max_tokens=10_000) for _ in range(16)]
        for one in requests:
            pace._agreement[one] = 0.0
        found = [pace.lengths(dict.fromkeys(requests, 0), 16) for _ in range(2000)]
        trials[checking] = sum(map(bool, found))
    # a hundredth of 2000 s, and a length is worth at most a tenth of a step for each token
    assert trials[1.1] <= 2000 * 0.01 / 1.1
    assert 4 <= trials[3.0] <= 2000 * 0.01 / 3.0


def measured(row: float, drafting: float, *, reading: float = 0.0) -> Pace:
    """Of steps that take 1 s and `row` for each row."""
    pace = Pace(8, model=True)
    for rows in (1, 2, 4, 8, 16, 32, 72) * 4:
        pace.step_took(1.0 + row * rows, rows)
        pace.drafting_took(drafting, 1)
        pace.drafting_took(drafting, 8)
        pace.reading_took(reading, 1)
    return pace


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("drafting", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("row", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("agreement", [0.3, 0.6, 0.8, 0.95])
def test_as_many_tokens_are_drafted_as_pay(
    agreement: float, row: float, drafting: float, count: int
) -> None:
    requests = [request([1], [], max_tokens=100) for _ in range(count)]
    pace = measured(row, drafting)
    for one in requests:
        pace._agreement[one] = agreement

    def rate(length: int) -> float:
        tokens = count * sum(agreement**j for j in range(length + 1))
        return tokens / (1 + row * count * (1 + length) + drafting * length)

    found = pace.lengths(dict.fromkeys(requests, 1), count)
    if len(found) < count:  # none, or a trial
        assert max(map(rate, range(9))) < 1.04 * rate(0)
    else:
        (length,) = set(found.values())
        assert rate(length) > 0.97 * max(map(rate, range(9)))


def test_each_request_drafts_by_its_own_agreement() -> None:
    sure, unsure, ending = (request([1], [], max_tokens=n) for n in (100, 100, 3))
    pace = measured(0.02, 0.0)
    for one in (sure, ending):
        pace.agreed(one, 99, 99)
    pace.agreed(unsure, 0, 1)
    for _ in range(30):
        pace.agreed(unsure, 0, 1)
    found = pace.lengths(dict.fromkeys((sure, unsure, ending), 1), 3)
    assert found[sure] == 8
    assert found.get(unsure, 0) <= 1
    assert found[ending] == 2  # one of the three that are left comes with the draft's


def test_what_the_draft_must_read_first_has_to_pay() -> None:
    for left, reads in ((200, True), (30, False)):
        one = request([1] * 1000, [], max_tokens=left)
        pace = measured(0.02, 0.1, reading=0.03)
        pace._agreement[one] = 0.9
        assert bool(pace.lengths({one: 1000}, 1)) == reads


def test_what_does_not_pay_is_tried_now_and_then() -> None:
    one = request([1], [], max_tokens=1000)
    pace = measured(0.5, 2.0)
    tried = [bool(pace.lengths({one: 1}, 1)) for _ in range(4000)]
    # 1 % of 1.5 s a step, for trials of 4.3 s and, each fourth, 17.2
    assert 7 <= sum(tried) <= 12
    pays = measured(0.0, 0.0)
    pays._agreement[one] = 0.9
    assert [bool(pays.lengths({one: 1}, 1)) for _ in range(297)].count(False) == 9


def test_a_first_step_that_took_long_does_not_end_all_drafting() -> None:
    """On a GPU steps without drafts overlap and those with drafts do not, so they cost more whatever their
    number; the first of them is slower than all others."""
    one = request([1], [], max_tokens=10_000)
    pace = Pace(8, model=False, overlaps=True)
    for _ in range(8):
        pace.step_took(1.0, 1)
    pace._agreement[one] = 0.9
    drafted, first = 0, 20.0
    for _ in range(400):
        lengths = pace.lengths({one: 0}, 1)
        if lengths:
            drafted += 1
            pace.step_took(first + 2.0, 1 + lengths[one], drafts=True)
            first = 0.0
        else:
            pace.step_took(1.0, 1)
    assert drafted > 200  # 2 s for 5.7 tokens


def test_steps_that_capture_do_not_end_drafting_while_a_batch_grows() -> None:
    """Without a warm-up the first step of each size is slow, and its number of rows may not come again."""
    requests = [request([1], [], max_tokens=100_000) for _ in range(16)]
    pace = Pace(8, model=False, overlaps=True)
    captured: set[int] = set()
    drafted = 0
    for step in range(1000):
        running = requests[: 1 + step // 10]
        for one in running:
            pace._agreement[one] = 0.9
        rows = len(running)
        lengths = pace.lengths(dict.fromkeys(running, 0), rows)
        if lengths:
            drafted += 1
            rows += sum(lengths.values())
            graph = next((size for size in (8, 16, 32, 64) if size >= rows), 0)
            pace.step_took(4.0 if graph in captured else 1000.0, rows, drafts=True)
            captured.add(graph)
        else:
            pace.step_took(3.0, rows)
    assert drafted > 900


def test_looking_for_drafts_takes_little_of_short_steps() -> None:
    one = request([1], [], max_tokens=10_000)
    pace = Pace(8, model=False, overlaps=True)
    for _ in range(4):
        pace.step_took(1.0, 16)
        for rows in (17, 20, 24):
            pace.step_took(90.0, rows, drafts=True)
    looks = 0
    for _ in range(1000):
        if not pace.rests():
            looks += 1
            pace.lengths({one: 0}, 16)
            pace.looked(0.3, 16)
    assert 25 < looks < 45  # 1 % of the time, 0.3 s each
    # a look that a slow moment held up does not end them; nor one when no token comes
    pace._in_vain = True
    pace.looked(50.0, 16)
    assert [pace.rests() for _ in range(40)].index(False) == 32
    pace.looked(50.0, 0)
    assert not pace.rests()


def test_looking_does_not_end_drafts_that_pay() -> None:
    one = request([1], [], max_tokens=10_000)
    pace = Pace(8, model=False, overlaps=True)
    for _ in range(4):
        pace.step_took(1.0, 1)
        for rows in range(2, 10):
            pace.step_took(2.0, rows, drafts=True)
    pace._agreement[one] = 0.9
    drafted = 0
    for _ in range(990):
        if pace.rests():
            continue
        lengths = pace.lengths({one: 0}, 1)
        drafted += bool(lengths)
        if not lengths:
            pace.looked(0.5, 1)
    assert drafted > 940  # 96 of 99


@pytest.mark.parametrize("draft", ["prompt", "model"])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_drafts_cost_is_measured_before_the_first_request(
    tiny: Tiny, draft: str, overlap: bool
) -> None:
    model = tiny(initializer_range=0.2)
    config = EngineConfig(
        device="cpu", overlap=overlap, draft=draft if draft == "prompt" else str(model.folder),
        max_seq_len=200,
    )  # fmt: skip
    engine = Engine(model, config)
    assert engine.drafter is not None
    engine.measure_drafts(engine.drafter)
    assert {*range(2, 10), 16, 32, 64} <= set(engine._pace._checking._seen)
    assert {1, 4, 16} <= set(engine._pace._steps._seen)
    assert (engine.num_drafted, engine.num_running, engine.has_work) == (0, 0, False)
    params = SamplingParams(max_tokens=12)
    plain = Engine(model, EngineConfig(device="cpu"))
    assert engine.generate([[5, 6]], params) == plain.generate([[5, 6]], params)


def test_a_machine_that_became_slower_is_no_reason_to_draft_otherwise() -> None:
    one = request([1], [], max_tokens=100)
    pace = measured(0.1, 0.2)
    pace._agreement[one] = 0.8
    before = pace.lengths({one: 1}, 1)
    for _ in range(200):  # only steps without drafts are seen, and take three times as long
        pace.step_took(3.3, 1)
    assert pace.lengths({one: 1}, 1) == before


@pytest.mark.parametrize(
    "limits",
    [{"max_seq_len": 128, "kv_cache_bytes": 30_000}, {"max_seq_len": 1}, {"max_input_len": 8}],
)
def test_drafts_are_measured_in_what_room_there_is(tiny: Tiny, limits: dict[str, int]) -> None:
    engine = Engine(tiny(), EngineConfig(device="cpu", draft="prompt", **limits))  # type: ignore[arg-type]
    assert engine.drafter is not None
    engine.measure_drafts(engine.drafter)
    assert not engine.has_work
    assert (2 in engine._pace._checking._seen) == (limits.get("max_seq_len") != 1)


def test_every_request_gets_its_token_before_any_draft(tiny: Tiny) -> None:
    model = tiny(initializer_range=0.2)
    asked = [([i], SamplingParams(max_tokens=20)) for i in range(4)]
    for most, drafts in ((4, False), (6, True)):
        _, steps, engine = run(model, asked, draft=model, always=8, max_step_tokens=most)
        assert (engine.num_drafted > 0) == drafts
        assert (steps < 20) == drafts
    # as many blocks as the tokens need, and no more: a draft takes none from another request
    room = sum(-(-(len(prompt) + 20) // 4) for prompt, _ in asked) * engine._block_bytes
    _, _, full = run(model, asked, draft="prompt", always=8, kv_cache_bytes=room)
    assert full.num_preemptions == 0


def test_processes_agree_on_room_where_one_has_the_draft(tiny: Tiny) -> None:
    model = tiny(initializer_range=0.2)
    asked = [(prompt, SamplingParams(max_tokens=40)) for prompt in prompts(5)]
    block = run(model, asked[:1])[2]._block_bytes
    plain, _, _ = run(model, asked)
    got, _, engine = run(
        model, asked, draft=model, always=3, tensor_parallel=2, kv_cache_bytes=40 * block
    )
    check_same(got, plain)
    assert engine.num_preemptions


def test_biases_of_tokens_that_a_draft_lacks_are_the_model_s_alone(tiny: Tiny) -> None:
    model = tiny(initializer_range=0.2)
    small = tiny(name="small", vocab_size=200, initializer_range=0.2)
    prompt = [token % 190 for token in prompts(1)[0]]
    asked = [(prompt, SamplingParams(max_tokens=16, logit_bias={230: -5.0, 7: 2.0}))]
    plain, _, _ = run(model, asked)
    got, _, engine = run(model, asked, draft=small, always=4)
    check_same(got, plain)
    assert engine.num_drafted


def test_trials_go_on_where_steps_overlap_and_cost_nothing_where_nothing_repeats(
    tiny: Tiny,
) -> None:
    model = tiny(initializer_range=0.2, max_position_embeddings=4096)
    asked = [(prompts(1)[0], SamplingParams(max_tokens=900))]
    for overlap in (False, True):
        engine = Engine(
            model,
            EngineConfig(device="cpu", max_seq_len=1000, overlap=overlap, draft=str(model.folder)),
        )
        engine._pace.agreed = lambda *_: None  # type: ignore[method-assign]
        engine._pace._typical = 0.01
        engine.generate([asked[0][0]], asked[0][1])
        assert 4 < engine.num_drafted < 100
    drawn = [(asked[0][0], SamplingParams(max_tokens=300, temperature=3.0))]
    _, steps, looking = run(model, drawn, draft="prompt", overlap=True, max_seq_len=1000)
    assert looking.num_drafted < 60
    assert steps < 300 + 60
