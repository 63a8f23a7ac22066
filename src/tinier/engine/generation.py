"""A prompt continued by a model, as text, piece by piece. Start at `generate`."""

from collections.abc import Iterator
from dataclasses import replace

from tinier.checkpoint import Checkpoint
from tinier.engine.config import EngineConfig
from tinier.engine.engine import Engine
from tinier.engine.request import SamplingParams
from tinier.engine.text import TextStream, encode_prompt, stop_token_ids
from tinier.schemes import Int4Inputs
from tinier.tokenizer import load_tokenizer


class Generation:
    """A continuation, computed while it is iterated over, once."""

    def __init__(self, engine: Engine, ids: list[int], params: SamplingParams, stream: TextStream):
        self._pieces, self._stream = self._written(engine.stream(ids, params)), stream
        self._engine = engine
        self.prompt_tokens = len(ids)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _written(self, tokens: Iterator[int]) -> Iterator[str]:
        for token in tokens:
            yield self._stream.push(token)
        yield self._stream.close()

    @property
    def output_tokens(self) -> int:
        """Those of the text so far."""
        return self._stream.num_tokens

    @property
    def drafted(self) -> tuple[int, int]:
        """Tokens so far that a draft proposed, and those of them that were right."""
        return self._engine.num_drafted, self._engine.num_accepted

    @property
    def text(self) -> str:
        """The text so far."""
        return self._stream.text


def generate(
    model: Checkpoint,
    prompt: str,
    params: SamplingParams | None = None,
    *,
    chat: bool = False,
    tensor_parallel: int = 1,
    device: str = "auto",
    int4_inputs: Int4Inputs = "int8",
    draft: str | None = None,
) -> Generation:
    """The model's continuation of `prompt`, as an iterable of pieces of text; `"".join(…)` is all of it.

    params: how tokens are picked; those that end a text are the model's. chat: the prompt is one message of
    the model's chat template. draft: EngineConfig's; the text comes sooner. Raises InputError for an empty
    prompt, or one longer than the model reads.
    """
    tokenizer = load_tokenizer(model)
    params = replace(params or SamplingParams(), stop_token_ids=stop_token_ids(model, tokenizer))
    ids = encode_prompt(tokenizer, prompt, chat=chat)
    config = EngineConfig(
        max_batch_size=1, max_seq_len=len(ids) + params.max_tokens, tensor_parallel=tensor_parallel,
        device=device, int4_inputs=int4_inputs, draft=draft,
    )  # fmt: skip
    engine = Engine(model, config, tokenizer=tokenizer)
    return Generation(engine, ids, params, TextStream(tokenizer, params.stop, params.min_tokens))
