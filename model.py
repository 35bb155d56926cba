"""One Llama in one page, gpt-fast's way: no cache, no policy, no compile in here.

The model is handed one `attend(q, k, v)` function per layer. Training passes plain causal attention,
prefill and decode pass methods of `cache.py`; the model cannot tell the difference.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a Llama or Mistral checkpoint. `rope_scaling` is the Hugging Face dict, or None."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int  # n_heads: MHA, 1: MQA, between: GQA
    head_dim: int
    norm_eps: float = 1e-5
    max_positions: int = 2048
    sliding_window: int | None = None  # not implemented: only runs shorter than it are right
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


class Llama(nn.Module):
    """Token ids in, hidden states out; `logits` turns the ones you need into scores over the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        # Stays float32 whatever the weights are: bf16 frequencies would misplace far tokens.
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, attends=None) -> Tensor:
        """tokens, positions [B, S] -> hidden states [B, S, hidden]; `attends` holds one function per layer."""
        x = self.embed(tokens)
        rope = rope_table(self.inv_freq, positions, x.dtype)
        for layer, attend in zip(self.layers, attends or [kernels.causal_attention] * len(self.layers), strict=True):
            x = layer(x, rope, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab] in float32."""
        return self.head(hidden).float()


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, attend)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.widths = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        # One matrix for q, k and v: three short reads of memory become one long one.
        self.wqkv = Linear(config.hidden_size, sum(self.widths), bias=config.attention_bias)
        self.wo = Linear(self.widths[0], config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend) -> Tensor:
        q, k, v = (self.split_heads(t) for t in self.wqkv(x).split(self.widths, dim=-1))
        y = attend(rotate(q, rope), rotate(k, rope), v)  # [B, n_heads, S, head_dim]
        return self.wo(y.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:  # [B, S, n * head_dim] -> [B, n, S, head_dim]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.w_down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_gate_up(x).chunk(2, dim=-1)
        return self.w_down(F.silu(gate) * up)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding, Hugging Face's layout: channel i pairs with channel i + head_dim / 2."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def rope_table(inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions [B, S] -> cos, sin [B, 1, S, head_dim]. Computed, not stored: no table limits the length."""
    angles = positions[:, None, :, None].float() * inv_freq  # [B, 1, S, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """[head_dim / 2] float32 on the CPU, also under a meta-device context."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling or {}
    scale, _ = ROPE_SCALINGS[scaling.get("rope_type", "default")]
    return scale(inv_freq, scaling)


def scale_linear(inv_freq: Tensor, scaling: dict) -> Tensor:
    return inv_freq / scaling["factor"]


def scale_llama3(inv_freq: Tensor, scaling: dict) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # within the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]


# rope_type of the config -> what it does, and the numbers that it needs
ROPE_SCALINGS = {
    "default": (lambda inv_freq, scaling: inv_freq, ()),
    "linear": (scale_linear, ("factor",)),
    "llama3": (
        scale_llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}
