"""Fork the attention: decode with a sliding-window cache of your own: python examples/own_attention.py

The model asks for one function `attend(q, k, v)` per layer and knows no cache. So a new cache needs no change to it.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from generate import load  # noqa: E402
from kernels import causal_attention  # noqa: E402
from model import Llama  # noqa: E402


class SlidingWindow:
    """The last `window` tokens of one layer. q [1, n_heads, S, head_dim], k and v [1, n_kv_heads, S, head_dim]."""

    def __init__(self, window: int):
        self.window = window

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k, self.v = k[:, :, -self.window :], v[:, :, -self.window :]
        return causal_attention(q, k, v)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k = torch.cat((self.k, k), dim=2)[:, :, -self.window :]
        self.v = torch.cat((self.v, v), dim=2)[:, :, -self.window :]
        return scaled_dot_product_attention(q, self.k, self.v, enable_gqa=True)


@torch.inference_mode()
def decode_greedily(model: Llama, ids: list[int], window: int, n_tokens: int) -> list[int]:
    """The next `n_tokens` token ids after the prompt `ids`."""
    caches = [SlidingWindow(window) for _ in model.layers]
    hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], [cache.prefill for cache in caches])
    tokens = [model.logits(hidden[:, -1]).argmax().item()]
    for position in range(len(ids), len(ids) + n_tokens - 1):
        hidden = model(torch.tensor([tokens[-1:]]), torch.tensor([[position]]), [cache.decode for cache in caches])
        tokens.append(model.logits(hidden[:, -1]).argmax().item())
    return tokens


if __name__ == "__main__":
    model, tokenizer = load("checkpoints/mini", dtype="float32")
    ids = tokenizer.encode((ROOT / "checkpoints" / "mini" / "demo.txt").read_text())
    for window in (512, 64):  # 512 holds the whole run; 64 has lost the questions
        print(f"window {window}: {tokenizer.decode(decode_greedily(model, ids, window, 60))!r}")
