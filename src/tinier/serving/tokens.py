"""Text to token ids and back over HTTP, in vLLM's shapes: `POST /tokenize` and `POST /detokenize`."""

import asyncio
from typing import Any

from tinier.serving.model import Model
from tinier.serving.protocol import DetokenizeBody, TokenizeBody, conversation_text


async def tokenize(model: Model, body: TokenizeBody) -> dict[str, Any]:
    """The ids of a text or of a conversation. Raises TextError, ApiError."""
    tokenizer = model.tokenizer

    def encode() -> list[int]:
        if body.prompt is not None:
            return tokenizer.encode(body.prompt, special=body.add_special_tokens is not False)
        text = conversation_text(tokenizer, body)
        return tokenizer.encode(text, special=bool(body.add_special_tokens))

    ids = await asyncio.to_thread(encode)  # a long text, or a template, may take its time
    strings = tokenizer.inner.convert_ids_to_tokens(ids) if body.return_token_strs else None
    room = model.ready.limits.room if model.ready else None
    return {"count": len(ids), "max_model_len": room, "tokens": ids, "token_strs": strings}


async def detokenize(model: Model, body: DetokenizeBody) -> dict[str, Any]:
    """The text of ids, special tokens included. Raises TextError for ids that the model lacks."""
    model.tokenizer.check(body.tokens)
    return {"prompt": await asyncio.to_thread(model.tokenizer.decode, body.tokens)}
