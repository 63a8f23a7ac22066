"""Checkpoints measured on a text: what `tinier eval` and `tinier compare` do, as functions.

Start at `evaluate`. In: checkpoints and a text. Out: figures over windows of its held-out part.
"""

from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.device import pick_device
from tinier.engine import load_decoder
from tinier.evaluation.comparison import Comparison, compare_windows
from tinier.evaluation.quality import Quality, evaluate_windows, reference_states
from tinier.families import check_length
from tinier.progress import warn
from tinier.schemes import Int4Inputs
from tinier.text import BUILTIN, Text, documents_of, shortfall, token_windows
from tinier.tokenizer import check_same_tokens, load_tokenizer


def evaluate(
    model: Checkpoint,
    against: Checkpoint | None = None,
    *,
    text: Text = BUILTIN,
    windows: int = 16,
    length: int = 512,
    device: str = "auto",
    int4_inputs: Int4Inputs = "int8",
) -> Quality:
    """Perplexity of `model`; its divergence and top-1 agreement from `against`, the original, where given.

    windows: of `length` tokens, at most. int4_inputs: as EngineConfig's. Raises InputError for models of
    different tokens or too long windows, TextError for too short a text, before anything is loaded.
    """
    place = pick_device(device)
    held = heldout_windows(model, against, text, windows, length)
    reference = None
    if against is not None:
        reference = reference_states(load_decoder(against, device=place), held)
    return evaluate_windows(
        load_decoder(model, device=place, int4_inputs=int4_inputs), held, reference
    )


def compare(
    first: Checkpoint,
    second: Checkpoint,
    *,
    text: Text = BUILTIN,
    windows: int = 8,
    length: int = 512,
    device: str = "auto",
) -> Comparison:
    """Where `second` differs from `first`, layer by layer; both are in memory at once. Raises as
    `evaluate`."""
    place = pick_device(device)
    held = heldout_windows(first, second, text, windows, length)
    return compare_windows(first, second, held, device=place)


def heldout_windows(
    model: Checkpoint, other: Checkpoint | None, text: Text, windows: int, length: int
) -> Tensor:
    """Token ids [n, length] of a text's held-out part, for one model or two of the same tokens; fewer than
    `windows` are warned of."""
    common = check_same_tokens(model, other) if other else None
    for checkpoint in (model, other):
        if checkpoint is not None:
            check_length(checkpoint, length)
    tokenizer = load_tokenizer(model, common)
    held = token_windows(tokenizer, documents_of(text, "heldout"), length=length, count=windows)
    for warning in shortfall(held, windows):
        warn(warning)
    return held
