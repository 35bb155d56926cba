"""--trace: which token lies in which slot, step by step."""

from dataclasses import asdict

import numpy as np
import torch

from cache import Cache
from cli.output import replace_file
from generate import Options, size_of
from model import Llama
from scope import FORMATS


class Trace:
    """The positions in all slots after prefill and after every step, of one batch, at most 1 GiB."""

    def __init__(self, path: str, options: Options, model: Llama, prompts: list[list[int]]):
        if len(prompts) > options.batch_size:
            raise ValueError(f"--trace records one batch: {len(prompts)} prompts need --batch-size {len(prompts)}")
        with torch.device("meta"):  # shapes only
            cache = Cache(
                model.config, *options.rules(), size_of(prompts, options), torch.float32, FORMATS[options.kv_format]
            )
        size = cache.positions().nbytes * options.max_new_tokens
        if size > 2**30:
            raise ValueError(f"--trace would take {size / 2**30:.1f} GiB, more than 1: lower --max-new-tokens")
        self.path = path
        self.options = options
        self.prompt_slots = cache.slots[0]
        self.frames: list[np.ndarray] = []

    def __call__(self, cache: Cache) -> None:
        self.frames.append(cache.positions().cpu().numpy())

    def save(self) -> None:
        slots = self.prompt_slots if len(set(self.prompt_slots)) > 1 else self.prompt_slots[0]
        arrays = {"pos": np.stack(self.frames), "prompt_slots": slots} | asdict(self.options)
        replace_file(self.path, lambda file: np.savez_compressed(file, **arrays))
