"""Llama models with random weights, of any shape, with a tokenizer whose ids are bytes: nothing to download.

``python -m models.llama DIR --layers 16 --hidden 2048 --intermediate 8192 --heads 32 --kv-heads 8 --no-weights`` writes
a Llama-3.2-1B to use with ``--load-format dummy``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

BOS, EOS, PAD = 256, 257, 258
CHAT = (
    "{% for m in messages %}<{{m.role}}>{{m.content}}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCABULARY = 320  # the 256 bytes, three special tokens, rounded up to a multiple of 64


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama. The default has four KV heads, so that two and four ranks share it."""

    layers: int = 4
    hidden: int = 256
    intermediate: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64


def config(shape: Shape) -> dict[str, object]:
    """Return the Hugging Face configuration of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCABULARY,
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip


def byte_alphabet() -> dict[str, int]:
    """Map GPT-2's printable stand-in for each byte to the byte: printable bytes stand for themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}


def tokenizer() -> dict[str, object]:
    """Return ``tokenizer.json``: byte-level BPE without merges, ``<s>`` before each text."""
    special = {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in special.items()],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing", "single": [start, first], "pair": [start, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": byte_alphabet() | special, "merges": [],
        },
    }  # fmt: skip


def write(folder: Path, shape: Shape, seed: int = 0, weights: bool = True) -> None:
    """Write a model into ``folder``; the same shape and seed give the same bytes."""
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "model_max_length": 131072, "clean_up_tokenization_spaces": False, "chat_template": CHAT,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "config.json": config(shape), "generation_config.json": special,
        "tokenizer.json": tokenizer(), "tokenizer_config.json": settings,
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
    if weights:
        write_weights(folder / "model.safetensors", shape, seed)


def write_weights(path: Path, shape: Shape, seed: int) -> None:
    """Write random weights: activations keep their size from layer to layer, and attention looks at few tokens.

    So the next token depends on the whole text; with evenly spread attention it would depend on the last one alone.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(torch.bfloat16)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return random(rows, columns, columns**-0.5)

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, shape.hidden, 1.0),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(VOCABULARY, shape.hidden),
    }
    for i in range(shape.layers):
        layer = {
            "self_attn.q_proj": random(q, shape.hidden, 3 * shape.hidden**-0.5),
            "self_attn.k_proj": matrix(kv, shape.hidden),
            "self_attn.v_proj": matrix(kv, shape.hidden),
            "self_attn.o_proj": matrix(shape.hidden, q),
            "mlp.gate_proj": matrix(shape.intermediate, shape.hidden),
            "mlp.up_proj": matrix(shape.intermediate, shape.hidden),
            "mlp.down_proj": matrix(shape.hidden, shape.intermediate),
            "input_layernorm": ones.clone(),
            "post_attention_layernorm": ones.clone(),
        }
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    """Write a model of the shape that the flags give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-weights", dest="weights", action="store_false")
    options = vars(parser.parse_args())
    folder, seed, weights = (options.pop(name) for name in ("folder", "seed", "weights"))
    write(folder, Shape(**options), seed, weights)


if __name__ == "__main__":
    main()
