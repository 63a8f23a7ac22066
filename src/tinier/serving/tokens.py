"""Text to token ids and back over HTTP, in vLLM's shapes: `POST /tokenize` and `POST /detokenize`."""

import asyncio
from typing import Any

from tinier.serving.model import Model
from tinier.serving.protocol import ApiError, DetokenizeBody, TokenizeBody, conversation_text


async def tokenize(model: Model, body: TokenizeBody) -> dict[str, Any]:
    """The ids of a text or of a conversation. Raises TextError, ApiError."""
    tokenizer = model.tokenizer

    def encode() -> tuple[list[int], list[str] | None]:
        if body.prompt is not None:
            ids = tokenizer.encode(body.prompt, special=body.add_special_tokens is not False)
        else:
            text = conversation_text(tokenizer, body, model.tool_style)
            ids = tokenizer.encode(text, special=bool(body.add_special_tokens))
        return ids, tokenizer.inner.convert_ids_to_tokens(ids) if body.return_token_strs else None

    ids, strings = await asyncio.to_thread(encode)  # a long text, or a template, may take its time
    room = model.ready.limits.room if model.ready else None
    return {"count": len(ids), "max_model_len": room, "tokens": ids, "token_strs": strings}


async def detokenize(model: Model, body: DetokenizeBody) -> dict[str, Any]:
    """The text of ids, special tokens included. Raises ApiError for ids that the model lacks."""
    vocab = model.tokenizer.vocab
    unknown = next((token for token in body.tokens if vocab is not None and token >= vocab), None)
    if vocab is not None and unknown is not None:
        raise ApiError(400, f"tokens has {unknown}. Use 0 to {vocab - 1}.", param="tokens")
    return {"prompt": await asyncio.to_thread(model.tokenizer.decode, body.tokens)}
