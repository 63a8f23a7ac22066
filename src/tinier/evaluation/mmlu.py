"""MMLU (arXiv 2009.03300) by log-likelihood, from a folder in the original layout.

Start at `load_mmlu`, which checks every row before any model is loaded, then `evaluate_mmlu`. Each
subject counts by its questions (micro average), as the original reports. Two forms:

- letters, the original's: a headline with the subject, the first `shots` questions of
  `dev/SUBJECT_dev.csv` with their answers, then the question and its choices. The answer is the letter
  that the model finds most likely next.
- continuation, as SmolLM2's makers ask (lighteval's `mmlu_cloze`): the choices are not shown; the answer
  is the one whose text, divided by its number of characters, is most likely behind the question. Small
  models are at chance by letters, and not by this.
"""

import csv
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tinier.engine import Decoder
from tinier.errors import TextError
from tinier.evaluation.likelihood import score_continuations
from tinier.progress import bar
from tinier.text import read_text
from tinier.tokenizer import Tokenizer

MmluFormat = Literal["letters", "continuation"]
LETTERS = "ABCD"
_BATCH_TOKENS = 4096
_LONGEST_FIELD = 2**27
_STEM = "abstract_algebra anatomy astronomy college_biology college_chemistry " \
    "college_computer_science college_mathematics college_physics computer_security " \
    "conceptual_physics electrical_engineering elementary_mathematics high_school_biology " \
    "high_school_chemistry high_school_computer_science high_school_mathematics " \
    "high_school_physics high_school_statistics machine_learning"  # fmt: skip
_HUMANITIES = "formal_logic high_school_european_history high_school_us_history " \
    "high_school_world_history international_law jurisprudence logical_fallacies moral_disputes " \
    "moral_scenarios philosophy prehistory professional_law world_religions"  # fmt: skip
_SOCIAL = "econometrics high_school_geography high_school_government_and_politics " \
    "high_school_macroeconomics high_school_microeconomics high_school_psychology " \
    "human_sexuality professional_psychology public_relations security_studies sociology " \
    "us_foreign_policy"  # fmt: skip
CATEGORIES = (
    dict.fromkeys(_STEM.split(), "STEM")
    | dict.fromkeys(_HUMANITIES.split(), "humanities")
    | dict.fromkeys(_SOCIAL.split(), "social sciences")
)
_OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class MmluPlan:
    folder: Path
    """Holds dev/SUBJECT_dev.csv and test/SUBJECT_test.csv."""
    shots: int = 5
    """Solved questions before each, 0 to 5."""
    subjects: tuple[str, ...] = ()
    """Subjects to ask; empty: all in the folder."""
    sample: int | None = None
    """Ask so many questions, drawn with `seed` from all of them; None: all."""
    format: MmluFormat = "letters"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    subject: str
    text: str
    choices: tuple[str, str, str, str]
    answer: int
    """Index of the right choice."""


@dataclass(frozen=True, slots=True)
class Mmlu:
    """Questions to ask, and the solved examples of each subject."""

    questions: list[Question]
    examples: dict[str, list[Question]]
    format: MmluFormat = "letters"


@dataclass(frozen=True, kw_only=True)
class MmluResult:
    accuracy: float
    stderr: float
    """Binomial standard error of `accuracy`."""
    questions: int
    shots: int
    subjects: dict[str, float]
    """Accuracy by subject."""
    categories: dict[str, float]
    """Accuracy by category: STEM, humanities, social sciences, other."""
    format: MmluFormat = "letters"
    answers: str = ""
    """For each question, in order, 1 (right) or 0; empty in results of older versions"""


def load_mmlu(plan: MmluPlan) -> Mmlu:
    """Read and check the questions. Raises TextError naming file and line of a malformed row."""
    if not 0 <= plan.shots <= 5:
        raise TextError(f"shots={plan.shots}. Use 0 to 5; the dev files have five questions each.")
    if plan.format not in get_args(MmluFormat):
        raise TextError(f"format={plan.format!r}. Use {' or '.join(get_args(MmluFormat))}.")
    tests = {p.name.removesuffix("_test.csv"): p for p in plan.folder.glob("test/*_test.csv")}
    if not tests:
        raise TextError(
            f"{plan.folder} is no MMLU folder: it has no test/SUBJECT_test.csv. "
            "Give the folder that holds dev/ and test/ of the original archive."
        )
    unknown = sorted(set(plan.subjects) - set(tests))
    if unknown:
        raise TextError(
            f"MMLU subjects {unknown} are not in {plan.folder}. Use some of {', '.join(sorted(tests))}."
        )
    subjects = sorted(plan.subjects or tests)
    questions = [q for subject in subjects for q in _read(tests[subject], subject)]
    if plan.sample is not None:
        if not 1 <= plan.sample <= len(questions):
            raise TextError(f"sample={plan.sample}. Use 1 to {len(questions)}.")
        questions = random.Random(plan.seed).sample(questions, plan.sample)
    examples: dict[str, list[Question]] = {}
    for subject in sorted({q.subject for q in questions}) if plan.shots else []:
        path = plan.folder / "dev" / f"{subject}_dev.csv"
        if not path.exists():
            raise TextError(f"{path} is missing; it holds the solved examples. Or use 0 shots.")
        examples[subject] = _read(path, subject)[: plan.shots]
        if len(examples[subject]) < plan.shots:
            raise TextError(f"{path} has fewer than {plan.shots} questions. Use fewer shots.")
    return Mmlu(questions, examples, plan.format)


def evaluate_mmlu(decoder: Decoder, tokenizer: Tokenizer, mmlu: Mmlu, shots: int) -> MmluResult:
    """Ask every question. Batches are padded on the right, behind the token that is read."""
    if mmlu.format == "continuation":
        return score(mmlu, _continued(decoder, tokenizer, mmlu), shots)
    letters = torch.tensor(letter_tokens(tokenizer))
    prompts = question_prompts(tokenizer, mmlu)
    check_prompts(prompts, mmlu, decoder.geometry.max_positions)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    right = [False] * len(prompts)
    with bar("MMLU", len(prompts)) as advance:
        for batch in _batches(order, [len(p) for p in prompts]):
            answers = _answers(decoder, [prompts[i] for i in batch], letters)
            for i, answer in zip(batch, answers, strict=True):
                right[i] = answer == mmlu.questions[i].answer
            advance(len(batch))
    return score(mmlu, right, shots)


def _continued(decoder: Decoder, tokenizer: Tokenizer, mmlu: Mmlu) -> list[bool]:
    """Whether each question's most likely choice, by its log-probability a character, is the right one."""
    prompts = question_prompts(tokenizer, mmlu)
    pairs = []
    for question, prompt, text in zip(mmlu.questions, prompts, _texts(mmlu), strict=True):
        for choice in question.choices:
            whole = tokenizer.encode(f"{text} {choice}")
            # a choice that is empty, or joins the prompt's last token, is scored from there on
            start = min(len(prompt), len(whole) - 1)
            pairs.append((whole[:start], whole[start:]))
    check_prompts([context + rest for context, rest in pairs], mmlu, decoder.geometry.max_positions)
    scores = score_continuations(decoder, pairs, "MMLU")
    right = []
    for index, question in enumerate(mmlu.questions):
        own = scores[4 * index : 4 * index + 4]
        each = [
            score.logprob / max(1, len(choice))
            for score, choice in zip(own, question.choices, strict=True)
        ]
        right.append(each.index(max(each)) == question.answer)
    return right


def question_prompts(tokenizer: Tokenizer, mmlu: Mmlu) -> list[list[int]]:
    """Token ids of each question behind its subject's solved examples."""
    return [tokenizer.encode(text) for text in _texts(mmlu)]


def _texts(mmlu: Mmlu) -> list[str]:
    prompt = _prompt if mmlu.format == "letters" else _open_prompt
    return [prompt(q, mmlu.examples.get(q.subject, [])) for q in mmlu.questions]


def check_prompts(prompts: list[list[int]], mmlu: Mmlu, room: int) -> None:
    """Raise TextError for questions that are longer than `room` tokens. prompts: as many of each."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) > room:
        question = mmlu.questions[longest * len(mmlu.questions) // len(prompts)]
        raise TextError(
            f"a question of {question.subject} with its examples has {len(prompts[longest])} tokens "
            f"({question.text[:60]!r}…), and this model has room for {room}. Use fewer shots, or leave the "
            "subject out."
        )


def _read(path: Path, subject: str) -> list[Question]:
    questions = []
    csv.field_size_limit(_LONGEST_FIELD)
    with io.StringIO(read_text(path), newline="") as stream:
        rows = csv.reader(stream)
        for row in _rows(path, rows):
            if len(row) != 6 or row[5].strip() not in tuple(LETTERS):
                raise TextError(
                    f"{path}:{rows.line_num} is not a row of question, four choices and one letter "
                    f"of {LETTERS}; it has {len(row)} fields: {row!r:.80}"
                )
            choices = (row[1], row[2], row[3], row[4])
            questions.append(Question(subject, row[0], choices, LETTERS.index(row[5].strip())))
    if not questions:
        raise TextError(f"{path} has no questions. Download MMLU again.")
    return questions


def _rows(path: Path, rows: Any) -> Iterator[list[str]]:
    """The rows of a CSV file but the blank ones. Raises TextError."""
    try:
        yield from (row for row in rows if row)
    except csv.Error as error:
        raise TextError(f"{path}:{rows.line_num} is not CSV: {error}.") from None


def _prompt(question: Question, examples: list[Question]) -> str:
    topic = question.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    solved = "".join(f"{_ask(q)} {LETTERS[q.answer]}\n\n" for q in examples)
    return head + solved + _ask(question)


def _open_prompt(question: Question, examples: list[Question]) -> str:
    """Without the choices."""
    topic = question.subject.replace("_", " ")
    solved = "".join(f"Question: {q.text}\nAnswer: {q.choices[q.answer]}\n\n" for q in examples)
    head = f"The following are questions about {topic}.\n"
    return f"{head}{solved}Question: {question.text}\nAnswer:"


def _ask(question: Question) -> str:
    lines = [f"{letter}. {c}" for letter, c in zip(LETTERS, question.choices, strict=True)]
    return "\n".join([question.text, *lines, "Answer:"])


def letter_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token that follows "Answer:" for each letter.

    Raises TextError for a tokenizer in which they do not differ there.
    """
    before = tokenizer.encode("Answer:", special=False)
    tokens = []
    for letter in LETTERS:
        after = tokenizer.encode(f"Answer: {letter}", special=False)
        tokens.append(after[len(before)])
    if len(set(tokens)) < len(LETTERS):
        raise TextError(
            "this model's tokenizer splits ' A' to ' D' so that the first tokens are equal; MMLU by "
            "log-likelihood of one token cannot be asked of it. Leave MMLU out."
        )
    return tokens


def _batches(order: list[int], lengths: list[int]) -> list[list[int]]:
    """Prompts of similar length together, at most _BATCH_TOKENS padded tokens a batch."""
    batches: list[list[int]] = []
    for i in order:  # longest first: a batch is as wide as its first prompt
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= _BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _answers(decoder: Decoder, prompts: list[list[int]], letters: Tensor) -> list[int]:
    longest = max(map(len, prompts))
    windows = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
    last = torch.tensor([len(p) - 1 for p in prompts])
    hidden = decoder.hidden_states(windows)  # causal: what follows the last token cannot change it
    states = hidden[torch.arange(len(prompts)), last]
    answers: list[int] = decoder.logits(states)[:, letters].argmax(dim=-1).tolist()
    return answers


def score(mmlu: Mmlu, right: list[bool], shots: int) -> MmluResult:
    """The result of questions that were answered rightly or not."""
    by_subject: dict[str, list[bool]] = {}
    by_category: dict[str, list[bool]] = {}
    for question, good in zip(mmlu.questions, right, strict=True):
        by_subject.setdefault(question.subject, []).append(good)
        category = CATEGORIES.get(question.subject, _OTHER)
        by_category.setdefault(category, []).append(good)
    accuracy = sum(right) / len(right)
    return MmluResult(
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / len(right)),
        questions=len(right),
        shots=shots,
        subjects={name: sum(rows) / len(rows) for name, rows in sorted(by_subject.items())},
        categories={name: sum(rows) / len(rows) for name, rows in sorted(by_category.items())},
        format=mmlu.format,
        answers="".join(str(int(good)) for good in right),
    )
