from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import byte_tokenizer, shared_data
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.engine import load_decoder
from tinier.errors import TextError
from tinier.evaluation import MmluPlan, evaluate_mmlu, load_mmlu, mmlu
from tinier.evaluation.mmlu import CATEGORIES
from tinier.tokenizer import Tokenizer, load_tokenizer

Tiny = Callable[..., Checkpoint]
CPU = torch.device("cpu")


def test_prompt_is_the_original_s(mmlu_folder: Path) -> None:
    loaded = load_mmlu(MmluPlan(folder=mmlu_folder, shots=1, subjects=("astronomy",)))
    question = loaded.questions[1]
    assert mmlu._prompt(question, loaded.examples["astronomy"]) == (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        'astronomy dev 0?\nA. 0, one\nB. two\nC. three "quoted"\nD. four\nAnswer: A\n\n'
        'astronomy test 1?\nA. 1, one\nB. two\nC. three "quoted"\nD. four\nAnswer:'
    )


@pytest.mark.parametrize("shots", [0, 5])
def test_answers_are_those_of_transformers(
    tiny: Tiny, mmlu_folder: Path, monkeypatch: pytest.MonkeyPatch, shots: int
) -> None:
    checkpoint = tiny(max_position_embeddings=2048)
    loaded = load_mmlu(MmluPlan(folder=mmlu_folder, shots=shots))
    tokenizer = Tokenizer(byte_tokenizer())
    ids = mmlu.letter_tokens(tokenizer)
    assert ids == [258, 259, 260, 261]
    monkeypatch.setattr(mmlu, "_BATCH_TOKENS", 3000)
    found = evaluate_mmlu(load_decoder(checkpoint, device=CPU), tokenizer, loaded, shots)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    right = []
    for question in loaded.questions:
        prompt = mmlu._prompt(question, loaded.examples.get(question.subject, []))
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1]
        right.append(int(logits[ids].argmax()) == question.answer)
    assert found.accuracy == pytest.approx(sum(right) / 14)
    assert found.subjects["astronomy"] == pytest.approx(sum(right[:7]) / 7)
    assert found.categories == {
        "STEM": found.subjects["astronomy"],
        "humanities": found.subjects["philosophy"],
    }
    assert found.stderr == pytest.approx((found.accuracy * (1 - found.accuracy) / 14) ** 0.5)


@pytest.mark.parametrize("shots", [0, 2])
def test_continuations_are_scored_by_their_own_text(
    tiny: Tiny, mmlu_folder: Path, shots: int
) -> None:
    checkpoint = tiny(max_position_embeddings=2048)
    loaded = load_mmlu(MmluPlan(folder=mmlu_folder, shots=shots, format="continuation"))
    tokenizer = Tokenizer(byte_tokenizer())
    found = evaluate_mmlu(load_decoder(checkpoint, device=CPU), tokenizer, loaded, shots)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    answers = ""
    for question in loaded.questions:
        solved = "".join(
            f"Question: {q.text}\nAnswer: {q.choices[q.answer]}\n\n"
            for q in loaded.examples.get(question.subject, [])
        )
        prompt = (
            f"The following are questions about {question.subject}.\n{solved}Question: "
            f"{question.text}\nAnswer:"
        )
        before, scores = tokenizer.encode(prompt), []
        for choice in question.choices:
            ids = tokenizer.encode(f"{prompt} {choice}")
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
            after = range(len(before), len(ids))
            scores.append(sum(float(logprobs[i - 1, ids[i]]) for i in after) / len(choice))
        answers += str(int(scores.index(max(scores)) == question.answer))
    assert found.answers == answers
    assert found.format == "continuation"
    assert found.accuracy == pytest.approx(answers.count("1") / 14)


def test_unknown_formats_are_refused(mmlu_folder: Path) -> None:
    with pytest.raises(TextError, match="letters or continuation"):
        load_mmlu(MmluPlan(folder=mmlu_folder, format="cloze"))  # type: ignore[arg-type]


def test_letters_follow_a_space(smollm2: Checkpoint) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert [tokenizer.decode([token]) for token in mmlu.letter_tokens(tokenizer)] == [
        " A", " B", " C", " D",
    ]  # fmt: skip


def test_a_tokenizer_without_letters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def bytes_only(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    with pytest.raises(TextError, match="first tokens are equal"):
        mmlu.letter_tokens(Tokenizer(bytes_only))


def test_samples_are_drawn_by_the_seed(mmlu_folder: Path) -> None:
    plan = MmluPlan(folder=mmlu_folder, sample=5, seed=1)
    assert load_mmlu(plan).questions == load_mmlu(plan).questions
    other = load_mmlu(MmluPlan(folder=mmlu_folder, sample=5, seed=2))
    assert other.questions != load_mmlu(plan).questions


def test_the_whole_of_mmlu_is_read() -> None:
    loaded = load_mmlu(MmluPlan(folder=shared_data("mmlu")))
    assert len(loaded.questions) == 14_042
    subjects = {question.subject for question in loaded.questions}
    assert len(subjects) == 57
    assert set(CATEGORIES) <= subjects
    assert len(subjects - set(CATEGORIES)) == 13  # the category "other"


@pytest.mark.parametrize(
    "row", ["a,b,c,d,A", "q,a,b,c,d,E", "q,a,b,c,d,", "q,a,b,c,d,AB", '"q,a,b,c,d,A']
)
def test_a_malformed_row_is_named(mmlu_folder: Path, row: str) -> None:
    path = mmlu_folder / "test" / "astronomy_test.csv"
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(TextError, match=r"astronomy_test\.csv:8 is not a row of question"):
        load_mmlu(MmluPlan(folder=mmlu_folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shots": 6}, "shots=6. Use 0 to 5"),
        ({"subjects": ("chess",)}, r"subjects \['chess'\] are not in"),
        ({"sample": 15}, "sample=15. Use 1 to 14"),
        ({"sample": 0}, "sample=0"),
    ],
)
def test_bad_plans(mmlu_folder: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(TextError, match=message):
        load_mmlu(MmluPlan(folder=mmlu_folder, **values))  # type: ignore[arg-type]


def test_bad_folders(mmlu_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is no MMLU folder"):
        load_mmlu(MmluPlan(folder=tmp_path))
    path = mmlu_folder / "test" / "philosophy_test.csv"
    content = path.read_bytes()
    for broken, message in ((b"", "has no questions"), (b"\xff\xfe", "is not UTF-8")):
        path.write_bytes(broken)
        with pytest.raises(TextError, match=message):
            load_mmlu(MmluPlan(folder=mmlu_folder))
    path.write_bytes(content)
    (mmlu_folder / "dev" / "astronomy_dev.csv").unlink()
    with pytest.raises(TextError, match=r"astronomy_dev\.csv is missing"):
        load_mmlu(MmluPlan(folder=mmlu_folder))
    load_mmlu(MmluPlan(folder=mmlu_folder, shots=0))
