from collections.abc import Callable

import pytest
import torch
from tests.conftest import byte_tokenizer

from tinier.checkpoint import Checkpoint
from tinier.errors import CheckpointError, TextError
from tinier.families import open_model
from tinier.text import load_tokenizer, tensor_sha256, token_windows


def test_windows_pack_documents_end_to_end() -> None:
    windows = token_windows(byte_tokenizer(), ["abcdefgh", "ijk"], length=4)
    text = byte_tokenizer().decode(windows.flatten().tolist())
    assert text == "abcdefgh\n\nij"  # "abcdefgh\n\nijk\n\n" is 15 tokens: three windows
    assert windows.shape == (3, 4)


def test_count_is_a_limit() -> None:
    assert token_windows(byte_tokenizer(), ["x" * 100] * 5, length=8, count=3).shape == (3, 8)
    assert token_windows(byte_tokenizer(), ["x" * 100], length=8, count=99).shape == (12, 8)


def test_a_tokenizer_that_adds_bos_gets_it_in_every_window() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 256)]
    )
    windows = token_windows(tokenizer, ["abcdefghi"], length=4)
    assert windows[:, 0].tolist() == [256] * 3
    assert (windows[:, 1:] < 256).all()
    assert tokenizer.decode(windows[:, 1:].flatten().tolist()) == "abcdefghi"


def test_short_text_is_an_error() -> None:
    with pytest.raises(TextError, match="has 5 tokens, less than one window of 8"):
        token_windows(byte_tokenizer(), ["abc"], length=8)
    with pytest.raises(TextError, match="0 windows were asked for"):
        token_windows(byte_tokenizer(), ["abc"], length=8, count=0)
    with pytest.raises(TextError, match="too short"):
        token_windows(byte_tokenizer(), ["abc"], length=1)


def test_a_model_without_tokenizer_is_an_error(tiny: Callable[..., Checkpoint]) -> None:
    checkpoint = tiny()
    for path in checkpoint.folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        load_tokenizer(checkpoint)


def test_code_in_a_model_folder_never_runs(tiny: Callable[..., Checkpoint]) -> None:
    import json

    folder = tiny().folder
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_tokenizer(open_model(folder))


def test_hash_tells_windows_apart() -> None:
    a = torch.arange(6).view(2, 3)
    assert tensor_sha256(a) == tensor_sha256(a.clone())
    assert tensor_sha256(a) != tensor_sha256(a + 1)
