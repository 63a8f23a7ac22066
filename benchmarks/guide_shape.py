"""The chain of recipes/guide.yaml on Llama-3.2-3B's shape with random weights, on one GPU.

Llama-3.2-3B's weights are gated; its shape is not. Speed and memory are those of the shape; quality
figures of random weights mean nothing and are left out of the summary. Distillation runs few steps.

    python benchmarks/guide_shape.py --out DIR [--steps 2] [--concurrency 1 64] [--repeats 5]
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import tinier
from tinier import progress
from tinier.checkpoint import Checkpoint
from tinier.device import release_memory
from tinier.families import open_model
from tinier.recipe import load_recipe, run_recipe
from tinier.report import markdown_table, write_report

ROOT = Path(__file__).parent.parent
SHAPE = LlamaConfig(
    vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
    num_attention_heads=24, num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072,
    rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=128_000, eos_token_id=128_001,
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
)  # fmt: skip


def write_random_llama(folder: Path) -> None:
    """A bf16 checkpoint of the shape, weights drawn on the GPU, with a tokenizer of bytes."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(SHAPE)
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def random_llama(work: Path, layers: int) -> Checkpoint:
    """`write_random_llama` of so many layers in `work`, made unless it is there; opened."""
    base = work / f"llama-3.2-3b-random-{layers}"
    if not base.exists():
        SHAPE.num_hidden_layers = layers
        write_random_llama(base)
    release_memory()
    return open_model(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--output-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    progress.enable()
    base = arguments.out / "llama-3.2-3b-random"
    if not base.exists():
        write_random_llama(base)
    recipe = yaml.safe_load((ROOT / "recipes" / "guide.yaml").read_text())
    recipe |= {"base": str(base), "text": "builtin"}
    for variant in recipe["variants"].values():
        if "distill" in variant:
            variant["distill"] |= {"steps": arguments.steps, "warmup_steps": 1}
        if "prune" in variant and "keep_layers" in variant["prune"]:
            variant["prune"]["windows"] = 8
    recipe["measure"]["quality"]["windows"] = 8
    del recipe["measure"]["mmlu"]
    recipe["measure"]["speed"] |= {
        "concurrency": arguments.concurrency,
        "output_length": arguments.output_length,
        "repeats": arguments.repeats,
    }
    path = arguments.out / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    results = run_recipe(load_recipe(path), arguments.out / "run", command="guide_shape.py")
    write_report(results, arguments.out / "run")
    print(markdown_table(results))
    for name in ("last-7-distilled", "best-7-distilled"):
        manifest = json.loads((arguments.out / "run/variants" / name / "tinier.json").read_text())
        tokens = arguments.steps * 64 * 2048
        print(
            f"{name}: {manifest['seconds']:.0f} s in all for {tokens} tokens, peak GPU memory "
            f"{manifest['peak_memory_bytes'] / 1e9:.1f} GB"
        )
    print(f"tinier {tinier.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
