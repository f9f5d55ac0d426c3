"""Small original networks and tokenizers with random weights."""

import json
from pathlib import Path

from mlx_snapgen.networks.text_encoders.clip import byte_symbols


def write_byte_tokenizer(folder: Path) -> None:
    """Hugging Face's files of a tokenizer whose 260 tokens are marks and bytes."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {symbol: i for i, symbol in enumerate([*marks, *byte_symbols()])}
    added = [
        {
            "id": i,
            "content": mark,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, mark in enumerate(marks)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": True},
        "post_processor": None,
        "decoder": level | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {f"{mark[1:-1]}_token": mark for mark in marks}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
