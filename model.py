"""One Llama in one page, as in gpt-fast. This file knows no cache, no policy and no compiler.

The caller hands the model one function `attend(q, k, v)` per layer. Training passes plain causal attention; prefill and
decode pass those of `cache.py`, and a decode step adds what its layers must know of it: `attend(q, k, v, *step)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a Llama or Mistral checkpoint, or of the part of it that one rank holds."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int  # n_heads: MHA, 1: MQA, between: GQA
    head_dim: int
    norm_eps: float = 1e-5
    max_positions: int = 2048
    sliding_window: int | None = None  # not implemented: longer runs are refused
    rope_theta: float = 10000.0
    rope_scale: Callable[[Tensor], Tensor] | None = None  # for long contexts: hf/checkpoint.py, ROPE_SCALINGS
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    n_ranks: int = 1  # processes that share out the model: heads and intermediate_size are those of this one
    rank: int = 0  # which of them this is

    def for_rank(self, rank: int, n_ranks: int) -> "ModelConfig":
        """One rank's part of a whole model. Raises ValueError where heads or channels cannot be shared out evenly.

        Llama-3-70B on 8 ranks: 8 of 64 query heads, 1 of 8 KV heads and 3,584 of 28,672 channels of each MLP.
        """
        most = math.gcd(self.n_kv_heads, self.intermediate_size)
        if most % n_ranks:
            fits = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
            have = f"{self.n_kv_heads} KV heads and {self.intermediate_size} channels of the MLP"
            raise ValueError(f"{have} cannot be shared out evenly to {n_ranks} ranks: start one of {fits}")
        heads = {"n_heads": self.n_heads // n_ranks, "n_kv_heads": self.n_kv_heads // n_ranks}
        middle = self.intermediate_size // n_ranks
        return replace(self, **heads, intermediate_size=middle, rank=rank, n_ranks=n_ranks)

    @property
    def head_rows(self) -> int:
        """Tokens whose logits this rank computes: its share, or all where they cannot be shared out evenly."""
        return self.vocab_size if self.vocab_size % self.n_ranks else self.vocab_size // self.n_ranks

    @property
    def all_kv_heads(self) -> int:
        """KV heads of a layer, those of the other ranks too."""
        return self.n_kv_heads * self.n_ranks

    def context_limit(self) -> tuple[int, str]:
        """The longest supported sequence, and the field of the config that sets it."""
        if self.sliding_window and self.sliding_window < self.max_positions:
            return self.sliding_window, "tokens of sliding window"
        return self.max_positions, "positions"


class Llama(nn.Module):
    """Turns token ids into hidden states; `logits` turns the hidden states you need into scores over the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        if not table.is_meta:  # drawing random numbers on the meta device would import the compiler, which takes 2 s
            self.embed.reset_parameters()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.head_rows, bias=False)
        if config.tie_embeddings:
            self.tie_head()
        # Stays float32 whatever dtype the weights have: in bf16, far positions would be rounded to wrong angles.
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)

    def tie_head(self) -> None:
        """Make the output head this rank's rows of the embedding, in the same memory."""
        table, n = self.embed.weight, self.config.head_rows
        whole = n == self.config.vocab_size
        self.head.weight = table if whole else nn.Parameter(table.detach()[self.config.rank * n :][:n])

    def forward(self, tokens: Tensor, positions: Tensor, attends=None, step=()) -> Tensor:
        """tokens, positions [B, S] -> hidden states [B, S, hidden]. attends: one function per layer; step: what each of
        them gets beside q, k and v."""
        x = self.embed(tokens)
        cos, sin = rope_table(self.inv_freq, positions, x.dtype)
        for layer, attend in zip(self.layers, attends or [kernels.causal_attention] * len(self.layers), strict=True):
            x = layer(x, cos, sin, attend, *step)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab] in float32."""
        logits = self.head(hidden)
        if logits.shape[-1] < self.config.vocab_size:
            logits = kernels.gather_over_ranks(logits, self.config.n_ranks, -1)
        return logits.float()


def compiled_once(forward):
    """Compile `forward` once for all layers whose weights and caches have the same shapes, not once per layer.

    The compiler compares each layer's arguments with those of the first layer. That is quick for tensors, modules and
    numbers. With a tuple among them, it would take a quarter of the time that each further layer takes to compile.
    """
    region = torch.compiler.nested_compile_region
    try:
        return region(forward, max_reuse_entries=1000)  # sets of shapes: in a pyramid each layer has its own
    except TypeError:  # torch 2.11 has no limit
        return region(forward)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    @compiled_once
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend, *step) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, attend, *step)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.widths = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        # One matrix for q, k and v: one long read of memory is faster than three short ones.
        self.wqkv = Linear(config.hidden_size, sum(self.widths), bias=config.attention_bias)
        self.wo = SummedLinear(config, self.widths[0], config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend, *step) -> Tensor:
        q, k, v = (self.split_heads(t) for t in self.wqkv(x).split(self.widths, dim=-1))
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, *step)  # [B, n_heads, S, head_dim]
        return self.wo(y.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:  # [B, S, n * head_dim] -> [B, n, S, head_dim]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.w_down = SummedLinear(config, config.intermediate_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_gate_up(x).chunk(2, dim=-1)
        return self.w_down(F.silu(gate) * up)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class SummedLinear(Linear):
    """Back to the hidden size. A rank has some of the input channels, so the sum of all ranks is the product."""

    def __init__(self, config: ModelConfig, width: int, bias: bool):
        super().__init__(width, config.hidden_size, bias)
        self.n_ranks = config.n_ranks
        self.adds_bias = config.rank == 0  # once, not once for each rank

    def forward(self, x: Tensor) -> Tensor:
        y = kernels.linear(x, self.weight, self.bias if self.adds_bias else None)
        return kernels.sum_over_ranks(y, self.n_ranks)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Hugging Face's layout: channel i turns together with channel i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def rope_table(inv_freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions [B, S] -> cos, sin [B, 1, S, head_dim]. Nothing is stored, so no table limits the length."""
    angles = positions[:, None, :, None].float() * inv_freq  # [B, 1, S, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """[head_dim / 2] float32. It is made on the CPU even where the weights are on the meta device."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    return config.rope_scale(inv_freq) if config.rope_scale else inv_freq
