"""Tasks of lm-evaluation-harness: what is asked, and what comes out. harness.py measures them."""

from collections.abc import Sequence
from dataclasses import dataclass

from tinier.errors import InputError
from tinier.evaluation.paired import PairedChange, compare_answers


@dataclass(frozen=True, kw_only=True)
class TasksPlan:
    names: tuple[str, ...]
    """Tasks or groups, as lm-eval calls them"""
    shots: int | None = None
    """Solved examples before each question; None: as the task says."""
    limit: int | None = None
    """Only so many questions of each task; None: all."""
    include: str | None = None
    """A folder with task files of one's own."""
    chat: bool = False
    """Write prompts with the model's chat template."""
    max_length: int = 4096
    """Tokens of a prompt and its answer."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise InputError("a task has no name. Name at least one, such as arc_easy.")
        if len(set(self.names)) < len(self.names):
            raise InputError(f"tasks {', '.join(self.names)} name one twice. Give each once.")
        for name in ("limit", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}. Use 1 or more.")
        if self.shots is not None and self.shots < 0:
            raise InputError(f"shots={self.shots}. Use 0 or more.")


@dataclass(frozen=True, kw_only=True)
class Metric:
    value: float
    stderr: float | None
    higher_is_better: bool
    answers: str | None
    """For each question 1 (right) or 0; None where the metric is another"""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    name: str
    metrics: dict[str, Metric]
    """By lm-eval's name, and behind a comma the filter that is not `none`"""
    shots: int | None
    documents: int
    """Questions that were asked"""
    version: str
    """Of the task, in lm-eval"""

    @property
    def main(self) -> str:
        """The metric that stands for the task in a table: the normalized accuracy where there is one."""
        usual = ("acc_norm", "acc", "exact_match", "exact_match, strict-match")
        return next((name for name in usual if name in self.metrics), next(iter(self.metrics)))


def task_changes(
    base: Sequence[TaskResult], variant: Sequence[TaskResult]
) -> dict[str, PairedChange]:
    """Answers of a variant against the base's, in pairs, by TASK/METRIC."""
    theirs = {task.name: task for task in base}
    return {
        f"{task.name}/{name}": compare_answers(before, metric.answers)
        for task in variant
        for name, metric in task.metrics.items()
        if metric.answers is not None
        and (before := theirs[task.name].metrics[name].answers) is not None
    }
