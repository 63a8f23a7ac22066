import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import byte_tokenizer

from tinier.checkpoint import Checkpoint
from tinier.errors import CheckpointError, TextError
from tinier.families import open_model
from tinier.text import (
    load_calibration,
    tensor_sha256,
    token_windows,
    written_windows,
)
from tinier.tokenizer import Tokenizer, load_tokenizer


def test_windows_pack_documents_end_to_end() -> None:
    windows = token_windows(Tokenizer(byte_tokenizer()), ["abcdefgh", "ijk"], length=4)
    text = byte_tokenizer().decode(windows.flatten().tolist())
    assert text == "abcdefgh\n\nij"  # "abcdefgh\n\nijk\n\n" is 15 tokens: three windows
    assert windows.shape == (3, 4)


def test_count_is_a_limit() -> None:
    assert token_windows(Tokenizer(byte_tokenizer()), ["x" * 100] * 5, length=8, count=3).shape == (
        3,
        8,
    )
    assert token_windows(Tokenizer(byte_tokenizer()), ["x" * 100], length=8, count=99).shape == (
        12,
        8,
    )


def test_a_tokenizer_that_adds_bos_gets_it_in_every_window() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(byte_tokenizer())
    tokenizer.inner.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 256)]
    )
    windows = token_windows(tokenizer, ["abcdefghi"], length=4)
    assert windows[:, 0].tolist() == [256] * 3
    assert (windows[:, 1:] < 256).all()
    assert tokenizer.decode(windows[:, 1:].flatten().tolist()) == "abcdefghi"


def test_short_text_is_an_error() -> None:
    with pytest.raises(TextError, match="has 5 tokens, less than one window of 8"):
        token_windows(Tokenizer(byte_tokenizer()), ["abc"], length=8)
    with pytest.raises(TextError, match="0 windows were asked for"):
        token_windows(Tokenizer(byte_tokenizer()), ["abc"], length=8, count=0)
    with pytest.raises(TextError, match="too short"):
        token_windows(Tokenizer(byte_tokenizer()), ["abc"], length=1)


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


def test_a_conversation_is_written_with_the_template_and_one_bos(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    tokenizer.inner.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]
    path.write_text("\n".join(json.dumps({"messages": messages}) for _ in range(8)))
    documents = load_calibration(str(path))
    windows = token_windows(tokenizer, documents, length=32)
    text = tokenizer.decode(windows.flatten().tolist())
    assert text.startswith("user: Hello\nassistant: Hi there\nuser: Hello")
    assert "<bos>" not in text  # this tokenizer adds none, and the template's own is left out
    with pytest.raises(TextError, match="has no chat template"):
        token_windows(Tokenizer(byte_tokenizer()), documents, length=32)


@pytest.mark.parametrize("line", ['{"messages": []}', '{"messages": [{"role": 1}]}', "{"])
def test_a_broken_conversation_is_named_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "chat.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}]}'
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(TextError, match=r"chat\.jsonl:2 is not an object"):
        load_calibration(str(path))


def test_the_model_writes_windows_of_exact_length(tiny: Callable[..., Checkpoint]) -> None:
    first, second, other = (
        written_windows(tiny(), 3, 24, seed=seed, device=torch.device("cpu")) for seed in (0, 0, 9)
    )
    assert first.shape == (3, 24)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert (first[:, 0] == 256).all()  # the tokenizer's BOS


def test_the_model_goes_on_from_pieces_of_a_text(tiny: Callable[..., Checkpoint]) -> None:
    text = torch.arange(80).view(2, 40)
    made = written_windows(tiny(), 5, 24, seed=0, device=torch.device("cpu"), text=text)
    assert made.shape == (5, 24)
    begun = made[:, :3]  # an eighth
    assert (begun.diff() == 1).all()
    # both windows before either comes again, from other places
    assert {row.item() // 40 for row in begun[:2, 0]} == {0, 1}
    assert len(begun[:, 0].unique()) == 5
