"""lm-evaluation-harness on tinier's engine: its tasks, measured on what serves.

Start at `run_tasks`. lm-eval has no way to announce a model from outside; this module adds `tinier` to its
models and can stand in for its command:

    python -m tinier.evaluation.harness run --model tinier --model_args pretrained=smollm2-135m
        --tasks arc_easy

Needs the extra `eval`. Log-likelihoods are taken from logits multiplied out in float32 (`Decoder`), texts
from the engine, greedily or sampled, with its stop strings.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.errors import InputError
from tinier.evaluation.likelihood import score_continuations
from tinier.evaluation.tasks import Metric, TaskResult, TasksPlan
from tinier.families import geometry_of, open_model
from tinier.progress import bar
from tinier.schemes import Int4Inputs
from tinier.tokenizer import Tokenizer, load_tokenizer

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise InputError(
        f"tasks are lm-evaluation-harness's, which is not installed ({error}). Type: "
        "pip install lm-eval"
    ) from None

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("tinier")
class TinierLM(TemplateLM):  # type: ignore[misc]
    """A model of lm-eval.

    pretrained: what `open_model` opens. max_length: tokens of a prompt and its answer, the model's own
    limit if that is lower. batch_size: requests that are written at once. The other arguments are what
    lm-eval hands to any model.
    """

    backend = "causal"

    def __init__(
        self, pretrained: str, revision: str | None = None, device: str | None = None,
        batch_size: int | str | None = None, max_batch_size: int | None = None,
        max_length: int = 4096, max_gen_toks: int = 256, int4_inputs: Int4Inputs = "int8",
        draft: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        at_once = max_batch_size or 32
        if batch_size is not None and str(batch_size).isdigit():  # else it is auto
            at_once = int(batch_size)
        source = open_model(pretrained, revision)
        self._name = pretrained
        self.tokenizer_wrapper: Tokenizer = load_tokenizer(source)
        self.tokenizer = self.tokenizer_wrapper.inner
        config = EngineConfig(
            max_batch_size=at_once, max_seq_len=min(max_length, geometry_of(source).max_positions),
            device=device or "auto", int4_inputs=int4_inputs, draft=draft,
        )  # fmt: skip
        self._engine = Engine(source, config, tokenizer=self.tokenizer_wrapper)
        self._device = self._engine.decoder.device
        self._max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        token = self.tokenizer_wrapper.eos_token_id
        if token is None:
            raise InputError(
                "this model's tokenizer has no end token, which tasks need. Leave --tasks out."
            )
        return token

    @property
    def prefix_token_id(self) -> int:
        token = self.tokenizer_wrapper.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def max_length(self) -> int:
        return self._engine.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; by default with BOS where the model's tokenizer sets it, and never with two."""
        special = add_special_tokens
        if special is None:
            bos = self.tokenizer_wrapper.bos_token
            special = not (bos and string.startswith(bos))
        return self.tokenizer_wrapper.encode(string, special=special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability in nats, and whether it is what greedy decoding
        would write."""
        pairs = []
        for _, context, continuation in requests:
            whole = (context + continuation)[-(self.max_length + 1) :]
            kept = continuation[-(len(whole) - 1) :]
            pairs.append((whole[: len(whole) - len(kept)], kept))
        scores = score_continuations(self._engine.decoder, pairs, "log-likelihoods")
        found = [(score.logprob, score.greedy) for score in scores]
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, each token behind as much of its text as fits."""
        windows: list[_Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            for pair in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            ):  # fmt: skip
                context, continuation = utils.make_disjoint_window(pair)
                windows.append((None, context, continuation))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += total
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts, up to a stop string or the end token. Raises InputError for options that the engine has
        none of."""
        waiting = []
        for request in requests:
            context, options = request.args
            params = self._params(options)
            ids = self.tok_encode(context)[-(self.max_length - params.max_tokens) :]
            waiting.append(self._engine.add(ids, params))
        with bar("texts", len(waiting)) as advance:
            while self._engine.has_work:
                advance(sum(done.finished is not None for done in self._engine.step()))
        texts = []
        for request, done in zip(requests, waiting, strict=True):
            text = self.tokenizer_wrapper.decode(done.output, skip_special_tokens=True)
            for stop in done.params.stop:
                text = text.split(stop, 1)[0]
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _params(self, options: dict[str, Any]) -> SamplingParams:
        given = dict(normalize_gen_kwargs(options, self._max_gen_toks))
        stop, tokens = given.pop("until"), given.pop("max_gen_toks")
        if not given.pop("do_sample", False):
            given["temperature"] = 0.0
        unknown = sorted(set(given) - set(_SAMPLING))
        if unknown:
            raise InputError(
                f"the task asks for {', '.join(unknown)}, which the engine does not have. It has "
                f"{', '.join(_SAMPLING)}, until and max_gen_toks."
            )
        if tokens >= self.max_length:
            raise InputError(
                f"the task asks for {tokens} tokens of text, and a request has room for "
                f"{self.max_length} with its prompt. Give a larger max_length."
            )
        return SamplingParams(
            max_tokens=tokens, stop=tuple(text for text in stop if text),
            stop_token_ids=(self.eot_token_id,), **given,
        )  # fmt: skip


def run_tasks(
    model: str, plan: TasksPlan, *, revision: str | None = None, device: str = "auto",
    int4_inputs: Int4Inputs = "int8", draft: str | None = None,
) -> tuple[TaskResult, ...]:  # fmt: skip
    """Measure the tasks, or groups of tasks, of a plan; draft: EngineConfig's, for those that write texts.
    Raises InputError for a task that lm-eval lacks."""
    manager = _manager(plan)
    lm = TinierLM(
        model, revision, device, max_length=plan.max_length, int4_inputs=int4_inputs, draft=draft
    )
    found = simple_evaluate(
        lm, tasks=list(plan.names), num_fewshot=plan.shots, limit=plan.limit, task_manager=manager,
        apply_chat_template=plan.chat, bootstrap_iters=0, random_seed=plan.seed,
        numpy_random_seed=plan.seed, torch_random_seed=plan.seed, fewshot_random_seed=plan.seed,
    )  # fmt: skip
    assert found is not None
    return tuple(_result(name, found) for name in plan.names)


def check_tasks(plan: TasksPlan) -> None:
    """Raise InputError for a task that lm-eval does not know."""
    _manager(plan)


def _manager(plan: TasksPlan) -> Any:
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if plan.include is not None and not Path(plan.include).is_dir():
        raise InputError(f"--include {plan.include} is no folder. Give one with task files.")
    manager = TaskManager(include_path=plan.include)
    known = set(manager.all_tasks)
    unknown = [name for name in plan.names if name not in known]
    if unknown:
        near = sorted(name for name in known if name.startswith(unknown[0][:4]))[:8]
        raise InputError(
            f"lm-eval has no task {unknown[0]!r}. "
            + (f"Near it: {', '.join(near)}. " if near else "")
            + "`lm_eval ls tasks` lists them all; --include DIR adds task files of your own."
        )
    return manager


def _result(name: str, found: Any) -> TaskResult:
    row = found["results"][name]
    members = [name] if name in found["samples"] else _members(name, found["group_subtasks"])
    metrics = {}
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        error = row.get(f"{metric}_stderr,{filtered}")
        label = metric if filtered == "none" else f"{metric}, {filtered}"
        metrics[label] = Metric(
            value=float(value),
            stderr=float(error) if isinstance(error, float | int) else None,
            higher_is_better=bool(found["higher_is_better"][name].get(metric, True)),
            answers=_answers(metric, filtered, [found["samples"][task] for task in members]),
        )
    if not metrics:
        raise InputError(f"lm-eval gave no figure for {name!r}.")
    first = members[0]
    return TaskResult(
        name=name, metrics=metrics, shots=found["n-shot"].get(first),
        documents=sum(found["n-samples"][task]["effective"] for task in members),
        version=str(found["versions"].get(first)),
    )  # fmt: skip


def _members(group: str, subtasks: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, those of groups inside it included."""
    return sorted(
        task
        for name in subtasks[group]
        for task in (_members(name, subtasks) if subtasks.get(name) else [name])
    )


def _answers(metric: str, filtered: str, samples: Sequence[Sequence[dict[str, Any]]]) -> str | None:
    """1 for each question that was answered rightly, 0 for others, in order; None for another metric."""
    marks: list[Any] = []
    for of in samples:
        own = sorted(
            (s for s in of if s.get("filter", "none") == filtered), key=lambda s: s["doc_id"]
        )
        marks += [sample.get(metric) for sample in own]
    if not marks or any(mark not in (0, 1, True, False) for mark in marks):
        return None
    return "".join(str(int(mark)) for mark in marks)


def main() -> None:
    """lm-eval's own command, which knows `--model tinier` here."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
