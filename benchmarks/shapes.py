"""Llama shapes to fill with random weights, and random prompts: speed needs no trained model."""

import torch

from generate import Row, find_dtype
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
    config = SHAPES[shape]
    with torch.device("meta"):  # shapes only
        model = Llama(config)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    weights = {name: torch.empty(shape, dtype=find_dtype(dtype, {}), device=device) for name, shape in shapes.items()}
    if config.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    for weight in weights.values():
        weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)


def random_rows(config: ModelConfig, batch: int, tokens: int) -> list[Row]:
    prompts = torch.randint(config.vocab_size, (batch, tokens)).tolist()
    return [Row(i, ids, stream=None) for i, ids in enumerate(prompts)]
