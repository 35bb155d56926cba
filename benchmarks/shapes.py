"""Llama shapes to fill with random weights, and random prompts: speed needs no trained model."""

import torch

from hf.checkpoint import find_dtype
from model import Llama, ModelConfig

LONGEST = 131072  # positions; no table of them is stored, so they cost nothing
SHAPES = {  # vocabulary, hidden, intermediate, layers, query heads, KV heads, head_dim
    "mini": ModelConfig(301, 128, 384, 4, 4, 2, 32, max_positions=LONGEST),
    "cpu": ModelConfig(4096, 512, 1408, 8, 8, 8, 64, max_positions=LONGEST),
    "cpu-gqa": ModelConfig(4096, 512, 1408, 8, 8, 2, 64, max_positions=LONGEST),
    "1b": ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, max_positions=LONGEST, tie_embeddings=True),
    "8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, max_positions=LONGEST),
}


def random_model(shape: str, device: torch.device, dtype: str) -> Llama:
    """A model of this shape with torch's initial weights, made in `dtype` on the device: no memory is taken twice."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(find_dtype(dtype, {}))
    try:
        with torch.device(device):
            model = Llama(SHAPES[shape])
    finally:
        torch.set_default_dtype(default)
    return model.to(device).eval().requires_grad_(False)


def random_prompts(config: ModelConfig, batch: int, tokens: int) -> list[list[int]]:
    return torch.randint(config.vocab_size, (batch, tokens)).tolist()
