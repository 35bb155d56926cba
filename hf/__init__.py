"""Hugging Face's checkpoint format: config.json, safetensors, tokenizers and chat templates.

`generate.load` calls `load_checkpoint`. A fork that brings its own weights and tokenizer does not need this folder.
"""

from hf.checkpoint import find_checkpoint, find_device, find_dtype, load_model, parse_config, read_json, refuse_adapter
from hf.tokenizer import load_tokenizer


def load_checkpoint(name: str, device: str, dtype: str, rank: int = 0, n_ranks: int = 1):
    """Directory or hub id -> (Llama, Tokenizer). Raises ValueError, in one line, for what cannot be run.

    Of several ranks each reads its own part of the weights, and nothing else of them.
    """
    where = find_device(device)
    if dtype != "auto":
        find_dtype(dtype, {})  # refuses now what would be refused after a download
    folder = find_checkpoint(name)
    refuse_adapter(folder)
    raw = read_json(folder / "config.json")
    config = parse_config(raw, folder / "config.json")
    tokenizer = load_tokenizer(folder, raw, config.vocab_size)
    return load_model(folder, config, where, find_dtype(dtype, raw), rank, n_ranks), tokenizer
