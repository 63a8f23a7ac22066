"""The recipe file: YAML in, a checked `Recipe` out. Start at `load_recipe`."""

import difflib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinier.errors import RecipeError
from tinier.schemes import Int4Inputs

BASE = "base"
DEMO = "demo"
"""The recipe that comes with tinier"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantize(_Strict):
    """Fields of tinier.quantization.QuantizePlan, where they are explained."""

    preset: str | None
    """A name of tinier.schemes.PRESETS, `mixed`, `mixed-best`, or null."""
    group_size: int | None = None
    symmetric: bool | None = None
    ignore: tuple[str, ...] = ()
    head: Literal["fp8", "int8"] | None = None
    embedding: Literal["16bit", "fp8", "int8", "int4"] = "16bit"
    kv: Literal["fp8", "int8"] | None = None
    bits: float | None = None
    formats: tuple[str, ...] = ()
    layer_formats: dict[str, str] = {}
    self_text: bool = False
    windows: int = 128
    length: int = 512
    weighting: Literal["none", "fisher"] | None = None
    drift: Literal["ignored", "corrected"] | None = None
    iterations: int = 100


class Prune(_Strict):
    """Fields of tinier.pruning.PrunePlan, where they are explained."""

    drop_layers: str | None = None
    """Which layers go, such as `21-27`."""
    keep_layers: int | str | None = None
    method: Literal["influence", "angular", "loss", "greedy", "last"] = "angular"
    keep_hidden: int | str | None = None
    keep_intermediate: int | str | None = None
    keep_heads: int | None = None
    keep_kv_heads: int | None = None
    keep_experts: int | None = None
    target: str | None = None
    shrink: Literal["depth", "width", "both"] = "both"
    align: int = 64
    candidates: int = 8
    refit: bool = True
    windows: int = 64
    length: int = 512


class Distill(_Strict):
    """Fields of tinier.distillation.DistillPlan, where they are explained."""

    teacher: str = BASE
    """A variant, or the base."""
    steps: int = 100
    batch: int = 64
    micro_batch: int | None = None
    length: int = 512
    lr: float = 7e-5
    min_lr: float | None = None
    warmup_steps: int | None = None
    loss: Literal["forward-kl", "reverse-kl", "js"] = "forward-kl"
    temperature: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    hidden_loss: Literal["mse", "cosine"] = "mse"
    train: Literal["all", "norms", "lora"] = "all"
    lora_rank: int = 16
    top_k: int | None = None
    generated: int = 0
    quantize: Quantize | None = None
    """Quantize first, then train on that grid."""
    checkpointing: Literal["none", "selective", "full"] | None = None
    compile: bool = False
    eval_every: int | None = None


class Variant(_Strict):
    from_: Annotated[str, Field(alias="from")] = BASE
    """The variant, or the base, that the stage starts from."""
    quantize: Quantize | None = None
    prune: Prune | None = None
    distill: Distill | None = None

    @model_validator(mode="after")
    def _one_stage(self) -> "Variant":
        if sum(s is not None for s in (self.quantize, self.prune, self.distill)) != 1:
            raise ValueError("has exactly one stage: quantize, prune or distill")
        return self


class Text(_Strict):
    """A source of its own for each part."""

    calibration: str
    training: str
    heldout: str


class QualityMeasure(_Strict):
    windows: Annotated[int, Field(ge=1)] = 16
    length: Annotated[int, Field(ge=8)] = 512
    own_text: Annotated[int, Field(ge=1)] | None = None
    """Divergence, too, along so many tokens that each model writes greedily after the start of a window."""
    long: Annotated[int, Field(ge=8)] | None = None
    """Divergence on windows of so many tokens, too."""


class MmluMeasure(_Strict):
    folder: Path
    shots: int = 5
    subjects: tuple[str, ...] = ()
    sample: int | None = None
    format: Literal["letters", "continuation"] = "letters"


class TasksMeasure(_Strict):
    """Tasks of lm-evaluation-harness; fields of tinier.evaluation.TasksPlan, where they are explained."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    shots: int | None = None
    limit: int | None = None
    include: str | None = None
    chat: bool = False
    max_length: int = 4096


class SpeedMeasure(_Strict):
    concurrency: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 8)
    input_length: int = 128
    output_length: int = 64
    repeats: Annotated[int, Field(ge=1)] = 3


class ServingMeasure(_Strict):
    """Load on `tinier serve`; fields of tinier.benchmark.Load, where they are explained."""

    concurrency: tuple[int, ...] = (1, 4)
    request_rate: tuple[float, ...] = ()
    input_length: int = 512
    output_length: int = 128
    requests: int = 64

    @model_validator(mode="after")
    def _some_load(self) -> "ServingMeasure":
        if not self.concurrency and not self.request_rate:
            raise ValueError("give a concurrency or a request_rate")
        return self


class Measure(_Strict):
    quality: QualityMeasure = QualityMeasure()
    mmlu: MmluMeasure | None = None
    tasks: TasksMeasure | None = None
    speed: SpeedMeasure = SpeedMeasure()
    serving: ServingMeasure | None = None
    draft: bool = False
    """What each variant gains as the base's draft, too."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """GPUs that share each layer where memory, speed and serving are measured."""
    int4_inputs: Int4Inputs = "int8"
    """EngineConfig's, where anything is measured."""


class Recipe(_Strict):
    """Relative paths in it are meant from where the command is typed, as on the command line."""

    base: str
    """Folder, Hub id, GGUF file or built-in name."""
    revision: str | None = None
    """Of a Hub id."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    text: str | Text = "builtin"
    """One source, split by document, or a source for each part."""
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    measure: Measure = Measure()

    @model_validator(mode="after")
    def _variants_form_a_tree(self) -> "Recipe":
        names = [BASE, *self.variants]
        for name, variant in self.variants.items():
            if (
                name == BASE
                or not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
            ):
                raise ValueError(
                    f"variant {name!r}: names have letters, digits, '-', '_' and '.', and are not "
                    f"{BASE!r}, which is the base model"
                )
            for needed in self.needs(name):
                if needed not in names:
                    near = difflib.get_close_matches(needed, names, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(
                        f"variant {name!r} needs {needed!r}, which does not exist. There are "
                        f"{', '.join(names)}{hint}"
                    )
            if variant.from_ == name:
                raise ValueError(f"variant {name!r} starts from itself. Use another `from`")
            for end in ("-last", "-best"):
                other = self.variants.get(name.removesuffix(end))
                if name.endswith(end) and other is not None and other.distill is not None:
                    raise ValueError(
                        f"variant {name!r}: {name.removesuffix(end)!r} is distilled and keeps other "
                        "weights in a folder of this name. Use another name"
                    )
        self.order()
        return self

    def needs(self, name: str) -> list[str]:
        """Variants (or the base) that must exist before this one."""
        variant = self.variants[name]
        return [variant.from_] + ([variant.distill.teacher] if variant.distill else [])

    def order(self) -> list[str]:
        """The variants, each after those it needs. Raises ValueError for a cycle."""
        done: list[str] = []
        left = list(self.variants)
        while left:
            ready = [n for n in left if all(d == BASE or d in done for d in self.needs(n))]
            if not ready:
                raise ValueError(
                    f"variants {', '.join(left)} need each other in a circle. Let one start from {BASE!r}"
                )
            done.append(ready[0])
            left.remove(ready[0])
        return done


def load_recipe(path: Path | str, tensor_parallel: int | None = None) -> Recipe:
    """Read and check a recipe file, or the built-in `demo`. tensor_parallel: instead of the recipe's.

    Raises RecipeError, naming the key and the nearest known one."""
    path = Path(path)
    if str(path) == DEMO and not path.is_file():
        path = Path(__file__).with_name("demo.yaml")
    if not path.is_file():
        raise RecipeError(
            f"recipe {path} does not exist. Write one, or try the built-in one: tinier run {DEMO}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    # ValueError: bytes that are no UTF-8, and a date that does not exist
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {error}. Correct the file.") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"recipe {path} is not a mapping of keys. It needs at least base and variants: "
            "`base: smollm2-135m` and `variants: {small: {quantize: {preset: fp8}}}`."
        )
    try:
        measure = {} if values.get("measure") is None else values["measure"]
        if tensor_parallel is not None and isinstance(measure, dict):  # if not: refused below
            values["measure"] = {**measure, "tensor_parallel": tensor_parallel}
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        places: dict[tuple[int | str, ...], list[Any]] = {}
        for one in error.errors():
            places.setdefault(_place(values, one), []).append(one)
        # of a value that may be of several types, the one that it fits best has the errors inside it
        outer = {place[:i] for place in places for i in range(len(place))}
        problems = "\n".join(
            f"  {_explain(place, found)}"
            for place, found in places.items()
            if place not in outer or found[0]["type"] == "value_error"
        )
        raise RecipeError(f"recipe {path}:\n{problems}") from None
    return recipe


def _place(values: Any, error: Any) -> tuple[int | str, ...]:
    """An error's location in the recipe: without pydantic's names of the types that it tried."""
    place: list[int | str] = []
    for part in error["loc"]:
        inside = isinstance(values, dict) and part in values
        if inside or (isinstance(values, list) and isinstance(part, int)):
            place.append(part)
            values = values[part]
    return (*place, error["loc"][-1]) if error["type"] == "missing" else tuple(place)


def _explain(place: tuple[int | str, ...], errors: list[Any]) -> str:
    """What is wrong at a place of the recipe; several errors: of each type that is allowed there."""
    path, error = ".".join(str(part) for part in place), errors[0]
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    if error["type"] == "missing":
        return f"{path}: missing, and must be given."
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
        return f"{path}: unknown key. {hint}"
    wanted = " or ".join(dict.fromkeys(_wanted(one) for one in errors))
    given = "null" if error["input"] is None else repr(error["input"])
    return f"{path}: {given} is not allowed. Use {wanted}."


def _wanted(error: Any) -> str:
    """What pydantic asks for, in the words of the other messages."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "int_type" | "int_parsing" | "int_from_float":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "string_type" | "path_type" | "invalid_key":
            return "text in quotes"
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "tuple_type" | "list_type":
            return "a list: [...]"
        case "dict_type" | "model_type":
            return "keys with values: {KEY: VALUE}"
        case "too_short":
            return "at least one entry"
        case "literal_error":
            return str(limits["expected"])
        case "greater_than_equal":
            return f"{limits['ge']} or more"
        case "less_than":
            return f"a number below {limits['lt']}"
        case _:
            return f"what pydantic asks for ({error['msg']})"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the model at a location of the recipe has."""
    model: Any = Recipe
    for part in location:
        field = model.model_fields.get(part)
        if field is not None:
            model = _model_in(field.annotation)
        # any other part is the name of a variant, or pydantic's name for a branch of a union
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> Any:
    """The recipe model inside an annotation such as `dict[str, Variant]` or `Prune | None`."""
    if get_origin(annotation) in (Union, types.UnionType, dict):
        inner = [_model_in(argument) for argument in get_args(annotation)]
        return next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return annotation
