"""Checkpoints and texts as they are found in the wild: each is read right, or refused with a reason.

The kinds are public ones; models and files are made here. What is read must be what transformers reads,
and every stage must read what the engine reads.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import DOCUMENTS, quantize_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinier.checkpoint import Checkpoint, open_checkpoint, resolve
from tinier.engine import load_decoder
from tinier.engine.text import stop_token_ids
from tinier.errors import CheckpointError, InputError, TextError
from tinier.evaluation import evaluate_windows, reference_states
from tinier.families import EMBEDDING, HEAD, check_length, geometry_of, open_model
from tinier.pruning import PrunePlan, prune
from tinier.quantization import QuantizePlan, plan_quantize
from tinier.text import load_calibration, load_documents, token_windows
from tinier.tokenizer import Tokenizer, check_same_tokens, load_tokenizer

Tiny = Callable[..., Checkpoint]
CPU = torch.device("cpu")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the tensors of a model folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Change a JSON file in place; None removes a key."""
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def our_logits(model: Path | Checkpoint, tokens: Tensor) -> Tensor:
    checkpoint = model if isinstance(model, Checkpoint) else open_model(model)
    decoder = load_decoder(checkpoint, device=CPU)
    return decoder.logits(decoder.hidden_states(tokens)).float()


def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        logits: Tensor = model(tokens).logits.float()
    return logits


def assert_read_as_transformers_does(folder: Path, length: int = 48) -> None:
    tokens = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(1))
    ours, theirs = our_logits(folder, tokens), their_logits(folder, tokens)
    tolerance = 1e-4 if open_model(folder).dtype == torch.float32 else 0.12
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# --- types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", [torch.float32, torch.float16])
def test_mixed_types_are_read_as_the_models_type_by_every_stage(
    tiny: Tiny, tmp_path: Path, norms: torch.dtype
) -> None:
    folder = edit(
        tiny(dtype=torch.bfloat16).folder,
        lambda w: w.update({k: v.to(norms) for k, v in w.items() if "norm" in k}),
    )
    source = open_model(folder)
    assert any("are read as bfloat16" in note for note in source.notes)
    assert_read_as_transformers_does(folder)
    made = quantize_tiny(source, "int4-gptq", tmp_path / "int4")
    assert {t.dtype for n, t in made.tensors.items() if "norm" in n} == {"BF16"}
    assert any("are read as bfloat16" in warning for warning in made.manifest.warnings)
    pruned = prune(source, PrunePlan(drop_layers=(1,), refit=False), tmp_path / "p", device="cpu")
    assert {info.dtype for info in pruned.tensors.values()} == {"BF16"}


def test_float16_weights_under_a_bf16_configuration(tiny: Tiny) -> None:
    folder = edit(
        tiny(dtype=torch.bfloat16).folder,
        lambda w: w.update({k: v.half() for k, v in w.items()}),
    )
    assert_read_as_transformers_does(folder)


def test_without_a_dtype_it_is_that_of_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(dtype=torch.float16).folder
    edit_json(folder / "config.json", dtype=None, torch_dtype=None)
    source = open_model(folder)
    assert source.dtype == torch.float16
    made = quantize_tiny(source, "fp8", tmp_path / "fp8")
    assert made.dtype == torch.float16
    assert made.config["dtype"] == "float16"


@pytest.mark.parametrize("store", ["safetensors", "F8"])
def test_codes_without_a_word_in_the_configuration_are_refused(
    tiny: Tiny, tmp_path: Path, store: str
) -> None:
    made = quantize_tiny(tiny(dtype=torch.bfloat16), "fp8", tmp_path / "fp8")
    edit_json(made.folder / "config.json", quantization_config=None)
    if store == "F8":
        for path in made.folder.glob("*.safetensors"):
            kept = {n: t for n, t in load_file(path).items() if not n.endswith("_scale")}
            save_file(kept, path)
        index = made.folder / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        names = {n: f for n, f in values["weight_map"].items() if not n.endswith("_scale")}
        index.write_text(json.dumps(values | {"weight_map": names}))
    with pytest.raises(CheckpointError, match="quantiz"):
        open_model(made.folder)


# --- tensors that are missing, left over, renamed or doubled ----------------------------------------


def test_a_stored_head_goes_before_a_tie_that_only_the_configuration_says(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny(tie_word_embeddings=False).folder
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert_read_as_transformers_does(folder)
    source = open_model(folder)
    assert "ties the head to the embedding" in source.notes[0]
    made = quantize_tiny(source, "fp8", tmp_path / "fp8")
    assert HEAD in made.tensors
    assert not geometry_of(made).tied_head
    pruned = prune(source, PrunePlan(drop_layers=(1,), refit=False), tmp_path / "p", device="cpu")
    tokens = torch.arange(32).view(1, -1)
    torch.testing.assert_close(our_logits(pruned, tokens), their_logits(pruned.folder, tokens))


def test_an_equal_head_beside_a_tied_embedding_is_the_embedding(tiny: Tiny) -> None:
    folder = edit(tiny().folder, lambda w: w.update({HEAD: w[EMBEDDING].clone()}))
    source = open_model(folder)
    assert HEAD not in source.tensors
    assert source.notes == ()
    assert_read_as_transformers_does(folder)


def test_a_tied_model_that_stores_only_the_head(tiny: Tiny, tmp_path: Path) -> None:
    folder = edit(tiny().folder, lambda w: w.update({HEAD: w.pop(EMBEDDING)}))
    made = quantize_tiny(open_model(folder), "fp8", tmp_path / "fp8")
    assert EMBEDDING in made.tensors
    tokens = torch.arange(32).view(1, -1)
    same = edit(folder, lambda w: w.update({EMBEDDING: w.pop(HEAD)}))
    torch.testing.assert_close(
        our_logits(made, tokens),
        our_logits(quantize_tiny(open_model(same), "fp8", tmp_path / "again"), tokens),
    )


def test_names_without_model_in_front(tiny: Tiny, tmp_path: Path) -> None:
    whole = tiny()
    tokens = torch.arange(32).view(1, -1)
    expected = our_logits(whole, tokens)

    def shorten(w: dict[str, Tensor]) -> None:
        for name in list(w):
            w[name.removeprefix("model.")] = w.pop(name)

    folder = edit(whole.folder, shorten)
    torch.testing.assert_close(our_logits(folder, tokens), expected)
    assert_read_as_transformers_does(folder)
    assert EMBEDDING in quantize_tiny(open_model(folder), "fp8", tmp_path / "fp8").tensors


def test_biases_that_the_configuration_does_not_call_for_are_refused(tiny: Tiny) -> None:
    names = ("self_attn.o_proj", "self_attn.q_proj", "mlp.down_proj")
    for number, name in enumerate(names):
        folder = edit(
            tiny(name=f"m{number}").folder,
            lambda w, name=name: w.update({f"model.layers.0.{name}.bias": torch.zeros(64)}),  # type: ignore[misc]
        )
        with pytest.raises(CheckpointError, match=rf"{name}.bias.*attention_bias, mlp_bias"):
            open_model(folder)


def test_other_tensors_that_nothing_reads_are_refused(tiny: Tiny) -> None:
    folder = edit(
        tiny().folder, lambda w: w.update({"model.layers.9.input_layernorm.weight": torch.ones(64)})
    )
    with pytest.raises(CheckpointError, match="does not call for: model.layers.9"):
        open_model(folder)


def test_buffers_that_every_loader_makes_are_passed_over(tiny: Tiny) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert (
        name
        not in open_model(edit(tiny().folder, lambda w: w.update({name: torch.ones(8)}))).tensors
    )


def sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    """Split the weights over two shards; returns the index's path and its map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in parts.items():
        save_file({n: tensors[n].clone() for n in members}, folder / shard)
    weight_map = {name: shard for shard, members in parts.items() for name in members}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path, weight_map


def test_of_a_tensor_in_two_shards_the_index_decides(tiny: Tiny) -> None:
    folder = tiny().folder
    tokens = torch.arange(32).view(1, -1)
    expected = our_logits(folder, tokens)
    _, weight_map = sharded(folder)
    name = next(n for n, shard in weight_map.items() if shard == "a.safetensors" and "proj" in n)
    later = load_file(folder / "b.safetensors")
    later[name] = torch.zeros_like(load_file(folder / "a.safetensors")[name])
    save_file(later, folder / "b.safetensors")
    torch.testing.assert_close(our_logits(folder, tokens), expected)


def test_two_sets_of_weights_in_a_folder_are_refused(tiny: Tiny) -> None:
    folder = tiny().folder
    original = (folder / "model.safetensors").read_bytes()
    sharded(folder)
    (folder / "model.safetensors").write_bytes(original)
    with pytest.raises(CheckpointError, match="two sets of weights"):
        open_model(folder)


# --- numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_that_is_no_number_is_named(
    tiny: Tiny, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edit(tiny(dtype=dtype).folder, lambda w: w[name].__setitem__((3, 5), value))
    source = open_model(folder)
    expected = rf"{name}.*holds 1 values that are no numbers .*\[3, 5\]"
    for work in (
        lambda: load_decoder(source, device=CPU),
        lambda: quantize_tiny(source, "fp8", tmp_path / "a"),
        lambda: quantize_tiny(source, "int4-gptq", tmp_path / "b"),
        lambda: prune(
            source, PrunePlan(drop_layers=(0,), refit=False), tmp_path / "c", device="cpu"
        ),
    ):
        with pytest.raises(CheckpointError, match=expected):
            work()
    assert not any((tmp_path / out).exists() for out in "abc")


def test_codes_that_are_no_numbers_are_named(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_tiny(tiny(dtype=torch.bfloat16), "fp8", tmp_path / "fp8")
    name = "model.layers.0.mlp.up_proj.weight"
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())
    path = made.folder / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name].view(torch.uint8)[0, 1] = 0x7F
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"no numbers \(NaN or Inf\), the first at \[0, 1\]"):
        load_decoder(open_model(made.folder), device=CPU)


def test_a_weight_too_large_for_the_models_type_is_named(tiny: Tiny) -> None:
    folder = edit(
        tiny(dtype=torch.float16).folder,
        lambda w: w.update({"model.norm.weight": torch.full((64,), 1e6)}),
    )
    with pytest.raises(CheckpointError, match=r"model.norm.weight .*\(F32, read as float16\)"):
        load_decoder(open_model(folder), device=CPU)


# --- configurations ----------------------------------------------------------------------------------


def test_a_window_in_a_llamas_configuration_means_nothing(tiny: Tiny) -> None:
    folder = tiny().folder
    edit_json(folder / "config.json", sliding_window=8, layer_types=["sliding_attention"] * 4)
    assert_read_as_transformers_does(folder)
    assert "sliding_window=8" in open_model(folder).notes[0]


def test_yarn_reaches_past_the_length_of_training(tiny: Tiny) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 128}  # fmt: skip
    source = tiny("qwen3", max_position_embeddings=128, rope_parameters=rope)
    assert geometry_of(source).max_positions == 512
    check_length(source, 512)
    with pytest.raises(InputError, match="513 tokens are more than the 512"):
        check_length(source, 513)
    assert_read_as_transformers_does(source.folder, length=400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "transformers rejects .*hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 3}, "The second divides the first"),
        ({"head_dim": 15}, "even rotary dimension|heads of size 15"),
        ({"compression_config": {}}, "old layout"),
        ({"dtype": "int8"}, "not a type tinier computes"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantized with 'hqq'"),
        ({"quantization_config": []}, "quantization_config"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_configurations_that_mean_nothing(
    tiny: Tiny, changes: dict[str, object], message: str
) -> None:
    folder = tiny().folder
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_model(folder)


def test_a_quantization_of_null_is_none(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny().folder
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": None}
    (folder / "config.json").write_text(json.dumps(config))
    quantize_tiny(open_model(folder), "fp8", tmp_path / "fp8")


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "257"}', "[]", "{", '{"eos_token_id": [true]}']
)
def test_generation_defaults_that_are_none(tiny: Tiny, content: str) -> None:
    source = tiny()
    (source.folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        stop_token_ids(source, load_tokenizer(source))


def test_what_transformers_cannot_load_is_said_in_the_plan(tiny: Tiny) -> None:
    source = tiny(dtype=torch.float16)
    zeros = plan_quantize(source, QuantizePlan(preset="int4", group_size=32, symmetric=False))
    assert "zero points" in zeros.warnings[0]
    plan = QuantizePlan(preset="nvfp4", windows=4, length=64)
    assert any("float16 model" in w for w in plan_quantize(source, plan, DOCUMENTS).warnings)


# --- tokenizers --------------------------------------------------------------------------------------


def with_special(folder: Path, single: str) -> Tokenizer:
    """The folder's tokenizer with another template for a single text."""
    from tokenizers.processors import TemplateProcessing

    inner = AutoTokenizer.from_pretrained(folder)
    inner.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<bos>", 256), ("<eos>", 257)]
    )
    return Tokenizer(inner, 264)


@pytest.mark.parametrize(("single", "prefix"), [("<bos> $A <eos>", (256,)), ("$A <eos>", ())])
def test_a_tokenizer_that_appends_eos_never_does(
    tiny: Tiny, single: str, prefix: tuple[int, ...]
) -> None:
    tokenizer = with_special(tiny().folder, single)
    assert tokenizer.prefix == prefix
    assert tokenizer.encode("ab") == [*prefix, *tokenizer.encode("ab", special=False)]
    assert 257 not in token_windows(tokenizer, ["abc " * 40], length=8)


def test_tokens_past_the_embedding_are_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny().folder
    inner = AutoTokenizer.from_pretrained(folder)
    inner.add_tokens(["<a>", "<b>", "<ticket>"])  # ids 262 to 264 beside an embedding of 264
    inner.save_pretrained(folder)
    source = open_model(folder)
    text = ["see <ticket> please. " * 60]
    with pytest.raises(TextError, match=r"token 264 \('<ticket>'\).*knows 264 tokens"):
        token_windows(load_tokenizer(source), text, length=16)
    with pytest.raises(TextError, match="<ticket>"):
        plan_quantize(source, QuantizePlan(preset="int4-gptq", group_size=32, length=64), text)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda p: edit_json(p, model={"type": "BPE9"}),
        lambda p: p.write_text("{"),
        lambda p: p.write_bytes(b"\xff\xfe"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(tiny: Tiny, break_it: Callable[[Path], object]) -> None:
    source = tiny()
    break_it(source.folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("template", "told"),
    [("{{ raise_exception('no system role') }}", "no system role"), ("{{ 1 / 0 }}", "ZeroDivision"),
     ("{% for %}", "TemplateSyntaxError")],
)  # fmt: skip
def test_what_a_template_raises(tiny: Tiny, template: str, told: str) -> None:
    source = tiny()
    (source.folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(source)
    with pytest.raises(TextError, match=f"chat template refuses this conversation: {told}"):
        tokenizer.chat([{"role": "user", "content": "hi"}], opens_reply=True)


def test_equal_sizes_do_not_make_one_vocabulary(tiny: Tiny) -> None:
    one, other = tiny(), tiny(name="other")
    path = other.folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    names = {token: name for name, token in vocabulary.items()}
    vocabulary[names[65]], vocabulary[names[66]] = 66, 65
    path.write_text(json.dumps(values))
    assert check_same_tokens(one, one) == 264
    with pytest.raises(InputError, match="different tokenizers: token 65"):
        check_same_tokens(one, other)


def test_padded_vocabularies_are_compared_in_what_they_share(tiny: Tiny) -> None:
    one, wide = tiny(), tiny(name="wide", vocab_size=320)
    assert check_same_tokens(one, wide) == check_same_tokens(wide, one) == 264
    tokens = torch.randint(0, 264, (2, 64), generator=torch.Generator().manual_seed(0))
    base, own = (
        torch.log_softmax(their_logits(c.folder, tokens)[:, :-1, :264].double(), dim=-1)
        for c in (one, wide)
    )
    found = evaluate_windows(
        load_decoder(wide, device=CPU),
        tokens,
        reference_states(load_decoder(one, device=CPU), tokens),
    )
    assert found.kl == pytest.approx((base.exp() * (base - own)).sum(-1).mean().item(), rel=1e-4)
    assert found.top1_agreement == (base.argmax(-1) == own.argmax(-1)).double().mean().item()


# --- texts -------------------------------------------------------------------------------------------


def test_line_separators_inside_json_are_no_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["one\u2028two", "three\u0085four", "five\x0bsix"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert load_documents(str(path)) == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = '{"text": "words"}' if name.endswith("jsonl") else "words"
    path.write_text(text, encoding="utf-8-sig")
    assert load_documents(str(path)) == ["words"]


def test_a_byte_order_mark_in_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8-sig")
    assert load_calibration(str(path)) == [messages]


@pytest.mark.parametrize(
    "content",
    [
        '{"messages": [{"role": "user", "content": "caf\xe9"}]}\n'.encode("latin-1"),
        b'{"text": "half a pair \\ud83d words"}\n',
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n',
    ],
)
def test_text_that_is_no_unicode_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(TextError, match=r"c\.jsonl.*(UTF-8|half a surrogate)"):
        load_calibration(str(path))


def test_a_lone_surrogate_that_reaches_the_tokenizer(tiny: Tiny) -> None:
    with pytest.raises(TextError, match="half a surrogate pair at character 2"):
        load_tokenizer(tiny()).encode("ab\ud83dcd")


def test_a_parquet_column_of_numbers(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "e.parquet")
    with pytest.raises(TextError, match='"text" of int64'):
        load_documents(str(tmp_path / "e.parquet"))


def test_fewer_windows_than_asked_are_said(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_tiny(
        tiny(), "int4-gptq", tmp_path / "int4", windows=500, length=64, group_size=32
    )
    assert any("of the 500 windows" in warning for warning in made.manifest.warnings)
    short = plan_quantize(
        tiny(name="b"),
        QuantizePlan(preset="int4-gptq", group_size=32, length=32, windows=3),
        [DOCUMENTS[0] * 2],
    )
    assert any("fewer than the 128 input columns" in warning for warning in short.warnings)


class Counted:
    """A tokenizer that notes how much text it was given."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.characters = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def __call__(self, text: str, **options: object) -> object:
        self.characters += len(text)
        return self._inner(text, **options)  # type: ignore[operator]


@pytest.mark.network
def test_a_long_text_is_tokenized_as_far_as_it_is_wanted(smollm2: Checkpoint) -> None:
    inner = Counted(load_tokenizer(smollm2).inner)
    text = "".join(
        f"The {i}th brown fox jumps over {i * 7} dogs, and sleeps.\n\n" for i in range(20_000)
    )
    few = token_windows(Tokenizer(inner), [text], length=64, count=8)
    assert inner.characters < 20_000
    whole = token_windows(Tokenizer(inner), [text], length=64)
    assert torch.equal(few, whole[:8])


# --- GGUF --------------------------------------------------------------------------------------------


def write_gguf(source: Checkpoint, path: Path, change: Callable[[gguf.GGUFWriter], object]) -> None:
    """A tiny Llama as a GGUF file, with what `change` adds."""
    g = geometry_of(source)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(g.hidden)
    writer.add_block_count(g.layers)
    writer.add_feed_forward_length(g.intermediate)
    writer.add_head_count(g.heads)
    writer.add_head_count_kv(g.kv_heads)
    writer.add_layer_norm_rms_eps(g.norm_eps)
    writer.add_rope_dimension_count(g.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(g.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    values = json.loads((source.folder / "tokenizer.json").read_text())["model"]
    vocabulary = values["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens += [f"<{i}>" for i in range(g.vocab - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<") and len(t) > 1 else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in values["merges"]])
    change(writer)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    edges = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight",
             HEAD: "output.weight"}  # fmt: skip
    with source.reader() as read:
        for name in source.tensors:
            value = read(name).float().numpy()
            parts = name.split(".", 3)
            stored = edges.get(name)
            if stored is None:
                inside = parts[3].removesuffix(".weight")
                stored = f"blk.{parts[2]}.{names[inside]}.weight"
                heads = {"self_attn.q_proj": g.heads, "self_attn.k_proj": g.kv_heads}.get(inside)
                if heads:  # llama.cpp turns neighbours against each other, not halves
                    shape = (heads, 2, g.head_dim // 2, g.hidden)
                    value = value.reshape(shape).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(stored, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINIER_CACHE", str(tmp_path / "cache"))


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("change", "rope"),
    [
        (yarn, {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
                "original_max_position_embeddings": 128}),
        (linear, {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}),
        (lambda w: None, {"rope_type": "default", "rope_theta": 10_000.0}),
    ],
)  # fmt: skip
def test_rope_scaling_of_a_gguf_file_is_kept(
    tiny: Tiny, tmp_path: Path, change: Callable[[gguf.GGUFWriter], object], rope: dict[str, object]
) -> None:
    source = tiny(tie_word_embeddings=False, max_position_embeddings=512, rope_parameters=rope)
    write_gguf(source, tmp_path / "m.GGUF", change)  # in capitals, too
    made = open_model(tmp_path / "m.GGUF")
    tokens = torch.randint(0, 256, (1, 400), generator=torch.Generator().manual_seed(0))
    ours, expected = our_logits(made, tokens), our_logits(source, tokens)
    # weights are bf16 now
    assert torch.cosine_similarity(ours, expected, dim=-1).mean() > 0.995
    kept = json.loads((made.folder / "config.json").read_text())["rope_parameters"]
    assert {key: kept[key] for key in rope} == rope


@pytest.mark.usefixtures("own_cache")
def test_the_frequencies_of_llama_3_in_a_gguf_file_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(tie_word_embeddings=False, rope_parameters=LLAMA3)
    from tinier.checkpoint.gguf_file import llama3_factors

    factors = llama3_factors(16, 10_000.0, 8.0, 1.0, 4.0, 8192)
    write_gguf(
        source, tmp_path / "m.gguf", lambda w: w.add_tensor("rope_freqs.weight", factors.numpy())
    )
    made = open_model(tmp_path / "m.gguf")
    kept = json.loads((made.folder / "config.json").read_text())["rope_parameters"]
    assert {key: kept[key] for key in LLAMA3} == LLAMA3


@pytest.mark.usefixtures("own_cache")
def test_frequencies_that_are_nobodys_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    odd = np.array([1, 1, 2, 3, 5, 8, 13, 21], dtype=np.float32)
    write_gguf(
        tiny(tie_word_embeddings=False), tmp_path / "m.gguf",
        lambda w: w.add_tensor("rope_freqs.weight", odd),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="rope_freqs"):
        resolve(str(tmp_path / "m.gguf"))


# --- what goes along ---------------------------------------------------------------------------------


def test_templates_and_tokenizers_of_other_names_go_along(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    (source.folder / "additional_chat_templates").mkdir()
    (source.folder / "additional_chat_templates" / "tools.jinja").write_text("{{ 1 }}")
    (source.folder / "tekken.json").write_text("{}")
    made = quantize_tiny(source, "fp8", tmp_path / "fp8")
    assert (made.folder / "additional_chat_templates" / "tools.jinja").read_text() == "{{ 1 }}"
    assert (made.folder / "tekken.json").read_text() == "{}"


def test_the_index_counts_tensors(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize_tiny(tiny(), "fp8", tmp_path / "fp8")
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == open_checkpoint(made.folder).weight_bytes
