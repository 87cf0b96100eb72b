"""Turn a GGUF file of a model into a Hugging Face folder with bfloat16 weights, through transformers' own reader."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

GEMMA_BOS = {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text("utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not None or key not in changes}
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False), "utf-8")


def convert(gguf: Path, folder: Path, architecture: str) -> None:
    """Write configuration, tokenizer and dequantized weights of ``gguf`` into ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=str(gguf), dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    edit_json(
        folder / "config.json",
        architectures=[architecture],
        dtype="bfloat16",
        _model_name_or_path=None,
        quantization_config=None,
    )


def restore_gemma_bos(folder: Path) -> None:
    """Put ``<bos>`` before each text again: the GGUF loses that rule, and Gemma babbles without it."""
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    bos, bos_second = ({"SpecialToken": {"id": "<bos>", "type_id": i}} for i in range(2))
    template = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos_second, second],
        "special_tokens": {"<bos>": GEMMA_BOS},
    }
    edit_json(folder / "tokenizer.json", post_processor=template)
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        add_bos_token=True,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=32768,
    )
