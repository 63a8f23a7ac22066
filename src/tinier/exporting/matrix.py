"""Which preset goes where: `tinier export --matrix`, and the table of docs/loading.md.

Asked of the rules that `export` asks, for a Llama whose sides every format divides.
"""

from pathlib import Path
from typing import NamedTuple

from tinier.checkpoint import Checkpoint
from tinier.errors import SchemeError
from tinier.exporting.planned import planned
from tinier.exporting.targets import TARGETS, target_config
from tinier.quantization import QuantizePlan
from tinier.schemes import PRESETS

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


class Row(NamedTuple):
    what: str
    """A preset, with options"""
    reasons: dict[str, str | None]
    """By target, why it is refused; None: it is carried over, number for number"""


def matrix() -> list[Row]:
    """A row for the 16-bit model, each preset, and what else a checkpoint may have."""
    plans = {name: QuantizePlan(preset=name) for name in PRESETS}
    plans["int4, zero points"] = QuantizePlan(preset="int4", symmetric=False)
    plans["int4, INT8 embedding"] = QuantizePlan(preset="int4", embedding="int8")
    plans["fp8, FP8 head"] = QuantizePlan(preset="fp8", head="fp8")
    plans["fp8, FP8 cache"] = QuantizePlan(preset="fp8", kv="fp8")
    rows = [Row("bf16", _reasons(_checkpoint(None)))]
    return rows + [Row(name, _reasons(_checkpoint(plan))) for name, plan in plans.items()]


def matrix_text(rows: list[Row]) -> str:
    """As a table in Markdown, and what each target takes; `export --dry-run` says why one is refused."""
    columns = [name for name, target in TARGETS.items() if target.repository is None]
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for row in rows:
        cells = ("yes" if row.reasons[name] is None else "" for name in columns)
        lines.append(f"| {row.what} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", *(f"- `{name}`: {target.about}" for name, target in TARGETS.items())]
    )


def _checkpoint(plan: QuantizePlan | None) -> Checkpoint:
    source = Checkpoint(Path("model"), dict(_LLAMA), {}, None)
    return source if plan is None else planned(source, plan)


def _reasons(source: Checkpoint) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for to in TARGETS:
        try:
            target_config(source, to)
            found[to] = None
        except SchemeError as error:
            found[to] = str(error).removeprefix(f"{source.folder} cannot go to {to}: ")
    return found
