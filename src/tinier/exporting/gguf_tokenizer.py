"""The tokenizer and the chat template of a model, in the fields of a GGUF file."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from tinier.checkpoint import Checkpoint, read_json
from tinier.errors import CheckpointError, SchemeError
from tinier.tokenizer import load_tokenizer

# regular expressions that split a text before byte pairs are joined, and llama.cpp's name of each
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def read_tokenizer(source: Checkpoint) -> dict[str, Any]:
    """tokenizer.json. Raises SchemeError for a tokenizer that a GGUF file cannot hold or llama.cpp has no
    name for, CheckpointError for a file that is none."""
    path = source.folder / "tokenizer.json"
    if not path.exists():
        raise SchemeError(
            f"{source.folder} has no tokenizer.json, which a GGUF file's tokenizer is made of. "
            "Put the one of the model there."
        )
    values = read_json(path)
    model = values.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(
            f"{path} has no model of a tokenizer. Put the tokenizer.json of the model there."
        )
    if model.get("type") != "BPE":
        raise SchemeError(
            f"llama.cpp's tokenizer is made of byte pairs, and this one is {model.get('type')}. Choose "
            "another format: tinier export --matrix"
        )
    if not model.get("byte_fallback"):
        _split_name(values)
    return values


def add_tokenizer(writer: GGUFWriter, source: Checkpoint, vocab: int) -> None:
    """vocab: rows of the embedding, which may be more than there are tokens.

    Raises what `read_tokenizer` raises.
    """
    values = read_tokenizer(source)
    model = values["model"]
    tokens, types = _tokens(values, vocab)
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, values, tokens, types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(values))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        writer.add_token_merges(merges)
    _add_special(writer, source)


def _tokens(values: dict[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Token texts by id and their types; ids without one are unused."""
    tokens = [f"[PAD{i}]" for i in range(vocab)]
    types = [int(TokenType.UNUSED)] * vocab
    for text, index in values["model"]["vocab"].items():
        tokens[index], types[index] = text, int(TokenType.NORMAL)
        if values["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[index] = int(TokenType.BYTE)
    for added in values.get("added_tokens") or []:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    unknown = values["model"].get("unk_token")
    if unknown is not None and values["model"].get("byte_fallback"):
        types[tokens.index(unknown)] = int(TokenType.UNKNOWN)
    return tokens, types


def _add_sentencepiece(
    writer: GGUFWriter, values: dict[str, Any], tokens: list[str], types: list[int]
) -> None:
    """SentencePiece's byte pairs: the token that an earlier merge makes has the higher score."""
    scores = [-1e6] * len(tokens)
    place = {text: i for i, text in enumerate(tokens)}
    for rank, merge in enumerate(values["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        index = place.get(left + right)
        if index is not None and scores[index] == -1e6:
            scores[index] = float(-rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    adds = [part for part in _parts(values.get("normalizer")) if part.get("type") == "Prepend"]
    writer.add_add_space_prefix(bool(adds))


def _split_name(values: dict[str, Any]) -> str:
    """llama.cpp's name of how texts are split. Raises SchemeError where it has none."""
    parts = _parts(values.get("pre_tokenizer"))
    kinds = [part["type"] for part in parts]
    patterns = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    uses_regex = [part.get("use_regex", True) for part in parts if part["type"] == "ByteLevel"]
    if kinds == ["ByteLevel"] and uses_regex == [True]:
        return "gpt-2"
    if (
        kinds == ["Digits", "ByteLevel"]
        and uses_regex == [True]
        and parts[0].get("individual_digits")
    ):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and uses_regex == [False] and patterns[0] in _SPLITS:
        return _SPLITS[patterns[0]]
    raise SchemeError(
        f"the tokenizer splits texts in a way that tinier knows no name of llama.cpp's for: {kinds}, "
        f"{json.dumps(patterns)[:200]}. Choose another format: tinier export --matrix"
    )


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step."""
    if step is None:
        return []
    for key in ("pretokenizers", "normalizers"):
        if key in step:
            return list(step[key])
    return [step]


def _add_special(writer: GGUFWriter, source: Checkpoint) -> None:
    tokenizer = load_tokenizer(source)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer.prefix
    )
    template = tokenizer.inner.chat_template
    if template is not None:
        writer.add_chat_template(template)
